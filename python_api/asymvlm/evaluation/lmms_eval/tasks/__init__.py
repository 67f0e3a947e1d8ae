"""Task files for lmms-eval; their functions are in the modules beside them."""
