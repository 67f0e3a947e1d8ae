"""Triton where it can be imported, a harmless stand-in where it cannot, so that every kernel file imports anywhere."""

from __future__ import annotations

import os
from typing import Any

TRITON_IMPORT_ERROR = ""
try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError as error:
    HAS_TRITON = False
    TRITON_IMPORT_ERROR = str(error)

    class _Missing:
        """Stands for ``triton`` and ``triton.language``: decorators pass through, every other name is None."""

        constexpr = object

        @staticmethod
        def jit(function: Any = None, **options: Any) -> Any:
            return function if function is not None else lambda decorated: decorated

        def __getattr__(self, name: str) -> None:
            return None

    triton = tl = _Missing()

# Triton reads the variable when a kernel is decorated: it has to be set before this package is imported.
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0") == "1"


def constant(value: float) -> Any:
    """A number that kernels may read from their module."""
    return tl.constexpr(value) if HAS_TRITON else value


__all__ = ["HAS_TRITON", "INTERPRETED", "TRITON_IMPORT_ERROR", "constant", "tl", "triton"]
