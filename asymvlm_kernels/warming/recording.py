"""What Triton would compile for a call, without a GPU and without compiling.

A launch goes through Triton's own code up to the point where it compiles: what is recorded has the very types,
divisibilities, constants and options of a real call, and so the very key in Triton's cache. CPU tensors of real sizes
stand for those of a GPU; nobody reads them. Works only where kernels are compiled (``TRITON_INTERPRET`` unset), and for
one thread at a time: use it in a process of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from asymvlm_kernels import dispatch
from asymvlm_kernels.dispatch import use_backend
from asymvlm_kernels.tuning.prefill import H100_PROCESSORS, architecture, processors
from asymvlm_kernels.warming.inside import launches_end_at_compiling


@dataclass(frozen=True, eq=False)
class Build:
    """One compilation: what Triton's ``compile`` is given."""

    source: Any
    target: Any
    options: dict[str, Any]

    @property
    def kernel(self) -> str:
        name: str = self.source.fn.__name__
        return name

    @property
    def key(self) -> str:
        """Builds of equal key are one compilation and one entry of Triton's cache."""
        parts = (self.source.hash(), str(self.target), *(f"{name}={self.options[name]}" for name in self.options))
        return f"{self.kernel} {hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"


@contextlib.contextmanager
def recording(arch: int) -> Iterator[list[Build]]:
    """Record what the launches inside the ``with`` block would compile for a GPU of ``arch``, 90 for capability 9.0.

    Nothing is launched: what the kernels would write stays as it was allocated. Ops of CPU tensors take the launchers.
    """
    with (
        launches_end_at_compiling(arch, Build) as builds,
        patch.object(dispatch, "INTERPRETED", True),  # a CPU will do: nothing runs
        answering_for(arch),
        use_backend("triton"),
    ):
        yield builds


@contextlib.contextmanager
def answering_for(arch: int) -> Iterator[None]:
    """Whoever asks for the compute capability of a device hears ``arch``, for its processors those of an H100.

    The first decides what is compiled, the second only how work is split.
    """
    answers = {"architecture": (architecture, arch), "processors": (processors, H100_PROCESSORS)}
    with contextlib.ExitStack() as patched:
        for module in list(sys.modules.values()):  # wherever a launcher asks for the device
            for name, (asked, answer) in answers.items():
                if getattr(module, name, None) is asked:
                    patched.enter_context(patch.object(module, name, lambda device, answer=answer: answer))
        yield
