"""What a file of cases is made of: kernels with what they must do, and calls that launch them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """A launcher with its arguments: CPU tensors of real shapes, which nothing reads."""

    name: str
    call: Callable[[], object]
    operands: torch.dtype | None = None  # of matrix products: halves use tensor cores, fp32 must not become TF32
    oldest: int = 80  # architecture that can run it
    wide: bool = False  # rows are whole multiples of 16 bytes and must move that many at a time


@dataclass(frozen=True)
class Kernel:
    """What the machine code of a kernel must show. Rules are functions of `gate`."""

    wide_loads: bool = False  # has a 128-bit load in wide cases
    wide_stores: bool = False
    only_wide_loads: bool = False  # no narrower load of rows at all
    wide_copies: bool = False  # 128 bits at a time straight into shared memory, ahead of their use
    multiplies: bool = False
    small_tiles: bool = False  # of fewer than 64 rows: tensor cores of any generation will do
    rounds_float64_twice: bool = False  # no fused multiply-add in float64
    # architectures of which `make test-static` builds and emulates the first case; None: all, and all cases of sm_90
    sampled: tuple[int, ...] | None = None

    def rules(self, case: Case) -> list[str]:
        """The names of the rules for one case."""
        found = ["rounds_float64_twice"] * self.rounds_float64_twice
        if case.wide:
            found += [
                name for name in ("wide_loads", "wide_stores", "only_wide_loads", "wide_copies") if getattr(self, name)
            ]
        if self.multiplies and case.operands is not None:
            tensor_cores = "any_tensor_cores" if self.small_tiles else "tensor_cores"
            found.append(tensor_cores if case.operands in HALVES else "no_tensor_cores")
        return found
