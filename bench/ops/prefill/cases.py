"""Each op as a benchmark case: inputs, what a right answer is, the variants to time, and the bytes to count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

import asymvlm_kernels as ak
from asymvlm_kernels.prefill import reference
from asymvlm_kernels.unproven.cuda import library as cuda
from asymvlm_kernels.unproven.paths import PrefillPath, use_path
from bench.ops.prefill import peers
from bench.ops.prefill.shapes import COMPILED, SMOKE, Shape

Inputs = tuple[Any, ...]
PATHS = {"ours one launch": PrefillPath(launches=1), "ours overlapped": PrefillPath(overlap=True)}
SCORE_TOLERANCE = 1e-5  # fp32 arithmetic; scores are about 0.1
ROUNDED_TOLERANCE = 2e-2  # the product itself is rounded to 16 bits
TIE = 2e-6  # scores this near may swap places between two right answers


class WrongAnswer(AssertionError):
    """A variant gave a wrong result: its time is worth nothing."""


@dataclass(frozen=True)
class Variant:
    """One way to compute an op."""

    function: Callable[..., Any]
    capturable: bool = True  # may run inside a CUDA graph
    tolerance: float = SCORE_TOLERANCE
    answers: bool = True  # False: the copy ceiling at this size, not an answer


@dataclass(frozen=True)
class Case:
    """One op at one size. ``make(generator)`` gives inputs, ``check(inputs, output, tolerance)`` the largest error."""

    op: str
    shape: Any  # a Shape, or a DecodeShape
    dtype: torch.dtype
    make: Callable[[torch.Generator], Inputs]
    check: Callable[[Inputs, Any, float], float]
    variants: dict[str, Variant] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.op}/{self.shape.name}/{str(self.dtype).removeprefix('torch.')}"


def prepare(op: str, shape: Shape, dtype: torch.dtype, device: str) -> Case:
    """The case of ``op``, one of ``CASES``."""
    return CASES[op](shape, dtype, device)


def score_case(shape: Shape, dtype: torch.dtype, device: str) -> Case:
    B, N, D, L = shape.B, shape.N, shape.D, shape.L

    def make(generator: torch.Generator) -> Inputs:
        return _normal((B, N, D), dtype, generator), _normal((B, L, D), dtype, generator), _weight(D, generator)

    def check(inputs: Inputs, output: torch.Tensor, tolerance: float) -> float:
        return _require_close(output, exact_scores(*inputs), tolerance)

    variants = {
        "ours": Variant(ak.score_tokens),
        "literal eager": Variant(peers.literal_scores),
        "folded eager": Variant(peers.folded_scores),
    }
    if device == "cuda":
        variants["reference"] = Variant(lambda v, t, w: reference.score_tokens(v, t, w, None, None))
    if dtype != torch.float32:
        variants["rounded eager"] = Variant(peers.rounded_scores, tolerance=ROUNDED_TOLERANCE)
    if shape in COMPILED or shape == SMOKE[1] or (device == "cpu" and shape not in SMOKE):
        variants["literal compiled"] = Variant(peers.compiled(peers.literal_scores, device))
        variants["folded compiled"] = Variant(peers.compiled(peers.folded_scores, device))
    copy = copy_ceiling(device)
    variants["copy of V"] = Variant(lambda v, t, w: copy(v), answers=False)
    return Case("score_tokens", shape, dtype, make, check, variants)


def select_case(shape: Shape, dtype: torch.dtype, device: str) -> Case:
    B, N, K = shape.B, shape.N, shape.K

    def make(generator: torch.Generator) -> Inputs:
        rank = torch.rand((B, N), generator=generator, device=generator.device).argsort(-1)
        scores = rank / N - 0.25  # all different, so that every peer has one right answer
        return scores, torch.full((B,), K, dtype=torch.int32, device=generator.device)

    def check(inputs: Inputs, output: torch.Tensor, tolerance: float) -> float:
        return _require_equal("index", output, peers.sort_select(inputs[0], K))

    variants = {
        "ours": Variant(lambda scores, counts: ak.select_tokens(scores, counts, capacity=K)),
        "topk and sort": Variant(lambda scores, counts: peers.topk_select(scores, K)),
        "stable sort": Variant(lambda scores, counts: peers.sort_select(scores, K)),
    }
    variants |= by_cuda(variants["ours"], device)
    return Case("select_tokens", shape, torch.float32, make, check, variants)


def gather_case(shape: Shape, dtype: torch.dtype, device: str) -> Case:
    B, N, D, K = shape.B, shape.N, shape.D, shape.K

    def make(generator: torch.Generator) -> Inputs:
        order = torch.rand((B, N), generator=generator, device=generator.device).argsort(-1)
        return _normal((B, N, D), dtype, generator), order[:, :K].sort(-1).values

    def check(inputs: Inputs, output: torch.Tensor, tolerance: float) -> float:
        return _require_equal("rows", output, peers.take_gather(*inputs))

    copy = copy_ceiling(device)
    variants = {
        "ours": Variant(ak.gather_rows),
        "indexing": Variant(peers.index_gather),
        "torch.gather": Variant(peers.take_gather),
        "copy of K rows": Variant(lambda rows, index: copy(rows[:, :K]), answers=False),
    }
    return Case("gather_rows", shape, dtype, make, check, variants)


def prune_case(shape: Shape, dtype: torch.dtype, device: str) -> Case:
    B, N, K, S = shape.B, shape.N, shape.K, shape.S
    start = shape.L // 2  # one block of vision, text on both sides
    budget = ak.UniformBudget(shape.keep)

    def make(generator: torch.Generator) -> Inputs:
        vision_mask = torch.zeros((B, S), dtype=torch.bool, device=generator.device)
        vision_mask[:, start : start + N] = True
        return _normal((B, S, shape.D), dtype, generator), vision_mask, ~vision_mask, _weight(shape.D, generator)

    def ours(static: bool) -> Callable[..., Any]:
        def prune(e: torch.Tensor, v: torch.Tensor, t: torch.Tensor, w: torch.Tensor) -> Inputs:
            out = ak.prune_sequence(e, v, t, w, budget, static=static, capacity=S - N + K if static else None)
            return out.embeds, out.index

        return prune

    def check(inputs: Inputs, output: Any, tolerance: float) -> float:
        return _require_pruned(inputs, output, K)

    variants = {
        "ours": Variant(ours(static=False), capturable=False),
        "literal eager": Variant(lambda e, v, t, w: peers.mask_prune(e, v, t, w, K), capturable=False),
        "folded slices": Variant(lambda e, v, t, w: peers.slice_prune(e, start, N, w, K)),
    }
    if device == "cuda":
        variants["ours static"] = Variant(ours(static=True))
        variants |= {name: by_path(variants["ours static"], path) for name, path in PATHS.items()}
    variants |= by_cuda(Variant(ours(static=True)), device)
    return Case("prune_sequence", shape, dtype, make, check, variants)


def by_path(variant: Variant, path: PrefillPath) -> Variant:
    """The same on a path that nothing chooses by itself until it is measured to be faster."""

    def function(*inputs: Any) -> Any:
        with use_path(path):
            return variant.function(*inputs)

    return replace(variant, function=function)


def by_cuda(variant: Variant, device: str) -> dict[str, Variant]:
    """The same by the CUDA library, where it can run: on a CPU where the emulator was asked for."""
    if cuda.why_not(torch.device(device)):
        return {}

    def function(*inputs: Any) -> Any:
        with ak.use_backend("cuda"):
            return variant.function(*inputs)

    return {"ours, cuda": replace(variant, function=function)}


CASES: dict[str, Callable[[Shape, torch.dtype, str], Case]] = {
    "score_tokens": score_case,
    "select_tokens": select_case,
    "gather_rows": gather_case,
    "prune_sequence": prune_case,
}


def copy_ceiling(device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """A plain copy. On a CPU into memory that is there already: faults of fresh pages cost more than the copy."""
    if device == "cuda":
        return lambda rows: rows.clone(memory_format=torch.contiguous_format)
    places: list[torch.Tensor] = []

    def copy(rows: torch.Tensor) -> torch.Tensor:
        if not places:
            places.append(torch.empty_like(rows, memory_format=torch.contiguous_format))
        return places[0].copy_(rows)

    return copy


def exact_scores(vision: torch.Tensor, text: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Eq. 1 in fp64, one sample at a time."""
    w = weight.double()
    rows = []
    for v, t in zip(vision, text):
        v, t = (x.double() / x.double().norm(dim=-1, keepdim=True).clamp_min(peers.EPSILON) for x in (v, t))
        rows.append(((v * w) @ t.mT).amax(-1))
    return torch.stack(rows)


def _normal(size: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(size, generator=generator, device=generator.device, dtype=dtype)


def _weight(D: int, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(D, generator=generator, device=generator.device) + 0.5


def _require_close(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> float:
    if got.shape != want.shape:
        raise WrongAnswer(f"shape {tuple(got.shape)}, wanted {tuple(want.shape)}")
    error = float((got.double() - want).abs().max())
    if not error <= tolerance:  # NaN fails too
        raise WrongAnswer(f"error {error:.1e}, allowed {tolerance:.0e}")
    return error


def _require_equal(name: str, got: torch.Tensor, want: torch.Tensor) -> float:
    if got.shape != want.shape or not torch.equal(got, want):
        raise WrongAnswer(f"{name} differ: shape {tuple(got.shape)}, wanted {tuple(want.shape)} and equal values")
    return 0.0


def _require_pruned(inputs: Inputs, output: tuple[torch.Tensor, torch.Tensor], K: int) -> float:
    """Text whole, K vision tokens, none kept that scores below one dropped, ascending, rows copied bit for bit."""
    embeds, vision_mask, text_mask, weight = inputs
    rows, index = output
    for b in range(embeds.shape[0]):
        kept = index[b][index[b] >= 0]
        vision, text = vision_mask[b].nonzero()[:, 0], text_mask[b].nonzero()[:, 0]
        scores = exact_scores(embeds[b, vision][None], embeds[b, text][None], weight)[0]
        is_kept = torch.isin(vision, kept)
        right = torch.equal(kept, kept.unique()) and len(kept) == len(text) + K and bool(torch.isin(text, kept).all())
        right = right and (len(vision) == K or bool(scores[is_kept].min() >= scores[~is_kept].max() - TIE))
        if not right or not torch.equal(rows[b, index[b] >= 0], embeds[b, kept]):
            raise WrongAnswer(f"sample {b}: {len(kept)} tokens, not the {K} best vision tokens and {len(text)} of text")
    return 0.0
