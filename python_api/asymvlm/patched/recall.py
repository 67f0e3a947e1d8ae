"""Vision tokens that return to a cache: they go through the decoder behind what it holds, and then take their places.

A token that goes through attends to what its place and the family's mask let it see among the tokens that the cache
holds from then on, those that go through with it included. Nothing but the K and V that they replace changes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from asymvlm.hf.arguments import CACHE, EMBEDS, MASK, POSITIONS, USE_CACHE, Callee, past_length
from asymvlm.hf.growing_layers import check_grows, grown_whole, move_columns, widest_past
from asymvlm.hf.masks import FULL, SLIDING, attention_form
from asymvlm.hf.pruned_cache import serve
from asymvlm.hf.windows import sliding_window
from asymvlm.prompt.continuing import check_conversation
from asymvlm.prompt.recalling import Recalled, replaced_slots, wanted_back, with_past, with_recalled
from asymvlm.prompt.state import PromptState, remember
from asymvlm.report.recall import RecallReport, stored_report

if TYPE_CHECKING:
    from asymvlm.patched.handle import PatchHandle


def recall_for(
    handle: PatchHandle, state: PromptState, call: Mapping[str, Any]
) -> tuple[PromptState, RecallReport | None]:
    """Before a question is read: bring back what it asks about.

    Args:
        state: of the call's cache. call: of `generate`, with ids and mask of the whole conversation.
    Returns:
        The state that the cache has then, and what was done; None where nothing is recalled by the settings.
    Raises:
        NotImplementedError: for a cache whose columns cannot be moved.
    """
    store, cache = state.recall, call[CACHE]
    if store is None or not (handle.vision.recall and handle.enabled):
        return state, None
    check_grows(cache)
    check_conversation(handle.adapter, state, call)
    begun, cached = time.perf_counter(), past_length(cache)
    past = cached - state.length
    report = stored_report(state, later=False)
    assert report is not None
    if cached > widest_past(cache):
        report.note = f"nothing recalled: a window of the cache no longer holds all of its {cached} columns"
        return state, report
    recalled = wanted_back(handle.model, handle.adapter, handle.vision, state, call, state.original_length + past)
    report.recalled, report.left, report.computed = recalled.counts.T.tolist()
    if any(report.recalled) or any(report.left):
        before = with_past(state, call, past)
        state, order = with_recalled(before, recalled)
        _read(handle.adapter.text_of(handle.model), handle.model, before, recalled, order, cache)
        remember(cache, state)
    if state.index.is_cuda:
        torch.cuda.synchronize(state.index.device)
    report.seconds = time.perf_counter() - begun
    return state, report


@torch.no_grad()
def _read(
    decoder: nn.Module, model: nn.Module, state: PromptState, recalled: Recalled, order: torch.Tensor, cache: Any
) -> None:
    """Write K and V of recalled tokens into the cache, at their places among the others.

    Args:
        state: of the cache as it is. order: ``(B, columns)``, the slot that each column has before it is moved.
    """
    text_config = cast("Any", model.config).get_text_config()
    arguments = {
        **recalled.arguments,
        MASK: _masks(text_config, state, recalled),
        POSITIONS: recalled.positions,
        CACHE: cache,
        USE_CACHE: True,
    }
    # not by a call: hooks of ours would take it for a step of the conversation
    forward = Callee.of(type(decoder).forward)
    serve(cache, True)
    try:
        with grown_whole(cache):
            cast("Any", decoder).forward(**forward.write(arguments))
            move_columns(cache, order)
    finally:
        serve(cache, False)


def _masks(text_config: Any, state: PromptState, recalled: Recalled) -> Any:
    """What recalled tokens attend to, ``(B, 1, R, S' + R)`` by slot before sorting, one for each kind of layer."""
    new = recalled.places.shape[1]
    places = torch.cat([state.index, recalled.places], 1)
    stays = state.attention_mask.bool() & (state.index >= 0) & ~replaced_slots(state, recalled)
    real = torch.cat([stays, recalled.places >= 0], 1)
    own = torch.arange(places.shape[1], device=places.device) - (places.shape[1] - new)
    own = own == torch.arange(new, device=places.device)[:, None]  # padding attends to something, too
    embeds, window = recalled.arguments[EMBEDS], sliding_window(text_config)

    def form(reach: torch.Tensor, window: int | None) -> torch.Tensor:
        visible = real[:, None] & (places[:, None] <= reach[..., None])
        if window is not None:
            visible &= recalled.places[..., None] - places[:, None] < window
        return attention_form(text_config, embeds, (visible | own)[:, None])

    kinds = set(getattr(text_config, "layer_types", None) or ())
    if kinds == {FULL, SLIDING}:
        return {FULL: form(recalled.reach, None), SLIDING: form(recalled.sliding_reach, window)}
    return form(recalled.reach if window is None else recalled.sliding_reach, window)


__all__ = ["recall_for"]
