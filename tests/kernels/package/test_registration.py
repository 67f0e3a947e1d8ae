"""The registered ops: opcheck, torch.compile without a graph break, refused gradients, messages of wrong arguments."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

import pytest
import torch

import asymvlm_kernels as ak
from asymvlm_kernels import use_backend
from asymvlm_kernels._triton import INTERPRETED

BACKENDS = ("reference", "triton")


@pytest.fixture
def guarded_scratch() -> None:
    """Off: opcheck compares the storage of a result with that of its fake."""


any_backend = pytest.mark.parametrize("backend", BACKENDS)


def arguments(device) -> dict[str, tuple]:
    """Positional arguments of each registered op, with and without its optional ones."""
    torch.manual_seed(0)
    vision, text = torch.randn(2, 20, 16, device=device), torch.randn(2, 3, 16, device=device)
    scores, counts = torch.randn(2, 20, device=device), torch.tensor([5, 9], device=device)
    mask = torch.rand(2, 20, device=device) < 0.8
    matrix, few = torch.eye(9, device=device).repeat(2, 1, 1), torch.tensor([2, 3], device=device)
    heads, places = torch.randn(2, 6, 2, 16, device=device), torch.arange(6, dtype=torch.int32, device=device)
    return {
        "score_tokens": (vision, text, torch.rand(16, device=device), mask, mask[:, :3]),
        "score_tokens bare": (vision.bfloat16(), text.bfloat16(), None, None, None),
        "importance_gap": (scores, mask),
        "importance_gap bare": (scores, None),
        "select_tokens": (scores, counts, mask, 9),
        "select_tokens bare": (scores, counts, None, 20),
        "relative_counts": (scores, mask, 0.4, 50_000, 1_000_000),
        "gather_rows": (vision, torch.tensor([[0, 5, -1], [1, 2, 3]], device=device), 0),
        "gather_rows pad": (mask, torch.tensor([[0], [-1]], device=device), True),
        "attention_column_sums": (heads, heads[:, :, :1], None, *2 * [places.repeat(2, 1)], 0.25, -1, 0.0),
        "cosine_matrix": (vision, mask),
        "farthest_points": (matrix, mask[:, :9], few),
        "dpp_map": (matrix, mask[:, :9], few, 3),
        "drop_similar": (matrix, torch.arange(-1, 5, device=device).repeat(2, 1), few),
    }


OPS = tuple(arguments("cpu"))


@any_backend
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name, backend, device):
    with use_backend(backend):
        op = getattr(torch.ops.asymvlm, name.split()[0]).default
        torch.library.opcheck(op, arguments(device)[name])


CALLS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "score_tokens": lambda vision, scores: ak.score_tokens(vision, vision[:, :3], vision_mask=scores > 0),
    "importance_gap": lambda vision, scores: ak.importance_gap(scores) + 1,
    "select_tokens": lambda vision, scores: ak.select_tokens(
        scores, (scores > 0).sum(-1), capacity=scores.shape[1] // 2
    ),
    "gather_rows": lambda vision, scores: ak.gather_rows(vision * 2, (scores > 0).long().cumsum(-1) - 1, pad=3),
    "keep_counts": lambda vision, scores: ak.keep_counts(scores[:, 0], 7, ak.ThresholdBudget(-0.1, 0.1, 0.9, 0.5, 0.2)),
    "prune_sequence": lambda vision, scores: ak.prune_sequence(vision, scores > 0, scores < -0.5, static=True).embeds,
}


@any_backend
@pytest.mark.parametrize("name", CALLS)
def test_compiles_without_a_graph_break(name, backend, device):
    torch.manual_seed(0)
    inputs = torch.randn(2, 20, 16, device=device), torch.randn(2, 20, device=device)
    torch.compiler.reset()
    with use_backend(backend), torch.no_grad():
        compiled = torch.compile(CALLS[name], fullgraph=True, backend="aot_eager")
        expected = CALLS[name](*inputs)
        assert torch.equal(compiled(*inputs), expected)


def some_prompt(device) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 20, 16, device=device), (torch.arange(20, device=device) < 15).expand(2, 20)


@any_backend
def test_a_result_of_any_length_compiles_without_a_graph_break(backend, device):
    embeds, vision = some_prompt(device)

    def prune(embeds: torch.Tensor) -> torch.Tensor:
        return ak.prune_sequence(embeds, vision, ~vision, None, ak.UniformBudget(0.4)).embeds

    torch.compiler.reset()
    with use_backend(backend):  # around: a context variable cannot be set inside
        compiled = torch.compile(prune, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(embeds), prune(embeds))


@pytest.mark.parametrize("function", ["prune_sequence", "keep_counts"])
def test_a_ratio_is_data_of_a_compiled_call(function, device):
    embeds, vision = some_prompt(device)
    calls = {
        "prune_sequence": lambda ratio: ak.prune_sequence(embeds, vision, ~vision, None, ratio, static=True).counts,
        "keep_counts": lambda ratio: ak.keep_counts(embeds[:, 0, 0], 1000, ak.UniformBudget(ratio)),
    }
    torch.compiler.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(calls[function], fullgraph=True, backend=count)
    for ratio in (0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95):
        assert torch.equal(compiled(ratio), calls[function](ratio))
    assert len(graphs) <= 2


@pytest.mark.parametrize("pads", [None, {"ids": -1}, {"ids": -1, "more": 0.5}, {"ids": True}, {"ids": 2**60}], ids=str)
def test_an_exported_program_is_written_and_read(pads, device, monkeypatch):
    monkeypatch.undo()
    embeds, vision = some_prompt(device)
    carry = {} if pads is None else {"ids": vision.long(), "more": embeds[..., :2]}

    class Prune(torch.nn.Module):
        def forward(self, embeds: torch.Tensor, vision: torch.Tensor) -> tuple[torch.Tensor, ...]:
            options = {"carry": carry, "carry_pad": pads, "static": True, "capacity": 16}
            result = ak.prune_sequence(embeds, vision, ~vision, None, 0.4, **options)
            return result.embeds, result.index, *result.carry.values()

    file = io.BytesIO()
    torch.export.save(torch.export.export(Prune(), (embeds, vision)), file)
    file.seek(0)
    results = torch.export.load(file).module()(embeds, vision)
    for got, want in zip(results, Prune()(embeds, vision), strict=True):
        assert torch.equal(got, want)


def test_a_number_is_a_keep_ratio_wherever_a_budget_is_taken(device):
    embeds, vision = some_prompt(device)
    groups = torch.zeros(2, 20, dtype=torch.int64, device=device)
    for more in ({}, {"groups": groups}):
        one = ak.prune_sequence(embeds, vision, ~vision, None, 0.3, **more)
        assert torch.equal(
            one.index, ak.prune_sequence(embeds, vision, ~vision, None, ak.UniformBudget(0.3), **more).index
        )
    gap = torch.zeros(2, device=device)
    assert ak.keep_counts(gap, 10, 0.3).tolist() == [3, 3]
    for wrong in (0.0, 1.5, float("nan"), True, "half", None):
        with pytest.raises(ValueError, match="keep ratio in"):
            ak.keep_counts(gap, 10, wrong)
    with pytest.raises(ValueError, match="which counts scores"):
        ak.keep_counts(gap, 10, ak.RelativeThresholdBudget(0.4))


@pytest.mark.parametrize("name", ["score_tokens", "importance_gap", "select_tokens", "gather_rows"])
def test_a_new_length_is_not_traced_again_and_again(name, device):
    torch.compiler.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        compiled = torch.compile(CALLS[name], fullgraph=True, backend=count)
        for N in (20, 24, 31, 40, 57):
            inputs = torch.randn(2, N, 16, device=device), torch.randn(2, N, device=device)
            assert torch.equal(compiled(*inputs), CALLS[name](*inputs))
    assert len(graphs) <= 2  # the second is the one for every length


@any_backend
def test_inputs_that_require_grad_are_refused(backend, device):
    vision = torch.randn(1, 8, 4, device=device, requires_grad=True)
    weight = torch.ones(4, device=device, requires_grad=True)
    plain = vision.detach()
    scores = torch.randn(1, 8, device=device, requires_grad=True)
    index = torch.zeros(1, 2, dtype=torch.int64, device=device)
    mask = torch.ones(1, 8, dtype=torch.bool, device=device)
    calls = {
        ("score_tokens", "vision"): lambda: ak.score_tokens(vision, plain),
        ("score_tokens", "text"): lambda: ak.score_tokens(plain, vision),
        ("importance_gap", "scores"): lambda: ak.importance_gap(scores),
        ("select_tokens", "scores"): lambda: ak.select_tokens(scores, index[:, 0]),
        ("gather_rows", "rows"): lambda: ak.gather_rows(vision, index),
        ("prune_sequence", "embeds"): lambda: ak.prune_sequence(vision, mask, ~mask),
        ("prune_sequence", "weight"): lambda: ak.prune_sequence(plain, mask, ~mask, weight),
    }
    with use_backend(backend):
        for (op, name), call in calls.items():
            with pytest.raises(ValueError, match=f"{op} is not differentiable in {name}"):
                call()
            with torch.no_grad():
                call()


def unsupported(device) -> dict[str, tuple[Callable[..., object], tuple[torch.Tensor, ...]]]:
    """Public function: a call of it, and the tensors that a derivative might be asked for in."""
    torch.manual_seed(0)
    rows, scores = torch.randn(1, 8, 4, device=device), torch.randn(1, 8, device=device)
    index = torch.zeros(1, 2, dtype=torch.int64, device=device)
    mask = torch.arange(8, device=device)[None] < 4
    heads, lse = torch.randn(1, 8, 2, 4, device=device), torch.randn(1, 2, 8, device=device)
    weight, square = torch.ones(4, device=device), torch.eye(8, device=device)[None]
    spread = ak.RelativeThresholdBudget(0.4)

    def moved(x: torch.Tensor) -> torch.Tensor:
        ak.move_slots_([x], index, index)
        return x

    return {
        "score_tokens": (ak.score_tokens, (rows, rows, weight)),
        "importance_gap": (ak.importance_gap, (scores,)),
        "select_tokens": (lambda x: ak.select_tokens(x, index[:, 0]), (scores,)),
        "gather_rows": (lambda x: ak.gather_rows(x, index), (rows,)),
        "relative_counts": (lambda x: spread.counts(x, mask), (scores,)),
        "prune_sequence": (
            lambda x, w, c: ak.prune_sequence(x, mask, ~mask, w, carry={"c": c}).embeds,
            (rows, weight, scores),
        ),
        "flash_attn_func": (ak.flash_attn_func, (heads, heads, heads)),
        "flash_attn_with_kvcache": (ak.flash_attn_with_kvcache, (heads, heads, heads)),
        "score_from_lse": (ak.score_from_lse, (heads, heads, lse)),
        "move_slots_": (moved, (rows,)),
        "attention_column_sums": (
            lambda q, k: ak.attention_column_sums(q, k, q_pos=index[:, :1].repeat(1, 8)),
            2 * (heads,),
        ),
        "cosine_matrix": (ak.cosine_matrix, (rows,)),
        "farthest_points": (lambda x: ak.farthest_points(x, None, index[:, 0]), (square,)),
        "dpp_map": (lambda x: ak.dpp_map(x, None, index[:, 0]), (square,)),
        "drop_similar": (lambda x: ak.drop_similar(x, index, index[:, 0]), (square,)),
        "key_bias_attention": (ak.key_bias_attention, (heads, heads, heads, scores)),
    }


@any_backend
@pytest.mark.parametrize("name", unsupported("cpu"))
def test_no_way_to_differentiate_passes_in_silence(name, backend, device):
    call, inputs = unsupported(device)[name]
    refused = pytest.raises(ValueError, match=f"{name}.* does not run under torch.func")
    with use_backend(backend), torch.no_grad():  # which does not switch off forward mode
        for place, x in enumerate(inputs):

            def one(x: torch.Tensor, place: int = place) -> object:
                return call(*inputs[:place], x, *inputs[place + 1 :])

            with refused:
                torch.func.jvp(one, (x,), (torch.ones_like(x),))
            with refused:
                torch.vmap(one)(x[None])
            with torch.autograd.forward_ad.dual_level():
                dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
                with pytest.raises(ValueError, match=f"{name} has no forward-mode derivative"):
                    one(dual)
            with torch.enable_grad(), pytest.raises(ValueError, match=f"{name}.* does not run under torch.func"):
                torch.func.grad(lambda x, one=one: one(x).sum())(x)
            one(x)


def test_a_batch_of_masks_is_refused_too(device):
    keep = torch.ones(3, 2, 8, dtype=torch.bool, device=device)
    with pytest.raises(ValueError, match=r"plan_moves does not run under torch\.vmap"):
        torch.vmap(ak.plan_moves)(keep)


def wrong_arguments() -> dict[str, Callable[[], object]]:
    """Message: call that must raise it."""
    v, t = torch.zeros(2, 5, 4), torch.zeros(2, 3, 4)
    scores, counts = torch.zeros(2, 5), torch.ones(2, dtype=torch.int64)
    index, mask = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 5, dtype=torch.bool)
    budget = ak.UniformBudget(0.5)

    def padded(dtype: torch.dtype, pad: float) -> torch.Tensor:
        return ak.gather_rows(torch.zeros(2, 5, dtype=dtype), index, pad=pad)

    return {
        "vision must have shape (B, N, D), got (5, 4)": lambda: ak.score_tokens(v[0], t),
        "text must have shape (2, L, 4), got (1, 3, 4)": lambda: ak.score_tokens(v, t[:1]),
        "text must have shape (2, L, 4), got (2, 3, 2)": lambda: ak.score_tokens(v, t[..., :2]),
        "vision must be float32 or float16 or bfloat16, got float64": lambda: ak.score_tokens(v.double(), t.double()),
        "text must be float32, got float16": lambda: ak.score_tokens(v, t.half()),
        "weight must have shape (4,), got (5,)": lambda: ak.score_tokens(v, t, torch.ones(5)),
        "weight must be float32, got bfloat16": lambda: ak.score_tokens(v, t, torch.ones(4).bfloat16()),
        "vision_mask must have shape (2, 5), got (2, 3)": lambda: ak.score_tokens(v, t, vision_mask=mask[:, :3]),
        "text_mask must be bool, got int64": lambda: ak.score_tokens(v, t, text_mask=index),
        "text must be on cpu, got meta": lambda: ak.score_tokens(v, t.to("meta")),
        "scores must have shape (B, N), got (5,)": lambda: ak.importance_gap(scores[0]),
        "scores must be float32, got float64": lambda: ak.importance_gap(scores.double()),
        "mask must have shape (2, 5), got (1, 5)": lambda: ak.importance_gap(scores, mask[:1]),
        "counts must have shape (2,), got (1,)": lambda: ak.select_tokens(scores, counts[:1]),
        "counts must be int32 or int64, got float32": lambda: ak.select_tokens(scores, counts.float()),
        "counts must be on cpu, got meta": lambda: ak.select_tokens(scores, counts.to("meta")),
        "mask must be bool, got float32": lambda: ak.select_tokens(scores, counts, mask=scores),
        "capacity must be 0 or more, got -1": lambda: ak.select_tokens(scores, counts, capacity=-1),
        "rows must have shape (B, S, ...), got (3,)": lambda: ak.gather_rows(torch.zeros(3), index),
        "index must have shape (2, K), got (1, 3)": lambda: ak.gather_rows(v, index[:1]),
        "index must be int64, got int32": lambda: ak.gather_rows(v, index.int()),
        "index must be on cpu, got meta": lambda: ak.gather_rows(v, index.to("meta")),
        "embeds must have shape (B, S, D), got (2, 5)": lambda: ak.prune_sequence(scores, mask, mask),
        "embeds must be float32 or float16 or bfloat16, got int64": lambda: ak.prune_sequence(v.long(), mask, mask),
        "text_mask must be bool, got float32": lambda: ak.prune_sequence(v, mask, scores),
        "protect must have shape (2, 5), got (2, 4)": lambda: ak.prune_sequence(v, mask, mask, protect=mask[:, :4]),
        "groups must be int64 or int32, got bool": lambda: ak.prune_sequence(v, mask, mask, groups=mask),
        "per_image=True needs groups, got None": lambda: ak.prune_sequence(v, mask, mask, None, budget, per_image=True),
        "carry['x'] must have shape (2, 5, ...) or (R, 2, 5), got (2, 4)": lambda: ak.prune_sequence(
            v, mask, mask, carry={"x": scores[:, :4]}
        ),
        "carry_pad must name tensors of carry, x; got y": lambda: ak.prune_sequence(
            v, mask, mask, carry={"x": scores}, carry_pad={"y": 1}
        ),
        "carry_pad must name tensors of carry, which is empty; got y": lambda: ak.prune_sequence(
            v, mask, mask, carry_pad={"y": 1}
        ),
        "carry_pad['x'] must be a whole number from 0 to 255 for uint8, got -100": lambda: ak.prune_sequence(
            v, mask, mask, carry={"x": mask.to(torch.uint8)}, carry_pad={"x": -100}
        ),
        "pad must be a whole number from 0 to 255 for uint8, got 256": lambda: padded(torch.uint8, 256),
        "pad must be a whole number from -2147483648 to 2147483647 for int32, got 1.5": lambda: padded(
            torch.int32, 1.5
        ),
        "pad must be a whole number from 0 to 65535 for uint16, got -1": lambda: padded(torch.uint16, -1),
        "pad must be a whole number from -128 to 127 for int8, got nan": lambda: padded(torch.int8, float("nan")),
        "pad must be at most 65504 in size for float16, got 65536.0": lambda: padded(torch.float16, 65536.0),
        "pad must be at most 448 in size for float8_e4m3fn, got -449": lambda: padded(torch.float8_e4m3fn, -449),
        "pad must be finite or NaN for float8_e4m3fn, got inf": lambda: padded(torch.float8_e4m3fn, float("inf")),
        "pad must be 0 or 1 for bool, got 2": lambda: padded(torch.bool, 2),
        "pad must be a number, got 'x'": lambda: padded(torch.float32, "x"),
        "padding_side must be 'left' or 'right', got 'up'": lambda: ak.prune_sequence(v, mask, mask, padding_side="up"),
    }


@pytest.mark.parametrize("message", wrong_arguments())
def test_message_names_what_was_found_and_wanted(message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        wrong_arguments()[message]()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_its_arguments():
    scores = torch.randn(2, 50, device="cuda:1")
    with torch.cuda.device(0), use_backend("triton"):
        result = ak.importance_gap(scores)
    assert torch.equal(result.cpu(), ak.importance_gap(scores.cpu()))


def test_this_suite_runs_the_kernels():
    assert torch.cuda.is_available() or INTERPRETED
