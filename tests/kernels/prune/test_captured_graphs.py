"""`prune_sequence` in CUDA graphs: replayed with other inputs, on streams side by side, from threads. Needs a GPU."""

from __future__ import annotations

import ctypes
import threading

import pytest
import torch

from asymvlm_kernels import PrunedSequence, UniformBudget, prune_sequence, use_backend
from asymvlm_kernels._triton import INTERPRETED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="no CUDA device"),
]
B, S, D = 2, 600, 256
REPLAYS = 200
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(autouse=True)
def no_guards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # poisoning is a launch, from memory of the host


def inputs(seed: int) -> Inputs:
    generator = torch.Generator("cuda").manual_seed(seed)
    embeds = torch.randn(B, S, D, generator=generator, device="cuda", dtype=torch.bfloat16)
    vision = torch.rand(B, S, generator=generator, device="cuda") < 0.9
    return embeds, vision, ~vision


def prune(given: Inputs) -> PrunedSequence:
    with use_backend("triton"), torch.no_grad():
        return prune_sequence(*given, None, UniformBudget(0.3), static=True)


def fill(given: Inputs, seed: int) -> None:
    for tensor, new in zip(given, inputs(seed), strict=True):
        tensor.copy_(new)


def captured(given: Inputs) -> tuple[torch.cuda.CUDAGraph, PrunedSequence]:
    for _ in range(3):  # compiled, put on tape, replayed from it
        prune(given)
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        result = prune(given)
    graph.instantiate()
    return graph, result


def differs(result: PrunedSequence, wanted: PrunedSequence) -> torch.Tensor:
    """Without waiting: whether one of them is not the other, bit for bit."""
    names = ("embeds", "index", "lengths", "counts", "gap")
    return torch.stack([(getattr(result, name) != getattr(wanted, name)).any() for name in names]).any()


def replays(graph: torch.cuda.CUDAGraph, given: Inputs, result: PrunedSequence, seed: int) -> torch.Tensor:
    wrong = []
    for number in range(REPLAYS):
        fill(given, seed + number % 7)
        graph.replay()
        wrong.append(differs(result, prune(given)))
    return torch.stack(wrong).any()


def test_replays_follow_their_inputs():
    given = inputs(0)
    graph, result = captured(given)
    assert not replays(graph, given, result, 100)


def test_two_graphs_on_two_streams():
    given = [inputs(0), inputs(1)]
    graphs = [captured(one) for one in given]
    streams = [torch.cuda.Stream() for _ in given]  # whose eager calls have counters of their own
    torch.cuda.synchronize()
    wrong = []
    for number in range(REPLAYS):
        for one, (graph, result), stream in zip(given, graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                fill(one, number % 7)
                graph.replay()
                wrong.append(differs(result, prune(one)))
    torch.cuda.synchronize()
    assert not torch.stack(wrong).any()


def test_graphs_replayed_from_threads():
    given = [inputs(seed) for seed in range(3)]
    graphs = [captured(one) for one in given]
    torch.cuda.synchronize()
    wrong: list[torch.Tensor] = []

    def work(number: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            graph, result = graphs[number]
            wrong.append(replays(graph, given[number], result, 10 * number))

    workers = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    torch.cuda.synchronize()
    assert len(wrong) == 3
    assert not torch.stack(wrong).any()


def test_a_captured_call_is_two_nodes():
    given = inputs(0)
    graph, _ = captured(given)
    count = ctypes.c_size_t()
    driver = ctypes.CDLL("libcuda.so.1")
    assert driver.cuGraphGetNodes(ctypes.c_void_p(graph.raw_cuda_graph()), None, ctypes.byref(count)) == 0
    assert count.value == 2
