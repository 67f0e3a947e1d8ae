"""Hooks, positions, masks, undo: the mechanics, once for every family.

Three touch points, all on the instance and all removed without a trace: the attribute ``generate``, a forward pre-hook
and a forward hook on the top model. `generate` is called on the shorter problem; the pre-hook hands it the merged
embeddings during prefill. A plain forward is pruned by the same pre-hook, and later steps on its cache are repaired.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from asymvlm.generation import PromptStreamer, infer_attention_mask, shorten_lengths, static_cache_length
from asymvlm.models import adapter_for
from asymvlm.policies import VisionPruning
from asymvlm.prompt import DecodeState, PrunedPrompt, check_prompt, has_images, prune_prompt, untouched_report
from asymvlm.report import PruningReport
from asymvlm.windows import sliding_window, tighten

HANDLE = "_asymvlm_handle"  # on the model
STATE = "_asymvlm_state"  # on a cache


@dataclass(eq=False)
class _Call:
    """One call in flight. It lives in a context variable, so threads do not see each other's."""

    handle: PatchHandle
    report: PruningReport
    prompt: PrunedPrompt | None  # None: the call is left alone and only its cache is measured
    phase: str  # "prefill", "measure" (its last chunk runs), "decode"; "forward" for a plain call
    outer: _Call | None = None  # the call, of another patched model, that this one runs inside


_call: ContextVar[_Call | None] = ContextVar("asymvlm_call", default=None)


def patch(model: nn.Module, vision: VisionPruning | None = None) -> PatchHandle:
    """Prune the vision tokens of every later call of this model instance.

    ``generate``, ``model(**inputs)`` and pipelines then work on the shortened sequence. Returned sequences start with
    the original prompt; logits, attentions and hidden states have S' columns, which ``handle.last.index`` maps back.
    Gradients into the vision tower and the embeddings are not supported through a patched model.

    Args:
        model: a supported Hugging Face vision-language model (see `supported_models`).
        vision: settings; None means ``VisionPruning()``: half the vision tokens, cosine similarity.
    Returns:
        `PatchHandle`, also a context manager that removes the patch on exit.
    Raises:
        ValueError: if the family is unknown; the message lists the known ones.
        RuntimeError: if the model is patched already.
    """
    return PatchHandle(model, VisionPruning() if vision is None else vision)


class PatchHandle:
    """A patched model.

    ``last`` reports the last call that had images (None before the first); ``enabled = False`` lets calls through
    untouched, and ``remove()`` or leaving the ``with`` block restores the model.
    """

    def __init__(self, model: nn.Module, vision: VisionPruning) -> None:
        self.adapter = adapter_for(model)
        if HANDLE in model.__dict__:
            raise RuntimeError(f"{type(model).__name__} is patched already: remove the first handle to patch again")
        if vision.scorer is not None:
            _check_width(model, vision.scorer)
        self.model = model
        self.vision = vision
        self.enabled = True
        self.last: PruningReport | None = None
        self._static_length: int | None = None
        self._previous_generate = model.__dict__.get("generate")
        self._hooks = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True),
        ]
        self._window = sliding_window(cast("Any", model.config).get_text_config())
        if self._window is not None and vision.positions == "keep":
            text = self.adapter.text_of(model)
            self._hooks.append(text.register_forward_pre_hook(self._before_decoder, with_kwargs=True))
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
        del self.model.__dict__[HANDLE]
        if self._previous_generate is None:
            del self.model.__dict__["generate"]
        else:
            self.model.__dict__["generate"] = self._previous_generate

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`GenerationMixin.generate` on the shortened prompt; the returned sequences start with the original one."""
        model_class: Any = type(self.model)
        original = self._previous_generate or functools.partial(model_class.generate, self.model)
        bound = inspect.signature(model_class.generate).bind_partial(self.model, *args, **kwargs).arguments
        bound.pop("self", None)
        call = {**bound, **bound.pop("kwargs", {})}
        if call.get("inputs") is not None and call.get("input_ids") is None:
            call["input_ids"] = call.pop("inputs")
        _refuse_continuation(call)
        if not self.enabled or not has_images(self.adapter, call):
            return original(*args, **kwargs)
        if self.vision.bypassed:
            self.last = untouched_report(self.model, self.adapter, self.vision, call)
            with _in_flight(_Call(self, self.last, None, "measure")):
                return original(*args, **kwargs)
        _refuse_unsupported(call)
        if call.get("attention_mask") is None:
            call["attention_mask"] = infer_attention_mask(self.model, call)
        accepted = inspect.signature(type(self.model).forward).parameters
        inputs = {name: value for name, value in call.items() if name in accepted}
        prompt = prune_prompt(self.model, self.adapter, self.vision, inputs, generating=True)
        self.last = prompt.report
        shorter = {name: value for name, value in call.items() if name not in accepted}
        shorter |= {name: value for name, value in prompt.inputs.items() if value is not None}
        del shorter["inputs_embeds"]  # the pre-hook hands them out, so that any decoding method works
        shorter |= shorten_lengths(self.model, call, prompt.decode.original_length - prompt.decode.length)
        if call.get("streamer") is not None:
            shorter["streamer"] = PromptStreamer(call["streamer"], prompt.original_ids)
        with _in_flight(_Call(self, prompt.report, prompt, "prefill")), static_cache_length(self):
            result = original(input_ids=prompt.input_ids, **shorter)
        return _with_original_prompt(result, prompt)

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = _call.get()
        if call is not None and call.handle is self:
            return (args, _feed(module, call, kwargs)) if call.phase == "prefill" else None
        cache = kwargs.get("past_key_values")
        state: DecodeState | None = getattr(cache, STATE, None)
        if state is None and not has_images(self.adapter, kwargs) and not args:
            return None
        if args:
            bound = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments
            bound.pop("self", None)
            kwargs = {**bound, **bound.pop("kwargs", {})}
            state = getattr(kwargs.get("past_key_values"), STATE, None)
        if state is not None:
            return (), _repair(self.adapter.model_type, state, kwargs, has_images(self.adapter, kwargs))
        if not self.enabled or not has_images(self.adapter, kwargs):
            return (), kwargs
        if self.vision.bypassed:
            self.last = untouched_report(self.model, self.adapter, self.vision, kwargs)
            _call.set(_Call(self, self.last, None, "forward", outer=call))
            return (), kwargs
        _refuse_unsupported(kwargs)
        prompt = prune_prompt(self.model, self.adapter, self.vision, kwargs, generating=False)
        self.last = prompt.report
        _call.set(_Call(self, prompt.report, prompt, "forward", outer=call))
        return (), prompt.inputs

    def _before_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Sliding layers: keep windows as wide as they were."""
        call, cache = _call.get(), kwargs.get("past_key_values")
        state: DecodeState | None = getattr(cache, STATE, None)
        if state is None and call is not None and call.handle is self and call.prompt is not None:
            state = call.prompt.decode
        if state is None or self._window is None:
            return None
        queries = kwargs["inputs_embeds"].shape[1]
        masks = kwargs.get("attention_mask")
        kwargs["attention_mask"] = tighten(masks, self._window, state.index, state.original_length, cache, queries)
        return args, kwargs

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        call = _call.get()
        if call is None or call.handle is not self or call.phase in ("prefill", "decode"):
            return
        cache = _find_cache(output)
        call.report.measure(cache)
        if call.phase == "measure":
            call.phase = "decode"  # a constant from here on: torch.compile would guard on a number that changes
            return
        _call.set(call.outer)
        if cache is not None and call.prompt is not None:
            setattr(cache, STATE, call.prompt.decode)


@dataclass(eq=False)
class _Generate:
    """The ``generate`` of a patched instance. Not a closure: a deep copy has to follow the copied model."""

    handle: PatchHandle

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.handle.generate(*args, **kwargs)


@contextlib.contextmanager
def _in_flight(call: _Call) -> Iterator[None]:
    token = _call.set(call)
    try:
        yield
    finally:
        _call.reset(token)


def _feed(model: nn.Module, call: _Call, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Inside `generate`: swap the prompt ids of this (chunk of the) prefill for the merged embeddings."""
    assert call.prompt is not None
    input_ids, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
    past = 0 if cache is None else int(cache.get_seq_length())
    prompt_length = call.prompt.decode.length
    if input_ids is None or past >= prompt_length:
        return kwargs
    end = past + input_ids.shape[1]
    prompt_embeds = call.prompt.inputs["inputs_embeds"]
    repeats = input_ids.shape[0] // prompt_embeds.shape[0]  # beams, num_return_sequences
    embeds = prompt_embeds.repeat_interleave(repeats, 0)[:, past:end]
    if end > prompt_length:  # no cache, or drafted tokens behind the prompt
        generated = cast("Any", model).get_input_embeddings()(input_ids[:, prompt_length - past :])
        embeds = torch.cat([embeds, generated.to(embeds.dtype)], 1)
    if cache is not None and end >= prompt_length:
        call.phase = "measure"
    fed = {name: value for name, value in kwargs.items() if name != "input_ids"}
    if cache is None and kwargs.get("attention_mask") is None:
        fed["attention_mask"] = torch.ones_like(input_ids)  # gapped positions without a mask are read as packed
    return {**fed, "inputs_embeds": embeds.contiguous()}


def _repair(model_type: str, state: DecodeState, kwargs: dict[str, Any], images: bool) -> dict[str, Any]:
    """A later step on a pruned cache, written for the original length: give it the mask and the positions that fit."""
    if images:
        raise NotImplementedError(f"new images on a pruned cache are not supported for {model_type}: start afresh")
    tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
    new, mask = tokens.shape[1], kwargs.get("attention_mask")
    past = int(kwargs["past_key_values"].get_seq_length())
    kwargs = dict(kwargs)
    prompt_mask = state.attention_mask
    if mask is None:
        ones = prompt_mask.new_ones(prompt_mask.shape[0], past - state.length + new)
        kwargs["attention_mask"] = torch.cat([prompt_mask, ones], 1)
    elif mask.ndim == 2 and mask.shape[1] == past - state.length + state.original_length + new:
        kwargs["attention_mask"] = torch.cat([prompt_mask.to(mask), mask[:, state.original_length :]], 1)
    elif mask.ndim != 2 or mask.shape[1] != past + new:
        wanted = past - state.length + state.original_length + new
        raise ValueError(
            f"attention_mask must have {wanted} columns (original prompt and new tokens) or {past + new} (pruned), "
            f"got shape {tuple(mask.shape)}"
        )
    if kwargs.get("position_ids") is None:
        offsets = torch.arange(past - state.length, past - state.length + new, device=tokens.device)
        kwargs["position_ids"] = state.next_position + offsets
    return kwargs


def _with_original_prompt(result: Any, prompt: PrunedPrompt) -> Any:
    """Put the original prompt back in front of the generated ids, and the state on the returned cache."""
    sequences = result if torch.is_tensor(result) else result.sequences
    generated = sequences[:, prompt.decode.length :]
    ids = prompt.original_ids.to(sequences).repeat_interleave(sequences.shape[0] // prompt.original_ids.shape[0], 0)
    sequences = torch.cat([ids, generated], 1)
    if torch.is_tensor(result):
        return sequences
    result.sequences = sequences
    if getattr(result, "past_key_values", None) is not None:
        setattr(result.past_key_values, STATE, prompt.decode)
    return result


def _find_cache(output: Any) -> Any:
    if isinstance(output, tuple):
        return next((item for item in output if hasattr(item, "get_seq_length")), None)
    return getattr(output, "past_key_values", None)


def _refuse_continuation(call: dict[str, Any]) -> None:
    if getattr(call.get("past_key_values"), STATE, None) is not None:
        raise NotImplementedError("generate() cannot go on from a pruned cache yet: pass the whole conversation")


def _refuse_unsupported(call: dict[str, Any]) -> None:
    cache = call.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise NotImplementedError(
            f"pruning needs an empty cache, got one of {cache.get_seq_length()} tokens: pass the whole conversation"
        )
    if call.get("assistant_model") is not None:
        raise NotImplementedError("an assistant_model is not supported: it would see a prompt of another length")
    check_prompt(call)


def _check_width(model: nn.Module, weight: torch.Tensor) -> None:
    config: Any = model.config
    width = config.get_text_config().hidden_size
    if weight.shape != (width,):
        raise ValueError(f"the scorer must have the model's width ({width},), got {tuple(weight.shape)}")


__all__ = ["PatchHandle", "patch"]
