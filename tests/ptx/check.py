"""What a launch on the emulator is made of, and how its results are compared with a reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Emulated = Callable[..., Any]  # `emulation.emulate` for one architecture


@dataclass(frozen=True)
class Launch:
    """Launchers on small inputs, compared with the reference inside ``check``.

    ``quick``: the architectures for which `make test-static` runs it too: its builds are those of a case in
    tests/static, so that nothing more is compiled, or they are few.
    """

    name: str
    kernels: tuple[str, ...]
    check: Callable[[Emulated], None]
    quick: tuple[int, ...] = ()


def same(got: Any, want: Any, what: str) -> None:
    """Equal in every bit that a number has; NaN equals NaN."""
    pairs = zip(got, want, strict=True) if isinstance(got, (tuple, list)) else [(got, want)]
    for number, (one, other) in enumerate(pairs):
        assert one.shape == other.shape, f"{what} {number}: {tuple(one.shape)}, wanted {tuple(other.shape)}"
        differ = ~((one == other) | ((one != one) & (other != other)))
        assert not differ.any(), f"{what} {number}: {int(differ.sum())} of {differ.numel()} elements differ"


def close(got: torch.Tensor, want: torch.Tensor, within: float, what: str) -> None:
    """At most ``within`` of the largest element away; infinities where they belong."""
    got, want = got.double(), want.double()
    finite = torch.isfinite(want)
    same(got[~finite], want[~finite], f"{what}, not finite")
    if finite.any():
        largest = float(want[finite].abs().max())
        error = float((got[finite] - want[finite]).abs().max())
        assert error <= within * max(largest, 1e-30), f"{what}: error {error:.2e} beside {largest:.2e}"
