"""How many vision tokens stay from layer to layer, and what that is on average over the layers of a decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from asymvlm_kernels.millionths import MILLION, to_millionths

HALVINGS = 60  # of the interval that a schedule is searched in


@dataclass(frozen=True)
class StageBudget:
    """Numbers of vision tokens, one for each of a method's layers; a `asymvlm_kernels.ScoreBudget` of the last.

    Args:
        layers: in front of which tokens go, ascending from 1.
        tokens: how many stay from there on, descending.
        of: out of how many in the prompt: a prompt of N keeps ``N * tokens // of``, at least one. None: ``tokens`` are
            the numbers themselves, and a prompt that has fewer keeps all it has.
    Raises:
        ValueError: naming the value found and the value wanted.
    """

    layers: tuple[int, ...]
    tokens: tuple[int, ...]
    of: int | None = None

    def __post_init__(self) -> None:
        layers, tokens = list(self.layers), list(self.tokens)
        if not layers or layers != sorted({*layers}) or layers[0] < 1:
            raise ValueError(f"layers must ascend from 1 or more, got {self.layers}")
        if len(tokens) != len(layers) or tokens != sorted(tokens, reverse=True) or tokens[-1] < 1:
            raise ValueError(
                f"tokens must descend to 1 or more, one number a layer of {self.layers}, got {self.tokens}"
            )
        if self.of is not None and tokens[0] > self.of:
            raise ValueError(f"tokens must be at most the {self.of} they are out of, got {self.tokens}")

    @classmethod
    def shares(cls, layers: Sequence[int], shares: Sequence[float]) -> StageBudget:
        """Shares of the prompt's tokens, each in (0, 1]."""
        for share in shares:
            if not 1 / MILLION <= share <= 1:
                raise ValueError(f"shares must be in (0, 1], got {tuple(shares)}")
        return cls(tuple(layers), tuple(to_millionths(share) for share in shares), MILLION)

    @property
    def max_ratio(self) -> float:
        """Largest share that can be left."""
        return 1.0 if self.of is None else self.tokens[-1] / self.of

    def at(self, stage: int, total: torch.Tensor) -> torch.Tensor:
        """How many stay of ``total`` ``(B,)`` tokens of the prompt in one stage, int64."""
        total = total.long()
        if self.of is None:
            return total.clamp_max(self.tokens[stage])
        return torch.minimum((total * self.tokens[stage] // self.of).clamp_min(1), total)

    def counts(self, scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """``(B,)`` int32: how many the last stage leaves."""
        return self.at(-1, mask.sum(-1)).to(torch.int32)

    def average(self, num_layers: int, total: int) -> float:
        """Share of ``total`` vision tokens that the ``num_layers`` layers of a decoder hold on average."""
        counts = [int(self.at(stage, torch.tensor([total]))) for stage in range(len(self.layers))]
        return average(self.layers, [count / total for count in counts], num_layers)


def average(layers: Sequence[int], shares: Sequence[float], num_layers: int) -> float:
    """The mean share over layers: 1 in front of the first of ``layers``, then each share up to the next."""
    ends = [*layers[1:], num_layers]
    held = sum(share * (end - begin) for begin, end, share in zip(layers, ends, shares, strict=True))
    return (layers[0] + held) / num_layers


def scaled_layers(layers: Sequence[int], published: int, num_layers: int) -> tuple[int, ...]:
    """Layers at the same depth of a decoder as ``layers`` of one with ``published`` layers, all different.

    Raises:
        ValueError: for a decoder with too few layers.
    """
    if num_layers <= len(layers):
        raise ValueError(f"{len(layers)} stages need a decoder of {len(layers) + 1} layers or more, got {num_layers}")
    found: list[int] = []
    for place, layer in enumerate(layers):
        least = found[-1] + 1 if found else 1
        most = num_layers - (len(layers) - place)
        found.append(min(max((2 * layer * num_layers + published) // (2 * published), least), most))
    return tuple(found)


def shares_for(
    shares: Sequence[float], keep: float, average_of: Callable[[Sequence[float]], float], floor: float
) -> tuple[float, ...]:
    """A published schedule made stricter or milder as a whole: ``share ** power``, which averages ``keep``.

    Args:
        shares: of the published schedule, each in (0, 1). average_of: share over all layers that a schedule holds.
        floor: what layers in front of the first stage hold on average of all layers.
    Raises:
        ValueError: for a ``keep`` outside (floor, 1].
    """
    if not floor < keep <= 1:
        raise ValueError(f"keep must be in ({floor:.4g}, 1]: layers in front of the first stage hold all, got {keep!r}")
    if keep == 1:
        return (1.0,) * len(shares)

    def at(power: float) -> tuple[float, ...]:
        return tuple(max(share**power, 1 / MILLION) for share in shares)

    mild, strict = 0.0, 1.0
    while average_of(at(strict)) > keep and strict < 2**20:
        strict *= 2
    if average_of(at(strict)) > keep:
        raise ValueError(f"no schedule averages {keep!r}: the strictest holds {average_of(at(strict)):.4g}")
    for _ in range(HALVINGS):
        middle = (mild + strict) / 2
        mild, strict = (middle, strict) if average_of(at(middle)) > keep else (mild, middle)
    return at(strict)
