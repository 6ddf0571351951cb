"""Photos on a server: prefetched shard by shard into a bounded cache on disk."""
