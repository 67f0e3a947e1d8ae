"""What only a GPU can show of the CUDA library: graphs, two streams at once, real sizes. Skipped without one."""

from __future__ import annotations

import pytest
import torch

from asymvlm_kernels import PrunedSequence, UniformBudget, dispatch, prune_sequence, select_tokens, use_backend
from asymvlm_kernels.testing import SHAPES, PrefillShape
from asymvlm_kernels.unproven.cuda import library as cuda

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("cuda_library"),
]


def sequence(shape: PrefillShape, B: int = 1, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator("cuda").manual_seed(seed)
    S = shape.N + shape.L
    embeds = torch.randn(B, S, shape.D, generator=generator, device="cuda", dtype=torch.bfloat16)
    vision = torch.zeros(B, S, dtype=torch.bool, device="cuda")
    vision[:, shape.L // 2 : shape.L // 2 + shape.N] = True
    return embeds, vision, ~vision, torch.rand(shape.D, generator=generator, device="cuda") + 0.5


def prune(inputs: tuple[torch.Tensor, ...]) -> PrunedSequence:
    return prune_sequence(*inputs, UniformBudget(0.65), static=True)


def assert_pruned(result: PrunedSequence, inputs: tuple[torch.Tensor, ...]) -> None:
    """Right for its own scores, bit for bit; and those are the reference's but for rounding."""
    embeds, vision, text, weight = inputs
    with use_backend("reference"):
        wanted = prune(inputs)
        rank = result.scores.masked_fill(text, float("inf"))
        index = select_tokens(rank, result.lengths, capacity=embeds.shape[1])
    torch.testing.assert_close(result.scores[vision], wanted.scores[vision], rtol=0, atol=1e-5)
    assert torch.equal(result.counts, wanted.counts)
    for b, length in enumerate(result.lengths.tolist()):
        kept = index[b, :length]
        assert torch.equal(result.index[b, -length:], kept)
        assert torch.equal(result.embeds[b, -length:], embeds[b, kept])
        assert not result.embeds[b, :-length].any()


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_real_sizes(shape, B, cuda_backend):
    inputs = sequence(shape, B)
    assert_pruned(prune(inputs), inputs)


def test_one_launch(cuda_backend):
    inputs = sequence(SHAPES[0])
    prune(inputs)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        prune(inputs)
        torch.cuda.synchronize()
    kernels = [event.key for event in profile.key_averages() if "Memset" not in event.key and event.device_time]
    assert len(kernels) == 1
    assert "prune_kernel" in kernels[0]


def test_a_captured_graph_replays_on_new_contents(cuda_backend):
    inputs = sequence(SHAPES[1])
    prune(inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = prune(inputs)
    for seed in (1, 2):
        for held, new in zip(inputs, sequence(SHAPES[1], seed=seed), strict=True):
            held.copy_(new)
        graph.replay()
        assert_pruned(result, inputs)


def test_two_streams_at_once(cuda_backend):
    streams = [torch.cuda.Stream() for _ in range(2)]
    inputs = [sequence(SHAPES[0], seed=seed) for seed in range(2)]
    torch.cuda.synchronize()
    results: list[list[PrunedSequence]] = [[], []]
    for _ in range(20):  # each grid fills the device: cooperative ones must wait for each other whole
        for number, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[number].append(prune(inputs[number]))
    torch.cuda.synchronize()
    for found, own in zip(results, inputs, strict=True):
        assert_pruned(found[0], own)
        for other in found[1:]:
            assert torch.equal(other.embeds, found[0].embeds)
            assert torch.equal(other.index, found[0].index)


def test_auto_leaves_the_library_alone(monkeypatch):
    launched = []
    monkeypatch.setitem(dispatch.cuda_launchers(), "prune_static", lambda *args: launched.append(args))
    with use_backend("auto"):
        prune(sequence(SHAPES[1]))
    assert not launched
    assert cuda.why_not(torch.device("cuda")) == ""
