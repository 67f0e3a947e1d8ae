"""Time variants against each other: rotated inputs, interleaved rounds, medians; device and caller apart on a GPU.

A GPU's L2 and a CPU's last cache hold whole inputs of these ops, so a loop over one input measures the cache. Here each
call takes the next of several sets that together fill four caches. Variants alternate (A B A B) for two rounds, whose
distance is the noise: a smaller difference between two variants means nothing.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Call = Callable[[], Any]
Round = Callable[[], list[float]]  # one round of a metric: microseconds of single calls
ROUNDS = 2
CACHES = 4  # the input sets fill the last cache this many times


def set_count(set_bytes: int, cache: int, memory: int, most: int = 64) -> int:
    """How many input sets to rotate: four caches full, at least 2, at most a quarter of ``memory`` (all bytes)."""
    wanted = math.ceil(CACHES * cache / max(set_bytes, 1))
    return max(2, min(wanted, most, memory // 4 // max(set_bytes, 1)))


def interleave(rounds: dict[str, dict[str, Round]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Run ``{variant: {metric: round}}`` in turns. Per metric: median, the medians of the rounds and the call count."""
    samples: dict[str, dict[str, list[list[float]]]] = {
        name: {metric: [] for metric in rounds[name]} for name in rounds
    }
    for _ in range(ROUNDS):
        for name, metrics in rounds.items():
            for metric, run in metrics.items():
                samples[name][metric].append(run())
    return {
        name: {metric: _summary(batches) for metric, batches in metrics.items()} for name, metrics in samples.items()
    }


def cpu_rounds(calls: Sequence[Call], seconds: float) -> dict[str, Round]:
    """``wall_us`` from call to result, for ``seconds`` but at least 5 calls.

    With one thread also ``cpu_us``, the processor time of the call: other processes that take turns on the core do not
    count. With more threads it would be their sum.
    """

    def timed_by(clock: Callable[[], float]) -> Round:
        def run() -> list[float]:
            calls[-1]()  # the variant before left other things in the cache and the allocator
            times: list[float] = []
            stop = time.perf_counter() + seconds
            while len(times) < 5 or (time.perf_counter() < stop and len(times) < 1000):
                call = calls[len(times) % len(calls)]
                started = clock()
                call()
                times.append((clock() - started) * 1e6)
            return times

        return run

    rounds = {"wall_us": timed_by(time.perf_counter)}
    if torch.get_num_threads() == 1:
        rounds["cpu_us"] = timed_by(time.process_time)
    return rounds


class CapturedCalls:
    """One CUDA graph of several calls. ``outputs``: those of the first ``held`` calls, rewritten by every replay."""

    def __init__(self, calls: Sequence[Call], held: int) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # lazy initialisation must not end up in the graph
            calls[0]()
        torch.cuda.current_stream().wait_stream(stream)
        self.count = len(calls)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = [call() for call in calls[:held]]  # held, so each call writes memory of its own
            for call in calls[held:]:
                call()

    def round(self, seconds: float) -> list[float]:
        """Replay for ``seconds``; microseconds a call, one number a replay."""
        first = _events(self.graph.replay, 1) / self.count
        replays = min(max(int(seconds * 1e6 / (first * self.count)), 5), 200)
        return [_events(self.graph.replay, 1) / self.count for _ in range(replays)]


def cuda_rounds(
    calls: Sequence[Call], captured: CapturedCalls | None, warm: CapturedCalls | None, seconds: float
) -> dict[str, Round]:
    """``device_us`` and ``warm_us`` from graphs, ``stream_us`` of eager calls with gaps, ``caller_us`` of the host.

    ``caller_us`` queues at most 16 calls between two synchronisations: a full queue would make the host wait.
    """

    def stream() -> list[float]:
        run = lambda: [call() for call in calls]  # noqa: E731
        first = _events(run, 1)
        times = min(max(int(seconds * 1e6 / max(first, 1.0)), 3), 50)
        return [_events(run, 1) / len(calls) for _ in range(times)]

    def caller() -> list[float]:
        few = calls[:16]
        times = []
        for _ in range(10):
            torch.cuda.synchronize()
            started = time.perf_counter()
            for call in few:
                call()
            times.append((time.perf_counter() - started) * 1e6 / len(few))
        torch.cuda.synchronize()
        return times

    rounds: dict[str, Round] = {"stream_us": stream, "caller_us": caller}
    if captured is not None:
        rounds["device_us"] = lambda: captured.round(seconds)
    if warm is not None:
        rounds["warm_us"] = lambda: warm.round(seconds)
    return rounds


def copy_ceiling(device: str, smoke: bool = False) -> dict[str, float]:
    """GB/s (read plus written) of a large copy, and microseconds that one more tiny kernel or op costs."""
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        size = min(4 * 2**30, free // 4)
    else:
        size = 2**28
    source = torch.empty(2**20 if smoke else size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    tiny = torch.zeros(1, device=device)
    copy, step = (lambda: target.copy_(source)), (lambda: tiny.add_(1))
    if device == "cuda":
        copies = [_events(copy, 1) for _ in range(12)][2:]
        steps = CapturedCalls([step] * 200, held=1).round(0.05)
    else:
        clock = "cpu_us" if torch.get_num_threads() == 1 else "wall_us"
        copies, steps = cpu_rounds([copy], 0.5)[clock](), cpu_rounds([step], 0.05)[clock]()
    copy_us = statistics.median(copies)
    return {"copy_gbs": round(2 * source.numel() / copy_us / 1e3, 1), "launch_us": round(statistics.median(steps), 3)}


def _events(run: Call, times: int) -> float:
    """Microseconds of the device for ``times`` runs."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3 / times


def _summary(batches: list[list[float]]) -> dict[str, Any]:
    return {
        "median": round(statistics.median(value for batch in batches for value in batch), 3),
        "rounds": [round(statistics.median(batch), 3) for batch in batches],
        "calls": sum(len(batch) for batch in batches),
    }
