"""Registered ops and the choice of backend. The only reader of ``ASYMVLM_BACKEND``.

An op is defined once, with a reference, an optional Triton launcher and a fake. Its CPU kernel runs the reference, or
the Triton launcher under the interpreter when ``"triton"`` is asked for. Its CUDA kernel runs Triton, or the reference
where Triton cannot run; ``"auto"`` logs the reason once. Given equal scores every backend returns the same indices; the
scores themselves agree up to rounding (see `prefill.score`). An explicit choice that cannot run raises.

``"cuda"`` is the optional CUDA library, loaded when it is named. Ops that it has no kernel for run as under ``"auto"``,
which never takes it: no GPU has shown it to be faster.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

import torch

from asymvlm_kernels._triton import HAS_TRITON, INTERPRETED, TRITON_IMPORT_ERROR

BACKENDS = ("auto", "reference", "triton", "cuda")
ENVIRONMENT_VARIABLE = "ASYMVLM_BACKEND"
MINIMUM_CAPABILITY = (8, 0)  # bf16 MMA

logger = logging.getLogger(__name__)
# A second import of the package in one process finds the ops registered: what they run is looked up here, where that
# import writes its own. Kept beside the ops, which outlive this module.
_registered: dict[str, Any] = vars(torch.ops.asymvlm).setdefault("asymvlm_kernels", {"schemas": {}})
if "library" not in _registered:
    _registered["library"] = torch.library.Library("asymvlm", "DEF")
_library: torch.library.Library = _registered["library"]
_choice: ContextVar[str | None] = ContextVar("asymvlm_backend", default=None)
_instead: ContextVar[Mapping[str, Callable[..., Any]]] = ContextVar("asymvlm_launchers", default=MappingProxyType({}))


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run here."""


class Unsupported(RuntimeError):
    """A launcher cannot serve this call, told before anything ran."""


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops inside the ``with`` block on one backend: ``"auto"``, ``"reference"``, ``"triton"`` or ``"cuda"``.

    Local to the current thread or task. Overrides the environment variable ``ASYMVLM_BACKEND``. ``"cuda"`` is the
    optional CUDA library; ops that it has no kernel for run as under ``"auto"``.

    Enter it around a compiled function, not inside: torch.compile cannot trace the setting of a context variable, and
    ops look for the choice when they run.

    Raises:
        ValueError: on an unknown name. `BackendError` follows at the first op that cannot run on the named backend.
    """
    token = _choice.set(_known(name))
    try:
        yield
    finally:
        _choice.reset(token)


@contextlib.contextmanager
def use_launchers(launchers: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Run the named ops inside the ``with`` block by other Triton launchers than their own, with the same arguments."""
    token = _instead.set({**_instead.get(), **launchers})
    try:
        yield
    finally:
        _instead.reset(token)


def requested_backend() -> str:
    """The backend asked for: by `use_backend`, else by ``ASYMVLM_BACKEND``, else ``"auto"``."""
    return _choice.get() or _known(os.environ.get(ENVIRONMENT_VARIABLE, "auto"))


def resolve_backend(device: torch.device) -> str:
    """The backend that runs an op on ``device``: ``"reference"``, ``"triton"``, or ``"cuda"`` where asked for.

    Raises:
        BackendError: if a backend was asked for by name and cannot run on ``device``.
    """
    name = requested_backend()
    if name == "reference":
        return name
    if name == "auto":
        return _automatic(device)
    reason = _why_not(name, device)
    if reason:
        raise BackendError(f"backend {name!r} was asked for but cannot run on {device}: {reason}")
    return name


def _automatic(device: torch.device) -> str:
    if device.type == "cpu":
        return "reference"  # the interpreter is for tests: it is slower than PyTorch
    reason = _why_not("triton", device)
    if reason:
        _log_fallback(str(device), reason)
        return "reference"
    return "triton"


def explain_backend() -> dict[str, Any]:
    """What ``"auto"`` chooses on this machine and why, for ``asymvlm doctor``."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    why = {name: _why_not(name, device) for name in ("reference", "triton", "cuda")}
    if device.type == "cpu":
        chosen, reason = "reference", "no CUDA device is visible to torch: plain PyTorch is the CPU path"
    elif why["triton"]:
        chosen, reason = "reference", why["triton"]
    else:
        chosen, reason = "triton", f"{torch.cuda.get_device_name(device)} runs the Triton kernels"
    available = {name: {"ok": not text, "reason": text or "available"} for name, text in why.items()}
    return {"backend": chosen, "reason": reason, "device": str(device), "available": available}


def define_op(
    schema: str,
    *,
    reference: Callable[..., Any],
    triton: Callable[..., Any] | None,
    fake: Callable[..., Any],
    check: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """Register ``asymvlm::<schema>`` for CPU, CUDA and meta, and return the op.

    ``Library.define`` with ``impl`` adds 1.1 microseconds to a call, ``torch.library.custom_op`` 7.8 (torch 2.13, one
    core of an AMD EPYC).

    ``check`` looks at the values of the arguments before anything runs: on a CPU only, where that waits for nothing.
    """
    name = schema[: schema.index("(")]

    def run(*args: Any) -> Any:
        device = args[0].device
        if check is not None and device.type == "cpu":
            check(*args)
        backend = resolve_backend(device)
        if backend == "cuda":
            launcher = cuda_launchers().get(name)
            if launcher is not None:
                try:
                    with _current(device):
                        return launcher(*args)
                except Unsupported as reason:  # of this call: nothing has run
                    raise BackendError(f"backend 'cuda' was asked for but cannot run {name}: {reason}") from reason
            backend = _automatic(device)
        launcher = _instead.get().get(name, triton)
        if backend == "triton" and launcher is not None:
            with _current(device):
                return launcher(*args)
        return reference(*args)

    def refuse(*args: Any) -> Any:  # PyTorch would loop over the samples, and an op that writes in place cannot
        raise ValueError(f"{name} does not run under torch.vmap: it takes a batch as it is")

    _registered[f"{name} run"], _registered[f"{name} fake"] = run, fake
    if _is_new(name, schema):
        _library.define(schema)
        _library.impl(name, refuse, "FuncTorchBatched")
        _library.impl(name, _registered_call(f"{name} run"), "CPU")
        _library.impl(name, _registered_call(f"{name} run"), "CUDA")
        torch.library.register_fake(f"asymvlm::{name}", _registered_call(f"{name} fake"), lib=_library)
    op: Callable[..., Any] = getattr(torch.ops.asymvlm, name).default
    return op


def _is_new(name: str, schema: str) -> bool:
    """Whether no import before this one has registered ``name``.

    Raises:
        ImportError: if one has, with other arguments.
    """
    is_new = name not in _registered["schemas"]
    found = _registered["schemas"].setdefault(name, schema)
    if found != schema:
        raise ImportError(f"asymvlm::{name} is registered as {found!r}, {schema!r} wanted: start a new process")
    return is_new


def _registered_call(key: str) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        return _registered[key](*args, **options)

    return call


@functools.cache
def cuda_launchers() -> dict[str, Callable[..., Any]]:
    """Launchers of the CUDA library by op. They raise `Unsupported` where the library cannot serve a call."""
    found: dict[str, Callable[..., Any]] = importlib.import_module("asymvlm_kernels.unproven.cuda").LAUNCHERS
    return found


def define_backward(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Make the op ``asymvlm::<name>`` differentiable: arguments as those of `torch.library.register_autograd`."""
    _registered[f"{name} backward"], _registered[f"{name} context"] = backward, setup_context
    if _is_new(f"{name} backward", ""):
        torch.library.register_autograd(
            f"asymvlm::{name}",
            _registered_call(f"{name} backward"),
            setup_context=_registered_call(f"{name} context"),
            lib=_library,
        )


def _known(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def _why_not(name: str, device: torch.device) -> str:
    """Empty when backend ``name`` can run on ``device``, else the reason."""
    if name == "reference":
        return ""
    if name == "cuda":
        reason: str = importlib.import_module("asymvlm_kernels.unproven.cuda.library").why_not(device)
        return reason
    if not HAS_TRITON:
        return f"triton cannot be imported ({TRITON_IMPORT_ERROR})"
    if INTERPRETED:
        return ""
    if device.type != "cuda":
        return "Triton kernels need a CUDA device, or TRITON_INTERPRET=1 set before import"
    capability = _asked(torch.cuda.get_device_capability, device)
    if capability < MINIMUM_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} found, 8.0 or newer wanted"
    return ""


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Kernels are launched on the current device, which need not be that of the arguments."""
    there = device.type != "cuda" or device.index == torch.cuda.current_device()
    return _there if there else torch.cuda.device(device)


_there = contextlib.nullcontext()


@functools.cache
def _asked(question: Callable[[torch.device], Any], device: torch.device) -> Any:
    """What PyTorch answers of a device takes longer than the rest of a choice."""
    return question(device)


@functools.cache
def _log_fallback(device: str, reason: str) -> None:
    logger.warning("asymvlm_kernels runs the PyTorch reference on %s: %s", device, reason)
