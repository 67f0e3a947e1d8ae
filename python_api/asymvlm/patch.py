"""Patch one model instance: its ``generate`` works on the shortened prompt, its forwards go through `Forwards`.

Everything is put on the instance and taken off again without a trace. `generate` is called on the shorter problem; the
model's door hands it the merged embeddings during prefill.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from asymvlm.cache_state import PromptState, state_of
from asymvlm.continuing import continue_call, restate_settings, with_original_prompt
from asymvlm.eviction.text import TextEvictor
from asymvlm.eviction.turns import TurnEvictor
from asymvlm.forward import Forwards, check_call
from asymvlm.hf.arguments import CACHE, EMBEDS, IDS, MASK, POSITIONS, bind, cache_of, past_length
from asymvlm.hf.callers import CRITERIA, PROCESSORS, ListMaker, OriginalIds
from asymvlm.hf.context import entered, innermost
from asymvlm.hf.doors import check_free
from asymvlm.hf.generation import StaticLength, generate_callee, infer_attention_mask
from asymvlm.hf.instance import Replaced
from asymvlm.hf.peft import unwrapped
from asymvlm.hf.versions import warn_if_untested
from asymvlm.in_flight import Call
from asymvlm.later_images import brings_images, prune_later_images
from asymvlm.models import adapter_for
from asymvlm.models.adapter import ENCODED
from asymvlm.policies import TextEviction, TurnEviction, VisionPruning, as_vision
from asymvlm.prompt import PrunedPrompt, has_images, prune_prompt, untouched_report
from asymvlm.report import PruningReport
from asymvlm.strategy import AutoStrategy, Choice
from asymvlm_kernels import UniformBudget

HANDLE = "_asymvlm_handle"  # where a patched model keeps its handle


def patch(
    model: nn.Module,
    vision: VisionPruning | float | None = None,
    text: TextEviction | None = None,
    turns: TurnEviction | None = None,
    *,
    keep: float | None = None,
    strategy: str | None = None,
) -> PatchHandle:
    """Prune the vision tokens, and evict generated ones, in every later call of this model instance.

    ``generate``, ``model(**inputs)`` and pipelines then work on the shortened sequence. Returned sequences start with
    the original prompt; logits, attentions and hidden states have S' columns, which ``handle.last.index`` maps back.
    Gradients into the vision tower and the embeddings are not supported through a patched model.

    Args:
        model: a supported Hugging Face vision-language model (see `supported_models`), or a PEFT model around one,
            which is then patched itself.
        vision: settings, or a keep ratio in (0, 1], the share of vision tokens to keep. None means ``VisionPruning()``,
            half of them by cosine similarity, where nothing else is asked for, and no pruning beside eviction.
        text: evict generated tokens while decoding; None leaves them.
        turns: evict whole earlier answers when a turn of a dialogue begins; None leaves them.
        keep: a keep ratio, in other words ``vision=keep``.
        strategy: ``"auto"`` prunes vision in calls where vision tokens dominate and evicts text in the others, as
            `AutoStrategy` says; settings that are None are its own. ``handle.last.strategy`` explains the choice.
    Returns:
        `PatchHandle`, also a context manager that removes the patch on exit.
    Raises:
        ValueError: if the family is unknown, and the message lists the known ones; for another strategy.
        TypeError: for settings of another type.
        RuntimeError: if the model is patched already, or shares its decoder with one that is.
    """
    warn_if_untested()
    vision = as_vision(vision, keep)
    for name, found, wanted in (("text", text, TextEviction), ("turns", turns, TurnEviction)):
        if found is not None and not isinstance(found, wanted):
            raise TypeError(f"{name} must be {wanted.__name__}(...) or None, got {found!r}")
    if strategy not in (None, "auto"):
        raise ValueError(f"strategy must be None or 'auto', got {strategy!r}")
    if strategy is not None:
        given = {"vision": vision, "text": text, "turns": turns}
        auto = AutoStrategy(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
        return PatchHandle(unwrapped(model), auto.vision, auto.text, auto.turns, auto)
    if vision is None:
        vision = VisionPruning() if text is None and turns is None else VisionPruning(budget=UniformBudget(1.0))
    return PatchHandle(unwrapped(model), vision, text, turns)


def _hides(mask: Any) -> bool:
    """Whether a mask closes anything: `generate` drops one of ones, and only then."""
    return isinstance(mask, torch.Tensor) and not bool(mask.all())


class PatchHandle:
    """A patched model.

    ``last`` reports the last call that had images (None before the first), its ``eviction`` the last `generate`;
    ``enabled = False`` lets calls through untouched, and ``remove()`` or leaving the ``with`` block restores the model.
    """

    def __init__(
        self,
        model: nn.Module,
        vision: VisionPruning,
        text: TextEviction | None = None,
        turns: TurnEviction | None = None,
        strategy: AutoStrategy | None = None,
    ) -> None:
        self.adapter = adapter_for(model)
        if HANDLE in model.__dict__:
            raise RuntimeError(f"{type(model).__name__} is patched already: remove the first handle to patch again")
        vision.check_model(model)
        check_free(self.adapter.text_of(model))
        self.model = model
        self.vision = vision
        self.text = text
        self.turns = turns
        self.strategy = strategy
        self.enabled = True
        self.last: PruningReport | None = None
        self._static_length = StaticLength()
        self._callee = generate_callee(model)
        text_config = cast("Any", model.config).get_text_config()
        self._evictor = None
        if text is not None or turns is not None:
            turn_evictor = None if turns is None else TurnEvictor(self.adapter, turns)
            # it refuses decoders that it does not know, so it goes before anything of ours is on the model
            self._evictor = TextEvictor(self, self.adapter.text_of(model), text_config, text, turn_evictor)
        self._forwards = Forwards(self, self._evictor)
        self._generate = Replaced(model, "generate", _Generate(self))
        self._replaced = [self._generate, Replaced(model, HANDLE, self)]
        for method in (PROCESSORS, CRITERIA):
            self._replaced.append(Replaced(model, method, ListMaker(model, method, self._original_ids)))

    def __repr__(self) -> str:
        removed = "" if self.model.__dict__.get(HANDLE) is self else ", removed"
        settings = {"vision": self.vision, "text": self.text, "turns": self.turns}
        parts = [f"{name}={value!r}" for name, value in settings.items() if value is not None]
        return f"<asymvlm patch of {type(self.model).__name__}{removed}: {', '.join(parts)}>"

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
        if state is None and not (self.enabled and has_images(self.adapter, call)):
            if self._evictor is None:
                return original(call)
            with entered(Call(owner=self, phase="decode", masked=_hides(call.get(MASK)))):
                return original(call)
        if call.get(MASK) is None and call.get(IDS) is not None:
            call[MASK] = infer_attention_mask(self.model, call)
        if state is not None and not brings_images(self.model, self.adapter, state, call):
            return self._continue(original, state, call)
        if state is None and vision.bypassed:
            self.last = untouched_report(self.model, self.adapter, vision, call)
            with self._forwards.in_flight(
                Call(owner=self, report=self.last, masked=_hides(call.get(MASK)), phase="measure")
            ):
                return original(call)
        check_call(call, state)
        return self._generate_pruned(original, vision, state, call)

    def _generate_pruned(
        self, original: Callable[..., Any], vision: VisionPruning, state: PromptState | None, call: dict[str, Any]
    ) -> Any:
        """A call with images that are pruned: the first of its cache, or new ones in a later turn."""
        accepted = self._forwards.model.callee.accepted
        inputs = {name: value for name, value in call.items() if name in accepted or name == ENCODED}
        prompt = self.prune(vision, inputs, state, generating=True)
        self.last = prompt.report
        shorter = {name: value for name, value in call.items() if name not in accepted}
        shorter |= {name: value for name, value in prompt.inputs.items() if value is not None}
        for name in (EMBEDS, *prompt.decoder_rows):
            del shorter[name]  # the model's door hands them out, so that any decoding method works
        shorter |= {IDS: prompt.state.input_ids, **restate_settings(self.model, call, prompt.state)}
        original_ids = OriginalIds(prompt.state.original_ids, prompt.state.length)
        running = Call(
            owner=self,
            report=prompt.report,
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
        return with_original_prompt(result, prompt.state, cache)

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
        report = untouched_report(self.model, self.adapter, self.vision, call) if self.last is None else self.last
        self.last = report and dataclasses.replace(report, eviction=prepared.report(), strategy=choice)
        return result

    def _continue(self, original: Callable[..., Any], state: PromptState, call: dict[str, Any]) -> Any:
        """A later turn on the cache of a pruned prompt: its images are in the cache already."""
        shorter = call | continue_call(self.adapter, state, call) | restate_settings(self.model, call, state)
        original_ids = OriginalIds(state.original_ids, state.length)
        behind = self._behind(call[CACHE], shorter[POSITIONS])
        running = Call(owner=self, original=original_ids, masked=_hides(shorter[MASK]), phase="decode", wanted=behind)
        with entered(running):
            result = original({name: value for name, value in shorter.items() if value is not None})
        original_ids.check(call)
        running.check_doubts()
        return with_original_prompt(result, state, call[CACHE])

    def _behind(self, cache: Any, positions: torch.Tensor) -> torch.Tensor:
        """Of the ``positions`` that `generate` gets, those behind the cache, as the decoder has to get them."""
        return positions[..., past_length(cache) :] + self.adapter.first_position

    def prune(
        self, vision: VisionPruning, inputs: dict[str, Any], state: PromptState | None, *, generating: bool
    ) -> PrunedPrompt:
        if state is None:
            return prune_prompt(self.model, self.adapter, vision, inputs, generating=generating)
        vision = vision if self.enabled else dataclasses.replace(vision, budget=UniformBudget(1.0))
        return prune_later_images(self.model, self.adapter, vision, state, inputs, generating=generating)


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


__all__ = ["PatchHandle", "patch"]
