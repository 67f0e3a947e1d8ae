"""New images in a later turn: the new tokens are pruned by themselves and go behind what the cache of a prompt holds.

They are ranked against the new turn's text. Their positions, and what they attend to, are those of the unpruned
conversation. Rows keep different numbers of tokens, so padding may lie inside the turn: the mask closes it like any.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from asymvlm.hf.arguments import CACHE, IDS, MASK, POSITIONS, past_length
from asymvlm.models.adapter import Adapter, Inputs
from asymvlm.prompt.continuing import check_conversation
from asymvlm.prompt.selection import Selection
from asymvlm.prompt.shorten import PrunedPrompt, prune_prompt
from asymvlm.prompt.state import UNKNOWN, PromptState
from asymvlm.settings.policies import VisionPruning
from asymvlm.tokens.roles import Tokens


def brings_images(model: nn.Module, adapter: Adapter, state: PromptState, call: Mapping[str, Any]) -> bool:
    """Whether a `generate` on a pruned cache has images behind what the cache holds."""
    ids = call.get(IDS)
    return ids is not None and bool(Tokens.read(model, adapter, ids[:, state.original_length :]).vision.any())


def prune_later_images(
    model: nn.Module,
    adapter: Adapter,
    policy: VisionPruning,
    state: PromptState,
    inputs: Inputs,
    *,
    generating: bool,
) -> PrunedPrompt:
    """Solve the vision side of a later turn.

    Args:
        state: of the cache, which may hold generated tokens too.
        inputs: of the call under our names, with its cache. `generate` gets ``input_ids`` and masks of the whole
            conversation, and either all of its images or the new ones; a forward gets the new tokens and their images.
    Returns:
        The shorter problem of the new tokens, told in columns of the whole conversation.
    Raises:
        ValueError: if ``input_ids`` do not go on from what the cache holds.
        NotImplementedError: for families whose cached prompt would have to change.
    """
    if adapter.open_prompt or adapter.recurrent:
        reason = "its prompt attends both ways" if adapter.open_prompt else "its recurrent layers start anew"
        raise NotImplementedError(
            f"{adapter.model_type} cannot take new images on a filled cache ({reason}): pass the whole conversation"
        )
    if not adapter.brings_vision(inputs):
        raise ValueError(f"input_ids have new images, but none of {', '.join(adapter.triggers)} was given")
    cached = past_length(inputs[CACHE])
    past = cached - state.length
    known = state.original_length + past  # columns of the conversation that the cache stands for
    ids: torch.Tensor = inputs[IDS]
    mask: torch.Tensor = inputs[MASK] if inputs.get(MASK) is not None else torch.ones_like(ids)
    if generating:
        check_conversation(adapter, state, inputs)
        past_ids, past_mask = (x[:, state.original_length : known] for x in (ids, mask))
        start = state.next_position + past_mask.sum(-1, keepdim=True)
        whole = _has_all_images(model, adapter, inputs, known)
    else:
        past_ids = ids.new_full((ids.shape[0], past), UNKNOWN)
        mask = mask[:, -ids.shape[1] :]
        past_mask = _past_mask(state, inputs, past).to(mask)
        start, whole = state.next_position + past, False
    if not whole:
        inputs, policy = _behind(adapter, policy, inputs, mask, known if generating else 0)
    try:
        prompt = prune_prompt(
            model, adapter, policy, inputs, generating=generating, first=known if whole else 0, start=start
        )
    except ValueError as error:
        if "features" not in str(error):
            raise
        raise ValueError(
            f"a later turn needs the images of the whole conversation or of the new part alone: {error}"
        ) from error
    return _join(adapter, state, prompt, past_ids, past_mask, generating=generating)


def _has_all_images(model: nn.Module, adapter: Adapter, inputs: Inputs, known: int) -> bool:
    """Whether the call brings the images of the whole conversation: more tokens than its new part has places for."""
    grids = adapter.grids_of(model, inputs)
    new = adapter.unify(inputs[IDS])[:, known:]
    for name, token_id in adapter.token_ids(model).items():
        if name in grids and sum(rows * columns for rows, columns in grids[name]) > int((new == token_id).sum()):
            return True
    return not grids


def _behind(
    adapter: Adapter, policy: VisionPruning, inputs: Inputs, mask: torch.Tensor, first: int
) -> tuple[dict[str, Any], VisionPruning]:
    """The call and the policy with nothing of what is cached."""
    rows = {name: inputs[name][:, first:] for name in (IDS, *adapter.per_token) if inputs.get(name) is not None}
    if first and inputs.get(POSITIONS) is not None:
        rows[POSITIONS] = inputs[POSITIONS][..., first:]
    if first and isinstance(policy.text, torch.Tensor):
        policy = dataclasses.replace(policy, text=policy.text[:, first:])
    return {**inputs, **rows, MASK: mask[:, first:]}, policy


def _past_mask(state: PromptState, inputs: Inputs, past: int) -> torch.Tensor:
    """``(B, past)``: the mask of what was generated since, from a mask of either length."""
    mask, new = inputs.get(MASK), inputs[IDS].shape[1]
    if mask is None or mask.shape[1] == new:
        return state.attention_mask.new_ones(state.attention_mask.shape[0], past)
    if mask.ndim != 2 or mask.shape[1] not in (state.length + past + new, state.original_length + past + new):
        wanted = state.original_length + past + new
        raise ValueError(
            f"attention_mask must have {wanted} columns (the conversation so far and the new tokens), got shape "
            f"{tuple(mask.shape)}"
        )
    return mask[:, mask.shape[1] - past - new : mask.shape[1] - new]


def _join(
    adapter: Adapter,
    state: PromptState,
    prompt: PrunedPrompt,
    past_ids: torch.Tensor,
    past_mask: torch.Tensor,
    *,
    generating: bool,
) -> PrunedPrompt:
    """Put the new part behind the cached one."""
    new, past = prompt.state, past_ids.shape[1]
    known, cached = state.original_length + past, state.length + past
    offsets = torch.arange(past, device=past_ids.device)
    columns = (offsets + state.original_length).expand(past_ids.shape)
    index = torch.where(new.index >= 0, new.index + known, -1)
    store = None if new.recall is None else new.recall.behind(known)
    store = store if state.recall is None else state.recall.joined(store)
    joined = PromptState(
        original_ids=torch.cat([state.original_ids, past_ids, new.original_ids], 1),
        original_lengths=state.original_lengths + past_mask.sum(-1).to(new.original_lengths) + new.original_lengths,
        index=torch.cat([state.index, columns, index], 1),
        input_ids=torch.cat([state.input_ids, past_ids, new.input_ids], 1),
        attention_mask=torch.cat([state.attention_mask, past_mask.to(state.attention_mask), new.attention_mask], 1),
        position_ids=torch.cat([state.position_ids, state.next_position + offsets, new.position_ids], -1),
        next_position=new.next_position,
        recall=store,
    )
    inputs = {**prompt.inputs, MASK: joined.attention_mask}
    if generating:
        inputs[POSITIONS] = joined.position_ids
    # masks are made from token types, which are read by their place in the cache
    types = tuple(name for name in adapter.per_token if name != "labels" and inputs.get(name) is not None)
    for name in types:
        inputs[name] = nn.functional.pad(inputs[name], (cached, 0), value=adapter.per_token[name])
    return dataclasses.replace(
        prompt,
        inputs=inputs,
        state=joined,
        selection=_of_the_whole(prompt.selection, state, joined, past_mask),
        cached=cached,
        whole_rows=types,
    )


def _of_the_whole(selection: Selection, state: PromptState, joined: PromptState, past_mask: torch.Tensor) -> Selection:
    """Lengths, places and columns of the whole conversation; scores, counts and grids are the new images'."""
    after = (state.attention_mask.sum(-1) + past_mask.sum(-1)).to(selection.lengths_after)
    known = joined.original_length - selection.scores.shape[1]
    return dataclasses.replace(
        selection,
        lengths_before=joined.original_lengths,
        lengths_after=selection.lengths_after + after,
        scores=nn.functional.pad(selection.scores, (known, 0), value=-torch.inf),
        index=joined.index,
        columns_before=joined.original_length,
    )
