"""Close the holes of a cache without shifting it: survivors from the tail move into the freed slots of the head.

Of n slots m survive. Those in slots at or past m move into free slots before m, so what moves is at most what was
freed, no slot is both read and written, and any order of the moves is right. A cache that gains one token for each that
it loses needs no move: the new token is written into the freed slot.

All layers' K and V move in one launch: a table on the device holds the address and strides of each tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from asymvlm_kernels._checks import check_device, check_dtype, check_no_grad, check_places, check_shape
from asymvlm_kernels._triton import tl, triton
from asymvlm_kernels.decode import reference
from asymvlm_kernels.decode.address_table import FIELDS, address_tables
from asymvlm_kernels.dispatch import define_op
from asymvlm_kernels.launch import empty, launch, remember
from asymvlm_kernels.tuning.decode import move_config, plan_config


@triton.jit(do_not_specialize=["stride_kb", "stride_ks", "S", "capacity"])
def _plan_moves_kernel(keep_ptr, source_ptr, target_ptr, stride_kb, stride_ks, S, capacity, BLOCK_S: tl.constexpr):
    # one program plans one row: count the kept, then number what moves and where it goes, from left to right
    pid_b = tl.program_id(0).to(tl.int64)
    keep_ptr += pid_b * stride_kb
    source_ptr += pid_b * capacity
    target_ptr += pid_b * capacity
    kept = 0
    for start in range(0, S, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)  # [BLOCK_S]
        keep = tl.load(keep_ptr + offs_s.to(tl.int64) * stride_ks, mask=offs_s < S, other=0) != 0
        kept += tl.sum(keep.to(tl.int32), 0)
    moving, free = 0, 0
    for start in range(0, S, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        mask_s = offs_s < S
        keep = tl.load(keep_ptr + offs_s.to(tl.int64) * stride_ks, mask=mask_s, other=0) != 0
        moves = (keep & (offs_s >= kept)).to(tl.int32)
        is_free = ((keep == 0) & (offs_s < kept)).to(tl.int32)
        place = moving + tl.cumsum(moves, 0) - 1
        tl.store(source_ptr + place, offs_s.to(tl.int64), mask=(moves > 0) & (place < capacity))
        place = free + tl.cumsum(is_free, 0) - 1
        tl.store(target_ptr + place, offs_s.to(tl.int64), mask=(is_free > 0) & (place < capacity))
        moving += tl.sum(moves, 0)
        free += tl.sum(is_free, 0)
    for start in range(0, capacity, BLOCK_S):  # as many free slots before `kept` as kept ones behind it
        offs_s = start + tl.arange(0, BLOCK_S)
        padding = tl.full((BLOCK_S,), -1, tl.int64)
        tl.store(source_ptr + offs_s, padding, mask=(offs_s >= moving) & (offs_s < capacity))
        tl.store(target_ptr + offs_s, padding, mask=(offs_s >= moving) & (offs_s < capacity))


@remember
def _plan_moves_triton(keep: torch.Tensor, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
    B, S = keep.shape
    source, target = (empty((B, capacity), dtype=torch.int64, device=keep.device) for _ in range(2))
    if B * capacity > 0:
        block_s = plan_config(S)
        launch(
            _plan_moves_kernel, (B,), keep, source, target, *keep.stride(), S, capacity, BLOCK_S=block_s, num_warps=4
        )
    return source, target


@triton.jit(do_not_specialize=["stride_mb", "stride_mm", "stride_nb", "stride_nm", "M", "rows"])
def _move_slots_kernel(
    table_ptr,
    origin_ptr,
    source_ptr,
    target_ptr,
    stride_mb,
    stride_mm,
    stride_nb,
    stride_nm,
    M,
    rows,
    FIELDS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    VECTOR: tl.constexpr,
):
    # one program moves every WORKERS-th block of the moves of one sample, in one row of one tensor
    pid_b = tl.program_id(1).to(tl.int64)
    worker, workers = tl.program_id(2), tl.num_programs(2)
    fields = table_ptr + (tl.program_id(0) // rows) * FIELDS
    pid_r = (tl.program_id(0) % rows).to(tl.int64)
    # addresses are offsets from the table: Triton knows how that pointer is aligned, of a loaded one it would not
    row = tl.load(fields)
    stride_b, stride_s, stride_r = tl.load(fields + 1), tl.load(fields + 2), tl.load(fields + 3)
    own_rows, words = tl.load(fields + 4), tl.multiple_of(tl.load(fields + 5), VECTOR)
    source_ptr += pid_b * stride_mb
    target_ptr += pid_b * stride_nb
    count = 0  # real moves come first
    for start in range(0, M, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)
        count += tl.sum(
            (tl.load(target_ptr + offs_c.to(tl.int64) * stride_nm, mask=offs_c < M, other=-1) >= 0).to(tl.int32), 0
        )
    count = tl.where(pid_r < own_rows, count, 0)
    offs_w = tl.arange(0, BLOCK_W)  # [BLOCK_W]
    row += pid_b * stride_b + pid_r * stride_r
    for start in range(worker * BLOCK_M, count, workers * BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        mask_m = offs_m < count
        source = tl.load(source_ptr + offs_m.to(tl.int64) * stride_mm, mask=mask_m, other=0)
        target = tl.load(target_ptr + offs_m.to(tl.int64) * stride_nm, mask=mask_m, other=0)
        source = tl.multiple_of(row + source * stride_s, VECTOR)
        target = tl.multiple_of(row + target * stride_s, VECTOR)
        for word in range(0, words, BLOCK_W):
            mask = mask_m[:, None] & (word + offs_w < words)[None, :]
            tile = tl.load(origin_ptr + source[:, None] + (word + offs_w)[None, :], mask=mask)
            tl.store(origin_ptr + target[:, None] + (word + offs_w)[None, :], tile, mask=mask)


def _move_slots_triton(source: torch.Tensor, target: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
    B, M = source.shape
    if B * M == 0:
        return
    for table in address_tables(tensors):
        config = move_config(table.words, table.origin.itemsize)
        launch(
            _move_slots_kernel,
            (len(table.numbers) * table.rows, B, config.workers),
            table.numbers,
            table.origin,
            source,
            target,
            *source.stride(),
            *target.stride(),
            M,
            table.rows,
            FIELDS=FIELDS,
            BLOCK_C=512,
            BLOCK_M=config.block_m,
            BLOCK_W=config.block_w,
            VECTOR=table.vector,
            num_warps=config.num_warps,
        )


def _plan_moves_fake(keep: torch.Tensor, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
    size = (keep.shape[0], capacity)
    return keep.new_empty(size, dtype=torch.int64), keep.new_empty(size, dtype=torch.int64)


_plan_moves = define_op(
    "plan_moves(Tensor keep, SymInt capacity) -> (Tensor, Tensor)",
    reference=reference.plan_moves,
    triton=_plan_moves_triton,
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


def _check_moves(source: torch.Tensor, target: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
    """The places must be slots of every tensor: told before anything moves."""
    slots = min((tensor.shape[1] for tensor in tensors), default=0)
    if tensors:
        check_places("source", source, slots)
        check_places("target", target, slots)


def _move_slots_fake(source: torch.Tensor, target: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
    return None


_move_slots_ = define_op(
    "move_slots_(Tensor source, Tensor target, Tensor(a!)[] tensors) -> ()",
    reference=reference.move_slots_,
    triton=_move_slots_triton,
    fake=_move_slots_fake,
    check=_check_moves,
)


def move_slots_(tensors: Sequence[torch.Tensor], source: torch.Tensor, target: torch.Tensor) -> None:
    """Move slots in place, in all layers' K and V at once: ``tensor[b, target[b, i]] = tensor[b, source[b, i]]``.

    Args:
        tensors: each ``(B, S, ...)``, any dtype, sizes and strides of their own: a cache of layout ``(B, G, S, D)``
            goes in as ``cache.transpose(1, 2)``. ``slot_pos`` may be one of them. No two may share memory.
        source, target: ``(B, M)`` int64 from `plan_moves`; -1 moves nothing and comes behind the real moves. No slot
            may be both. Not checked on a GPU: that would synchronise.
    Raises:
        ValueError: on rank, size, dtype or device mismatch, or a tensor that requires grad in grad mode.
        IndexError: on a CPU, if ``source`` or ``target`` names a slot that is not there; nothing has moved then.

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
