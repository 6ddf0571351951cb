"""Storage of photos: tar shards on disk and files on servers."""
