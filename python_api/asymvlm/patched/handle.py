"""A patched model: its ``generate`` works on the shortened prompt, its forwards go through `Forwards`.

Everything is put on the instance and taken off again without a trace. `generate` is called on the shorter problem; the
model's door hands it the merged embeddings during prefill.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from asymvlm.eviction.text import TextEvictor
from asymvlm.hf.arguments import CACHE, EMBEDS, IDS, MASK, POSITIONS, bind, cache_of, past_length
from asymvlm.hf.callers import CRITERIA, PROCESSORS, ListMaker, OriginalIds
from asymvlm.hf.context import entered, innermost
from asymvlm.hf.doors import check_free
from asymvlm.hf.generation import StaticLength, generate_callee, infer_attention_mask
from asymvlm.hf.instance import Replaced
from asymvlm.models import adapter_for
from asymvlm.models.adapter import ENCODED
from asymvlm.patched.checks import check_call, check_recall
from asymvlm.patched.in_flight import Call
from asymvlm.patched.installing import install
from asymvlm.patched.recall import recall_for
from asymvlm.prompt.continuing import continue_call, restate_settings, with_original_prompt
from asymvlm.prompt.later import brings_images, prune_later_images
from asymvlm.prompt.shorten import PrunedPrompt, prune_prompt
from asymvlm.prompt.state import PromptState, state_of
from asymvlm.report.last import LastReport
from asymvlm.report.pruning import PruningReport, report_of, reported
from asymvlm.report.recall import stored_report
from asymvlm.report.unpruned import later_turn_report, untouched_report
from asymvlm.settings.cache_limit import CacheLimit
from asymvlm.settings.eviction import TextEviction, TurnEviction
from asymvlm.settings.policies import VisionPruning
from asymvlm.settings.strategy import AutoStrategy, Choice
from asymvlm_kernels import UniformBudget

HANDLE = "_asymvlm_handle"  # where a patched model keeps its handle


def _hides(mask: Any) -> bool:
    """Whether a mask closes anything: `generate` drops one of ones, and only then."""
    return isinstance(mask, torch.Tensor) and not bool(mask.all())


class PatchHandle:
    """A patched model.

    ``last`` reports the last call of this thread or task that had images or evicted text, or the newest of any where it
    made none; None before the first. ``enabled = False`` lets calls through untouched, and ``remove()`` or leaving the
    ``with`` block restores the model.
    """

    def __init__(
        self,
        model: nn.Module,
        vision: VisionPruning,
        text: TextEviction | None = None,
        turns: TurnEviction | None = None,
        strategy: AutoStrategy | None = None,
        logits: str = "kept",
        cache: CacheLimit | None = None,
    ) -> None:
        self.adapter = adapter_for(model, vision=strategy is not None or not vision.bypassed)
        if HANDLE in model.__dict__:
            raise RuntimeError(f"{type(model).__name__} is patched already: remove the first handle to patch again")
        vision.check_model(model)
        check_free(self.adapter.text_of(model))
        self.model = model
        self._vision, self._inside = vision, vision.inside
        self.text = text
        self.turns = turns
        self.cache = cache
        self.strategy = strategy
        self.enabled = True
        self.logits = logits
        self._last = LastReport()
        self._static_length = StaticLength()
        self._callee = generate_callee(model)
        self._evictor, self._forwards = install(self)
        self._generate = Replaced(model, "generate", _Generate(self))
        self._replaced = [self._generate, Replaced(model, HANDLE, self)]
        for method in (PROCESSORS, CRITERIA):
            self._replaced.append(Replaced(model, method, ListMaker(model, method, self._original_ids)))

    def __repr__(self) -> str:
        removed = "" if self.model.__dict__.get(HANDLE) is self else ", removed"
        settings = {"vision": self.vision, "text": self.text, "turns": self.turns, "cache": self.cache}
        parts = [f"{name}={value!r}" for name, value in settings.items() if value is not None]
        return f"<asymvlm patch of {type(self.model).__name__}{removed}: {', '.join(parts)}>"

    @property
    def vision(self) -> VisionPruning:
        return self._vision

    @vision.setter
    def vision(self, vision: VisionPruning) -> None:
        adapter_for(self.model, vision=not vision.bypassed)
        if not vision.bypassed and vision.inside != self._inside:
            raise ValueError(
                f"a patch is made for its method inside the decoder, {self._inside!r}: patch anew for {vision.inside!r}"
            )
        self._vision = vision

    @property
    def last(self) -> PruningReport | None:
        return self._last.get()

    @last.setter
    def last(self, report: PruningReport | None) -> None:
        self._last.set(report)

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Restore the model, bit for bit. Calling it again does nothing."""
        if self.model.__dict__.get(HANDLE) is not self:
            return
        self._forwards.remove()
        if self._evictor is not None:
            self._evictor.remove()
        for replaced in self._replaced:
            replaced.remove()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`GenerationMixin.generate` on the shortened prompt; the returned sequences start with the original one."""
        model_class: Any = type(self.model)
        call = bind(model_class.generate, self.model, args, kwargs)
        if self.model.__dict__.get(HANDLE) is not self:  # removed, and somebody's wrapper still leads here
            return self._original(call)
        if call.get("inputs") is not None and call.get(IDS) is None:
            call[IDS] = call.pop("inputs")
        cache = call.get(CACHE)
        state = state_of(cache)
        choice = self.choose(call, generating=True)
        vision = self.chosen_vision(choice, call)
        original = self._original
        if self._evictor is not None and self.enabled:
            original = functools.partial(self._evicting, self._evictor, choice)
        if state is None and not (self.enabled and self.adapter.brings_vision(call)):
            if self._evictor is None:
                return original(call)
            running = Call(owner=self, phase="decode", masked=_hides(call.get(MASK)))
            with entered(running):
                return self._done(original(call), running)
        if call.get(MASK) is None and call.get(IDS) is not None:
            call[MASK] = infer_attention_mask(self.model, call)
        if state is not None and not brings_images(self.model, self.adapter, state, call):
            return self._continue(original, state, call)
        if state is None and (vision.bypassed or vision.inside is not None):
            report = untouched_report(self.model, self.adapter, vision, call)
            running = Call(owner=self, report=report, masked=_hides(call.get(MASK)), phase="measure")
            if vision.inside is not None:
                check_call(call, state)
                running.inside = (vision, dict(call))
            with self._forwards.in_flight(running):
                return self._done(original(call), running)
        check_call(call, state)
        return self._generate_pruned(original, vision, state, call)

    def _generate_pruned(
        self, original: Callable[..., Any], vision: VisionPruning, state: PromptState | None, call: dict[str, Any]
    ) -> Any:
        """A call with images that are pruned: the first of its cache, or new ones in a later turn."""
        check_recall(vision, self.model, call)
        accepted = self._forwards.model.callee.accepted
        inputs = {name: value for name, value in call.items() if name in accepted or name == ENCODED}
        prompt, report = self.prune(vision, inputs, state, generating=True)
        shorter = {name: value for name, value in call.items() if name not in accepted}
        shorter |= {name: value for name, value in prompt.inputs.items() if value is not None}
        for name in (EMBEDS, *prompt.decoder_rows):
            del shorter[name]  # the model's door hands them out, so that any decoding method works
        shorter |= {IDS: prompt.state.input_ids, **restate_settings(self.model, call, prompt.state)}
        original_ids = OriginalIds(prompt.state.original_ids, prompt.state.length)
        running = Call(
            owner=self,
            report=report,
            prompt=prompt,
            original=original_ids,
            masked=_hides(prompt.state.attention_mask),
            phase="prefill",
        )
        with self._forwards.in_flight(running), self._static_length.used_by(self.model):
            result = original(shorter)
        sequences = result if torch.is_tensor(result) else result.sequences
        cache = call.get(CACHE)
        given = cache if cache is not None or torch.is_tensor(result) else cache_of(result)
        original_ids.check(call)
        running.check_end(sequences.shape[1] - prompt.state.length, given)
        return self._done(with_original_prompt(result, prompt.state, cache), running)

    def _original_ids(self) -> OriginalIds | None:
        """The prompt of the call in hand, where it is one of this model's."""
        call = innermost(Call)
        return call.original if call is not None and call.owner is self else None

    def _original(self, call: dict[str, Any]) -> Any:
        """The model's own `generate`, or the one that was on the instance before."""
        model_class: Any = type(self.model)
        original = self._generate.before or functools.partial(model_class.generate, self.model)
        return original(**self._callee.write(call))

    def choose(self, call: dict[str, Any], *, generating: bool) -> Choice | None:
        """What the strategy says about a call; None without one."""
        if self.strategy is None or not self.enabled:
            return None
        return self.strategy.choose(self.model, self.adapter, call, generating=generating)

    def chosen_vision(self, choice: Choice | None, call: dict[str, Any]) -> VisionPruning:
        if choice is None:
            return self.vision
        cache = call.get(CACHE)
        unpruned = cache is not None and state_of(cache) is None and past_length(cache) > 0
        if choice.prunes_vision and not unpruned:  # a cache that holds whole images goes on with whole images
            return self.vision
        return dataclasses.replace(self.vision, budget=UniformBudget(1.0))

    def _evicting(self, evictor: TextEvictor, choice: Choice | None, call: dict[str, Any]) -> Any:
        """The original `generate` on a cache to evict from."""
        evicts = choice is None or not choice.prunes_vision
        with evictor.call(self.model, call, evicts) as prepared:
            result = self._original(prepared.arguments)
            prepared.sequences = result if torch.is_tensor(result) else result.sequences
        running = innermost(Call)  # of this `generate`: nothing of an earlier one may stand beside its eviction
        assert running is not None
        report = running.report or untouched_report(self.model, self.adapter, self.vision, call)
        running.report = report and dataclasses.replace(report, eviction=prepared.report(), strategy=choice)
        return result

    def _done(self, result: Any, running: Call) -> Any:
        """What `generate` returns, with its report on it where it can carry one."""
        if running.report is not None:
            self.last = running.report
        return reported(result, running.report)

    def _continue(self, original: Callable[..., Any], state: PromptState, call: dict[str, Any]) -> Any:
        """A later turn on the cache of a pruned prompt: its images are in the cache already."""
        state, recalled = recall_for(self, state, call)
        shorter = call | continue_call(self.adapter, state, call) | restate_settings(self.model, call, state)
        original_ids = OriginalIds(state.original_ids, state.length)
        behind = self._behind(call[CACHE], shorter[POSITIONS])
        report = later_turn_report(self.model, self.adapter, self.vision, state, call)
        report.recall = recalled
        masked = _hides(shorter[MASK])
        running = Call(owner=self, report=report, original=original_ids, masked=masked, phase="decode", wanted=behind)
        with entered(running):
            result = original({name: value for name, value in shorter.items() if value is not None})
        original_ids.check(call)
        running.check_doubts()
        return self._done(with_original_prompt(result, state, call[CACHE]), running)

    def _behind(self, cache: Any, positions: torch.Tensor) -> torch.Tensor:
        """Of the ``positions`` that `generate` gets, those behind the cache, as the decoder has to get them."""
        return positions[..., past_length(cache) :] + self.adapter.first_position

    def prune(
        self, vision: VisionPruning, inputs: dict[str, Any], state: PromptState | None, *, generating: bool
    ) -> tuple[PrunedPrompt, PruningReport]:
        """The shorter problem of a call, the first of its cache or a later one, and the report of it."""
        if state is None:
            prompt = prune_prompt(self.model, self.adapter, vision, inputs, generating=generating)
        else:
            vision = vision if self.enabled else dataclasses.replace(vision, budget=UniformBudget(1.0))
            prompt = prune_later_images(self.model, self.adapter, vision, state, inputs, generating=generating)
        report = report_of(prompt.selection, self.model, self.adapter, vision, inputs)
        report.recall = stored_report(prompt.state, later=state is not None)
        return prompt, report


@dataclass(eq=False)
class _Generate:
    """The ``generate`` of a patched instance. Not a closure: a deep copy has to follow the copied model."""

    handle: PatchHandle

    @property
    def __signature__(self) -> inspect.Signature:
        model: Any = self.handle.model
        return inspect.signature(type(model).generate.__get__(model))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.handle.generate(*args, **kwargs)


__all__ = ["HANDLE", "PatchHandle"]
