"""What a GPU should prove in the few minutes that one is there: `bench/gpu.py` runs the steps of `steps`, in order."""
