"""Launchers of the decode kernels in the CUDA library: the merge of split attention, slots that move."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch

from asymvlm_kernels._triton import HAS_TRITON, INTERPRETED
from asymvlm_kernels.decode.address_table import address_tables
from asymvlm_kernels.decode.attend import Result, _attend_slots_triton, delegate_long
from asymvlm_kernels.dispatch import Unsupported
from asymvlm_kernels.unproven.cuda import library as cuda


def merge_parts_cuda(
    partial: torch.Tensor,
    sums: torch.Tensor,
    logits: torch.Tensor | None,
    seqlens: torch.Tensor | None,
    leftpad: torch.Tensor | None,
    bounds: tuple[int, int],
    out: torch.Tensor,
    lse: torch.Tensor,
    scores: torch.Tensor,
) -> None:
    """`merge_parts` by the library: ``(B, H, Q, parts, D)``, ``(B, H, Q, parts)``, ``(B, H * scored, S)``."""
    B, H, Q, parts, D = partial.shape
    S, scored = (0, 0) if logits is None else (logits.shape[2], logits.shape[1] // H)
    call = cuda.Merge(
        *map(cuda.pointer, (partial, sums, logits, seqlens, leftpad, out)),
        cuda.pointer(lse if lse.numel() else None),
        cuda.pointer(scores),
        *bounds,
        *(B, H, Q, S, D, parts, scored, cuda.DTYPES[out.dtype]),
        seqlens is not None and seqlens.dtype == torch.int64,
        leftpad is not None and leftpad.dtype == torch.int64,
    )
    library = cuda.library()
    code = library.asymvlm_merge(ctypes.byref(call), cuda.stream(partial.device))
    cuda.check(library, "asymvlm_merge", code)


_attend = delegate_long(functools.partial(_attend_slots_triton, merge=merge_parts_cuda))


def _attend_slots_cuda(q: torch.Tensor, *rest: object) -> Result:
    """The first launch is Triton's, the second the library's."""
    if not HAS_TRITON or (q.device.type == "cpu" and not INTERPRETED):
        raise Unsupported("its first launch is a Triton kernel, and Triton cannot run here")
    return _attend(q, *rest)


def _move_slots_cuda(source: torch.Tensor, target: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
    B, M = source.shape
    if B * M == 0:
        return
    library = cuda.library()
    for table in address_tables(tensors):
        word = table.origin.itemsize
        call = cuda.Moves(
            *map(cuda.pointer, (table.numbers, table.origin, source, target)),
            *source.stride(),
            *target.stride(),
            *(B, M, len(table.numbers), table.rows, word, word * table.vector),
        )
        code = library.asymvlm_move_slots(ctypes.byref(call), cuda.stream(source.device))
        cuda.check(library, "asymvlm_move_slots", code)


LAUNCHERS = {
    "attend_slots": _attend_slots_cuda,
    "move_slots_": _move_slots_cuda,
}
