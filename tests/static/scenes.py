"""Where a replay takes place and where it must not: one JSON object of scenes, for `test_replays`.

PYTHONPATH=. python tests/static/scenes.py
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "0"  # a kernel decorated for the interpreter launches nothing
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import contextlib
import functools
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from triton import knobs
from triton.runtime import driver as drivers
from triton.runtime.jit import JITFunction

from asymvlm_kernels.decode import attend, merge
from asymvlm_kernels.launch import empty, interface, launch, remember
from asymvlm_kernels.launch.tape import MISFIT, Tape
from asymvlm_kernels.prefill import select
from asymvlm_kernels.prefill.prune import known_length, two_launches
from bench.harness.fake_gpu import FakeDriver, Launch, fake_gpu

replay = Tape.replay


def attend_call() -> Any:
    q, k, v = (torch.empty(1, n, h, 16, dtype=torch.bfloat16) for n, h in ((1, 4), (64, 2), (64, 2)))
    return attend._attend_slots_triton(q, k, v, None, None, None, None, 0.1, -1, -1, 0.0, 0, True, 1)


def prune_call() -> Any:
    embeds, mask = torch.empty(1, 40, 16, dtype=torch.bfloat16), torch.empty(1, 40, dtype=torch.bool)
    budget = ([300_000] * 3, [0.0, 0.0])
    return known_length._prune_static_triton(embeds, mask, mask, None, None, *budget, [], [0], [], 40, True, None)


class Watch:
    """Counts launches and successful replays of the calls inside."""

    def __init__(self, heard: list[Launch]) -> None:
        self.heard = heard

    def __call__(self, call: Callable[[], Any]) -> dict[str, Any]:
        self.heard.clear()
        done = []

        def counted(tape: Tape, *given: Any) -> Any:
            results = replay(tape, *given)
            done.append(results is not MISFIT)
            return results

        with patch.object(Tape, "replay", counted):
            call()
        return {"launches": len(self.heard), "replays": sum(done), "streams": [x.stream for x in self.heard]}


@contextlib.contextmanager
def listener(found: dict[str, Any]) -> Iterator[None]:
    calls: list[Any] = []
    knobs.runtime.launch_enter_hook.add(calls.append)
    try:
        yield
    finally:
        knobs.runtime.launch_enter_hook.remove(calls.append)
        found["calls"] = len(calls)


def by_pytorch() -> dict[str, int]:
    """Launchers that break the rules of `remember`, and how many tapes they were given."""
    kernel = select._importance_gap_kernel
    numbers = {"N": 8, "BLOCK_N": 128, "CHUNKED": False, "num_warps": 4}

    def made(x: torch.Tensor) -> torch.Tensor:
        return empty((1,), dtype=torch.float32, device=x.device)

    def copy(x: torch.Tensor) -> torch.Tensor:
        out = made(x)
        launch(kernel, (1,), x + 1, None, out, **numbers)
        return out

    def written(x: torch.Tensor) -> torch.Tensor:
        out = made(x)
        launch(kernel, (1,), x, None, out, **numbers)
        return out.add_(1)

    def returned(x: torch.Tensor) -> torch.Tensor:
        out = made(x)
        launch(kernel, (1,), x, None, out, **numbers)
        return out + 1

    found = {}
    for name, launcher in (
        ("a copy", copy),
        ("written in place", written),
        ("returned", returned),
        ("no launch", made),
    ):
        remembered: Any = remember(launcher)
        for _ in range(3):
            remembered(torch.zeros(1, 8))
        found[name] = sum(type(tape) is Tape for tape in remembered.tapes.values.values())
    return found


def threads() -> dict[str, int]:
    """Each thread's own tensors come back from its own launches."""
    wrong = []

    def work() -> None:
        for _ in range(50):
            out, lse, scores = attend_call()
            if (out.shape, lse.shape, scores.shape) != ((1, 1, 4, 16), (1, 4, 1), (1, 64)):
                wrong.append(out.shape)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return {"calls": 200, "wrong": len(wrong)}


def main() -> None:
    heard: list[Launch] = []
    watch = Watch(heard)
    report: dict[str, Any] = {}
    with fake_gpu(heard.append) as driver:
        for call in (attend_call, prune_call) * 2:
            call()
        report["as it is"] = watch(attend_call)
        keep = torch.empty(12345)
        report["another address"] = watch(attend_call)
        del keep
        with patch.object(driver, "stream", 7):
            report["another stream"] = watch(attend_call)
        heard_by: dict[str, Any] = {}
        with listener(heard_by):
            report["a listener"] = watch(attend_call)
        report["a listener"]["heard"] = heard_by["calls"]
        for name, place, attribute, value in (
            ("debugging", knobs.runtime, "debug", True),
            ("instrumented", knobs.compilation, "instrumentation_mode", "fpsan"),
            ("Triton's launch replaced", JITFunction, "run", functools.partialmethod(JITFunction.run)),
            ("another device", driver, "device", driver.device + 1000),
            ("a hook of the kernel", merge._merge_parts_kernel, "pre_run_hooks", [lambda *args, **options: None]),
        ):
            with patch.object(place, attribute, value):
                report[name] = watch(attend_call)
        report["after a misfit"] = watch(attend_call)
        other = FakeDriver(90, driver.heard)
        other.kernels, other.device = driver.kernels, driver.device
        drivers.set_active(other)
        report["another driver"] = watch(attend_call)
        drivers.set_active(driver)
        for (name, _), (_, scope) in list(two_launches._score_select_kernel.used_global_vals.items())[:1]:
            with patch.dict(scope, {name: type(scope[name])(scope[name].value)}):  # equal, and another object
                report["a global of the kernel changed"] = watch(prune_call)
        with torch.inference_mode():
            attend_call()
        report["no longer in inference mode"] = watch(attend_call)
        report["threads"] = threads()
        report["by PyTorch"] = by_pytorch()
    names = interface.RUN.__code__.co_names
    report["unknown names"] = {
        "as read": interface.known(names),
        "one more": interface.known((*names, "a_knob_to_come")),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
