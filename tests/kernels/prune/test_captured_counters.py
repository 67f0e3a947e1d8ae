"""Counters of captured calls: zero, one set a call, never shared, and no node of the graph while the arena lasts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from asymvlm_kernels.prefill.prune import captured, scratch

DEVICE = torch.device("cuda", 0)  # by name: what is allocated on it lies on the CPU here


class Gpu:
    """A device that says whether a capture is under way, and counts what the graph would have to zero."""

    def __init__(self) -> None:
        self.state = threading.local()
        self.nodes = 0
        self.slabs: list[torch.Tensor] = []

    @property
    def capturing(self) -> bool:
        return getattr(self.state, "capturing", False)

    @capturing.setter
    def capturing(self, value: bool) -> None:
        self.state.capturing = value


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    gpu, zeros = Gpu(), torch.zeros

    def counted(*size: Any, device: Any = None, **options: Any) -> torch.Tensor:
        gpu.nodes += gpu.capturing
        return zeros(*size, **options)

    def zeroed(size: int, device: torch.device) -> torch.Tensor:
        assert not gpu.capturing, "an allocation outside the graph, in the middle of a capture"
        gpu.slabs.append(zeros(size, dtype=torch.int32))
        return gpu.slabs[-1]

    class Stream:
        cuda_stream = 0

    monkeypatch.setattr(torch, "zeros", counted)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: gpu.capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(captured, "zeroed", zeroed)
    monkeypatch.setattr(captured, "_arenas", {})
    monkeypatch.setattr(scratch, "_counters", {})
    yield gpu
    gpu.capturing = False


def capture(gpu: Gpu, *sizes: int) -> list[torch.Tensor]:
    gpu.capturing = True
    found = [scratch.zeroed_counters(DEVICE, size) for size in sizes]
    gpu.capturing = False
    return found


def memory(counters: torch.Tensor) -> set[int]:
    return set(range(counters.data_ptr(), counters.data_ptr() + counters.nbytes, 4))


def test_each_captured_call_has_its_own(gpu):
    eager = [scratch.zeroed_counters(DEVICE, 50)]
    sets = capture(gpu, 50, 7, 50) + capture(gpu, 50)
    eager += [scratch.zeroed_counters(DEVICE, size) for size in (50, 5000)]
    assert gpu.nodes == 0
    assert [len(counters) for counters in sets] == [50, 7, 50, 50]
    for number, counters in enumerate(sets):
        assert not counters.any()
        assert counters.data_ptr() % 16 == 0  # as Triton compiles for
        counters.fill_(number + 1)  # and nobody else sees it
    assert all(bool((counters == number + 1).all()) for number, counters in enumerate(sets))
    assert not any(counters.any() for counters in eager)
    assert not any(memory(counters) & memory(taken) for counters in eager for taken in sets)


def test_without_an_eager_call_the_graph_zeroes_its_own(gpu):
    (counters,) = capture(gpu, 50)
    assert (gpu.nodes, len(gpu.slabs)) == (1, 0)
    assert not counters.any()
    scratch.zeroed_counters(DEVICE, 50)  # later captures need no node
    capture(gpu, 50)
    assert gpu.nodes == 1


def test_an_exhausted_arena_grows_with_the_next_eager_call(gpu):
    scratch.zeroed_counters(DEVICE, 1)
    half = captured.SLAB // 2
    first = capture(gpu, half, half + 1)  # the second finds too little left
    assert gpu.nodes == 1
    scratch.zeroed_counters(DEVICE, 1)
    second = capture(gpu, half, half // 2)
    assert (gpu.nodes, len(gpu.slabs)) == (1, 2)
    for counters in first[:1] + second:
        assert not counters.any()
        counters.fill_(1)


def test_a_call_larger_than_a_slab_is_served_in_the_end(gpu):
    scratch.zeroed_counters(DEVICE, 1)
    for _ in range(2):
        capture(gpu, 3 * captured.SLAB)
        scratch.zeroed_counters(DEVICE, 1)
    assert gpu.nodes == 1


def test_memory_is_bounded_by_what_is_captured(gpu):
    taken = 0
    for size in (30, 5000, 64, 20_000) * 20:
        scratch.zeroed_counters(DEVICE, size)
        taken += sum(-(-len(counters) // captured.LINE) * captured.LINE for counters in capture(gpu, size))
        assert sum(map(len, gpu.slabs)) <= taken + captured.SLAB * 3 // 2
    assert gpu.nodes == 0


def test_eager_calls_alone_never_grow_it(gpu):
    for size in (30, 5000, 10**6) * 3:
        scratch.zeroed_counters(DEVICE, size)
    assert len(gpu.slabs) == 1


def test_another_thread_does_not_allocate_while_one_captures(gpu):
    scratch.zeroed_counters(DEVICE, 1)
    gpu.capturing = True
    scratch.zeroed_counters(DEVICE, captured.SLAB)  # nothing left

    def beside() -> None:
        scratch.zeroed_counters(DEVICE, 1)

    in_thread(beside)
    assert len(gpu.slabs) == 1
    gpu.capturing = False
    scratch.zeroed_counters(DEVICE, 1)
    assert len(gpu.slabs) == 2


def test_threads_never_share(gpu):
    scratch.zeroed_counters(DEVICE, 1)
    found: list[torch.Tensor] = []

    def work() -> None:
        for _ in range(20):
            found.extend(capture(gpu, 40, 70))
            scratch.zeroed_counters(DEVICE, 40)

    in_thread(*[work] * 4)
    assert len(found) == 160
    assert len(set().union(*map(memory, found))) == sum(map(len, found))


def in_thread(*functions: Callable[[], None]) -> None:
    workers = [threading.Thread(target=function) for function in functions]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
