"""From a call's inputs to the shorter problem: merge, score, select, gather, and what transformers gets instead."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from asymvlm.hf.arguments import EMBEDS, IDS, MASK, POSITIONS
from asymvlm.hf.errors import MechanismError
from asymvlm.hf.merge import merge_embeddings
from asymvlm.hf.peft import unwrapped
from asymvlm.hf.tower import TowerOutputs, tower_outputs
from asymvlm.methods import BeforeMethod, VisionPrompt
from asymvlm.models import adapter_for
from asymvlm.models.adapter import Adapter, Inputs
from asymvlm.prompt.choosing import choose_and_gather
from asymvlm.prompt.deepstack import DeepStack, decoder_rows, prune_deepstack
from asymvlm.prompt.padding import check_last_columns, padding_side
from asymvlm.prompt.reading import read_prompt
from asymvlm.prompt.recall_store import RecallStore
from asymvlm.prompt.selection import Selection
from asymvlm.prompt.state import PromptState
from asymvlm.settings.policies import VisionPruning
from asymvlm.tokens.positions import next_position, original_positions, renumbered
from asymvlm.tokens.roles import check_prompt
from asymvlm_kernels import PrunedSequence


@dataclass(frozen=True, eq=False)
class PrunedPrompt:
    """The shorter problem."""

    inputs: dict[str, Any]  # inputs_embeds, attention_mask, position_ids, per-token inputs, and what was not ours
    deepstack: DeepStack | None
    decoder_rows: Mapping[str, Callable[[nn.Module, torch.Tensor], torch.Tensor | None]]  # for generated ids
    state: PromptState
    selection: Selection
    columns: int  # that the call had before, of its own
    cached: int = 0  # columns of the cache in front of these embeddings: the state has them, the inputs do not
    whole_rows: tuple[str, ...] = ()  # inputs that have them after all, because masks are made from them


def prune_inputs(model: nn.Module, vision: VisionPruning | None = None, **inputs: Any) -> dict[str, Any]:
    """Prune the inputs of one call, for people with loops of their own. The model is left as it was.

    Args:
        model: a supported Hugging Face vision-language model, or a PEFT model around one.
        vision: settings; None means ``VisionPruning()``.
        inputs: what ``model(**inputs)`` takes: ``input_ids`` ``(B, S)``, ``pixel_values``, 2-D ``attention_mask``, ...
    Returns:
        Inputs of S' tokens without images: ``inputs_embeds`` ``(B, S', D)``, ``attention_mask`` ``(B, S')``,
        ``position_ids`` ``(B, S')`` or ``(R, B, S')``, and the per-token inputs of the family. Call
        ``model(**result)``; generated tokens take the positions that follow the original prompt's last one.
    Raises:
        ValueError: if the model is not supported, or inputs are missing or of a wrong shape.
        NotImplementedError: if the family's decoder needs more than the model's own call can carry (DeepStack).
    """
    vision = VisionPruning() if vision is None else vision
    model = unwrapped(model)
    adapter = adapter_for(model)
    vision.check_model(model)
    if vision.recall:
        raise NotImplementedError("prune_inputs keeps nothing that could come back (recall): use asymvlm.patch")
    if vision.inside is not None:
        raise NotImplementedError(f"{vision.scored_by!r} works inside the decoder: use asymvlm.patch")
    if adapter.deepstack:
        raise NotImplementedError(
            f"prune_inputs cannot serve {adapter.model_type!r}: {type(model).__name__} takes no DeepStack features "
            "beside inputs_embeds; use asymvlm.patch"
        )
    return prune_prompt(model, adapter, vision, inputs, generating=False).inputs


def prune_prompt(
    model: nn.Module,
    adapter: Adapter,
    policy: VisionPruning,
    inputs: Inputs,
    *,
    generating: bool,
    first: int = 0,
    start: torch.Tensor | None = None,
) -> PrunedPrompt:
    """Solve the vision side of a call.

    Args:
        generating: make the positions `generate` would have made.
        first: column of ``inputs`` where the prompt begins: those before it are in a cache, and only tell images and
            positions. The result is told in columns from there on.
        start: position of that column, where others are in a cache; not needed if ``inputs`` hold them all.
    """
    _, mask = check_prompt(inputs)
    with _watched(model, adapter, policy, inputs) as tower:
        record = merge_embeddings(model, adapter, inputs)
    from_the_start = first > 0 and policy.positions == "keep"
    positions = original_positions(
        adapter, inputs, record, mask, generating=generating, start=None if from_the_start else start
    )[..., first:]
    prompt = read_prompt(model, adapter, policy, inputs, record, first, tower)
    tokens, real = prompt.tokens, prompt.tokens.real
    config: Any = model.config
    text_config = config.get_text_config()
    pruned = _chosen(adapter, policy, prompt, inputs, positions, text_config, first, behind_a_turn=start is not None)
    kept = (pruned.index >= 0) & real.gather(1, pruned.index.clamp_min(0))
    index = pruned.index.masked_fill(~kept, -1)
    carried = {name: tensor for name, tensor in pruned.carry.items() if name != IDS}
    following = next_position(positions, real)
    if policy.positions == "compact":
        carried[POSITIONS] = renumbered(kept, positions, adapter, generating=generating, start=start)
        following = carried[POSITIONS][..., -1:] + 1
    # always a mask: gapped positions without one are read as packed sequences
    carried |= {EMBEDS: pruned.embeds, MASK: kept.to(mask.dtype)}
    carried |= decoder_rows(adapter, record, pruned.index, first)
    removed = {*adapter.drop, *adapter.drop_when_pruned, IDS}
    forwarded = {name: value for name, value in {**inputs, **carried}.items() if name not in removed}
    deepstack = prune_deepstack(record, pruned.index, first)
    if adapter.deepstack and deepstack is None:
        raise MechanismError("thinning DeepStack features", f"the decoder of {adapter.model_type!r} was handed none")
    shift = adapter.first_position if generating else 0  # `generate` counts from 0, its model adds the rest
    store = None
    if policy.recall and not model.training:
        store = RecallStore.of(adapter, policy, prompt, positions + shift, record, text_config, first)
    state = PromptState(
        original_ids=tokens.ids,
        original_lengths=real.sum(-1),
        index=index,
        input_ids=pruned.carry[IDS],
        attention_mask=carried[MASK],
        position_ids=carried[POSITIONS] + shift,
        next_position=following + shift,
        recall=store,
    )
    rows_of_ids = {name: more for name, more in adapter.decoder_rows.items() if name in carried}
    selection = _selection(policy, prompt, pruned, index)
    return PrunedPrompt(forwarded, deepstack, rows_of_ids, state, selection, tokens.ids.shape[1])


def _chosen(
    adapter: Adapter,
    policy: VisionPruning,
    prompt: VisionPrompt,
    inputs: Inputs,
    positions: torch.Tensor,
    text_config: Any,
    first: int,
    *,
    behind_a_turn: bool,
) -> PrunedSequence:
    """The tokens that stay, with what of the call goes along with them; arguments as of `prune_prompt`."""
    tokens = prompt.tokens
    per_token = {name: inputs[name][:, first:] for name in adapter.per_token if inputs.get(name) is not None}
    check_last_columns(inputs, tokens.prunable)
    labelled = inputs.get("labels") is not None and not inputs.get("logits_to_keep")
    return choose_and_gather(
        adapter,
        policy,
        prompt,
        padding_side(tokens.real, labelled=labelled),
        carry={IDS: tokens.ids, POSITIONS: positions, **per_token},
        ids_pad=getattr(text_config, "pad_token_id", None) or 0,
        behind_a_turn=behind_a_turn,
        background=policy.background,
    )


def _watched(
    model: nn.Module, adapter: Adapter, policy: VisionPruning, inputs: Inputs
) -> contextlib.AbstractContextManager[TowerOutputs]:
    """A block in which the vision tower is read as far as the method asks for it."""
    method = policy.scored_by
    attention = isinstance(method, BeforeMethod) and method.needs_tower_attention
    if isinstance(method, BeforeMethod) and (attention or method.needs_tower) and adapter.brings_vision(inputs):
        return tower_outputs(model, adapter, attention=attention)
    return contextlib.nullcontext(TowerOutputs())


def _selection(policy: VisionPruning, prompt: VisionPrompt, pruned: PrunedSequence, index: torch.Tensor) -> Selection:
    """What a report is made from; ``index`` ``(B, S')`` without padding that was kept in its place."""
    real = prompt.tokens.real
    return Selection(
        lengths_before=real.sum(-1),
        lengths_after=(index >= 0).sum(-1).to(pruned.lengths.dtype),
        num_vision=prompt.tokens.prunable.sum(-1),
        counts=pruned.counts,
        gaps=pruned.gap,
        scores=pruned.scores,
        own=pruned.own,
        index=index,
        has_text=prompt.text.any(-1) if policy.scored_by.needs_text else torch.ones_like(real[:, 0]),
        columns_before=real.shape[1],
        image_grids=prompt.grids,
    )
