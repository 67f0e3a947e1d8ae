"""The way of a call through its decoder's door where the method works between the layers."""

from __future__ import annotations

from typing import Any

from asymvlm.hf.arguments import CACHE, MASK, cache_of
from asymvlm.hf.context import innermost, pop
from asymvlm.hf.errors import MechanismError
from asymvlm.hf.layers import MECHANISM
from asymvlm.inside.later import Later
from asymvlm.inside.prefill import Prefill
from asymvlm.inside.pruner import InsidePruner
from asymvlm.inside.state import inside_state
from asymvlm.patched.in_flight import Call
from asymvlm.report.pruning import PruningReport, report_of


def note_mask(arguments: dict[str, Any]) -> None:
    """The model begins a step; its decoder may get masks of other forms, whose widths say less."""
    if (state := inside_state(arguments.get(CACHE))) is not None:
        state.given[MASK] = arguments.get(MASK)


def enter_inside(pruner: InsidePruner, call: Call | None, arguments: dict[str, Any]) -> None:
    """The decoder begins a prompt to prune, or a step behind one."""
    if call is not None and call.inside is not None:
        pruner.before_decoder(*call.inside, arguments)
    elif Later.begin(arguments) is None and call is not None and call.report is not None and call.report.stages:
        raise NotImplementedError(
            "methods inside the decoder need the cache of the pruned prompt in every step, and one came without it "
            "(use_cache=False, or LongRoPE beyond its switch)"
        )


def leave_inside(
    pruner: InsidePruner, call: Call | None, arguments: dict[str, Any], output: Any
) -> PruningReport | None:
    """The decoder is through, with an exception where ``output`` is None. The report of a prompt that was pruned."""
    if (later := innermost(Later)) is not None:
        pop(later)
    if (prefill := innermost(Prefill)) is None:
        return None
    if output is None:
        pruner.abandon(prefill)
        return None
    selection = pruner.after_decoder(prefill, arguments.get(CACHE, cache_of(output)))
    if call is None or call.inside is None:
        raise MechanismError(MECHANISM, "the decoder was left in another call than it was entered")
    vision, inputs = call.inside
    call.inside = None
    call.report = report_of(selection, pruner.model, pruner.adapter, vision, inputs, dict(prefill.lengths))
    return call.report


def with_hidden_columns(output: Any, report: PruningReport) -> Any:
    """What the decoder returns, its last hidden states spread over the columns of the prompt.

    So logits, and a loss, are made of as many columns as the call came with.
    """
    if report.index.shape[1] == report.columns_before:
        return output
    if isinstance(output, tuple):
        return (report.at_original_columns(output[0]), *output[1:])
    output.last_hidden_state = report.at_original_columns(output.last_hidden_state)
    return output
