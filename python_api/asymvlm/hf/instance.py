"""Attributes that stand on one instance in front of its class's."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn


class Replaced:
    """One such attribute, put there and taken off again."""

    def __init__(self, module: nn.Module, name: str, value: Any) -> None:
        self.module, self.name, self.value = module, name, value
        self.before = module.__dict__.get(name)  # what stood on the instance already
        module.__dict__[name] = value

    def remove(self) -> None:
        """Put back what was there. What somebody else has put on top since is theirs and stays, with a warning."""
        attributes = self.module.__dict__
        if attributes.get(self.name) is not self.value:
            warnings.warn(
                f"{type(self.module).__name__}.{self.name} was replaced while the model was patched, by "
                f"{attributes.get(self.name)!r}: it stays, and goes through to the model's own from now on",
                stacklevel=3,
            )
        elif self.before is None:
            del attributes[self.name]
        else:
            attributes[self.name] = self.before
