"""`prune_sequence`: score, gap, budget, selection and gather as one call. Start at `prune`, then `specification`.

The path of a GPU: `two_launches` allocates and launches; `score_item` (with `roles`, `parts`, `product`, `keys` and
`select_item`, or `select_by_scores` and `spread_item`) is a program of the first, `gather_item` one of the second.
`known_length` is both as one op.
"""

from asymvlm_kernels.prefill.prune.prune import PrunedSequence, prune_sequence

__all__ = ["PrunedSequence", "prune_sequence"]
