"""On a GPU: each kernel and dtype at the sizes that goals are set for, and what no CPU has: graphs, streams, paths.

The core of `make gpu`, which picks these by the marker. What they check is tried on a CPU in test_gpu_plan.py.
"""

from __future__ import annotations

import pytest
import torch

import asymvlm_kernels as ak
from asymvlm_kernels.unproven.paths import PrefillPath, can_overlap, use_path
from bench.ops.prefill.shapes import Shape
from bench.proof import goals

HAS_GPU = torch.cuda.is_available()
REPLAYS, INPUTS = 200, 7

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="no CUDA device")]


@pytest.fixture(autouse=True)
def no_memory_left():
    yield
    torch.cuda.empty_cache()


@pytest.mark.parametrize("goal", goals.goals() if HAS_GPU else [], ids=lambda goal: goal.name)
def test_a_kernel_is_right_at_its_goal_size(goal):
    goal.check("cuda")


def sequence(shape: Shape, seed: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    return goals.CASES["prune_sequence"](shape, dtype, "cuda").make(torch.Generator("cuda").manual_seed(seed))


def prune(inputs: tuple[torch.Tensor, ...], ratio: float = 0.65) -> ak.PrunedSequence:
    return ak.prune_sequence(*inputs, ratio, static=True)


def parts(result: ak.PrunedSequence) -> list[torch.Tensor]:
    return [result.embeds, result.index, result.lengths, result.counts, result.scores, result.gap]


def same(one: ak.PrunedSequence, other: ak.PrunedSequence) -> torch.Tensor:
    """Whether all bits are the same, told on the device."""
    pairs = zip(parts(one), parts(other), strict=True)
    return torch.stack([(a == b).all() for a, b in pairs]).all()


@pytest.mark.parametrize("dtype", goals.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [goals.PHI, goals.GEMMA], ids=lambda shape: shape.name)
def test_one_launch_and_two_give_the_same_bits(shape, dtype):
    inputs = sequence(shape, 0, dtype)
    plain = prune(inputs)
    for path in (PrefillPath(launches=1), PrefillPath(overlap=can_overlap(inputs[0].device))):
        with use_path(path):
            assert bool(same(prune(inputs), plain)), path


@pytest.mark.parametrize("shape", [goals.PHI, goals.GEMMA], ids=lambda shape: shape.name)
def test_a_graph_replayed_with_changing_input_gives_what_a_call_gives(shape):
    fresh = [sequence(shape, seed) for seed in range(INPUTS)]
    wanted = [prune(inputs) for inputs in fresh]
    inputs = tuple(x.clone() for x in fresh[0])
    prune(inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = prune(inputs)
    right = []
    for number in range(REPLAYS):
        for place, x in zip(inputs, fresh[number % INPUTS], strict=True):
            place.copy_(x)
        graph.replay()
        right.append(same(result, wanted[number % INPUTS]))
    assert torch.stack(right).nonzero()[:, 0].tolist() == list(range(REPLAYS))


def test_calls_on_two_streams_do_not_disturb_each_other():
    inputs = [sequence(goals.PHI, seed) for seed in range(2)]
    wanted = [prune(one) for one in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    right: list[list[torch.Tensor]] = [[], []]
    for _ in range(25):
        for number, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                right[number].append(same(prune(inputs[number]), wanted[number]))
    torch.cuda.synchronize()
    for found in right:
        assert bool(torch.stack(found).all())


def test_a_sample_has_the_same_bits_alone_and_in_a_batch():
    embeds, vision, text, weight = sequence(goals.BATCH, 0)
    whole = prune((embeds, vision, text, weight))
    for row in (0, 31, 63):
        rows = slice(row, row + 1)
        alone = prune((embeds[rows], vision[rows], text[rows], weight))
        for a, b in zip(parts(alone), parts(whole), strict=True):
            assert torch.equal(a, b[rows])


def test_selection_by_given_scores_and_its_parts_are_the_references():
    generator = torch.Generator("cuda").manual_seed(0)
    scores = torch.randn(4, 16424, generator=generator, device="cuda")
    vision = torch.rand(4, 16424, generator=generator, device="cuda") < 0.9
    embeds = torch.randn(4, 16424, 64, generator=generator, device="cuda", dtype=torch.bfloat16)
    results = []
    for backend in ("triton", "reference"):
        with ak.use_backend(backend):
            results.append(ak.prune_sequence(embeds, vision, ~vision, scores=scores, static=True))
            gap = ak.importance_gap(scores, vision)
            counts = ak.keep_counts(gap, vision.sum(-1), ak.ThresholdBudget(1.2, 1.4, 0.8, 0.6, 0.4))
            moves = ak.plan_moves(vision)
            relative = ak.RelativeThresholdBudget(0.5).counts(scores.abs(), vision)
        results[-1] = (*parts(results[-1]), gap, counts, relative, *moves)
    for found, wanted in zip(*results, strict=True):
        assert torch.equal(found, wanted)
