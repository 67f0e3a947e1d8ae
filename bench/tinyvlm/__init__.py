"""A small document-reading VLM trained from scratch, so that claims of quality rest on a model that reads.

``make_pages`` and ``ask`` give pages and questions, ``python -m bench.tinyvlm.train --out DIR`` trains the model, and
``bench/tinyvlm/checkpoint`` is what that command made.
"""
