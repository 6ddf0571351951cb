"""Shards: photos in WebDataset tars with an index, for random or sequential reads."""
