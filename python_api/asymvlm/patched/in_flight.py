"""One call in flight on a patched model: what it was shortened to, and the proof that every step of it took hold.

The proof is made of facts that the host knows: how many tokens the model was fed, how many its decoder then got behind
how many cached ones, what the cache holds. Positions and ids are compared on the device and read once a prompt; no step
synchronises. Steps inside `torch.compile` are not counted.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from asymvlm.hf.arguments import CACHE, EMBEDS, IDS, MASK, POSITIONS, past_length, tokens_of
from asymvlm.hf.caches import lengths_on_host
from asymvlm.hf.callers import OriginalIds
from asymvlm.hf.context import Frame
from asymvlm.hf.errors import MechanismError
from asymvlm.prompt.shorten import PrunedPrompt
from asymvlm.report.pruning import PruningReport
from asymvlm.settings.policies import VisionPruning

PREFILL = "feeding the shortened prompt"
STEPS = "following the decoder's steps"


@dataclass(eq=False)
class Call(Frame):
    """It lives in the context, so threads do not see each other's, and dies with the call."""

    owner: object = None  # the handle whose model is called
    report: PruningReport | None = None
    prompt: PrunedPrompt | None = None  # None: the call is left alone and only its cache is measured
    inside: tuple[VisionPruning, dict[str, Any]] | None = None  # a prompt to prune between layers, and its inputs
    original: OriginalIds | None = None  # the caller's prompt, for code that `generate` hands ids to
    begun: bool = False  # the model was called in it
    cache: Any = None  # that its steps are on, once known
    masked: bool = False  # `generate` was given a mask that closes something, so its steps have one
    phase: str = "forward"  # a plain call; `generate`: "prefill", "measure" (its last chunk runs), "decode"
    fed: int = 0  # columns of the shortened prompt that the model was fed, cached ones included
    end: int | None = None  # columns in the cache after prefill: drafted tokens may be fed behind the prompt
    step: tuple[int, int] | None = None  # tokens and cached columns that the decoder is about to get
    seen: bool = False  # the decoder got them
    handed: tuple[str, ...] = ()  # of the mask and the positions, what the model was called with in it
    started_over: bool = False  # without the cache, where LongRoPE passed its switch
    wanted: torch.Tensor | None = None  # (B, n) or (R, B, n): positions of the next step's first tokens, if known
    doubts: list[torch.Tensor] = field(default_factory=list)  # () bool each, on the model's device: something is wrong

    def forget(self) -> None:
        """Let go of all that it holds."""
        self.owner = self.report = self.prompt = self.cache = self.original = self.wanted = self.inside = None
        self.doubts = []

    def owns(self, arguments: dict[str, Any]) -> bool:
        """Whether a forward inside `generate` is a step of it, not one of the caller's code that runs meanwhile."""
        cache, ids = arguments.get(CACHE), arguments.get(IDS)
        if not self.begun:
            self.begun, self.cache = True, cache
            return True
        if cache is not None or self.prompt is None:
            return cache is self.cache or cache is None
        # without a cache the whole sequence is fed again, and it begins with the prompt
        prompt = self.prompt.state.input_ids
        if ids is None or ids.shape[1] < prompt.shape[1] or len(ids) % len(prompt):
            return False
        return bool((ids[:, : prompt.shape[1]] == prompt.repeat_interleave(len(ids) // len(prompt), 0)).all())

    def enter_model(self, arguments: Mapping[str, Any]) -> None:
        """The model begins a step.

        Raises:
            MechanismError: if the one before did not end.
        """
        if self.step is not None:
            raise MechanismError(STEPS, f"the model's hook was not called behind a step of {self.step[0]} tokens")
        self.step, self.seen = (tokens_of(arguments).shape[1], past_on_host(arguments.get(CACHE))), False
        self.handed = tuple(name for name in (MASK, POSITIONS) if arguments.get(name) is not None)
        if self.wanted is not None and POSITIONS not in self.handed and not self.started_over:
            raise MechanismError(STEPS, f"the model got no positions for {self.step[0]} tokens")
        # for a static cache `generate` makes the mask itself, and may find that none is needed
        if self.masked and MASK not in self.handed and not getattr(arguments.get(CACHE), "is_compileable", False):
            raise MechanismError(STEPS, f"`generate` was given a mask and the model got none for {self.step[0]} tokens")

    def enter_decoder(self, arguments: Mapping[str, Any]) -> None:
        """The decoder begins it.

        Raises:
            MechanismError: if the model did not begin it, or not like that, or the decoder had it already.
        """
        queries, cache = tokens_of(arguments).shape[1], arguments.get(CACHE)
        if self.step is None:
            if self.phase == "prefill":
                raise MechanismError(PREFILL, f"the decoder got {queries} tokens that did not pass the model's hook")
            return
        if self.seen:
            raise MechanismError(STEPS, f"the decoder was called twice in one step of {self.step[0]} tokens")
        got = (queries, past_on_host(cache))
        if got != self.step:
            raise MechanismError(
                STEPS,
                f"the model was called with {self.step[0]} tokens behind {self.step[1]} cached ones and its decoder "
                f"with {got[0]} behind {got[1]}",
            )
        # a composite may have found that no mask is needed, and says None
        lost = [
            name for name in self.handed if arguments.get(name) is None and (name == POSITIONS or name not in arguments)
        ]
        if lost:
            raise MechanismError(STEPS, f"the model was called with {' and '.join(lost)} and its decoder without")
        self.seen = True
        self._check_positions(arguments.get(POSITIONS))

    def _check_positions(self, positions: Any) -> None:
        """A prompt stands where it stood, the first token behind it goes on from there; compared on the device."""
        wanted, self.wanted = self.wanted, None
        if wanted is None or self.started_over:
            return
        if positions is None or positions.ndim != wanted.ndim or positions.shape[-2] % wanted.shape[-2]:
            found = "no positions" if positions is None else f"positions {tuple(positions.shape)}"
            raise MechanismError(STEPS, f"the decoder got {found} for tokens that stand at {tuple(wanted.shape)}")
        wanted = wanted.repeat_interleave(positions.shape[-2] // wanted.shape[-2], -2)
        if positions.ndim == 3:
            positions = positions[-len(wanted) :]  # behind those of text, where a family has them
        self.doubts.append((positions[..., : wanted.shape[-1]] != wanted.to(positions)).any())

    def check_doubts(self) -> None:
        """Once a prompt, where its answer goes out: the one synchronisation of all this.

        Raises:
            MechanismError: if tokens of it, or the first one behind it, stood elsewhere or were others.
        """
        doubts, self.doubts = self.doubts, []
        if doubts and bool(torch.stack([doubt.to(doubts[0].device) for doubt in doubts]).any()):
            raise MechanismError(
                "keeping the original positions", "a token of the prompt, or the first one behind it, stood elsewhere"
            )

    def first_new_position(self) -> torch.Tensor | None:
        """Where the first token behind the prompt stands, ``(B, 1)`` or ``(R, B, 1)``; None if drafts were fed too."""
        if self.prompt is None or (self.end or 0) > self.prompt.state.length:
            return None
        return self.prompt.state.position_ids[..., -1:] + 1  # as `generate` counts

    def leave_model(self) -> None:
        """The step is over.

        Raises:
            MechanismError: if the decoder was not called in it.
        """
        if self.step is not None and not self.seen:
            raise MechanismError(STEPS, f"the decoder was not called in a step of {self.step[0]} tokens")
        self.step = None

    def check_left_behind(self, cache: Any) -> None:
        """A plain forward ran, and the hook behind it did not: so its cache knows nothing of the pruned prompt.

        Raises:
            MechanismError: if the next step goes on with that cache.
        """
        goes_on = self.prompt is not None and self.seen and cache is not None
        if goes_on and self.prompt is not None and past_on_host(cache) == self.prompt.state.length:
            raise MechanismError(PREFILL, "the model's hook was not called behind it")

    def check_cache(self, cache: Any) -> None:
        """After prefill the cache holds the shortened prompt and nothing else, in every layer that holds all tokens."""
        if self.prompt is None or cache is None:
            return
        wanted = self.prompt.state.length if self.end is None else self.end
        for layer, held in lengths_on_host(cache):
            if held != wanted:
                raise MechanismError(
                    PREFILL, f"layer {layer} of the cache holds {held} columns after prefill, wanted {wanted}"
                )

    def check_end(self, new: int, cache: Any) -> None:
        """`generate` is over: the prompt was fed whole, and ``new`` tokens, the last one not, are in the cache.

        Args:
            new: generated columns. cache: what `generate` returned or was given; None where it kept its own.
        """
        if self.prompt is None:
            return
        length = self.prompt.state.length
        if self.fed < length or (self.phase == "prefill" and cache is not None):
            raise MechanismError(PREFILL, f"{self.fed} of its {length} columns were fed")
        if self.phase == "measure":
            raise MechanismError(PREFILL, "the model's hook was not called behind it")
        self.check_doubts()
        for layer, held in () if self.started_over else lengths_on_host(cache):
            if held < length + new - 1:
                raise MechanismError(
                    STEPS, f"layer {layer} of the cache holds {held} columns after {new} new ones behind {length}"
                )


def past_on_host(cache: Any) -> int:
    """Columns in a cache as far as the host knows; -1 where only a device does."""
    if cache is None:
        return 0
    length = cache.get_seq_length()
    return int(length) if not isinstance(length, torch.Tensor) or length.device.type == "cpu" else -1


def feed_prompt(model: nn.Module, call: Call, arguments: dict[str, Any]) -> dict[str, Any]:
    """Inside `generate`: swap the prompt ids of this (chunk of the) prefill for the merged embeddings.

    Raises:
        NotImplementedError: if a cache of earlier turns was given up, whose embeddings are gone.
        MechanismError: if the step does not go on where the one before ended.
    """
    assert call.prompt is not None
    input_ids, cache = arguments.get(IDS), arguments.get(CACHE)
    past = past_length(cache)
    prompt_length = call.prompt.state.length
    if input_ids is None or past >= prompt_length:
        return arguments
    cached = call.prompt.cached
    if past < cached:
        raise NotImplementedError(
            f"the cache of {cached} tokens was given up (LongRoPE beyond its switch), and their embeddings are gone: "
            "pass the whole conversation without a cache"
        )
    if cache is not None and past > max(call.fed, cached):
        raise MechanismError(PREFILL, f"a step begins at column {past}, but only {call.fed} were fed before")
    end = past + input_ids.shape[1]
    repeats = input_ids.shape[0] // call.prompt.inputs[EMBEDS].shape[0]  # beams, num_return_sequences
    rows = {EMBEDS: cast("Any", model).get_input_embeddings()}
    rows |= {name: functools.partial(more, model) for name, more in call.prompt.decoder_rows.items()}
    embeds = {}
    for name, more in rows.items():
        embeds[name] = call.prompt.inputs[name].repeat_interleave(repeats, 0)[:, past - cached : end - cached]
        if end > prompt_length:  # no cache, or drafted tokens behind the prompt
            generated = more(input_ids[:, prompt_length - past :])
            embeds[name] = torch.cat([embeds[name], generated.to(embeds[name].dtype)], 1)
    known = call.prompt.state.input_ids[:, past:end].repeat_interleave(repeats, 0)
    others = input_ids[:, : known.shape[1]] != known.to(input_ids)  # than the embeddings are of
    call.doubts.append(others.any())
    call.wanted = call.prompt.state.position_ids[..., past:end]
    call.fed = max(call.fed, min(end, prompt_length))
    if cache is not None and end >= prompt_length:
        call.phase, call.end = "measure", end
    fed = {name: value for name, value in arguments.items() if name != IDS}
    for name in call.prompt.whole_rows:
        fed[name] = call.prompt.inputs[name].repeat_interleave(repeats, 0)[:, :end]
    if cache is None and arguments.get(MASK) is None:
        fed[MASK] = torch.ones_like(input_ids)  # gapped positions without a mask are read as packed
    return {**fed, **{name: tensor.contiguous() for name, tensor in embeds.items()}}


__all__ = ["PREFILL", "STEPS", "Call", "feed_prompt", "past_on_host"]
