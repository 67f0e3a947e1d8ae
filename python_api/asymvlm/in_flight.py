"""One call in flight on a patched model: what it was shortened to, and the proof that every step of it took hold.

The proof is made of facts that the host knows: how many tokens the model was fed, how many its decoder then got behind
how many cached ones, what the cache holds. It costs no synchronisation. Steps inside `torch.compile` are not counted.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from asymvlm.hf.arguments import CACHE, EMBEDS, IDS, MASK, past_length
from asymvlm.hf.caches import lengths_on_host
from asymvlm.hf.callers import OriginalIds
from asymvlm.hf.context import Frame
from asymvlm.hf.errors import MechanismError
from asymvlm.prompt import PrunedPrompt

if TYPE_CHECKING:
    from asymvlm.report import PruningReport

PREFILL = "feeding the shortened prompt"
STEPS = "following the decoder's steps"


@dataclass(eq=False)
class Call(Frame):
    """It lives in the context, so threads do not see each other's, and dies with the call."""

    owner: object = None  # the handle whose model is called
    report: PruningReport | None = None
    prompt: PrunedPrompt | None = None  # None: the call is left alone and only its cache is measured
    original: OriginalIds | None = None  # the caller's prompt, for code that `generate` hands ids to
    begun: bool = False  # the model was called in it
    cache: Any = None  # that its steps are on, once known
    phase: str = "forward"  # a plain call; `generate`: "prefill", "measure" (its last chunk runs), "decode"
    fed: int = 0  # columns of the shortened prompt that the model was fed, cached ones included
    end: int | None = None  # columns in the cache after prefill: drafted tokens may be fed behind the prompt
    step: tuple[int, int] | None = None  # tokens and cached columns that the decoder is about to get
    seen: bool = False  # the decoder got them
    started_over: bool = False  # without the cache, where LongRoPE passed its switch
    misplaced: torch.Tensor | None = None  # () bool, on the model's device: the first new token is out of place

    def forget(self) -> None:
        """Let go of all that it holds."""
        self.owner = self.report = self.prompt = self.cache = self.original = self.misplaced = None

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

    def enter_model(self, queries: int, cache: Any) -> None:
        """The model begins a step of ``queries`` tokens."""
        self.step, self.seen = (queries, past_on_host(cache)), False

    def enter_decoder(self, queries: int, cache: Any) -> None:
        """The decoder begins it.

        Raises:
            MechanismError: if the model did not begin it, or not like that, or the decoder had it already.
        """
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
        self.seen = True

    def leave_model(self) -> None:
        """The step is over.

        Raises:
            MechanismError: if the decoder was not called in it.
        """
        if self.step is not None and not self.seen:
            raise MechanismError(STEPS, f"the decoder was not called in a step of {self.step[0]} tokens")
        self.step = None

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

    def check_position(self, positions: torch.Tensor | None) -> None:
        """The first token behind the prompt goes on from its last column's position; compared on the device."""
        if self.phase != "decode" or self.prompt is None or self.misplaced is not None or self.started_over:
            return
        wanted = self.prompt.state.position_ids[..., -1:] + 1  # (B, 1) or (R, B, 1), as `generate` counts
        if positions is None or positions.ndim != wanted.ndim or positions.shape[-2] % wanted.shape[-2]:
            found = "no positions" if positions is None else f"positions {tuple(positions.shape)}"
            raise MechanismError(STEPS, f"the decoder got {found} behind a prompt that ends at {tuple(wanted.shape)}")
        wanted = wanted.repeat_interleave(positions.shape[-2] // wanted.shape[-2], -2)
        if positions.ndim == 3:
            positions = positions[-len(wanted) :]
        self.misplaced = (positions[..., :1] != wanted.to(positions)).any()

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
        if self.misplaced is not None and bool(self.misplaced):
            raise MechanismError(
                "going on from the original position", "the first new token stood elsewhere than behind the prompt"
            )
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
    call.fed = max(call.fed, min(end, prompt_length))
    if cache is not None and end >= prompt_length:
        call.phase, call.end = "measure", end
    fed = {name: value for name, value in arguments.items() if name != IDS}
    for name in call.prompt.whole_rows:
        fed[name] = call.prompt.inputs[name].repeat_interleave(repeats, 0)[:, :end]
    if cache is None and arguments.get(MASK) is None:
        fed[MASK] = torch.ones_like(input_ids)  # gapped positions without a mask are read as packed
    return {**fed, **{name: tensor.contiguous() for name, tensor in embeds.items()}}


__all__ = ["PREFILL", "Call", "feed_prompt"]
