"""Where ``"auto"`` takes the CUDA library instead of Triton: only where a stored result shows that it is faster.

The rule, checked by a test for every proof: its results file in ``bench/results`` holds, for that device and op, a run
of the part ``cuda`` of ``make gpu`` that passed with the sanitizer clean, and times of the CUDA variant below Triton's
at the largest size of the proof and at one below it. Until then the library is for those who ask for it by name.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Proof:
    """On ``device`` (the name that CUDA gives it) ``op`` is faster up to ``largest`` elements of its first argument."""

    device: str
    op: str
    largest: int
    result: str  # file in bench/results


PROOFS: tuple[Proof, ...] = ()  # no GPU has run the library yet


def is_proven(op: str, tensor: torch.Tensor) -> bool:
    """Whether a proof covers ``op`` on ``tensor``, its first argument, on a CUDA device."""
    device = torch.cuda.get_device_name(tensor.device)
    return any(proof.op == op and proof.device == device and tensor.numel() <= proof.largest for proof in PROOFS)
