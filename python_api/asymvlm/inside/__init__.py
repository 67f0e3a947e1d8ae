"""Pruning between the layers of the decoder: what drives a method of `asymvlm.methods.inside`."""
