"""Hooks, positions, masks, undo: the mechanics, once for every family.

Three touch points, all on the instance and all removed without a trace: the attribute ``generate``, a forward pre-hook
and a forward hook on the top model. `generate` is called on the shorter problem; the pre-hook hands it the merged
embeddings during prefill. A plain forward is pruned by the same pre-hook, and later steps on its cache are repaired.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from asymvlm.cache_state import PromptState, find_cache, remember, repair_step, state_of
from asymvlm.calls import Call, current_call, feed_prompt, in_flight, set_call
from asymvlm.deepstack import deepstack_inputs
from asymvlm.eviction.text import TextEvictor
from asymvlm.eviction.turns import TurnEvictor
from asymvlm.flash import one_sequence, uses_flash
from asymvlm.generation import (
    StaticLength,
    continue_call,
    infer_attention_mask,
    restate_settings,
    with_original_prompt,
)
from asymvlm.hf.versions import warn_if_untested
from asymvlm.later_images import brings_images, prune_later_images
from asymvlm.models import adapter_for
from asymvlm.policies import TextEviction, TurnEviction, VisionPruning
from asymvlm.prompt import PrunedPrompt, check_prompt, has_images, prune_prompt, untouched_report
from asymvlm.report import PruningReport
from asymvlm.strategy import AutoStrategy, Choice
from asymvlm.windows import sliding_window, tighten
from asymvlm.wrappers import unwrapped
from asymvlm_kernels import UniformBudget

HANDLE = "_asymvlm_handle"  # where a patched model keeps its handle


def patch(
    model: nn.Module,
    vision: VisionPruning | None = None,
    text: TextEviction | None = None,
    turns: TurnEviction | None = None,
    *,
    strategy: str | None = None,
) -> PatchHandle:
    """Prune the vision tokens, and evict generated ones, in every later call of this model instance.

    ``generate``, ``model(**inputs)`` and pipelines then work on the shortened sequence. Returned sequences start with
    the original prompt; logits, attentions and hidden states have S' columns, which ``handle.last.index`` maps back.
    Gradients into the vision tower and the embeddings are not supported through a patched model.

    Args:
        model: a supported Hugging Face vision-language model (see `supported_models`), or a PEFT model around one,
            which is then patched itself.
        vision: settings. None means ``VisionPruning()``, half the vision tokens by cosine similarity, where nothing
            else is asked for, and no pruning beside eviction.
        text: evict generated tokens while decoding; None leaves them.
        turns: evict whole earlier answers when a turn of a dialogue begins; None leaves them.
        strategy: ``"auto"`` prunes vision in calls where vision tokens dominate and evicts text in the others, as
            `AutoStrategy` says; settings that are None are its own. ``handle.last.strategy`` explains the choice.
    Returns:
        `PatchHandle`, also a context manager that removes the patch on exit.
    Raises:
        ValueError: if the family is unknown, and the message lists the known ones; for another strategy.
        RuntimeError: if the model is patched already.
    """
    warn_if_untested()
    if strategy not in (None, "auto"):
        raise ValueError(f"strategy must be None or 'auto', got {strategy!r}")
    if strategy is not None:
        given = {"vision": vision, "text": text, "turns": turns}
        auto = AutoStrategy(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
        return PatchHandle(unwrapped(model), auto.vision, auto.text, auto.turns, auto)
    if vision is None:
        vision = VisionPruning() if text is None and turns is None else VisionPruning(budget=UniformBudget(1.0))
    return PatchHandle(unwrapped(model), vision, text, turns)


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
        self.model = model
        self.vision = vision
        self.text = text
        self.turns = turns
        self.strategy = strategy
        self.enabled = True
        self.last: PruningReport | None = None
        self._static_length = StaticLength()
        self._pending: dict[Call, None] = {}  # calls before their decode steps; empty, the hooks are constant
        self._previous_generate = model.__dict__.get("generate")
        text_config = cast("Any", model.config).get_text_config()
        # before our own decoder hook: that one narrows the windows of masks that evicted tokens are gone from
        self._evictor = None
        if text is not None or turns is not None:
            turn_evictor = None if turns is None else TurnEvictor(self.adapter, turns)
            # it refuses decoders that it does not know, so it goes before hooks of ours are on the model
            self._evictor = TextEvictor(self, self.adapter.text_of(model), text_config, text, turn_evictor)
        tightened = vision.positions == "keep" and not vision.bypassed
        self._window = sliding_window(text_config) if tightened else None
        self._hooks = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True),
            self.adapter.text_of(model).register_forward_pre_hook(self._before_decoder, with_kwargs=True),
        ]
        model.__dict__["generate"] = functools.update_wrapper(_Generate(self), cast("Any", model).generate)
        model.__dict__[HANDLE] = self

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Restore the model, bit for bit. Calling it again does nothing."""
        if self.model.__dict__.get(HANDLE) is not self:
            return
        for hook in self._hooks:
            hook.remove()
        if self._evictor is not None:
            self._evictor.remove()
        del self.model.__dict__[HANDLE]
        if self._previous_generate is None:
            del self.model.__dict__["generate"]
        else:
            self.model.__dict__["generate"] = self._previous_generate

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`GenerationMixin.generate` on the shortened prompt; the returned sequences start with the original one."""
        model_class: Any = type(self.model)
        original = self._previous_generate or functools.partial(model_class.generate, self.model)
        call = _named(model_class.generate, self.model, args, kwargs)
        if call.get("inputs") is not None and call.get("input_ids") is None:
            call["input_ids"] = call.pop("inputs")
        state = state_of(call.get("past_key_values"))
        choice = self._choose(call, generating=True)
        vision = self._chosen_vision(choice, call)
        if self._evictor is not None and self.enabled:
            original = functools.partial(self._evicting, self._evictor, choice, original)
        if state is None and not (self.enabled and has_images(self.adapter, call)):
            return original(*args, **kwargs)
        if call.get("attention_mask") is None and call.get("input_ids") is not None:
            call["attention_mask"] = infer_attention_mask(self.model, call)
        if state is not None and not brings_images(self.model, self.adapter, state, call):
            return self._continue(original, state, call)
        if state is None and vision.bypassed:
            self.last = untouched_report(self.model, self.adapter, vision, call)
            with self._in_flight(Call(self, self.last, None, "measure")):
                return original(*args, **kwargs)
        _check_call(call, state)
        accepted = inspect.signature(type(self.model).forward).parameters
        inputs = {name: value for name, value in call.items() if name in accepted}
        prompt = self._prune(vision, inputs, state, generating=True)
        self.last = prompt.report
        shorter = {name: value for name, value in call.items() if name not in accepted}
        shorter |= {name: value for name, value in prompt.inputs.items() if value is not None}
        for name in ("inputs_embeds", *prompt.decoder_rows):
            del shorter[name]  # the pre-hook hands them out, so that any decoding method works
        shorter |= {"input_ids": prompt.state.input_ids, **restate_settings(self.model, call, prompt.state)}
        with self._in_flight(Call(self, prompt.report, prompt, "prefill")), self._static_length.used_by(self.model):
            result = original(**shorter)
        return with_original_prompt(result, prompt.state)

    def _choose(self, call: dict[str, Any], *, generating: bool) -> Choice | None:
        """What the strategy says about a call; None without one."""
        if self.strategy is None or not self.enabled:
            return None
        return self.strategy.choose(self.model, self.adapter, call, generating=generating)

    def _chosen_vision(self, choice: Choice | None, call: dict[str, Any]) -> VisionPruning:
        if choice is None:
            return self.vision
        cache = call.get("past_key_values")
        unpruned = cache is not None and state_of(cache) is None and int(cache.get_seq_length()) > 0
        if choice.prunes_vision and not unpruned:  # a cache that holds whole images goes on with whole images
            return self.vision
        return dataclasses.replace(self.vision, budget=UniformBudget(1.0))

    def _evicting(
        self, evictor: TextEvictor, choice: Choice | None, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """`original` on a cache to evict from."""
        model_class: Any = type(self.model)
        call = _named(model_class.generate, self.model, args, kwargs)
        if call.get("inputs") is not None and call.get("input_ids") is None:
            call["input_ids"] = call.pop("inputs")
        evicts = choice is None or not choice.prunes_vision
        with evictor.call(self.model, call, evicts) as prepared:
            result = original(**prepared.arguments)
            prepared.sequences = result if torch.is_tensor(result) else result.sequences
        report = untouched_report(self.model, self.adapter, self.vision, call) if self.last is None else self.last
        self.last = report and dataclasses.replace(report, eviction=prepared.report(), strategy=choice)
        return result

    def _continue(self, original: Callable[..., Any], state: PromptState, call: dict[str, Any]) -> Any:
        """A later turn on the cache of a pruned prompt: its images are in the cache already."""
        shorter = call | continue_call(self.adapter, state, call) | restate_settings(self.model, call, state)
        with in_flight(Call(self, None, None, "decode")):
            result = original(**{name: value for name, value in shorter.items() if value is not None})
        return with_original_prompt(result, state)

    def _prune(
        self, vision: VisionPruning, inputs: dict[str, Any], state: PromptState | None, *, generating: bool
    ) -> PrunedPrompt:
        if state is None:
            return prune_prompt(self.model, self.adapter, vision, inputs, generating=generating)
        vision = vision if self.enabled else dataclasses.replace(vision, budget=UniformBudget(1.0))
        return prune_later_images(self.model, self.adapter, vision, state, inputs, generating=generating)

    @contextlib.contextmanager
    def _in_flight(self, call: Call) -> Iterator[None]:
        self._pending[call] = None
        try:
            with in_flight(call):
                yield
        finally:
            self._pending.pop(call, None)

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cache = kwargs.get("past_key_values")
        images = has_images(self.adapter, kwargs)
        if not (self._pending or args or images) and cache is not None and state_of(cache) is None:
            return None  # a decode step, which torch.compile traces without a graph break
        call = current_call()
        if call is not None and call.owner is self and call.phase == "forward":
            self._pending.pop(call, None)
            call = call.outer  # an interrupted forward, whose hook never ran, left its call behind
            set_call(call)
        if call is not None and call.owner is self:
            # a step without a cache after some with one: LongRoPE passed its switch and starts over
            starts_over = call.prompt is not None and cache is None
            return (args, feed_prompt(module, call, kwargs)) if call.phase == "prefill" or starts_over else None
        if args:
            kwargs = _named(type(module).forward, module, args, kwargs)
            cache, images = kwargs.get("past_key_values"), has_images(self.adapter, kwargs)
        state = state_of(cache)
        if state is not None and not images:
            return (), repair_step(state, kwargs)
        if state is None and not (self.enabled and images):
            return (), kwargs
        choice = self._choose(kwargs, generating=False)
        vision = self._chosen_vision(choice, kwargs)
        if state is None and vision.bypassed:
            self.last = untouched_report(self.model, self.adapter, vision, kwargs)
            if self.last is not None:
                self.last.strategy = choice
            self._expect(Call(self, self.last, None, "forward", outer=call))
            return (), kwargs
        _check_call(kwargs, state)
        if state is None and self.adapter.needs_fresh_cache and getattr(cache, "is_initialized", False):
            raise NotImplementedError(f"{self.adapter.model_type} needs a new cache here, got one that was reset")
        prompt = self._prune(vision, kwargs, state, generating=False)
        prompt.report.strategy = choice
        self.last = prompt.report
        self._expect(Call(self, prompt.report, prompt, "forward", outer=call))
        return (), prompt.inputs

    def _expect(self, call: Call) -> None:
        self._pending[call] = None
        set_call(call)

    def _before_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hand the decoder what its composite cannot: thinned DeepStack rows, windows as wide as they were.

        FlashAttention is told, too, that a row is one sequence.
        """
        if not self._pending and self._window is None:
            return None
        call, cache = current_call(), kwargs.get("past_key_values")
        prompt = call.prompt if call is not None and call.owner is self else None
        state = prompt.state if prompt is not None else state_of(cache)
        if state is None:
            return None
        batch, queries = kwargs["inputs_embeds"].shape[:2]
        past = 0 if cache is None else int(cache.get_seq_length())
        in_prompt = past < state.length
        if prompt is not None and prompt.deepstack is not None and in_prompt:
            kwargs |= deepstack_inputs(prompt.deepstack, past - prompt.cached, queries, batch)
        text_config = cast("Any", self.model.config).get_text_config()
        if in_prompt and batch == 1 < queries and uses_flash(text_config):
            kwargs |= one_sequence(module, queries, past, kwargs["inputs_embeds"].device)
        if self._window is not None and not (self.adapter.open_prompt and in_prompt):
            kwargs["attention_mask"] = tighten(text_config, kwargs, state.index, state.original_length)
        return args, kwargs

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        call = current_call() if self._pending else None
        if call is None or call.owner is not self or call.phase in ("prefill", "decode"):
            return
        self._pending.pop(call, None)
        cache = find_cache(output)
        if call.report is not None:
            call.report.measure(cache)
        if call.phase == "measure":
            call.phase = "decode"
            return
        set_call(call.outer)
        if cache is not None and call.prompt is not None:
            remember(cache, call.prompt.state)


@dataclass(eq=False)
class _Generate:
    """The ``generate`` of a patched instance. Not a closure: a deep copy has to follow the copied model."""

    handle: PatchHandle

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.handle.generate(*args, **kwargs)


def _named(function: Any, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a method call by name."""
    bound = inspect.signature(function).bind_partial(model, *args, **kwargs).arguments
    bound.pop("self", None)
    return {**bound, **bound.pop("kwargs", {})}


def _check_call(call: dict[str, Any], state: PromptState | None) -> None:
    cache = call.get("past_key_values")
    if state is None and cache is not None and cache.get_seq_length() > 0:
        raise NotImplementedError(
            f"pruning needs an empty cache, got one of {cache.get_seq_length()} tokens: pass the whole conversation"
        )
    if call.get("assistant_model") is not None:
        raise NotImplementedError("an assistant_model is not supported: it would see a prompt of another length")
    if isinstance(call.get("logits_to_keep"), torch.Tensor):
        raise NotImplementedError("logits_to_keep must be a number of last columns, got columns of the unpruned prompt")
    if state is None:
        check_prompt(call)


__all__ = ["PatchHandle", "patch"]
