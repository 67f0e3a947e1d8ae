"""The CUDA library: its check on a GPU, and floors."""
