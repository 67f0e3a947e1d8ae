"""The decode ops as benchmark cases: attention without and with scores, and the hole-fill of all layers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

import asymvlm_kernels as ak
from asymvlm_kernels.decode import reference
from bench.ops.decode import peers
from bench.ops.decode.shapes import FLEX, DecodeShape
from bench.ops.prefill.cases import Case, Inputs, Variant, WrongAnswer

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}  # of the largest value
LONGEST = 16384  # slots of all samples of a hole-fill: 6.4 GB of K and V in Gemma 3 12B
Answers = dict[int, tuple[torch.Tensor, torch.Tensor]]


def attend_case(shape: DecodeShape, dtype: torch.dtype, device: str) -> Case:
    """The output alone."""

    def check(inputs: Inputs, output: torch.Tensor, tolerance: float) -> float:
        return _require_near("output", output, _exact(inputs, answers)[0], tolerance)

    answers: Answers = {}
    tolerance = TOLERANCE[dtype]
    variants = {
        "ours": _ours(tolerance),
        "SDPA math": Variant(lambda q, k, v: peers.sdpa(q, k, v, "math"), tolerance=tolerance),
        "SDPA flash": Variant(lambda q, k, v: peers.sdpa(q, k, v, "flash"), tolerance=tolerance),
    }
    if device == "cuda":
        variants["SDPA flash, packed"] = Variant(
            lambda q, k, v: peers.packed_sdpa(q, k, v, "flash"), tolerance=tolerance
        )
        variants["SDPA cuDNN"] = Variant(lambda q, k, v: peers.sdpa(q, k, v, "cuDNN"), tolerance=tolerance)
        variants["SDPA cuDNN, packed"] = Variant(
            lambda q, k, v: peers.packed_sdpa(q, k, v, "cuDNN"), tolerance=tolerance
        )
        variants["ours, any slots"] = _ours(tolerance, slots=True)
        if shape.name in FLEX:
            variants["FlexAttention"] = Variant(peers.flex, tolerance=tolerance)
        if importlib.util.find_spec("flash_attn") is not None:
            variants["flash-attn"] = Variant(peers.flash_attn, tolerance=tolerance)
    return Case("attend", shape, dtype, _maker(shape, dtype), check, variants)


def attend_scores_case(shape: DecodeShape, dtype: torch.dtype, device: str) -> Case:
    """The output and the score of every slot."""

    def check(inputs: Inputs, output: tuple[torch.Tensor, torch.Tensor], tolerance: float) -> float:
        exact = _exact(inputs, answers)
        worst = [
            _require_near(name, got, want, tolerance)
            for name, got, want in zip(("output", "scores"), output, exact, strict=True)
        ]
        return max(worst)

    answers: Answers = {}
    tolerance = TOLERANCE[dtype]
    variants = {
        "ours": _ours(tolerance, return_scores=True),
        "eager": Variant(peers.eager, tolerance=tolerance),
    }
    if device == "cuda":
        variants["ours, no scores"] = _ours(tolerance, answers=False)  # what the scores are paid on top of
        variants["ours, any slots"] = _ours(tolerance, slots=True, return_scores=True)
        variants["ours, from lse"] = Variant(_from_lse, tolerance=tolerance)
    return Case("attend_scores", shape, dtype, _maker(shape, dtype), check, variants)


def move_case(shape: DecodeShape, dtype: torch.dtype, device: str) -> Case:
    """All layers' K and V, a quarter of whose slots was evicted. Calls may be repeated: sources stay as they are.

    Without variants where two sets of all layers, and what the gathers return, are too much for one GPU.
    """
    B, S, kept = shape.B, shape.S, shape.S - shape.freed

    def make(generator: torch.Generator) -> Inputs:
        order = torch.rand((B, S), generator=generator, device=generator.device).argsort(-1)
        keep = order < kept
        index = keep.nonzero()[:, 1].view(B, kept)
        source, target = reference.plan_moves(keep, shape.freed)
        most = int((source >= 0).sum(-1).max())
        size = (B, shape.G, S, shape.D)
        tensors = [_normal(size, dtype, generator) for _ in range(2 * shape.layers)]
        ak.move_slots_(_slots_first(tensors), source[:, :0], target[:, :0])
        ak.move_slots_(_slots_first(tensors), torch.full_like(source, -1), torch.full_like(target, -1))  # its table
        return source[:, :most].contiguous(), target[:, :most].contiguous(), index, *tensors

    def check(inputs: Inputs, output: tuple[torch.Tensor, ...], tolerance: float) -> float:
        source, target, index, *tensors = inputs
        for number, tensor in enumerate(tensors):
            right = peers.gather_layers(index, (tensor,))[0] if output else None
            for b in range(B):
                if right is not None:
                    good = torch.equal(output[number][b], right[b])
                else:
                    moves = source[b] >= 0
                    good = torch.equal(tensor[b][:, target[b, moves]], tensor[b][:, source[b, moves]])
                    tensor[b][:, target[b, moves]] = -1  # the next call has to write them again
                if not good:
                    raise WrongAnswer(f"tensor {number}, sample {b}: the moved slots are wrong")
        return 0.0

    def ours(source: torch.Tensor, target: torch.Tensor, index: torch.Tensor, *tensors: torch.Tensor) -> Inputs:
        ak.move_slots_(_slots_first(tensors), source, target)
        return ()

    variants = {
        "ours": Variant(ours),
        "gathers": Variant(lambda source, target, index, *tensors: peers.gather_layers(index, tensors)),
    }
    if B == 1:  # samples with fewer moves than others are padded
        variants["hole-fill by layer"] = Variant(lambda s, t, index, *tensors: peers.fill_layers(s, t, tensors))
    return Case("move_slots", shape, dtype, make, check, variants if B * S <= LONGEST else {})


DECODE_CASES: dict[str, Callable[[DecodeShape, torch.dtype, str], Case]] = {
    "attend": attend_case,
    "attend_scores": attend_scores_case,
    "move_slots": move_case,
}


def _ours(tolerance: float, *, slots: bool = False, answers: bool = True, **options: Any) -> Variant:
    """``slots``: with positions, those of a cache without a hole."""

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        places: dict[str, Any] = {}
        if slots:
            S = k.shape[2]
            if (len(q), S) not in positions:
                row = torch.arange(S, dtype=torch.int32, device=q.device).repeat(len(q), 1)
                positions[len(q), S] = {"slot_pos": row, "q_pos": torch.full((len(q),), S - 1, device=q.device)}
            places = positions[len(q), S]
        return ak.flash_attn_with_kvcache(q, k.transpose(1, 2), v.transpose(1, 2), **places, **options)

    positions: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
    return Variant(run, tolerance=tolerance, answers=answers)


def _from_lse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    out, lse = ak.flash_attn_with_kvcache(q, keys, values, return_softmax_lse=True)
    return out, ak.score_from_lse(q, keys, lse)


def _maker(shape: DecodeShape, dtype: torch.dtype) -> Callable[[torch.Generator], Inputs]:
    def make(generator: torch.Generator) -> Inputs:
        q = _normal((shape.B, 1, shape.H, shape.D), dtype, generator)
        k, v = (_normal((shape.B, shape.G, shape.S, shape.D), dtype, generator) for _ in range(2))
        return q, k, v

    return make


def _exact(inputs: Inputs, answers: Answers) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and scores in fp64, one key head at a time, once for each set of inputs."""
    q, k, v = inputs
    if q.data_ptr() not in answers:
        B, _, H, D = q.shape
        G = k.shape[1]
        rows, out = (
            q.view(B, G, H // G, D).double(),
            torch.empty((B, G, H // G, D), dtype=torch.float64, device=q.device),
        )
        scores = torch.zeros((B, k.shape[2]), dtype=torch.float64, device=q.device)
        for b in range(B):
            for g in range(G):
                weights = (rows[b, g] @ k[b, g].double().mT * D**-0.5).softmax(-1)
                out[b, g] = weights @ v[b, g].double()
                scores[b] += weights.sum(0) / H
        answers[q.data_ptr()] = out.view(B, 1, H, D), scores
    return answers[q.data_ptr()]


def _require_near(name: str, got: torch.Tensor, want: torch.Tensor, tolerance: float) -> float:
    if got.shape != want.shape:
        raise WrongAnswer(f"{name} has shape {tuple(got.shape)}, wanted {tuple(want.shape)}")
    error = float((got.double() - want).abs().max() / want.abs().max())
    if not error <= tolerance:  # NaN fails too
        raise WrongAnswer(f"{name} errs by {error:.1e} of its largest value, allowed {tolerance:.0e}")
    return error


def _slots_first(tensors: Any) -> list[torch.Tensor]:
    return [tensor.transpose(1, 2) for tensor in tensors]


def _normal(size: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(size, generator=generator, device=generator.device, dtype=dtype)
