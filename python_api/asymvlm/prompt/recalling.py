"""Which vision tokens the next question wants in the cache, and the prompt of a cache that holds them.

The vision tokens of earlier prompts are ranked against the new question's text, by the method and the budget of the
first ranking. Those that rank into the budget and are not in the cache return; `Recall` says what becomes of the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from asymvlm.hf.arguments import IDS, MASK
from asymvlm.methods import VisionPrompt
from asymvlm.models.adapter import Adapter
from asymvlm.prompt.choosing import choose_and_gather
from asymvlm.prompt.columns import marked_columns
from asymvlm.prompt.recall_store import RecallStore
from asymvlm.prompt.state import PromptState
from asymvlm.settings.policies import VisionPruning
from asymvlm.settings.recall import Recall
from asymvlm.tokens.images import Cells
from asymvlm.tokens.roles import Tokens, scored_text
from asymvlm_kernels import gather_rows
from asymvlm_kernels.prefill.reference import compact


@dataclass(frozen=True, eq=False)
class Recalled:
    """Tokens whose K and V are computed, R columns, rows filled up behind, and what they replace."""

    arguments: dict[str, Any]  # of the decoder: embeddings (B, R, D) and what goes beside them
    places: torch.Tensor  # (B, R) int64, original column, -1 = none
    positions: torch.Tensor  # (B, R) or (axes, B, R)
    reach: torch.Tensor  # (B, R) int64, last column that each attends to
    sliding_reach: torch.Tensor  # the same in sliding layers
    replaced: torch.Tensor  # (B, S) bool by original column of the prompt: K and V in the cache that go
    counts: torch.Tensor  # (B, 3) int64: tokens that return, that leave, whose K and V are computed


def wanted_back(
    model: nn.Module, adapter: Adapter, policy: VisionPruning, state: PromptState, call: Mapping[str, Any], known: int
) -> Recalled:
    """What the text of a call in columns from ``known`` on brings back.

    Args:
        state: of the cache, with a store. call: with ids and mask of the whole conversation.
    """
    store, settings = state.recall, policy.recall
    assert store is not None
    assert isinstance(settings, Recall)
    prompt = _ranked_prompt(model, policy, store, call, known)
    carry = {IDS: prompt.tokens.ids}
    background = policy.background if settings.leaves else 0  # else that of the first prompt is still there
    chosen = choose_and_gather(
        adapter, policy, prompt, "left", carry=carry, ids_pad=0, behind_a_turn=False, background=background
    ).index
    there = store.places >= 0
    is_chosen = marked_columns(chosen, prompt.tokens.ids.shape[1])[:, : there.shape[1]] & there
    in_cache = marked_columns(state.index, state.original_length).gather(1, store.places.clamp_min(0)) & there
    is_chosen = torch.where(prompt.text.any(-1, keepdim=True), is_chosen, in_cache)  # asking nothing wants nothing
    held = is_chosen if settings.leaves else is_chosen | in_cache
    changed = (held != in_cache).any(-1, keepdim=True)
    computed = held & changed if settings.recomputes else held & ~in_cache
    replaced = in_cache & changed & settings.recomputes
    fresh, gone = held & ~in_cache, in_cache & ~held
    most = int(computed.sum(-1).max())
    slots = compact(computed, most)
    order = slots.clamp_min(0)
    return Recalled(
        arguments=store.arguments(slots),
        places=gather_rows(store.places, slots, pad=-1),
        positions=store.positions.gather(-1, order.expand(*store.positions.shape[:-1], most)),
        reach=store.reach.gather(1, order),
        sliding_reach=store.sliding_reach.gather(1, order),
        replaced=marked_columns(store.places.where(replaced, -1), state.original_length),
        counts=torch.stack([mask.sum(-1) for mask in (fresh, gone, computed)], 1),
    )


def _ranked_prompt(
    model: nn.Module, policy: VisionPruning, store: RecallStore, call: Mapping[str, Any], known: int
) -> VisionPrompt:
    """The stored vision tokens and the new text behind them, as a method of vision pruning reads them."""
    ids, mask = call[IDS][:, known:], call[MASK][:, known:].bool()
    new = Tokens(ids, mask, torch.zeros_like(mask), torch.zeros_like(mask))
    embeds = store.embeds.to(ids.device)
    with torch.no_grad():
        text = cast("Any", model).get_input_embeddings()(ids.clamp_min(0)).to(embeds)
    there = store.places >= 0

    def beside(stored: torch.Tensor, fill: int) -> torch.Tensor:
        return torch.cat([stored, torch.full_like(ids, fill).to(stored)], 1)

    tokens = Tokens(
        torch.cat([torch.zeros_like(store.places), ids], 1),
        torch.cat([there, mask], 1),
        beside(there, False),
        torch.zeros_like(beside(there, False)),
    )

    def cells() -> Cells:
        assert store.lines is not None
        return Cells(*[beside(store.lines, -1)] * len(Cells._fields))  # only lines are read

    return VisionPrompt(
        tokens=tokens,
        embeds=torch.cat([embeds, text], 1),
        text=torch.cat([torch.zeros_like(there), scored_text(new, policy.text, turn_wanted=False)], 1),
        images=beside(store.images, -1),
        grids=store.grids,
        make_cells=cells,
        make_features=_not_kept("tower features"),
        make_attention=_not_kept("tower attention"),
        make_pixels=_not_kept("pixels"),
        project=_not_kept("tower features"),
    )


def _not_kept(what: str) -> Callable[..., Any]:
    def refuse(*_: Any) -> Any:
        raise NotImplementedError(f"recall keeps embeddings of vision tokens, and no {what}")

    return refuse


def with_past(state: PromptState, call: Mapping[str, Any], past: int) -> PromptState:
    """A prompt's state with the ``past`` columns that its cache holds behind it as part of the prompt.

    Args:
        call: with ids and mask of the whole conversation.
    """
    first, known = state.original_length, state.original_length + past
    ids, mask = call[IDS][:, first:known], call[MASK][:, first:known]
    offsets = (mask.long().cumsum(-1) - 1).clamp_min(0)  # as `generate` counts
    places = torch.arange(first, known, device=ids.device).expand(ids.shape)
    return PromptState(
        original_ids=torch.cat([state.original_ids, ids.to(state.original_ids)], 1),
        original_lengths=state.original_lengths + mask.sum(-1).to(state.original_lengths),
        index=torch.cat([state.index, places], 1),
        input_ids=torch.cat([state.input_ids, ids.to(state.input_ids)], 1),
        attention_mask=torch.cat([state.attention_mask, mask.to(state.attention_mask)], 1),
        position_ids=torch.cat([state.position_ids, state.next_position + offsets], -1),
        next_position=state.next_position + mask.sum(-1, keepdim=True),
        recall=state.recall,
    )


def with_recalled(state: PromptState, recalled: Recalled) -> tuple[PromptState, torch.Tensor]:
    """A state with more columns behind it, then all that stay in the order of their original places.

    Sorted, no two tokens are further apart than they were in the prompt, so windows of the cache hold what they must.

    Returns:
        The state, and ``(B, columns)`` int64: the slot that each of its columns has before.
    """
    places = torch.cat([state.index.masked_fill(replaced_slots(state, recalled), -1), recalled.places], 1)
    width = int((places >= 0).sum(-1).max())
    order = places.argsort(dim=1, stable=True)[:, places.shape[1] - width :]
    ids = state.original_ids.gather(1, recalled.places.clamp_min(0)).to(state.input_ids)
    new = torch.ones_like(recalled.places).to(state.attention_mask)
    mask = torch.cat([state.attention_mask, new], 1).masked_fill(places < 0, 0)
    positions = torch.cat([state.position_ids, recalled.positions.to(state.position_ids)], -1)
    return PromptState(
        original_ids=state.original_ids,
        original_lengths=state.original_lengths,
        index=places.gather(1, order),
        input_ids=torch.cat([state.input_ids, ids], 1).gather(1, order),
        attention_mask=mask.gather(1, order),
        position_ids=positions.gather(-1, order.expand(*positions.shape[:-1], width)),
        next_position=state.next_position,
        recall=state.recall,
    ), order


def replaced_slots(state: PromptState, recalled: Recalled) -> torch.Tensor:
    """``(B, S')`` bool: slots whose K and V go, of a state that may hold more columns than the prompt had."""
    columns = recalled.replaced.shape[1]
    inside = (state.index >= 0) & (state.index < columns)
    return inside & recalled.replaced.gather(1, state.index.clamp(0, columns - 1))


__all__ = ["Recalled", "replaced_slots", "wanted_back", "with_past", "with_recalled"]
