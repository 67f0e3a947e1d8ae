"""The small VLM on public images and questions that nobody here made: ``python -m bench.public``."""
