"""The error for a transformers that does not do what the patch rests on: no answer is better than a wrong one."""

from __future__ import annotations

import transformers


class MechanismError(RuntimeError):
    """A mechanism of the patch did not take hold, so the call has no answer that could be trusted.

    Args:
        mechanism: what was to happen, as a noun phrase.
        found: what was seen instead, in one clause.
    """

    def __init__(self, mechanism: str, found: str) -> None:
        super().__init__(
            f"{mechanism} did not take hold on transformers {transformers.__version__}: {found}. The call was stopped, "
            "because its answer would be wrong. Use a version that is tested (`asymvlm doctor` lists them) or remove "
            "the patch; `asymvlm verify --model DIR` shows what else is affected"
        )
