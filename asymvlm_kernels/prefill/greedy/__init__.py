"""Tokens chosen as a set, one after the other: each choice depends on those before it.

Every op takes a matrix ``(B, N, N)`` and says which tokens are chosen, ``(B, N)`` bool. Given the same matrix all
backends choose the same tokens: every number that decides is computed in one order, each operation rounded once.
"""

from asymvlm_kernels.prefill.greedy.cosine import cosine_matrix
from asymvlm_kernels.prefill.greedy.dpp import dpp_map
from asymvlm_kernels.prefill.greedy.farthest import farthest_points
from asymvlm_kernels.prefill.greedy.similar import drop_similar

__all__ = ["cosine_matrix", "dpp_map", "drop_similar", "farthest_points"]
