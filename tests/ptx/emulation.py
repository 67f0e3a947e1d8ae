"""The project's launchers on CPU tensors: the PTX of what they launch is run instead of being recorded.

Inside ``with emulate(90) as reports:`` a launcher such as `_score_tokens_triton` fills its outputs on a CPU.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import builds  # before anything of triton: it says that kernels are compiled
import torch
from block import Code, translate
from case import Case
from formats import Fault
from grid import PLAIN, Conditions, Report, launch
from program import parse
from storage import Tensors

CODES: dict[tuple[Any, ...], tuple[Code, int]] = {}  # with the bytes of shared memory


@contextlib.contextmanager
def emulate(
    arch: int,
    conditions: Conditions = PLAIN,
    *,
    also: Sequence[torch.Tensor] = (),
    change: Callable[[str], str] | None = None,
    races: bool = True,
    reports: list[Report] | None = None,
) -> Iterator[list[Report]]:
    """Run launches on CPU tensors inside the ``with`` block; the list grows by a report for each.

    Args:
        also: tensors that kernels reach by addresses kept in other tensors.
        change: what happens to the PTX of each kernel before it is run.
        races: whether a race in shared memory is a fault; otherwise the reports tell.
        reports: a list to add to.
    """
    found = [] if reports is None else reports

    def act(build: builds.Build, arguments: dict[str, Any], grid: builds.Grid) -> None:
        code, shared = translated(build, change)
        tensors, values = Tensors(), []
        for name, kind in build.signature.items():
            values += parameters(arguments[name], kind, name, tensors)
        for number, tensor in enumerate(also):
            add_tensor(tensors, tensor, f"tensor {number}")
        values += [0] * (len(code.program.parameters) - len(values))  # scratch memory of Triton, which is not used
        sizes = tuple(grid(arguments) if callable(grid) else grid)
        report = launch(code, tensors, values, (*sizes, 1, 1, 1)[:3], shared, conditions)
        found.append(report)
        if races and report.races:
            raise Fault("\n".join(sorted(report.races)))

    with builds.launches_replaced(Case("emulated", list), arch, act), poisoned():
        yield found


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """`torch.empty` is filled with NaN and large integers, so that no result is right because nobody wrote it."""
    before, only_warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warns)


def translated(build: builds.Build, change: Callable[[str], str] | None) -> tuple[Code, int]:
    key = (build.key, change)
    if key not in CODES:
        compiled = builds.compile_build(build)
        text = compiled.asm["ptx"]
        CODES[key] = translate(parse(change(text) if change else text)), compiled.metadata.shared
    return CODES[key]


def parameters(value: Any, kind: Any, name: str, tensors: Tensors) -> list[int]:
    """An argument as the parameters of the kernel; its tensors become global memory."""
    if isinstance(kind, tuple):
        parts = (parameters(*pair, f"{name}.{number}", tensors) for number, pair in enumerate(zip(value, kind)))
        return [number for part in parts for number in part]
    if kind == "constexpr":
        return []
    if isinstance(value, torch.Tensor):
        add_tensor(tensors, value, name)
        return [value.data_ptr()]
    if isinstance(value, float):
        return [struct.unpack("<I", struct.pack("<f", value))[0]]
    return [int(value)]


def add_tensor(tensors: Tensors, tensor: torch.Tensor, name: str) -> None:
    storage = tensor.untyped_storage()
    tensors.add(storage.data_ptr(), storage.nbytes(), name)
