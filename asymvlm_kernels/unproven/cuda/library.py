"""The optional CUDA library (csrc/): found, loaded by ctypes, and asked whether it can run here. Nothing needs it.

Looked for in this order: the file that ``ASYMVLM_CUDA_LIBRARY`` names, the one that an install with
``ASYMVLM_BUILD_CUDA=1`` put into the package, the one that ``python -m asymvlm_kernels.build`` put into the cache. It
has a plain C interface and a static CUDA runtime, so one binary serves every torch and Python and loads without a
driver. A build for a CPU (``csrc/emulator``) runs the same kernels on CPU tensors, for the tests.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import Any

import torch

from asymvlm_kernels.dispatch import Unsupported

ENVIRONMENT_VARIABLE = "ASYMVLM_CUDA_LIBRARY"
INTERFACE = 1  # ASYMVLM_INTERFACE in csrc/asymvlm.h
TOO_LARGE = 720  # cudaErrorCooperativeLaunchTooLarge: the blocks do not fit on the device all at once
LONGEST, WIDEST, MOST_CARRIES = 65536, 8192, 8
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

Pointer, Int, Long = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


class CudaLibraryError(RuntimeError):
    """A launch failed."""


class Carry(ctypes.Structure):
    """``AsymvlmCarry``."""

    _fields_ = [
        *((name, Pointer) for name in ("rows", "out")),
        *((name, Long) for name in ("pad", "stride_b", "stride_s", "stride_x")),
        *((name, Int) for name in ("width", "itemsize", "stacked", "unused")),
    ]


class Prune(ctypes.Structure):
    """``AsymvlmPrune``."""

    _fields_ = [
        *((name, Pointer) for name in ("embeds", "weight", "vision", "text", "protect", "scores", "gap", "counts")),
        *((name, Pointer) for name in ("lengths", "order", "out", "index", "workspace", "counters")),
        *((name, Long) for name in ("embeds_b", "embeds_s", "embeds_d", "weight_d", "vision_b", "vision_s")),
        *((name, Long) for name in ("text_b", "text_s", "protect_b", "protect_s")),
        ("ratios", Long * 3),
        ("numbers", ctypes.c_double * 5),
        *((name, Int) for name in ("B", "S", "D", "capacity", "dtype", "left", "linear", "carries")),
        ("carry", Carry * MOST_CARRIES),
    ]


class Plan(ctypes.Structure):
    """``AsymvlmPlan``."""

    _fields_ = [
        ("workspace", Long),
        *((name, Int) for name in ("counters", "team", "teams", "items", "groups", "ring", "slice", "wide")),
        *((name, Int) for name in ("keys_in_shared", "clusters", "shared", "resident")),
    ]


class Merge(ctypes.Structure):
    """``AsymvlmMerge``."""

    _fields_ = [
        *((name, Pointer) for name in ("partial", "sums", "logits", "seqlens", "leftpad", "out", "lse", "scores")),
        *((name, Long) for name in ("left", "right")),
        *(
            (name, Int)
            for name in ("B", "H", "Q", "S", "D", "parts", "scored", "dtype", "wide_seqlens", "wide_leftpad")
        ),
    ]


class Moves(ctypes.Structure):
    """``AsymvlmMoves``."""

    _fields_ = [
        *((name, Pointer) for name in ("table", "origin", "source", "target")),
        *((name, Long) for name in ("source_b", "source_m", "target_b", "target_m")),
        *((name, Int) for name in ("B", "M", "entries", "rows", "word", "access")),
    ]


def find() -> Path | None:
    """The library's file, or None where there is none."""
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    if named:
        return Path(named)
    from asymvlm_kernels import build  # here, or `python -m asymvlm_kernels.build` would find it imported already

    return next((path for path in (build.packaged(), build.cached()) if path is not None and path.exists()), None)


def why_not(device: torch.device) -> str:
    """Empty when the library can run on ``device``, else the reason."""
    path = find()
    if path is None:
        return "the CUDA library is not built (python -m asymvlm_kernels.build, which needs nvcc)"
    return _why_not(str(path), device.type, torch.cuda.current_device() if _needs_index(device) else device.index)


def _needs_index(device: torch.device) -> bool:
    return device.type == "cuda" and device.index is None and torch.cuda.is_available()


@functools.cache
def _why_not(path: str, kind: str, index: int | None) -> str:
    try:
        library = load(path)
    except (OSError, AttributeError, ImportError) as error:
        return f"{path} cannot be loaded: {error}"
    if library.asymvlm_emulated():
        return "" if kind == "cpu" else f"{path} is the build for a CPU"
    if kind == "cuda":
        with torch.cuda.device(index):
            code = library.asymvlm_probe()
    else:
        code = library.asymvlm_probe()  # says what a GPU user wants to know: no driver, or no device
    if code:
        return f"{path} cannot run here: {describe(library, code)}"
    return "" if kind == "cuda" else "CUDA kernels need a CUDA device"


def library() -> ctypes.CDLL:
    """The library, loaded.

    Raises:
        Unsupported: where there is none.
    """
    path = find()
    if path is None:
        raise Unsupported("the CUDA library is not built")
    return load(str(path))


@functools.cache
def load(path: str) -> ctypes.CDLL:
    """Load a build of the library and check that it has this package's interface.

    Raises:
        OSError: if it cannot be loaded. ImportError: if it is a build of other sources.
    """
    loaded = ctypes.CDLL(path)
    found = loaded.asymvlm_interface()
    if found != INTERFACE:
        raise ImportError(f"its interface is {found}, {INTERFACE} wanted: build it again")
    for number, struct in enumerate((Prune, Plan, Merge, Moves)):
        size = loaded.asymvlm_struct_size(number)
        if size != ctypes.sizeof(struct):
            raise ImportError(f"{struct.__name__} has {size} bytes there and {ctypes.sizeof(struct)} here")
    loaded.asymvlm_error_string.restype = ctypes.c_char_p
    loaded.asymvlm_prune.argtypes = [ctypes.POINTER(Prune), ctypes.POINTER(Plan), Pointer]
    loaded.asymvlm_prune_plan.argtypes = [ctypes.POINTER(Prune), ctypes.POINTER(Plan)]
    loaded.asymvlm_merge.argtypes = [ctypes.POINTER(Merge), Pointer]
    loaded.asymvlm_move_slots.argtypes = [ctypes.POINTER(Moves), Pointer]
    loaded.asymvlm_select.argtypes = [Pointer, Pointer, Pointer, Int, Pointer, Pointer, Int, Int, Int, Pointer]
    return loaded


def describe(library: ctypes.CDLL, code: int) -> str:
    return f"CUDA error {code}, {library.asymvlm_error_string(code).decode()}"


def check(library: ctypes.CDLL, name: str, code: int) -> None:
    """Raise what an error code means.

    Raises:
        Unsupported: if the blocks cannot be resident all at once: nothing has run. CudaLibraryError: on any other code.
    """
    if code == TOO_LARGE:
        raise Unsupported(f"{name} needs all its blocks on the device at once ({describe(library, code)})")
    if code:
        raise CudaLibraryError(f"{name} failed: {describe(library, code)}")


def pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def stream(device: torch.device) -> Any:
    """The raw current stream of ``device``; None in the emulator, which has none."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
