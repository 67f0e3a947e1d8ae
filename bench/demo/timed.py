"""What pruning saves in time and bytes where prefill dominates: a LLaVA-shaped model with random weights, timed.

Random weights cost what trained ones cost, so times and bytes are real; the tokens that such a model generates mean
nothing and are not shown.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

import asymvlm
from asymvlm.app.session import FirstToken
from asymvlm.report.crowded import silence
from asymvlm_kernels import Budget, UniformBudget
from bench import vlm

SIZES = {
    "tiny": vlm.SIZES["tiny"],  # for tests: too small for pruning to win
    "0.1B": vlm.Size("0.1B", 768, 8, 2048, 12, 4, 32_000, 588, 192, 2),  # one CPU core prefills it in a few seconds
}
DEFAULT_SIZE = "0.1B"
PAIRS, SECONDS = 5, 45.0  # measured pairs; on a slow machine no pair starts after so long, once there are LEAST
LEAST = 3


@dataclass(frozen=True)
class Timed:
    """Times and bytes of a model with random weights. ``kept`` of ``vision_tokens`` stay; ``parameters`` is a count."""

    parameters: int
    vision_tokens: int
    kept: int
    first_token: FirstToken


def time_first_token(
    size: vlm.Size,
    budget: Budget,
    say: Callable[[str], None],
    *,
    pairs: int = PAIRS,
    seconds: float = SECONDS,
) -> Timed:
    """Time to first token with all tokens and with those ``budget`` keeps, in turn, so that drift hits both alike.

    On a CPU with one thread: two threads that wait for each other double their time as soon as another program takes
    a core, and the neighbour is timed instead.

    Args:
        size: shape of the model; its random weights are drawn here.
        say: takes a line of progress.
        pairs: to measure, after a pair that is not counted.
        seconds: no further pair starts once everything took this long and `LEAST` are measured.
    """
    say(f"building a LLaVA-shaped model of {size.name} with random weights")
    model = vlm.build(size, "cuda" if torch.cuda.is_available() else "cpu", torch.float32)
    inputs = vlm.make_inputs(model, size, 1)
    times: dict[bool, list[float]] = {False: [], True: []}
    kv_bytes: dict[bool, int | None] = {}
    begun = time.perf_counter()
    with one_thread():
        for pair in range(pairs + 1):
            if pair > LEAST and time.perf_counter() - begun > seconds:
                break
            for pruned in (False, True):
                # keep ratio 1 calls the model untouched, and its report still counts the cache's bytes
                spent, report = _first_token(model, inputs, budget if pruned else UniformBudget(1.0))
                kv_bytes[pruned] = report.kv_bytes
                if pair:  # pair 0 is the warm-up
                    times[pruned].append(spent)
                name = f"pair {pair} of {pairs}" if pair else "warm-up"
                say(f"{name}: {'pruned' if pruned else 'full'} {spent / 1e3:.2f} s")
    parameters = sum(weight.numel() for weight in model.parameters())
    first_token = FirstToken(times[False], times[True], kv_bytes[False], kv_bytes[True])
    return Timed(parameters, size.vision_tokens, report.kept[0], first_token)


def _first_token(model: Any, inputs: dict[str, torch.Tensor], budget: Budget) -> tuple[float, Any]:
    """Milliseconds of a `generate` call that returns one token, and its report."""
    vision = asymvlm.VisionPruning(budget=budget)
    silence(vision)  # random weights find nothing relevant
    with asymvlm.patch(model, vision=vision) as handle:
        started = time.perf_counter()
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - started) * 1e3, handle.last


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread of torch inside the block, as many as before after it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def verdict(timing: FirstToken) -> str:
    """What the times allow to say: a gain or a loss only where no run of one side reaches into the other's."""
    full, pruned = timing.full_median_ms, timing.pruned_median_ms
    if max(timing.pruned_ms) < min(timing.full_ms):
        return f"Pruning is faster to the first token: {full / pruned:.2f} times, and no two runs overlap."
    if min(timing.pruned_ms) > max(timing.full_ms):
        return (
            "Pruning is slower to the first token here: at this size prefill does not dominate, or the machine is "
            "busy with something else."
        )
    return (
        "There is no clear difference in time to first token: the runs overlap (prefill does not dominate at this "
        "size, or the machine is busy). Bytes are what they are."
    )
