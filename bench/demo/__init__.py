"""``python -m bench.demo``: pruning at work on a document page, without network."""
