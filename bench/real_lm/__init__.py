"""Text eviction on real language models: weights from the package registry, natural text, long dialogues."""
