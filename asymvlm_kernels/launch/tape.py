"""A tape: what one call of a launcher allocated and launched, told so that it can be done again for other addresses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from asymvlm_kernels.launch.key import ALIGNMENT

MISFIT = object()  # the answer of a tape to a call that it cannot serve: nothing was launched

Results = int | tuple["Results", ...] | list["Results"] | None  # numbers stand for allocations


class Pointer(NamedTuple):
    """Bytes behind the start of a source: the tensors of a call, then its allocations, then what lives on."""

    source: int
    offset: int


class Group(tuple[Any, ...]):
    """One argument that is a tuple: of pointers, None, and 0 for memory without an element."""


class Step(NamedTuple):
    """One launch."""

    run: Callable[..., None]
    grid: tuple[int, int, int]
    function: Any
    packed_metadata: Any
    arguments: list[Any]  # all of them, in order; what stands at a place below does not count
    pointers: list[tuple[int, int, int]]  # place, source, offset
    groups: list[tuple[int, Group]]


class Allocation(NamedTuple):
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Held(NamedTuple):
    """A tensor that outlives a call, by the function that knows it."""

    make: Callable[..., torch.Tensor]
    arguments: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Tape:
    driver: Any  # Triton's, and its number of the device
    device: int
    allocate: Callable[..., torch.Tensor]  # there, by size, stride and type
    allocations: list[Allocation]
    held: list[Held]
    together: list[tuple[int, int, int]]  # tensors of one memory: first, second, bytes between them
    kernels: set[Any]
    constants: list[tuple[dict[str, Any], str, Any]]  # globals that the kernels were compiled with
    steps: list[Step]
    results: Results

    def replay(self, driver: Any, addresses: list[int]) -> Any:
        """The results of a call whose tensors lie at ``addresses``, which is added to; or `MISFIT`."""
        if driver is not self.driver or driver.get_current_device() != self.device:
            return MISFIT
        for first, second, distance in self.together:
            if addresses[second] - addresses[first] != distance:
                return MISFIT
        for kernel in self.kernels:
            if kernel.pre_run_hooks or kernel.debug:
                return MISFIT
        for scope, name, value in self.constants:
            if scope.get(name) is not value:
                return MISFIT
        allocate = self.allocate
        made = [allocate(size, stride, dtype) for size, stride, dtype in self.allocations]
        kept = [make(*arguments) for make, arguments in self.held]
        given = len(addresses)
        addresses += [tensor.data_ptr() for tensor in made]
        addresses += [tensor.data_ptr() for tensor in kept]
        for address in addresses[given:]:
            if address % ALIGNMENT:
                return MISFIT
        stream = driver.get_current_stream(self.device)
        for run, grid, function, packed_metadata, arguments, pointers, groups in self.steps:
            arguments = arguments.copy()
            for place, source, offset in pointers:
                arguments[place] = addresses[source] + offset
            for place, group in groups:
                arguments[place] = tuple([piece and addresses[piece[0]] + piece[1] for piece in group])
            run(*grid, stream, function, packed_metadata, None, None, None, *arguments)
        return pick(self.results, made)


def pick(results: Results, made: list[torch.Tensor]) -> Any:
    if results is None:
        return None
    if isinstance(results, int):
        return made[results]
    found = [made[item] if type(item) is int else pick(item, made) for item in results]
    return found if type(results) is list else tuple(found)
