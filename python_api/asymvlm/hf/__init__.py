"""What depends on the installed transformers version."""
