"""Decoding loops as a caller would write them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from tiny import FAMILIES
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel


def positions_of(family: str, model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Original positions of the prompt, as a caller with a loop of their own would compute them."""
    if FAMILIES[family].mrope:
        names = ("input_ids", "attention_mask", "image_grid_thw", "mm_token_type_ids")
        return model.model.get_rope_index(**{name: inputs[name] for name in names})[0]
    return (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0) + FAMILIES[family].first_position


def decode(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    with_mask: bool = True,
    positions: Tensor | None = None,
    cache: DynamicCache | None = None,
) -> Iterator[Tensor]:
    """Greedy logits (B, vocabulary) of each step; the mask and the positions grow from the original prompt."""
    mask = inputs["attention_mask"]
    call = {name: value for name, value in inputs.items() if name != "attention_mask"}
    call |= {"past_key_values": cache} if cache is not None else {}
    while True:
        if with_mask:
            call["attention_mask"] = mask
        if positions is not None:
            call["position_ids"] = positions
        with torch.no_grad():
            out = model(**call, use_cache=True)
        yield out.logits[:, -1]
        call = {"input_ids": out.logits[:, -1:].argmax(-1), "past_key_values": out.past_key_values}
        mask = nn.functional.pad(mask, (0, 1), value=1)
        positions = positions[..., -1:] + 1 if positions is not None else None


def steps(loop: Iterator[Tensor], number: int = 6) -> Tensor:
    return torch.stack([next(loop) for _ in range(number)], 1)
