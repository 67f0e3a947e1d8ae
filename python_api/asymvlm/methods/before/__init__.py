"""Methods that score vision tokens before the decoder runs."""
