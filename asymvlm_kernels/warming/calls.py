"""Which calls are to come, and those calls themselves: public functions on CPU tensors of their sizes.

What is here follows the public functions' arguments alone. Which kernels a call launches, and as what, is found by
making it inside `recording`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from asymvlm_kernels.budget import RelativeThresholdBudget
from asymvlm_kernels.decode.arguments import MAXIMUM_WIDTH
from asymvlm_kernels.decode.column_sums import attention_column_sums
from asymvlm_kernels.decode.flash import flash_attn_with_kvcache
from asymvlm_kernels.decode.moves import move_slots_, plan_moves
from asymvlm_kernels.prefill.gather import gather_rows
from asymvlm_kernels.prefill.greedy import dpp_map, drop_similar, farthest_points
from asymvlm_kernels.prefill.prune import prune_sequence
from asymvlm_kernels.prefill.score import score_tokens
from asymvlm_kernels.prefill.spread import Spread
from asymvlm_kernels.tuning.prefill import select_config
from asymvlm_kernels.tuning.prune import rank_config

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}
# one of each compilation: a longer prompt takes the next one's; beyond the last there is no other
LENGTHS = tuple({(rank_config(S), select_config(S)): S for S in (2**n for n in range(17))}.values())


class Carried(NamedTuple):
    """A tensor that `prune_sequence` gathers along: ``(B, S)`` of integers, or ``(rows, B, S)``."""

    pad: int = 0
    rows: int = 0
    dtype: torch.dtype = torch.int64


@dataclass(frozen=True)
class Calls:
    """The calls to compile for. Batch sizes compile nothing new, lengths only at some powers of two, so few are named.

    Args:
        width: D, of the embeddings.
        dtype: of the embeddings, and of K and V.
        lengths: tokens of a prompt. Only the next of ``LENGTHS`` counts.
        weight: with a learned weight, without, or both.
        protect: with a mask of protected tokens, without, or both.
        carry: what calls gather along; one entry a kind of call, in the order that they are given.
        sides: where a batch is padded.
        given: scores of the caller's own too (`prune_sequence` with ``scores``).
        by_scores: calls that look at all scores of a sample too: they spread (`Spread`), or a relative threshold or a
            floor of relevant tokens counts them.
        stepwise: calls that go step by step too: several images in a sample.
        gathers: widths of rows that `gather_rows` moves by themselves; 0: one integer a token.
        heads: ``(H, G, head_dim)`` of attention that scores slots (`flash_attn_with_kvcache`), and of the K/V cache
            that `move_slots_` closes up.
        softcap: whether that attention caps its logits.
        slots: tokens in such a cache.
        sums: column sums of a prompt's attention too (`attention_column_sums`), with positions of slots and without.
        choices: numbers of tokens among which a set is chosen (`farthest_points`, `dpp_map`, `drop_similar`).
    """

    width: int = 0
    dtype: torch.dtype = torch.bfloat16
    lengths: tuple[int, ...] = LENGTHS
    weight: tuple[bool, ...] = (True, False)
    protect: tuple[bool, ...] = (True, False)
    carry: tuple[tuple[Carried, ...], ...] = ((),)
    sides: tuple[str, ...] = ("left",)
    given: bool = False
    by_scores: bool = False
    stepwise: bool = False
    gathers: tuple[int, ...] = ()
    heads: tuple[tuple[int, int, int], ...] = ()
    softcap: bool = False
    slots: tuple[int, ...] = (128, 256, 512, 1024, 2048)
    sums: bool = False
    choices: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES.values():
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype}")
        numbers = {"width": (self.width,), "lengths": self.lengths, "slots": self.slots, "gathers": self.gathers}
        numbers["choices"] = self.choices
        for name, found in numbers.items():
            least = 1 if name in ("lengths", "slots", "choices") else 0
            if any(number < least for number in found):
                raise ValueError(f"{name} must be {least} or more, got {found}")
        for H, G, D in self.heads:
            if G < 1 or H % G or D < 1:
                raise ValueError(f"heads must be (H, G, head_dim) with H a multiple of G, got {(H, G, D)}")


def call_all(calls: Calls) -> None:
    """Make every call, inside `recording`."""
    for call in [*_prefill(calls), *_gathers(calls), *_decode(calls), *_methods(calls)]:
        call()


def _prefill(calls: Calls) -> Iterator[Callable[[], object]]:
    if not calls.width:
        return
    for S in calls.lengths:
        for weight in calls.weight:
            for protect in calls.protect:
                for carry in calls.carry:
                    for side in calls.sides:
                        yield partial(_prune, calls, S, weight, protect, carry, side)
        if calls.given:
            yield partial(_prune, calls, S, False, True, calls.carry[0], calls.sides[0], given=True)


def _prune(
    calls: Calls, S: int, weight: bool, protect: bool, carry: tuple[Carried, ...], side: str, given: bool = False
) -> None:
    embeds, mask = torch.empty(1, S, calls.width, dtype=calls.dtype), torch.zeros(1, S, dtype=torch.bool)
    tensors = {str(place): _carried(one, S) for place, one in enumerate(carry)}
    options: dict[str, Any] = {
        "protect": mask if protect else None,
        "carry": tensors,
        "carry_pad": {str(place): one.pad for place, one in enumerate(carry)},
        "static": True,  # the same launches, and no length that nobody has computed
        "padding_side": side,
        "scores": torch.zeros(1, S) if given else None,
    }
    arguments = (embeds, mask, mask, torch.empty(calls.width) if weight else None)
    prune_sequence(*arguments, 0.5, **options)
    if calls.stepwise:
        groups = torch.zeros(1, S, dtype=torch.int64)
        prune_sequence(*arguments, 0.5, groups=groups, **options)
        prune_sequence(*arguments, RelativeThresholdBudget(0.5), groups=groups, **options)
    if calls.by_scores:
        prune_sequence(*arguments, RelativeThresholdBudget(0.5), **options)
        lines = torch.zeros(1, S, dtype=torch.int64)
        prune_sequence(*arguments, 0.5, spread=Spread(), lines=lines, **options)


def _carried(carried: Carried, S: int) -> torch.Tensor:
    return torch.zeros((carried.rows, 1, S) if carried.rows else (1, S), dtype=carried.dtype)


def _gathers(calls: Calls) -> Iterator[Callable[[], object]]:
    index = torch.zeros(1, 8, dtype=torch.int64)
    for width in calls.gathers:
        rows = torch.empty(1, 16, width, dtype=calls.dtype) if width else torch.zeros(1, 16, dtype=torch.int64)
        yield partial(gather_rows, rows, index)
    if calls.stepwise and calls.width:  # answers of earlier turns against images: no weight, both masks
        rows, real = torch.empty(1, 16, calls.width, dtype=calls.dtype), torch.zeros(1, 16, dtype=torch.bool)
        yield partial(score_tokens, rows, rows, vision_mask=real, text_mask=real)


def _decode(calls: Calls) -> Iterator[Callable[[], object]]:
    for H, G, D in calls.heads:
        S = max(calls.slots)
        if D <= MAXIMUM_WIDTH:  # wider heads are plain PyTorch's
            yield partial(_attend, calls, H, G, D, S)
        yield partial(_move, calls, G, D, S)
    for S in calls.slots if calls.heads else ():
        yield partial(plan_moves, torch.zeros(1, S, dtype=torch.bool), capacity=S // 2)


def _attend(calls: Calls, H: int, G: int, D: int, S: int) -> None:
    q, k = torch.empty(1, 1, H, D, dtype=calls.dtype), torch.empty(1, G, S, D, dtype=calls.dtype).transpose(1, 2)
    place = torch.zeros(1, S, dtype=torch.int32)
    flash_attn_with_kvcache(
        q,
        k,
        k,
        softcap=30.0 if calls.softcap else 0.0,
        return_scores=True,
        slot_pos=place,
        q_pos=torch.zeros(1, dtype=torch.int64),
    )


def _move(calls: Calls, G: int, D: int, S: int) -> None:
    """K, V, the position of each slot, and whether it may go."""
    cache = [torch.empty(1, G, S, D, dtype=calls.dtype).transpose(1, 2) for _ in range(2)]
    slots = [torch.zeros(1, S, dtype=torch.int32), torch.zeros(1, S, dtype=torch.bool)]
    nowhere = torch.full((1, 8), -1, dtype=torch.int64)
    move_slots_([*cache, *slots], nowhere, nowhere.clone())


def _methods(calls: Calls) -> Iterator[Callable[[], object]]:
    for H, G, D in calls.heads if calls.sums else ():
        for slots in (False, True) if D <= MAXIMUM_WIDTH else ():
            yield partial(_sum_columns, calls, H, G, D, max(calls.slots), slots)
    for N in calls.choices:
        matrix, counts = torch.empty(1, N, N), torch.zeros(1, dtype=torch.int32)  # as of `keep_counts`
        for choose in (farthest_points, dpp_map):
            yield partial(choose, matrix, torch.zeros(1, N, dtype=torch.bool), counts)
        yield partial(drop_similar, matrix, torch.zeros(1, N, dtype=torch.int64), counts)


def _sum_columns(calls: Calls, H: int, G: int, D: int, S: int, slots: bool) -> None:
    q, k = (torch.empty(1, heads, S, D, dtype=calls.dtype).transpose(1, 2) for heads in (H, G))
    place = torch.zeros(1, S, dtype=torch.int32)
    cap = 30.0 if calls.softcap else 0.0
    attention_column_sums(q, k, q_pos=place, slot_pos=place if slots else None, softcap=cap)


def to_json(calls: Calls) -> dict[str, Any]:
    """For another process."""
    record = dataclasses.asdict(calls)
    carry = [[[one.pad, one.rows, _name(one.dtype)] for one in kind] for kind in calls.carry]
    return record | {"dtype": _name(calls.dtype), "carry": carry}


def from_json(record: Mapping[str, Any]) -> Calls:
    kinds = tuple(
        tuple(Carried(pad, rows, getattr(torch, dtype)) for pad, rows, dtype in kind) for kind in record["carry"]
    )
    plain = {name: _tuples(value) for name, value in record.items()}
    return Calls(**{**plain, "dtype": DTYPES[record["dtype"]], "carry": kinds})


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
