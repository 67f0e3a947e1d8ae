"""Several processes that train one weight (torchrun, accelerate): what each of them does, and how they agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among ``world``; alone where torch.distributed is not initialised."""

    rank: int = 0
    world: int = 1

    @classmethod
    def current(cls) -> Ranks:
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place and bit for bit the same on all: the first one's result is sent to them."""
        if self.world > 1:
            dist.all_reduce(tensor)
            dist.broadcast(tensor, 0)
        return tensor

    def share(self, value: T | None) -> T:
        """The first rank's value on all of them: a plain object with tensors on the CPU."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box, 0)
        assert box[0] is not None
        return box[0]

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """The ``(n,)`` values of all ranks, by rank; n may differ."""
        if self.world == 1:
            return values
        found: list[torch.Tensor | None] = [None] * self.world
        dist.all_gather_object(found, values.cpu())
        return torch.cat([part for part in found if part is not None]).to(values.device)
