"""A cache that holds a pruned prompt, and knows it: what is done to its rows is done to what is known of them.

A cache gets its state by a class of ours in front of its own, on the instance alone. Whoever resets it, moves its rows,
or uses it with a model that has no patch, then meets this class instead of a state that no longer fits.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import torch


class RowState(Protocol):
    """What is known of a pruned prompt: tensors with one entry a row."""

    @property
    def length(self) -> int: ...

    def rows(self, index: torch.Tensor) -> Any: ...


class PrunedPromptMixin:
    """The methods of a cache that a pruned prompt has to follow."""

    _asymvlm_state: RowState | None
    _asymvlm_served: bool  # a patched model runs a step on it

    def update(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and self._asymvlm_state is not None and not self._asymvlm_served:
            raise RuntimeError(
                "this cache holds a prompt that vision tokens were pruned from, and goes on only with a patched model: "
                "patch the model again, or begin with a new cache"
            )
        return super().update(*args, **kwargs)  # type: ignore[misc]

    def reset(self) -> None:
        self._asymvlm_state = None
        super().reset()  # type: ignore[misc]

    def crop(self, *args: Any, **kwargs: Any) -> None:
        state, length = self._asymvlm_state, next(iter((*args, *kwargs.values())), 0)
        if state is not None and getattr(state, "is_uneven", False) and length > 0:
            raise ValueError(
                "layers of this cache hold different numbers of columns, which no one length is of: crop by a negative "
                f"number, of tokens to remove, got {length}"
            )
        super().crop(*args, **kwargs)  # type: ignore[misc]
        if state is not None and int(self.get_seq_length()) < state.length:  # type: ignore[attr-defined]
            super().reset()  # type: ignore[misc]
            self._asymvlm_state = None
            raise ValueError(
                f"a cache cannot be cropped inside a pruned prompt, whose {state.length} columns are not those of the "
                "prompt as it was: it was reset, begin with the whole prompt"
            )

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._pick(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._pick(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        if self._asymvlm_state is not None:
            rows = torch.arange(len(self._asymvlm_state.index))  # type: ignore[attr-defined]
            self._pick(rows.repeat_interleave(repeats))

    def _pick(self, rows: torch.Tensor) -> None:
        if self._asymvlm_state is not None:
            self._asymvlm_state = self._asymvlm_state.rows(rows)

    def __reduce__(self) -> Any:
        return _rebuilt, (type(self).__mro__[2], self.__dict__)


def hold(cache: Any, state: RowState) -> None:
    """Let a cache know that it holds a pruned prompt."""
    if not isinstance(cache, PrunedPromptMixin):
        kind: Any = type(cache)
        cache.__class__ = _class_for(kind)
    cache._asymvlm_state, cache._asymvlm_served = state, False


def held(cache: Any) -> Any:
    """What `hold` was given for a cache, with its rows where they are now; None for any other cache."""
    return getattr(cache, "_asymvlm_state", None)


def serve(cache: Any, served: bool) -> None:
    """Begin or end a step of a patched model on a cache."""
    if isinstance(cache, PrunedPromptMixin):
        cache._asymvlm_served = served


@functools.cache
def _class_for(base: type) -> type:
    return type(base.__name__, (PrunedPromptMixin, base), {"__module__": base.__module__, "__doc__": base.__doc__})


def _rebuilt(base: type, attributes: dict[str, Any]) -> Any:
    """A copy, by pickle or deepcopy."""
    cache: Any = object.__new__(base)
    cache.__dict__.update(attributes)
    cache.__class__ = _class_for(base)
    return cache
