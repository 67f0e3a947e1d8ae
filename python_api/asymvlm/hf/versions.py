"""The transformers versions that the test suite runs on, and what `asymvlm.patch` says on another one."""

from __future__ import annotations

import warnings

import transformers

TESTED = ("5.17", "5.23", "5.24")
_warned = False


class UntestedVersionWarning(UserWarning):
    """The installed transformers is of a minor version that the test suite has not seen."""


def is_tested() -> bool:
    """Whether the installed transformers is of a tested minor version."""
    return ".".join(transformers.__version__.split(".")[:2]) in TESTED


def warn_if_untested() -> None:
    """Warn, once per process, if the installed transformers is not of a tested minor version."""
    global _warned
    if _warned or is_tested():
        return
    _warned = True
    warnings.warn(
        f"transformers {transformers.__version__} is not one of the versions that asymvlm is tested on "
        f"({', '.join(TESTED)}): `asymvlm verify --model DIR` or asymvlm.verify(model) tells whether it is right here",
        UntestedVersionWarning,
        stacklevel=3,  # the caller of `patch`
    )
