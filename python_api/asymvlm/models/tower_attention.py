"""Which attention layer of a vision tower says what its patches are worth, and how its queries and keys are read.

Methods from the literature read the attention of the layer whose output the projector reads: the last but one of CLIP
as LLaVA uses it, the last of SigLIP.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # queries, keys, keys before a rotation: (P, patches, H, Dk)


@dataclass(frozen=True, eq=False)
class TowerLayer:
    """An attention layer of a tower.

    Attributes:
        attention: its module. scale: of its logits.
        projections: submodules of it whose outputs are wanted.
        read: their outputs and the module's keyword arguments -> the heads of sequences that attend to themselves,
            sequences of equal length together, in the order in which the tower has their patches.
        has_class_token: whether a sequence of so many columns begins with a class token.
    """

    attention: nn.Module
    scale: float
    projections: tuple[str, ...]
    read: Callable[[Sequence[torch.Tensor], Mapping[str, Any]], list[Heads]]
    has_class_token: Callable[[int], bool]


def in_front_of_the_projector(model: nn.Module, depth: int) -> int:
    """Number of the layer whose output the projector reads, of ``depth`` layers."""
    state = getattr(model.config, "vision_feature_layer", None)
    state = -1 if state is None else state
    if not isinstance(state, int):
        raise NotImplementedError(
            f"the attention of the vision tower is read from one layer, got vision_feature_layer {state}"
        )
    return depth + state if state < 0 else state - 1  # hidden state 0 is what the first layer reads


def square_tower(
    path: str, layer: Callable[[nn.Module, int], int] = in_front_of_the_projector
) -> Callable[[nn.Module], TowerLayer]:
    """The layer of a CLIP or SigLIP tower over square pictures; more columns than a square has: a class token.

    Args:
        path: of the tower in the model. layer: (model, number of layers) to the number of the layer.
    """

    def find(model: nn.Module) -> TowerLayer:
        layers = [module for module in model.get_submodule(path).modules() if hasattr(module, "q_proj")]
        found = sorted({type(module).__name__ for module in layers})
        if len(found) != 1 or found[0] not in ("CLIPAttention", "SiglipAttention"):
            raise NotImplementedError(
                "the attention of the vision tower is read from CLIPAttention or SiglipAttention, got "
                f"{', '.join(found) or 'none of its kind'} in {type(model.get_submodule(path)).__name__}"
            )
        attention: Any = layers[layer(model, len(layers))]

        def read(outputs: Sequence[torch.Tensor], kwargs: Mapping[str, Any]) -> list[Heads]:
            queries, keys = (rows.unflatten(-1, (attention.num_heads, -1)) for rows in outputs)
            return [(queries, keys, keys)]

        return TowerLayer(attention, attention.scale, ("q_proj", "k_proj"), read, _one_more_than_a_square)

    return find


def _one_more_than_a_square(columns: int) -> bool:
    return round(columns**0.5) ** 2 != columns


def packed_tower(path: str, layer: Callable[[Any], int]) -> Callable[[nn.Module], TowerLayer]:
    """The layer of a tower of Qwen's kind: all patches of a call in a row, rotary positions, no class token.

    Args:
        path: of the tower in the model. layer: the tower's configuration to the number of a block whose patches see
            their whole frame.
    """

    def find(model: nn.Module) -> TowerLayer:
        tower: Any = model.get_submodule(path)
        attention = tower.blocks[layer(tower.config)].attn
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb_vision

        def read(outputs: Sequence[torch.Tensor], kwargs: Mapping[str, Any]) -> list[Heads]:
            queries, raw, _ = outputs[0].unflatten(-1, (3, attention.num_heads, -1)).unbind(1)
            queries, keys = rotate(queries, raw, *kwargs["position_embeddings"])
            bounds = kwargs["cu_seqlens"].tolist()
            lengths = [end - start for start, end in itertools.pairwise(bounds)]
            parts = zip(*(rows.split(lengths) for rows in (queries, keys, raw)), strict=True)
            return [(q[None], k[None], plain[None]) for q, k, plain in parts]

        return TowerLayer(attention, attention.scaling, ("qkv",), read, lambda columns: False)

    return find


def last_block(config: Any) -> int:
    return -1


def last_full_block(config: Any) -> int:
    """Of a tower whose other blocks see windows (Qwen2.5-VL)."""
    return int(max(config.fullatt_block_indexes))
