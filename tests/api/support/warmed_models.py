"""What calls of patched tiny models would have Triton compile, and what `asymvlm warmup` plans for them, as JSON.

A process of its own, without the interpreter. Each op of a call is recorded as on a GPU, and answered by the reference.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import tiny
import torch
import transformers

import asymvlm
from asymvlm.app.kernel_calls import kernel_calls
from asymvlm.models import registered
from asymvlm_kernels import Calls, dispatch, use_backend
from asymvlm_kernels.warming.calls import call_all
from asymvlm_kernels.warming.recording import recording

ARCH = 90
LENGTH = 60  # tokens: a bucket that all tiny prompts share
OPS = {name: run for name, run in dispatch._registered.items() if name.endswith(" run")}
Seen = dict[str, str]  # key of a build -> the call that asked for it


def shadowed(run: Callable[..., Any], seen: Seen, call: str) -> Callable[..., Any]:
    def answer(*args: Any) -> Any:
        with recording(ARCH) as found:
            run(*args)
        for build in found:
            seen.setdefault(build.key, call)
        with use_backend("reference"):
            return run(*args)

    return answer


def needed(family: str) -> Seen:
    """Every build of generating and evicting, for one sample and for several with several images."""
    seen: Seen = {}
    model = tiny.build(family)
    for batch, scorer in itertools.product(("single", "left_padded"), (None, torch.ones(32))):
        call = f"{family}, {batch}, {'learned' if scorer is not None else 'cosine'}"
        dispatch._registered.update({name: shadowed(run, seen, call) for name, run in OPS.items()})
        vision, text = asymvlm.VisionPruning(scorer), asymvlm.TextEviction(6, 0.5, recent=2)
        with asymvlm.patch(model, vision=vision, text=text):
            model.generate(**tiny.make_batch(family, batch), max_new_tokens=12, do_sample=False, eos_token_id=None)
    call = f"{family}, scores of another method"
    dispatch._registered.update({name: shadowed(run, seen, call) for name, run in OPS.items()})
    with asymvlm.patch(model, vision=asymvlm.VisionPruning(method="spiral")):
        model.generate(**tiny.make_batch(family, "single"), max_new_tokens=1)
    call = f"{family}, by scores"
    dispatch._registered.update({name: shadowed(run, seen, call) for name, run in OPS.items()})
    for spread, batch in ((None, "single"), (asymvlm.Spread(), "single"), (asymvlm.Spread(), "left_padded")):
        options = {"spread": spread, "at_least_relevant": True}
        vision = asymvlm.VisionPruning(budget=asymvlm.RelativeThresholdBudget(0.5), **options)
        with asymvlm.patch(model, vision=vision):
            model.generate(**tiny.make_batch(family, batch), max_new_tokens=1)
    dispatch._registered.update(OPS)
    return seen


def planned(family: str) -> Calls:
    config = tiny.build(family).config
    adapter = registered(config.model_type)
    assert adapter is not None
    return kernel_calls(config, adapter, dtype=torch.float32, lengths=(LENGTH,), given=True)


def keys(calls: Calls) -> list[str]:
    with recording(ARCH) as found:
        call_all(calls)
    return [build.key for build in found]


def thinned(calls: Calls) -> Iterator[Calls]:
    """The plan with one thing less, for each thing."""
    for less in ({"weight": (False,)}, {"weight": (True,)}, {"protect": (False,)}, {"carry": calls.carry[1:]}):
        yield dataclasses.replace(calls, **less)
    for less in (
        {"by_scores": False},
        {"stepwise": False},
        {"heads": ()},
        {"given": False},
        {"dtype": torch.bfloat16},
        {"width": 64},
    ):
        yield dataclasses.replace(calls, **less)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    first, *families = sys.argv[1:]
    record: dict[str, Any] = {name: {"needed": needed(name), "planned": keys(planned(name))} for name in sys.argv[1:]}
    print(json.dumps(record | {"thinned": [keys(less) for less in thinned(planned(first))]}))
