"""Shards: photos in WebDataset tars with an index beside them, read at random or one after the other."""
