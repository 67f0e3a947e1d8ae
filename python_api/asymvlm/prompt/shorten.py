"""From a call's inputs to the shorter problem: merge, score, select, gather, and what transformers gets instead."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from asymvlm.hf.arguments import EMBEDS, IDS, MASK, POSITIONS
from asymvlm.hf.errors import MechanismError
from asymvlm.hf.merge import merge_embeddings
from asymvlm.hf.peft import unwrapped
from asymvlm.models import adapter_for
from asymvlm.models.adapter import Adapter, Grid, Inputs
from asymvlm.prompt.deepstack import DeepStack, prune_deepstack
from asymvlm.prompt.padding import check_last_columns, pad_in_place, padding_side, padding_to_keep
from asymvlm.prompt.selection import Selection
from asymvlm.prompt.state import PromptState
from asymvlm.settings.policies import VisionPruning
from asymvlm.tokens.images import grids_by_row, image_lines, image_numbers
from asymvlm.tokens.positions import next_position, original_positions, renumbered
from asymvlm.tokens.roles import Tokens, check_prompt, scored_text
from asymvlm_kernels import PrunedSequence, gather_rows, prune_sequence


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
    input_ids, mask = check_prompt(inputs)
    record = merge_embeddings(model, adapter, inputs)
    embeds = record[EMBEDS].detach()
    from_the_start = first > 0 and policy.positions == "keep"
    positions = original_positions(
        adapter, inputs, record, mask, generating=generating, start=None if from_the_start else start
    )
    tokens = Tokens.read(model, adapter, input_ids, mask, inputs, embeds)
    labels = inputs.get("labels")
    text = scored_text(tokens, policy.text, labels)
    groups, image_grids = _images(model, adapter, policy, inputs, tokens, first)
    lines = None if policy.spread is None else _lines(model, adapter, inputs, tokens, first)
    config: Any = model.config
    text_config = config.get_text_config()
    per_token = {name: inputs[name] for name in adapter.per_token if inputs.get(name) is not None}
    if first:
        tokens, text, embeds = tokens.behind(first), text[:, first:], embeds[:, first:]
        positions = positions[..., first:]
        per_token = {name: tensor[:, first:] for name, tensor in per_token.items()}
    real, prunable = tokens.real, tokens.prunable
    check_last_columns(inputs, prunable)
    side = padding_side(real, labelled=labels is not None and not inputs.get("logits_to_keep"))
    pruned = _shorten(
        adapter,
        policy,
        tokens,
        embeds,
        text,
        side,
        groups=groups,
        lines=lines,
        carry={IDS: tokens.ids, POSITIONS: positions, **per_token},
        ids_pad=getattr(text_config, "pad_token_id", None) or 0,
        behind_a_turn=start is not None,
    )
    kept = (pruned.index >= 0) & real.gather(1, pruned.index.clamp_min(0))
    index = pruned.index.masked_fill(~kept, -1)
    carried = {name: tensor for name, tensor in pruned.carry.items() if name != IDS}
    following = next_position(positions, real)
    if policy.positions == "compact":
        carried[POSITIONS] = renumbered(kept, positions, adapter, generating=generating, start=start)
        following = carried[POSITIONS][..., -1:] + 1
    # always a mask: gapped positions without one are read as packed sequences
    carried |= {EMBEDS: pruned.embeds, MASK: kept.to(mask.dtype)}
    for name in adapter.decoder_rows:
        if record.get(name) is not None:
            rows = record[name][:, first:]
            carried[name] = gather_rows(rows.flatten(2), pruned.index).unflatten(-1, rows.shape[2:])
    removed = {*adapter.drop, *adapter.drop_when_pruned, IDS}
    forwarded = {name: value for name, value in {**inputs, **carried}.items() if name not in removed}
    selection = Selection(
        lengths_before=real.sum(-1),
        lengths_after=kept.sum(-1).to(pruned.lengths.dtype),
        num_vision=prunable.sum(-1),
        counts=pruned.counts,
        gaps=pruned.gap,
        scores=pruned.scores,
        index=index,
        has_text=text.any(-1),
        columns_before=tokens.ids.shape[1],
        image_grids=image_grids,
    )
    deepstack = prune_deepstack(record, pruned.index, first)
    if adapter.deepstack and deepstack is None:
        raise MechanismError("thinning DeepStack features", f"the decoder of {adapter.model_type!r} was handed none")
    shift = adapter.first_position if generating else 0  # `generate` counts from 0, its model adds the rest
    state = PromptState(
        original_ids=tokens.ids,
        original_lengths=real.sum(-1),
        index=index,
        input_ids=pruned.carry[IDS],
        attention_mask=carried[MASK],
        position_ids=carried[POSITIONS] + shift,
        next_position=following + shift,
    )
    decoder_rows = {name: more for name, more in adapter.decoder_rows.items() if name in carried}
    return PrunedPrompt(forwarded, deepstack, decoder_rows, state, selection, tokens.ids.shape[1])


def _shorten(
    adapter: Adapter,
    policy: VisionPruning,
    tokens: Tokens,
    embeds: torch.Tensor,
    text: torch.Tensor,
    side: str,
    *,
    groups: torch.Tensor | None,
    lines: torch.Tensor | None,
    carry: dict[str, torch.Tensor],
    ids_pad: int,
    behind_a_turn: bool,
) -> PrunedSequence:
    """Score, select and gather; padding that has to stay where it is counts as kept."""
    per_token = {name: rows for name, rows in carry.items() if name in adapter.per_token}
    carry_pad = {IDS: ids_pad, **{name: adapter.per_token[name] for name in per_token}}
    protect = tokens.text | tokens.structural
    if side == "left":
        protect = protect | padding_to_keep(tokens.real, tokens.prunable)
    exact = embeds.dtype == torch.float64  # scores are fp32, embeddings stay as they are
    pruned = prune_sequence(
        embeds.float() if exact else embeds,
        tokens.vision,
        text,
        None if policy.weight is None else policy.weight.detach().to(embeds.device),
        policy.budget,
        protect=protect,
        groups=groups,
        per_image=policy.per_image,
        spread=policy.spread,
        lines=lines,
        carry=carry,
        carry_pad=carry_pad,
        padding_side=side,
    )
    if behind_a_turn and len(embeds) > 1:
        pruned = pad_in_place(pruned, carry_pad, {name: x for name, x in per_token.items() if name != "labels"})
    return dataclasses.replace(pruned, embeds=gather_rows(embeds, pruned.index)) if exact else pruned


def _images(
    model: nn.Module, adapter: Adapter, policy: VisionPruning, inputs: Inputs, tokens: Tokens, first: int
) -> tuple[torch.Tensor | None, list[list[Grid]] | None]:
    """Of the columns from ``first`` on.

    Image number of each vision token, None where no row has several images; grids of each row, None if unknown.
    """
    token_ids, grids = adapter.token_ids(model), adapter.grids_of(model, inputs)
    numbers = image_numbers(adapter.unify(tokens.ids), tokens.vision, tokens.separators, token_ids, grids)[:, first:]
    rows = grids_by_row(numbers, tokens.ids, token_ids, grids)
    # one image a row needs no floors, and the fused path serves it
    several = policy.per_image or rows is None or any(len(row) > adapter.views for row in rows)
    return numbers // adapter.views if several else None, rows


def _lines(model: nn.Module, adapter: Adapter, inputs: Inputs, tokens: Tokens, first: int) -> torch.Tensor:
    """Line of each vision token in its image, of the columns from ``first`` on; -1 for none."""
    token_ids, grids = adapter.token_ids(model), adapter.grids_of(model, inputs)
    if not grids:
        raise ValueError(
            f"spread needs the grid of an image's tokens, which the {adapter.model_type} adapter does not know"
        )
    return image_lines(adapter.unify(tokens.ids), tokens.vision, tokens.separators, token_ids, grids)[:, first:]
