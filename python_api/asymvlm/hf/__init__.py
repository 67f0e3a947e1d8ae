"""All that depends on how transformers is written: argument names, outputs, masks, attention functions, cache layers.

Outside of this folder, of the model families (`asymvlm.models`) and of the applications nothing imports transformers or
spells one of its argument names, so that a new release is met here; a test holds that.
"""
