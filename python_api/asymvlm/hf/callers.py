"""Code that `generate` hands ids to, the caller's own and some of transformers', sees the sequence the caller knows.

Stopping criteria and logits processors get ids ``(rows, S' + new)``. Given the original prompt instead they find what
they look for where the caller put it, and penalties count the dropped placeholders as an unpatched model does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from asymvlm.hf.errors import MechanismError

PROCESSORS, CRITERIA = "_get_logits_processor", "_get_stopping_criteria"  # methods that make the lists of a call
# processors that count columns: their numbers are told for the shortened prompt, so it is what they have to see
COUNTING = (
    "MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor", "SuppressTokensAtBeginLogitsProcessor",
    "ForcedBOSTokenLogitsProcessor", "ForcedEOSTokenLogitsProcessor", "ExponentialDecayLengthPenalty",
)  # fmt: skip
# and those that read no ids
BLIND = (
    "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "TopHLogitsWarper", "MinPLogitsWarper",
    "TypicalLogitsWarper", "EpsilonLogitsWarper", "EtaLogitsWarper", "SuppressTokensLogitsProcessor",
    "InfNanRemoveLogitsProcessor", "LogitNormalization",
)  # fmt: skip


class OriginalIds:
    """Turns ``(rows, S' + new)`` ids of a call into ``(rows, S + new)``.

    Args:
        original_ids: ``(B, S)``, the caller's prompt. length: S', columns of the shortened one.
    """

    def __init__(self, original_ids: torch.Tensor, length: int) -> None:
        self.prompt = original_ids.clamp_min(0)  # a family's placeholders may be no ids at all
        self.length = length
        self.used: set[str] = set()  # the methods that have asked for it
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        if self._last is None or self._last[0] is not ids:  # once for all processors of a step
            prompt = self.prompt.to(ids).repeat_interleave(len(ids) // len(self.prompt), 0)
            self._last = ids, torch.cat([prompt, ids[:, self.length :]], 1)
        return self._last[1]

    def check(self, call: dict[str, Any]) -> None:
        """Raise a MechanismError if the caller's code was not told the original prompt."""
        for name, method in (("logits_processor", PROCESSORS), ("stopping_criteria", CRITERIA)):
            if call.get(name) and method not in self.used:
                raise MechanismError(f"telling {name} the original prompt", f"generate did not call {method}")


class Restated:
    """A processor or criterion that is called with the original prompt, and is itself in all else."""

    def __init__(self, inner: Any, original: OriginalIds) -> None:
        self._inner, self._original = inner, original
        self.__dict__["__call__"] = inner.__call__  # transformers reads its signature to see what it takes

    def __call__(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._inner(self._original(input_ids), *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@dataclass(eq=False)
class ListMaker:
    """One of the two methods on a patched instance. Not a closure: a deep copy has to follow the copied model."""

    model: nn.Module
    method: str
    original_ids: Callable[[], OriginalIds | None]  # of the call in hand

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = getattr(type(self.model), self.method)(self.model, *args, **kwargs)
        original = self.original_ids()
        if original is None:
            return result
        original.used.add(self.method)
        given: Sequence[Any] = kwargs.get("stopping_criteria") or ()
        for place, item in enumerate(result):
            name = type(item).__name__
            if self.method == CRITERIA:
                told = any(item is mine for mine in given)
            else:
                told = name not in COUNTING and name not in BLIND
            if told:
                result[place] = Restated(item, original)
        return result
