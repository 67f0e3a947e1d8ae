"""What pruning and eviction cost in answers, on the small VLM of `bench/tinyvlm`: ``python -m bench.quality``."""
