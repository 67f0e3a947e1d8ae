"""What a forward of a patched model goes through: the door of the model, then that of its decoder.

At the model's door a prompt is pruned, or, inside `generate`, its merged embeddings are handed out; later steps on a
pruned cache get the mask and the positions that fit. At the decoder's door come slots for text eviction, thinned
DeepStack rows, and windows as wide as they were. Each door knows what the other must have seen.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from asymvlm.eviction.text import TextEvictor
from asymvlm.hf.arguments import CACHE, EMBEDS, MASK, POSITIONS, USE_CACHE, cache_of, past_length, tokens_of
from asymvlm.hf.context import entered, innermost, pop, push
from asymvlm.hf.doors import Door
from asymvlm.hf.errors import MechanismError
from asymvlm.hf.flash import one_sequence, uses_flash
from asymvlm.hf.merge import merging
from asymvlm.hf.pruned_cache import serve
from asymvlm.hf.windows import sliding_window, tighten
from asymvlm.inside.pruner import InsidePruner
from asymvlm.patched.between_layers import enter_inside, leave_inside, note_mask, with_hidden_columns
from asymvlm.patched.checks import check_call, check_inside, check_recall, check_trainable
from asymvlm.patched.in_flight import PREFILL, STEPS, Call, feed_prompt, past_on_host
from asymvlm.prompt.columns import with_original_columns
from asymvlm.prompt.deepstack import deepstack_inputs
from asymvlm.prompt.shorten import PrunedPrompt
from asymvlm.prompt.state import PromptState, remember, repair_step, state_of
from asymvlm.report.pruning import reported
from asymvlm.report.unpruned import untouched_report

if TYPE_CHECKING:
    from asymvlm.patched.handle import PatchHandle

Arguments = dict[str, Any]


class Forwards:
    """The two doors of one patched model."""

    def __init__(self, handle: PatchHandle, evictor: TextEvictor | None, inside: InsidePruner | None = None) -> None:
        self._handle = handle
        self._evictor = evictor
        self._inside = inside
        self._adapter = handle.adapter
        # calls before their decode steps, by number; empty, a compiled step is constant
        self._pending: dict[int, weakref.ref[Call]] = {}
        tightened = handle.vision.positions == "keep" and not handle.vision.bypassed
        self._window = sliding_window(self._text_config) if tightened else None
        self.model = Door(handle.model, self._enter_model, self._leave_model)
        try:
            leave = None if evictor is None and inside is None else self._leave_decoder
            self.decoder = Door(handle.adapter.text_of(handle.model), self._enter_decoder, leave)
        except BaseException:
            self.model.remove()
            raise

    @property
    def _text_config(self) -> Any:
        return cast("Any", self._handle.model.config).get_text_config()

    def remove(self) -> None:
        self.model.remove()
        self.decoder.remove()
        if self._inside is not None:
            self._inside.remove()
        for found in [reference() for reference in self._pending.values()]:
            if found is not None and found.phase == "forward":
                found.forget()  # interrupted: its context may live on, what it held need not
        self._pending.clear()

    @contextlib.contextmanager
    def in_flight(self, call: Call) -> Iterator[None]:
        """A call of `generate`."""
        self._await(call)
        try:
            with entered(call):
                yield
        finally:
            self._pending.pop(id(call), None)

    def _await(self, call: Call) -> None:
        number, pending = id(call), self._pending
        pending[number] = weakref.ref(call, lambda _: pending.pop(number, None))

    def _call(self) -> Call | None:
        """The call in hand, if it is one of this model."""
        call = innermost(Call)
        return call if call is not None and call.owner is self._handle else None

    # -- the model ---------------------------------------------------------------------------------------------------

    def _enter_model(self, module: nn.Module, arguments: Arguments) -> Arguments | None:
        cache, images = arguments.get(CACHE), self._adapter.brings_vision(arguments)
        plain_step = not (self._pending or images) and cache is not None and state_of(cache) is None
        if plain_step and torch.compiler.is_compiling():
            return None  # a decode step, which torch.compile traces without a graph break
        if self._inside is not None:
            note_mask(arguments)
        call = self._call()
        if call is not None and call.phase == "forward":
            self._drop(call)  # an interrupted forward, whose hook never ran, left its call behind
            call.check_left_behind(cache)
            call = self._call()
        nested = call is not None and not torch.compiler.is_compiling() and not call.owns(arguments)
        if nested:  # by a logits processor, say: a forward of its own
            changed = self._plain(arguments)
            if self._call() is call:
                self._expect(Call(owner=self._handle))
        elif call is not None:
            changed = self._step(module, call, arguments)
        else:
            changed = None if plain_step else self._plain(arguments)
        if torch.compiler.is_compiling():
            return changed
        serve(cache, True)
        if self._evictor is not None and self._call() is None:
            self._expect(Call(owner=self._handle))  # tells the decoder whose step it is: another model may share it
        if (call := self._call()) is not None:
            call.enter_model(arguments if changed is None else changed)
        return changed

    def _step(self, module: nn.Module, call: Call, arguments: Arguments) -> Arguments | None:
        """The arguments of a step of `generate`; None for the same."""
        # a step without a cache after some with one: LongRoPE passed its switch and starts over
        starts_over = call.prompt is not None and arguments.get(CACHE) is None
        if starts_over and call.phase == "decode":
            call.started_over, call.cache = True, None
        return feed_prompt(module, call, arguments) if call.phase == "prefill" or starts_over else None

    def _plain(self, arguments: Arguments) -> Arguments | None:
        """The arguments of a forward that is no step of `generate`; None for the same."""
        cache, images = arguments.get(CACHE), self._adapter.brings_vision(arguments)
        state = state_of(cache)
        if state is not None and not images:
            repaired = repair_step(state, arguments)
            if not torch.compiler.is_compiling():
                first = past_on_host(cache) == state.length
                self._expect(Call(owner=self._handle, wanted=repaired[POSITIONS] if first else None))
            return repaired
        if state is None and not (self._handle.enabled and images):
            return None
        return self._prune(state, arguments)

    def _prune(self, state: PromptState | None, arguments: Arguments) -> Arguments:
        """A plain forward with images."""
        handle, cache = self._handle, arguments.get(CACHE)
        choice = handle.choose(arguments, generating=False)
        vision = handle.chosen_vision(choice, arguments)
        if state is None and vision.bypassed:
            report = handle.last = untouched_report(handle.model, self._adapter, vision, arguments)
            if report is not None:
                report.strategy = choice
            self._expect(Call(owner=handle, report=report))
            return arguments
        check_call(arguments, state)
        if state is None and vision.inside is not None:
            check_inside(vision, arguments, handle.model, handle.logits)
            self._expect(Call(owner=handle, inside=(vision, dict(arguments))))
            return arguments
        if state is None and self._adapter.needs_fresh_cache and getattr(cache, "is_initialized", False):
            raise NotImplementedError(f"{self._adapter.model_type} needs a new cache here, got one that was reset")
        check_recall(vision, handle.model, arguments)
        training = torch.is_grad_enabled() and handle.model.training
        if training:
            check_trainable(handle.model)
        prompt, report = handle.prune(vision, arguments, state, generating=False)
        if training:  # a reentrant checkpoint gives gradients only where an input wants one
            prompt.inputs[EMBEDS].requires_grad_(True)
        report.strategy = choice
        handle.last = report
        self._expect(Call(owner=handle, report=report, prompt=prompt, wanted=prompt.inputs[POSITIONS]))
        return prompt.inputs

    def _expect(self, call: Call) -> None:
        self._await(call)
        push(call)

    def _drop(self, call: Call) -> None:
        self._pending.pop(id(call), None)
        pop(call)

    def _leave_model(self, module: nn.Module, arguments: Arguments, output: Any) -> Any:
        """The output to return; None for the same."""
        if torch.compiler.is_compiling() and not self._pending:
            return None
        if not torch.compiler.is_compiling():
            serve(arguments.get(CACHE), False)
        call = self._call()
        if call is None:
            if output is not None and self._handle.enabled and self._adapter.brings_vision(arguments) and not merging():
                raise MechanismError("pruning images", "the model's hook was not called before its forward")
            return None
        if output is None:  # an exception is on its way
            call.step = None
            if call.phase == "forward":
                self._drop(call)
            return None
        call.leave_model()
        if call.cache is None:
            call.cache = cache_of(output)
        if call.phase in ("prefill", "decode"):
            return None
        self._pending.pop(id(call), None)
        returned = cache_of(output)
        cache = arguments.get(CACHE, returned)
        if call.report is not None:
            call.report.measure(cache)
        call.check_cache(cache)
        if call.phase == "measure":
            call.phase = "decode"
            call.wanted = call.first_new_position()
            return None
        self._drop(call)
        call.check_doubts()
        if call.prompt is not None:
            self._remember(call.prompt, cache, returned)
            if cache is None and self._wants_cache(module, arguments):
                raise MechanismError(PREFILL, f"a {type(output).__name__} came back without a K/V cache")
            if self._handle.logits == "original" and not arguments.get("logits_to_keep"):
                output = with_original_columns(output, call.prompt, labelled=arguments.get("labels") is not None)
        return reported(output, call.report)

    @staticmethod
    def _remember(prompt: PrunedPrompt, *caches: Any) -> None:
        """The state goes on the cache of the call, and on a copy of it where one comes back."""
        for cache in {id(cache): cache for cache in caches if cache is not None}.values():
            remember(cache, prompt.state)

    def _wants_cache(self, module: nn.Module, arguments: Arguments) -> bool:
        use = arguments.get(USE_CACHE)
        return bool(getattr(self._text_config, USE_CACHE, False) if use is None else use) and not module.training

    # -- the decoder -------------------------------------------------------------------------------------------------

    def _enter_decoder(self, module: nn.Module, arguments: Arguments) -> Arguments | None:
        tracing = torch.compiler.is_compiling()
        if not tracing and merging():
            return None
        given = arguments.get(CACHE)
        if not tracing and (call := self._call()) is not None:
            call.enter_decoder(arguments)
        elif not tracing and state_of(given) is not None:
            raise MechanismError(STEPS, "a step behind a pruned prompt passed no hook of the model")
        ours = self._evictor is not None and (tracing or self._call() is not None)
        evicting = self._evictor.before_decoder(module, arguments) if ours and self._evictor is not None else None
        arguments = arguments if evicting is None else evicting
        if self._inside is not None and not tracing:
            enter_inside(self._inside, self._call(), arguments)
        fitted = self._fitted(module, arguments)
        return evicting if fitted is None else fitted

    def _fitted(self, module: nn.Module, arguments: Arguments) -> Arguments | None:
        """Hand the decoder what its composite cannot; FlashAttention is told, too, that a row is one sequence."""
        if not self._pending and self._window is None:
            return None
        call, cache = self._call(), arguments.get(CACHE)
        prompt = None if call is None else call.prompt
        state = prompt.state if prompt is not None else state_of(cache)
        if state is None:
            return None
        tokens, past = tokens_of(arguments), past_length(cache)
        batch, queries = tokens.shape[:2]
        in_prompt = past < state.length
        if prompt is not None and prompt.deepstack is not None and in_prompt:
            rows = deepstack_inputs(prompt.deepstack, past - prompt.cached, queries, batch)
            self.decoder.callee.require("handing on rows", rows)
            arguments |= rows
        if in_prompt and batch == 1 < queries and uses_flash(self._text_config):
            arguments |= one_sequence(module, queries, past, tokens.device)
        if self._window is not None and not (self._adapter.open_prompt and in_prompt):
            if MASK not in arguments:
                raise MechanismError("windows by original position", f"the decoder was called without {MASK}")
            arguments[MASK] = tighten(self._text_config, arguments, state.index, state.original_length)
        return arguments

    def _leave_decoder(self, module: nn.Module, arguments: Arguments, output: Any) -> Any:
        """The output to return; None for the same."""
        if self._evictor is not None:
            self._evictor.after_decoder(arguments, output)
        if self._inside is None or torch.compiler.is_compiling() or merging():
            return None
        call = self._call()
        report = leave_inside(self._inside, call, arguments, output)
        self._handle.last = report or self._handle.last
        if report is None or call is None or call.phase != "forward" or self._handle.logits != "original":
            return None
        return with_hidden_columns(output, report)
