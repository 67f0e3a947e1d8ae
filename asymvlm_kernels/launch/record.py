"""The terms that a launcher is written in, and who listens while it runs."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from asymvlm_kernels.launch import interface
from asymvlm_kernels.launch.key import ALIGNMENT, Remembered, describe
from asymvlm_kernels.launch.tape import MISFIT, Allocation, Group, Held, Pointer, Results, Step, Tape

Function = TypeVar("Function", bound=Callable[..., Any])

SEEN, REFUSED = object(), object()  # in place of a tape: one call so far; not to be put on tape


def empty(size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`torch.empty`, for a launcher and its fake."""
    tensor = torch.empty(size, dtype=dtype, device=device)
    if _listening.recorder is not None:
        _listening.recorder.made.append(tensor)
    return tensor


def held(make: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
    """``make(*arguments)``, a tensor that outlives the call: each replay asks for it again."""
    tensor = make(*arguments)
    if _listening.recorder is not None:
        _listening.recorder.held.append((tensor, Held(make, arguments)))
    return tensor


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """``kernel[grid](*arguments, **constants)``."""
    compiled = kernel[grid](*arguments, **constants)
    if _listening.recorder is not None:
        _listening.recorder.launches.append((kernel, compiled, grid, arguments, constants))


def remember(launcher: Function) -> Function:
    """Replay ``launcher``, a function of tensors and numbers, on calls that differ in addresses only.

    It must allocate by `empty`, reach what lives on by `held`, launch by `launch`, and apart from that only look at its
    tensors without reading them. Where it does more, a copy say, it does so by PyTorch: then a kernel or the caller is
    handed memory that no tape knows, and such calls always run as written.

    The second call of a key is put on tape, since lengths that change with every call are not worth one.
    """
    if not interface.REPLAYS:
        return launcher
    tapes = Remembered()
    _all_tapes.append(tapes)

    @functools.wraps(launcher)
    def run(*arguments: Any, **options: Any) -> Any:
        driver = interface.driver_if_plain()
        if driver is None or _listening.recorder is not None:
            return launcher(*arguments, **options)
        tensors: list[torch.Tensor] = []
        addresses: list[int] = []
        given = (*arguments, *options, *options.values()) if options else arguments
        key = describe(given, tensors, addresses)
        if key is None:
            return launcher(*arguments, **options)
        tape = tapes.get(key)
        if type(tape) is Tape:
            results = tape.replay(driver, addresses)
            return launcher(*arguments, **options) if results is MISFIT else results
        if tape is None:
            tapes.put(key, SEEN)
        if tape is not SEEN:
            return launcher(*arguments, **options)
        recorder = Recorder(tensors, addresses)
        results = recorder.listen(launcher, arguments, options)
        tapes.put(key, recorder.tape(driver, results) or REFUSED)
        return results

    run.tapes = tapes  # type: ignore[attr-defined]
    return run  # type: ignore[return-value]


def forget() -> None:
    """Drop every tape: the next calls launch as written. For tests that put another kernel in the place of one."""
    for tapes in _all_tapes:
        tapes.clear()


_all_tapes: list[Remembered] = []


class Unknown(Exception):
    """Something that a tape cannot hold, memory of unknown origin above all."""


class Recorder:
    """Listens to one call of a launcher, given tensors at some addresses."""

    def __init__(self, given: list[torch.Tensor], addresses: list[int]) -> None:
        self.given, self.addresses = given, addresses
        self.made: list[torch.Tensor] = []
        self.held: list[tuple[torch.Tensor, Held]] = []
        self.launches: list[tuple[Any, Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = []
        self.sources: list[torch.Tensor] = []

    def listen(self, launcher: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        _listening.recorder = self
        try:
            return launcher(*arguments, **options)
        finally:
            _listening.recorder = None

    def tape(self, driver: Any, results: Any) -> Tape | None:
        """What was heard, or None where a tape cannot tell it."""
        self.sources = [*self.given, *self.made, *(tensor for tensor, _ in self.held)]
        try:
            return self._tape(driver, results)
        except Unknown:
            return None

    def _tape(self, driver: Any, results: Any) -> Tape:
        devices = {tensor.device for tensor in (*self.sources, *self.made)}
        if not self.launches or not self.made or len(devices) != 1:
            raise Unknown
        for tensor in self.sources[len(self.given) :]:
            if tensor.data_ptr() % ALIGNMENT or (not tensor.is_inference() and tensor._version):
                raise Unknown  # what was written by PyTorch would not be written again
        (device,) = devices
        return Tape(
            driver=driver,
            device=driver.get_current_device(),
            allocate=interface.allocator(device),
            allocations=[Allocation(tuple(tensor.shape), tensor.stride(), tensor.dtype) for tensor in self.made],
            held=[held for _, held in self.held],
            together=self._together(),
            kernels={kernel for kernel, *_ in self.launches},
            constants=[constant for kernel, *_ in self.launches for constant in constants_of(kernel)],
            steps=[self._step(*launch) for launch in self.launches],
            results=self._results(results),
        )

    def _together(self) -> list[tuple[int, int, int]]:
        """Tensors given that share memory: a pointer into it may have come from either, so they must stay so."""
        first: dict[int, int] = {}
        found = []
        for place, tensor in enumerate(self.given):
            memory = tensor.untyped_storage().data_ptr()
            other = first.setdefault(memory, place)
            if memory and other != place:
                found.append((other, place, self.addresses[place] - self.addresses[other]))
        return found

    def _step(
        self, kernel: Any, compiled: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]
    ) -> Step:
        if not interface.can_replay(kernel, compiled):
            raise Unknown
        named = {name: value for name, value in constants.items() if name in kernel.arg_names}
        bound = kernel.signature.bind(*arguments, **named)
        bound.apply_defaults()
        items = [self._item(value) for value in bound.arguments.values()]
        pointers = [(place, *item) for place, item in enumerate(items) if type(item) is Pointer]
        groups = [(place, item) for place, item in enumerate(items) if type(item) is Group]
        width, height, depth = (*grid, 1, 1)[:3]
        return Step(
            compiled.run, (width, height, depth), compiled.function, compiled.packed_metadata, items, pointers, groups
        )

    def _item(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._pointer(value)
        if isinstance(value, tuple):
            return self._group([self._item(item) for item in value])
        if isinstance(value, list) or hasattr(value, "data_ptr"):
            raise Unknown
        return value

    def _group(self, items: list[Any]) -> Any:
        if not any(isinstance(item, (Pointer, Group)) for item in items):
            return tuple(items)
        if any(item and type(item) is not Pointer for item in items):
            raise Unknown
        return Group(items)

    def _pointer(self, tensor: torch.Tensor) -> Pointer | int:
        address = tensor.data_ptr()
        if address == 0:  # without an element, as at each call of these sizes
            return 0
        memory = tensor.untyped_storage().data_ptr()
        for number, source in enumerate(self.sources):
            if source.untyped_storage().data_ptr() == memory and source.data_ptr():
                return Pointer(number, address - source.data_ptr())
        raise Unknown

    def _results(self, results: Any) -> Results:
        if results is None:
            return None
        if type(results) in (tuple, list):
            found = [self._results(item) for item in results]
            return found if type(results) is list else tuple(found)
        for number, tensor in enumerate(self.made):
            if tensor is results:
                return number
        raise Unknown


def constants_of(kernel: Any) -> list[tuple[dict[str, Any], str, Any]]:
    """The globals that a kernel reads, as they are now: Triton refuses to launch where one has changed."""
    return [(scope, name, scope.get(name)) for (name, _), (_, scope) in kernel.used_global_vals.items()]


class _Listening(threading.local):
    recorder: Recorder | None = None


_listening = _Listening()
