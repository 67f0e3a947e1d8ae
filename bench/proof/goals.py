"""The core: each kernel and dtype once at a size that a goal is set for, as cases that know their right answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from asymvlm_kernels.prefill.score import score_tokens
from asymvlm_kernels.training.attention import key_bias_attention
from bench.ops.decode.cases import DECODE_CASES
from bench.ops.decode.shapes import SINGLES as DECODE
from bench.ops.decode.shapes import SMOKE as SMALL_DECODE
from bench.ops.decode.shapes import DecodeShape
from bench.ops.prefill.cases import CASES, Case, Inputs, Variant, WrongAnswer
from bench.ops.prefill.shapes import BATCHES, SINGLES, Shape
from bench.ops.prefill.shapes import SMOKE as SMALL
from bench.proof.by_scores import BY_SCORES

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (*HALVES, torch.float32)
PHI, GEMMA, PAGE, BATCH = SINGLES[0], SINGLES[1], SINGLES[-1], BATCHES[-1]
SLOW = "ours"  # reads a length on the host; "ours static" launches the same
GRADIENT = 1e-2  # of the largest entry: a gradient of 16-bit values


@dataclass(frozen=True)
class Goal:
    """One variant of one case."""

    case: Case
    variant: str

    @property
    def name(self) -> str:
        return f"{self.case.key}/{self.variant}".replace(" ", "-")

    def run(self, inputs: Inputs) -> Any:
        return self.case.variants[self.variant].function(*inputs)

    def check(self, device: str) -> float:
        """The largest error. Raises WrongAnswer."""
        inputs = self.case.make(torch.Generator(device).manual_seed(0))
        variant = self.case.variants[self.variant]
        return self.case.check(inputs, self.run(inputs), variant.tolerance)


def goals(device: str = "cuda", smoke: bool = False) -> list[Goal]:
    """The core's goals; with ``smoke`` at tiny sizes, which a CPU computes too."""
    found = list(_goals(device))
    if not smoke:
        return found
    small: dict[str, Goal] = {}
    for goal in found:
        shape = SMALL[1] if isinstance(goal.case.shape, Shape) else SMALL_DECODE[1]
        case = _case(goal.case.op, shape, goal.case.dtype, device)
        if goal.variant in case.variants:
            small[f"{case.key}/{goal.variant}"] = replace(goal, case=case)
    return list(small.values())


def _goals(device: str) -> Iterator[Goal]:
    def of(op: str, shape: Shape | DecodeShape, dtype: torch.dtype, *variants: str) -> Iterator[Goal]:
        case = _case(op, shape, dtype, device)
        yield from (Goal(case, name) for name in variants if name in case.variants)

    paths = ("ours static", "ours one launch", "ours overlapped")
    for dtype in DTYPES:
        yield from of("prune_sequence", PHI, dtype, SLOW, *(paths if dtype != torch.float16 else paths[:1]))
        yield from of("prune_sequence", GEMMA, dtype, SLOW)
        yield from of("prune_by_scores", PHI, dtype, "ours")
        yield from of("score_tokens", PHI, dtype, "ours")
        yield from of("gather_rows", PHI, dtype, "ours")
        yield from of("attend", DECODE[2], dtype, "ours")
        yield from of("attend_scores", DECODE[2], dtype, "ours", "ours, any slots", "ours, from lse")
        yield from of("score_gradient", PHI, dtype, "ours")
        yield from of("key_bias_attention", DECODE[2], dtype, "ours")
    for shape in (PAGE, BATCH):
        yield from of("prune_sequence", shape, torch.bfloat16, "ours static")
        yield from of("select_tokens", shape, torch.bfloat16, "ours")
    for decoded in (DECODE[0], DECODE[1], DECODE[3]):  # Gemma 3 at 2k and 8k, Phi
        yield from of("attend_scores", decoded, torch.bfloat16, "ours", "ours, any slots")
    yield from of("move_slots", DECODE[1], torch.bfloat16, "ours")


def _case(op: str, shape: Any, dtype: torch.dtype, device: str) -> Case:
    return (CASES | BY_SCORES | DECODE_CASES | TRAINING)[op](shape, dtype, device)  # type: ignore[operator]


def gradient_case(shape: Shape, dtype: torch.dtype, device: str) -> Case:
    """The gradient of the learned weight through the scores, against autograd of the formula in fp64."""

    def make(generator: torch.Generator) -> Inputs:
        return CASES["score_tokens"](shape, dtype, device).make(generator)

    def ours(vision: torch.Tensor, text: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            learned = weight.detach().clone().requires_grad_()
            (gradient,) = torch.autograd.grad(score_tokens(vision, text, learned).sum(), learned)
        return gradient

    def check(inputs: Inputs, output: torch.Tensor, tolerance: float) -> float:
        vision, text, weight = (x.double() for x in inputs)
        v, t = (x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12) for x in (vision, text))
        best = ((v * weight) @ t.mT).argmax(-1)
        wanted = torch.einsum("bnd,bnd->d", v, t.gather(1, best[..., None].expand(-1, -1, t.shape[-1])))
        return _near(output, wanted, tolerance)

    return Case("score_gradient", shape, dtype, make, check, {"ours": Variant(ours, tolerance=GRADIENT)})


def key_bias_case(shape: DecodeShape, dtype: torch.dtype, device: str) -> Case:
    """Output and gradient of the bias, 500 tokens of a model's heads, against fp64."""
    H, G, D, S = shape.H, shape.G, shape.D, min(shape.S, 500)

    def make(generator: torch.Generator) -> Inputs:
        def heads(number: int) -> torch.Tensor:  # as a decoder makes them, heads before places in memory
            size = (shape.B, number, S, D)
            return torch.randn(size, generator=generator, device=generator.device, dtype=dtype).transpose(1, 2)

        bias = torch.randn((shape.B, S), generator=generator, device=generator.device)
        return heads(H), heads(G), heads(G), bias

    def attended(attend: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> Any:
        with torch.enable_grad():
            learned = bias.detach().clone().requires_grad_()
            out = attend(q, k, v, learned)
            (gradient,) = torch.autograd.grad(out.float().square().sum(), learned)
        return out.detach(), gradient

    def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k, v = (x.repeat_interleave(H // G, 1) for x in (k, v))
        mask = torch.ones((S, S), dtype=torch.bool, device=q.device).triu(1)
        logits = (q @ k.mT * D**-0.5 + bias[:, None, None]).masked_fill(mask, float("-inf"))
        return (logits.softmax(-1) @ v).transpose(1, 2)

    def check(inputs: Inputs, output: tuple[torch.Tensor, ...], tolerance: float) -> float:
        wanted = attended(exact, *(x.double() for x in inputs))
        return max(_near(got, want, tolerance) for got, want in zip(output, wanted, strict=True))

    variants = {"ours": Variant(lambda *inputs: attended(key_bias_attention, *inputs), tolerance=2e-2)}
    return Case("key_bias_attention", shape, dtype, make, check, variants)


TRAINING = {"score_gradient": gradient_case, "key_bias_attention": key_bias_case}


def _near(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> float:
    error = float((got.double() - want).abs().max() / want.abs().max())
    if not error <= tolerance:  # NaN fails too
        raise WrongAnswer(f"error {error:.1e} of the largest value, allowed {tolerance:.0e}")
    return error
