"""GPU kernels for vision-language models: prune vision tokens before prefill, score and evict text while decoding.

Every op works on CPU (the PyTorch reference), under Triton's interpreter and on CUDA, and gives the same indices on
all. Masks are bool, True = real.
"""

from __future__ import annotations

from typing import Any

from asymvlm_kernels.budget import (
    AtLeastRelevant,
    Budget,
    LinearBudget,
    RelativeThresholdBudget,
    ScoreBudget,
    ThresholdBudget,
    UniformBudget,
    keep_counts,
)
from asymvlm_kernels.decode.column_sums import attention_column_sums
from asymvlm_kernels.decode.flash import flash_attn_func, flash_attn_with_kvcache
from asymvlm_kernels.decode.moves import move_slots_, plan_moves
from asymvlm_kernels.decode.score import score_from_lse
from asymvlm_kernels.dispatch import BackendError, use_backend
from asymvlm_kernels.prefill.gather import gather_rows
from asymvlm_kernels.prefill.greedy import cosine_matrix, dpp_map, drop_similar, farthest_points
from asymvlm_kernels.prefill.prune import PrunedSequence, prune_sequence
from asymvlm_kernels.prefill.score import score_tokens
from asymvlm_kernels.prefill.select import importance_gap, select_tokens
from asymvlm_kernels.prefill.spread import Spread
from asymvlm_kernels.training.attention import key_bias_attention
from asymvlm_kernels.training.soft_mask import soft_mask
from asymvlm_kernels.warming.calls import Calls, Carried
from asymvlm_kernels.warming.warm import Warmed, WarmedBuild, warmup

__version__ = "0.1.0"

__all__ = [
    "AtLeastRelevant",
    "BackendError",
    "Budget",
    "Calls",
    "Carried",
    "LinearBudget",
    "PrunedSequence",
    "RelativeThresholdBudget",
    "ScoreBudget",
    "Spread",
    "ThresholdBudget",
    "UniformBudget",
    "Warmed",
    "WarmedBuild",
    "attention_column_sums",
    "cosine_matrix",
    "dpp_map",
    "drop_similar",
    "farthest_points",
    "flash_attn_func",
    "flash_attn_with_kvcache",
    "gather_rows",
    "importance_gap",
    "keep_counts",
    "key_bias_attention",
    "move_slots_",
    "plan_moves",
    "prune_sequence",
    "score_from_lse",
    "score_tokens",
    "select_tokens",
    "soft_mask",
    "use_backend",
    "warmup",
]


def __getattr__(name: str) -> Any:
    # the one name that points up the tree: resolved on first use, so that the kernels import without transformers, and
    # not in __all__, so that `import *` does too
    if name == "patch":
        try:
            from asymvlm import patch
        except ImportError as error:  # hasattr and inspect want to hear of an attribute
            raise AttributeError(f"asymvlm_kernels.patch needs asymvlm and transformers: {error}") from error
        return patch
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
