"""Data sets that turn the rows of a manifest into batches for the detector."""
