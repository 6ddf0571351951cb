"""Where photos lie: tar shards on disk and files on servers."""
