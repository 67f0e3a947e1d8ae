"""The ops of other methods as benchmark cases: column sums of attention, cosines, and the greedy choices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import asymvlm_kernels as ak
from asymvlm_kernels.prefill.greedy import reference
from bench.ops.methods.shapes import MethodShape
from bench.ops.prefill.cases import Case, Inputs, Variant, WrongAnswer

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}  # of the largest value
Choice = Callable[..., torch.Tensor]


def column_sums_case(shape: MethodShape, dtype: torch.dtype, device: str) -> Case:
    """A prompt's queries over its own keys."""
    B, N = shape.B, shape.N

    def make(generator: torch.Generator) -> Inputs:
        q, k = (_normal((B, heads, N, shape.D), dtype, generator).transpose(1, 2) for heads in (shape.H, shape.G))
        return q, k, torch.arange(N, device=q.device).repeat(B, 1)

    def check(inputs: Inputs, output: torch.Tensor, tolerance: float) -> float:
        q, k, _ = inputs
        exact = eager_sums(q.double(), k.double())
        error = float((output.double() - exact).abs().max() / exact.abs().max())
        if output.shape != exact.shape or not error <= tolerance:  # NaN fails too
            raise WrongAnswer(f"sums err by {error:.1e} of their largest, allowed {tolerance:.0e}")
        return error

    def ours(q: torch.Tensor, k: torch.Tensor, q_pos: torch.Tensor) -> torch.Tensor:
        return ak.attention_column_sums(q, k, q_pos=q_pos)

    variants = {
        "ours": Variant(ours, tolerance=TOLERANCE[dtype]),
        "eager": Variant(lambda q, k, _: eager_sums(q, k), tolerance=TOLERANCE[dtype]),
    }
    return Case("attention_column_sums", shape, dtype, make, check, variants)


def eager_sums(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """By the whole matrix, of one key head at a time: of all of them it would not fit."""
    (_, N, H, D), G = q.shape, k.shape[2]
    hidden = torch.ones(N, N, dtype=torch.bool, device=q.device).triu(1)
    sums = []
    for g in range(G):
        rows = q[:, :, g * (H // G) : (g + 1) * (H // G)].transpose(1, 2)
        logits = rows @ k[:, :, g, None].permute(0, 2, 3, 1) * D**-0.5
        weights = logits.masked_fill(hidden, float("-inf")).softmax(-1, torch.promote_types(q.dtype, torch.float32))
        sums.append(weights.sum(2).mean(1))
    return torch.stack(sums, 1)


def cosine_case(shape: MethodShape, dtype: torch.dtype, device: str) -> Case:
    def make(generator: torch.Generator) -> Inputs:
        return (_normal((shape.B, shape.N, shape.width), dtype, generator),)

    def eager(x: torch.Tensor) -> torch.Tensor:
        unit = torch.nn.functional.normalize(x.float(), dim=-1)
        return unit @ unit.mT

    def check(inputs: Inputs, output: torch.Tensor, tolerance: float) -> float:
        unit = torch.nn.functional.normalize(inputs[0].double(), dim=-1)
        error = float((output.double() - unit @ unit.mT).abs().max())
        if not error <= tolerance:
            raise WrongAnswer(f"cosines err by {error:.1e}, allowed {tolerance:.0e}")
        return error

    return Case(
        "cosine_matrix", shape, dtype, make, check, {"ours": Variant(ak.cosine_matrix), "eager": Variant(eager)}
    )


def farthest_case(shape: MethodShape, dtype: torch.dtype, device: str) -> Case:
    return _choice_case(
        "farthest_points", shape, device, lambda x, counts, _: ak.farthest_points(x, None, counts),
        lambda x, counts, _: reference.farthest_points(x, None, counts),
    )  # fmt: skip


def dpp_case(shape: MethodShape, dtype: torch.dtype, device: str) -> Case:
    return _choice_case(
        "dpp_map", shape, device, lambda x, counts, _: ak.dpp_map(x, None, counts, capacity=shape.K),
        lambda x, counts, _: reference.dpp_map(x, None, counts, shape.K),
    )  # fmt: skip


def drop_case(shape: MethodShape, dtype: torch.dtype, device: str) -> Case:
    return _choice_case(
        "drop_similar", shape, device, lambda x, counts, order: ak.drop_similar(x, order, counts),
        lambda x, counts, order: reference.drop_similar(x, order, counts),
    )  # fmt: skip


def _choice_case(op: str, shape: MethodShape, device: str, ours: Choice, plain: Choice) -> Case:
    """Tokens chosen by a matrix of cosines. A right answer is the reference's, on the CPU, token by token."""
    B, N = shape.B, shape.N

    def make(generator: torch.Generator) -> Inputs:
        x = ak.cosine_matrix(_normal((B, N, shape.width), torch.float32, generator))
        order = torch.rand((B, N), generator=generator, device=x.device).argsort(-1)
        return x, torch.full((B,), shape.K, device=x.device), order

    def check(inputs: Inputs, output: torch.Tensor, tolerance: float) -> float:
        address = inputs[0].data_ptr()
        if address not in answers:
            answers[address] = plain(*(x.cpu() for x in inputs))
        if not torch.equal(output.cpu(), answers[address]):
            raise WrongAnswer(f"{int((output.cpu() != answers[address]).sum())} tokens differ from the reference's")
        return 0.0

    answers: dict[int, torch.Tensor] = {}
    variants = {"ours": Variant(ours)}
    if device == "cuda":
        variants["reference"] = Variant(plain, capturable=False)
    return Case(op, shape, torch.float32, make, check, variants)


METHOD_CASES: dict[str, Callable[[Any, torch.dtype, str], Case]] = {
    "attention_column_sums": column_sums_case,
    "cosine_matrix": cosine_case,
    "farthest_points": farthest_case,
    "dpp_map": dpp_case,
    "drop_similar": drop_case,
}


def _normal(size: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(size, generator=generator, device=generator.device, dtype=dtype)
