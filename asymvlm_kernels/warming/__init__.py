"""Compiling before the first call: `warm` is the public function, and starts `worker` in a process of its own.

There `calls` makes the calls that are to come on CPU tensors, `recording` keeps each launch from happening and notes
what Triton would have compiled for it, and `compiling` compiles that, many at a time, into Triton's cache. `cache`
looks at what lies there, and `inside` is all that knows how Triton does it.
"""
