"""Data sets of photos: rows of a manifest as batches for the detector."""
