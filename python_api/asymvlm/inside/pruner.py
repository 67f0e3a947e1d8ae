"""Drops vision tokens between layers while a prompt is prefilled, and gives later steps the masks that fit.

layer      0 ... K-1 | K ... L-1
prefill    S tokens  | S' tokens, at their original positions or numbered anew
K/V cache  S + t     | S' + t columns
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from asymvlm.hf import attention as capture
from asymvlm.hf.arguments import CACHE, EMBEDS, MASK, POSITIONS, past_length, tokens_of
from asymvlm.hf.context import entered, innermost, pop, push
from asymvlm.hf.errors import MechanismError
from asymvlm.hf.flash import uses_flash
from asymvlm.hf.layers import MECHANISM, LayerDoors, at_columns, rotary_of, score_only
from asymvlm.hf.masks import CHUNKED
from asymvlm.hf.pruned_cache import hold
from asymvlm.hf.windows import sliding_window
from asymvlm.inside.later import Later
from asymvlm.inside.masks import stage_mask
from asymvlm.inside.prefill import Prefill, asking, keeping, taken
from asymvlm.inside.rotary import RotaryTable, check_consecutive, ranks
from asymvlm.inside.state import InsideState
from asymvlm.methods.inside.base import InsideMethod, LayerTokens
from asymvlm.models.adapter import Adapter
from asymvlm.prompt.columns import marked_columns
from asymvlm.prompt.reading import read_prompt
from asymvlm.prompt.selection import Selection
from asymvlm.settings.policies import VisionPruning
from asymvlm.tokens.images import has_several
from asymvlm.tokens.roles import check_prompt
from asymvlm_kernels.prefill.reference import compact

Entered = tuple[torch.Tensor, dict[str, Any]] | None


class InsidePruner:
    """What one decoder does around its layers for a method inside it.

    Raises:
        ValueError: for layers that the decoder does not have.
        NotImplementedError: for a family whose decoder does more between its layers than a method may know.
    """

    def __init__(self, model: nn.Module, adapter: Adapter, decoder: nn.Module, method: InsideMethod) -> None:
        config: Any = model.config
        self.config, self.model, self.adapter, self.method = config.get_text_config(), model, adapter, method
        self._window = sliding_window(self.config)
        layers = cast("Any", decoder).layers
        stages = method.layers
        if not stages or list(stages) != sorted({*stages}) or not 0 < stages[0] <= stages[-1] < len(layers):
            raise ValueError(f"layers of a method must ascend within 1 .. {len(layers) - 1}, got {stages}")
        in_chunks = CHUNKED in (getattr(self.config, "layer_types", None) or ())
        if reason := adapter.closed_between_layers or ("attention in chunks" if in_chunks else ""):
            raise NotImplementedError(f"methods inside the decoder do not know {adapter.model_type}: {reason}")
        attention = capture.attention_modules(decoder)
        self._layers = layers
        self._scored = {self._scorer(number): attention[self._scorer(number)] for number in stages}
        self._doors = LayerDoors(layers, range(stages[0], len(layers)), self._enter_layer)
        capture.install(self._scored)

    def remove(self) -> None:
        self._doors.remove()
        capture.remove(self._scored)

    def _scorer(self, number: int) -> int:
        """The layer whose attention scores in front of layer ``number``."""
        return number if self.method.ahead else number - 1

    # -- the prompt --------------------------------------------------------------------------------------------------

    def before_decoder(self, policy: VisionPruning, inputs: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
        """The decoder begins the whole prompt of a call. ``inputs`` of the model, ``arguments`` of its decoder.

        Raises:
            NotImplementedError: for a prompt in chunks, static caches, beams, and positions that a method cannot number
                anew.
            ValueError: for rows that a method cannot score.
        """
        ids, _ = check_prompt(inputs)
        embeds, cache = tokens_of(arguments), arguments.get(CACHE)
        if embeds.shape[1] != ids.shape[1] or past_length(cache) or getattr(cache, "is_compileable", False):
            raise NotImplementedError(
                "methods inside the decoder need the whole prompt in one step on a cache that grows, got "
                f"{embeds.shape[1]} of {ids.shape[1]} columns on a {type(cache).__name__}"
            )
        if self._window is not None and uses_flash(self.config):
            raise NotImplementedError(
                "FlashAttention counts sliding windows by index, not by original position: use attn_implementation "
                "'sdpa' or 'eager' with a method inside the decoder"
            )
        if len(embeds) > len(ids):
            raise NotImplementedError("methods inside the decoder do not work with beams or several sequences")
        prompt = read_prompt(self.model, self.adapter, policy, inputs, {EMBEDS: embeds})
        asks = asking(prompt.tokens, inputs.get("labels"))
        prompt = dataclasses.replace(prompt, tokens=keeping(prompt.tokens, asks))
        several = policy.per_image or has_several(prompt.grids, self.adapter.views)
        index = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        with torch.no_grad():
            noted = dict(self.method.begin(prompt))
        prefill = Prefill(
            method=self.method,
            policy=policy,
            prompt=prompt,
            asking=asks,
            noted=noted,
            groups=prompt.images if several else None,
            tokens=prompt.tokens,
            index=index.masked_fill(~prompt.tokens.real, -1),
        )
        if prefill.compact:
            if self._window is not None:
                raise NotImplementedError("a decoder with sliding windows keeps positions: they measure by them")
            check_consecutive(arguments.get(POSITIONS), prompt.tokens.real)
        push(prefill)
        if not self.method.ahead:
            capture.wanted.set(self._asked(self.method.layers[0], prefill))

    def _asked(self, number: int, prefill: Prefill) -> capture.Step:
        """What the layer that scores in front of layer ``number`` is asked for."""
        tokens = prefill.tokens
        rows = self.method.rows(prefill.stage(number)) & tokens.real
        found = rows.sum(1)
        mute = ((found == 0) & tokens.prunable.any(1)).nonzero()[:, 0].tolist()
        most = int(found.max())
        if mute or most == 0:
            raise ValueError(
                f"{self.method!r} wants tokens whose attention scores the images, and rows {mute} have none"
            )
        queries = compact(rows, most)
        standing = prefill.index.gather(1, queries.clamp_min(0)).masked_fill(queries < 0, -1)
        lying = capture.Places(
            prefill.index.masked_fill(~tokens.real, -2).to(torch.int32),
            standing[:, 0],
            queries=queries,
            query_pos=standing,
            per_head=self.method.per_head,
        )
        return capture.Step(places={self._scorer(number): lying}, scores_only=self.method.ahead)

    def abandon(self, prefill: Prefill) -> None:
        """An exception is on its way."""
        capture.wanted.set(None)
        pop(prefill)

    def after_decoder(self, prefill: Prefill, cache: Any) -> Selection:
        """The prompt is through, ``cache`` holds it, if there is one."""
        self.abandon(prefill)
        if prefill.first is None or tuple(prefill.done) != self.method.layers:
            raise MechanismError(MECHANISM, f"tokens went before layers {prefill.done}, not {self.method.layers}")
        whole = prefill.prompt.tokens.real
        if cache is not None and prefill.real:
            table = None if prefill.rotary is None else RotaryTable(prefill.rotary, whole)
            columns = dict(prefill.columns)
            hold(cache, InsideState(whole.shape[1], dict(prefill.real), columns, whole.sum(1), rotary=table))
        return prefill.selection()

    # -- layers ------------------------------------------------------------------------------------------------------

    def _enter_layer(self, number: int, hidden: torch.Tensor, kwargs: dict[str, Any]) -> Entered:
        prefill = innermost(Prefill)
        if prefill is None:
            later = innermost(Later)
            changed = None if later is None else later.arguments(self.config, self._window, number, hidden, kwargs)
            return None if changed is None else (hidden, changed)
        if number in self.method.layers:
            hidden = self._drop(number, hidden, kwargs, prefill)
        if not prefill.real:
            return None  # nothing has gone so far, and the layer is called as it was
        mask = kwargs.get(MASK)
        if id(mask) not in prefill.masks:  # layers of a kind share it
            fitted = stage_mask(self.config, hidden, mask, prefill.index, prefill.tokens.real)
            prefill.masks[id(mask)] = mask, fitted
        return hidden, {MASK: prefill.masks[id(mask)][1], **self._positions(number, kwargs, prefill)}

    def _positions(self, number: int, kwargs: dict[str, Any], prefill: Prefill) -> dict[str, Any]:
        """Rotary embeddings of what is left."""
        rotary = rotary_of(kwargs, number)
        if not prefill.compact:
            return at_columns(rotary, prefill.index.clamp_min(0))
        return at_columns(rotary, ranks(prefill.index >= 0, prefill.prompt.tokens.real))

    def _attention(self, number: int, hidden: torch.Tensor, kwargs: dict[str, Any], prefill: Prefill) -> torch.Tensor:
        """``(B, S')``, or ``(B, H, S')`` of each head, fp32: of the layer before, or of the one that begins."""
        step = capture.wanted.get()
        if self.method.ahead:
            step = self._asked(number, prefill)
            fitted = self._positions(number, kwargs, prefill) if prefill.real else {}
            with entered(step):
                score_only(self._layers[number], hidden.detach(), {**kwargs, **fitted})
        if step is None:
            raise MechanismError(MECHANISM, f"nothing was asked of layer {number - 1}")
        return step.mean().to(hidden.device)

    def _drop(self, number: int, hidden: torch.Tensor, kwargs: dict[str, Any], prefill: Prefill) -> torch.Tensor:
        """Let the method score in front of layer ``number``, and go on with what it leaves."""
        found, method = self._attention(number, hidden, kwargs, prefill), self.method
        heads = found if method.per_head else None
        stage = vars(prefill.stage(number))
        seen = LayerTokens(
            **stage, hidden=hidden.detach(), attention=found if heads is None else found.mean(1), heads=heads
        )
        scores = method.scores(seen)
        pruned = prefill.select(seen, scores)
        prefill.first = prefill.first or pruned
        pruned, joined = prefill.join(seen, scores, pruned)
        if joined is not None:
            hidden = torch.where(joined.mask[..., None], joined.hidden.to(hidden), hidden)
        before = prefill.tokens.real
        kept = marked_columns(pruned.index, hidden.shape[1])
        prefill.done.append(number)
        if bool((kept != before).any()):
            hidden = self._shorten(number, hidden, kwargs, prefill, pruned, kept)
        following = [layer for layer in method.layers if layer > number]
        if not method.ahead:
            capture.wanted.set(self._asked(following[0], prefill) if following else None)
        return hidden

    def _shorten(
        self, number: int, hidden: torch.Tensor, kwargs: dict[str, Any], prefill: Prefill, pruned: Any, kept: Any
    ) -> torch.Tensor:
        """Hidden states of what is left, for which masks and positions are made."""
        if prefill.compact and prefill.rotary is None:
            prefill.rotary = rotary_of(kwargs, number)
        if self.method.hides:
            prefill.hide(kept)
        else:
            prefill.shorten(pruned)
            hidden = taken(hidden, pruned.index)
        prefill.real[number], prefill.columns[number] = prefill.tokens.real, prefill.index
        prefill.lengths[number] = (prefill.index >= 0).sum(-1)
        prefill.masks.clear()
        return hidden
