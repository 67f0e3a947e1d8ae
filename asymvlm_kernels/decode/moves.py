"""Close the holes of a cache without shifting it: survivors from the tail move into the freed slots of the head.

Of n slots m survive. Those in slots at or past m move into free slots before m, so what moves is at most what was
freed, no slot is both read and written, and any order of the moves is right. A cache that gains one token for each that
it loses needs no move: the new token is written into the freed slot.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from asymvlm_kernels._checks import check_device, check_dtype, check_no_grad, check_shape
from asymvlm_kernels.decode import reference
from asymvlm_kernels.dispatch import define_op


def _plan_moves_fake(keep: torch.Tensor, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
    size = (keep.shape[0], capacity)
    return keep.new_empty(size, dtype=torch.int64), keep.new_empty(size, dtype=torch.int64)


_plan_moves = define_op(
    "plan_moves(Tensor keep, SymInt capacity) -> (Tensor, Tensor)",
    reference=reference.plan_moves,
    triton=None,
    fake=_plan_moves_fake,
)


def plan_moves(keep: torch.Tensor, *, capacity: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Which slots move where, so that the kept ones become the first ones.

    Args:
        keep: ``(B, S)`` bool, True = the slot holds a token that stays; free and evicted slots are False.
        capacity: most moves of a row; None means ``S // 2``, which always suffices. So does the largest number of False
            before the last True of a row.
    Returns:
        ``source, target``: ``(B, capacity)`` int64, ascending, -1 behind the last move. With m kept slots in a row,
        each source is at or past m and each target before it.
    Raises:
        ValueError: on rank or dtype mismatch, or a negative capacity.

    Exact and the same on every backend. Does not synchronise.
    """
    check_shape("keep", keep, ("B", "S"))
    check_dtype("keep", keep, (torch.bool,))
    capacity = keep.shape[1] // 2 if capacity is None else capacity
    if capacity < 0:
        raise ValueError(f"capacity must be 0 or more, got {capacity}")
    moves: tuple[torch.Tensor, torch.Tensor] = _plan_moves(keep, capacity)
    return moves


def _move_slots_fake(source: torch.Tensor, target: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
    return None


_move_slots_ = define_op(
    "move_slots_(Tensor source, Tensor target, Tensor(a!)[] tensors) -> ()",
    reference=reference.move_slots_,
    triton=None,
    fake=_move_slots_fake,
)


def move_slots_(tensors: Sequence[torch.Tensor], source: torch.Tensor, target: torch.Tensor) -> None:
    """Move slots in place, in all layers' K and V at once: ``tensor[b, target[b, i]] = tensor[b, source[b, i]]``.

    Args:
        tensors: each ``(B, S, ...)``, any dtype, sizes and strides of their own: a cache of layout ``(B, G, S, D)``
            goes in as ``cache.transpose(1, 2)``. ``slot_pos`` may be one of them. No two may share memory.
        source, target: ``(B, M)`` int64 from `plan_moves`; -1 moves nothing and comes behind the real moves. No slot
            may be both. Values are not checked: that would synchronise.
    Raises:
        ValueError: on rank, size, dtype or device mismatch, or a tensor that requires grad in grad mode.

    A source keeps its contents; whoever owns ``slot_pos`` marks it as free. Does not synchronise.
    """
    check_shape("source", source, ("B", "M"))
    check_shape("target", target, tuple(source.shape))
    for name, index in (("source", source), ("target", target)):
        check_dtype(name, index, (torch.int64,))
    check_device("target", target, source)
    for number, tensor in enumerate(tensors):
        if tensor.ndim < 2 or tensor.shape[0] != source.shape[0]:
            wanted = f"({source.shape[0]}, S, ...)"
            raise ValueError(f"tensors[{number}] must have shape {wanted}, got {tuple(tensor.shape)}")
        check_device(f"tensors[{number}]", tensor, source)
        check_no_grad("move_slots_", **{f"tensors[{number}]": tensor})
    if tensors:
        _move_slots_(source, target, list(tensors))
