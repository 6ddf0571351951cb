"""Photos on a server: fetched shard by shard into a bounded cache on disk, ahead of their being read."""
