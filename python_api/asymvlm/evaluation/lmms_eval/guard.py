"""What happens in a model's ``generate``: failures are carried out past code that would answer with nothing.

Models of lmms-eval catch what ``generate`` raises and go on with an empty answer, so that a refusal would be a score of
0; and a model that answers by other ways than ``generate`` of its module would be measured unpruned.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from asymvlm.patch import PatchHandle


class Escaping(BaseException):
    """Carries an exception past ``except Exception``."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


class Guard:
    """Stands in front of the ``generate`` of a patched model while a `watching` block runs.

    Args:
        handle: of the patch. The attribute ``generate`` of its model, this instance alone, is replaced meanwhile.
    """

    def __init__(self, handle: PatchHandle) -> None:
        self.handle = handle
        self.calls = 0  # of generate
        self.held = 0.0  # vision tokens in an average layer, over rows
        self.vision_tokens = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Raises what ``generate`` raised inside, as it was raised."""
        attributes = self.handle.model.__dict__
        before = attributes["generate"]  # the patch's own
        attributes["generate"] = self._watched(before)
        try:
            yield
        except Escaping as escaping:
            raise escaping.error from None
        finally:
            attributes["generate"] = before

    def _watched(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(generate)
        def watched(*args: Any, **kwargs: Any) -> Any:
            try:
                output = generate(*args, **kwargs)
            except Exception as error:
                raise Escaping(error) from error
            self.calls += 1
            if (report := self.handle.last) is not None:
                self.held += sum(report.average_kept)
                self.vision_tokens += sum(report.vision_tokens)
            return output

        return watched


__all__ = ["Guard"]
