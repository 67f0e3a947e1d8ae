"""Reports of calls that pruned nothing: a keep ratio of 1, text alone, a later turn on a cache of a pruned prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from asymvlm.hf.arguments import IDS, MASK
from asymvlm.models.adapter import Adapter, Inputs
from asymvlm.prompt.state import PromptState
from asymvlm.report.pruning import PruningReport
from asymvlm.settings.policies import VisionPruning
from asymvlm.tokens.roles import Tokens, check_prompt


def untouched_report(model: nn.Module, adapter: Adapter, policy: VisionPruning, inputs: Inputs) -> PruningReport | None:
    """Of a call that goes to the model as it came; None where its tokens cannot be told."""
    try:
        input_ids, mask = check_prompt(inputs)
    except ValueError:
        return None
    tokens = Tokens.read(model, adapter, input_ids, mask)
    real, num_vision = tokens.real, tokens.vision.sum(-1)
    places = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    images = adapter.brings_vision(inputs)
    return _report(
        model,
        policy,
        real=real,
        num_vision=num_vision,
        counts=num_vision,
        index=places.masked_fill(~real, -1),
        vision_flops=adapter.flops_of(model, inputs) if images else 0,
        unpruned_because="keep ratio 1: the model was called untouched" if images else "no image in the call",
    )


def later_turn_report(
    model: nn.Module, adapter: Adapter, policy: VisionPruning, state: PromptState, call: Mapping[str, Any]
) -> PruningReport:
    """Of a `generate` that goes on from a cache whose images were pruned in an earlier one.

    Args:
        call: with the ids and the mask of the whole conversation.
    """
    input_ids = call[IDS]
    tokens = Tokens.read(model, adapter, input_ids, call[MASK])
    real, vision = tokens.real, tokens.vision
    places = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    new = places.masked_fill(~real, -1)[:, state.original_length :]
    index = torch.cat([state.index, new], 1)
    kept = vision.gather(1, index.clamp_min(0)) & (index >= 0)
    return _report(
        model,
        policy,
        real=real,
        num_vision=vision.sum(-1),
        counts=kept.sum(-1),
        index=index,
        vision_flops=0,
        unpruned_because="a later turn: its images were pruned in an earlier one",
    )


def _report(
    model: nn.Module, policy: VisionPruning, *, real: torch.Tensor, index: torch.Tensor, **counted: Any
) -> PruningReport:
    config: Any = model.config
    return PruningReport(
        lengths_before=real.sum(-1),
        lengths_after=(index >= 0).sum(-1),
        gaps=torch.full((len(real),), float("nan"), device=real.device),
        scores=None,
        index=index,
        budget=policy.budget,
        text_config=config.get_text_config(),
        has_text=torch.ones(len(real), dtype=torch.bool, device=real.device),
        columns_before=real.shape[1],
        **counted,
    )
