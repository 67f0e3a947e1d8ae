"""Second launch of `prune_sequence`: every per-token tensor moved into the shortened sequence, and the index."""

from __future__ import annotations

from asymvlm_kernels._triton import tl, triton


@triton.jit
def source_of(order_ptr, length, slot, K, LEFT: tl.constexpr):
    """Place in the original sequence of each slot of the shortened one; -1 for padding."""
    rank = slot
    if LEFT:
        rank = slot - (K - length)
    real = (rank >= 0) & (rank < length) & (slot < K)
    return tl.load(order_ptr + rank, mask=real, other=-1)


@triton.jit
def decoded(odd):
    """Inverse of `encoded`."""
    return ((odd - 3) >> 1).to(tl.int64)


def encoded(stride: int) -> int:
    """Odd and not 1: in a tuple Triton always compiles anew for 1 and for multiples of 16."""
    return 2 * stride + 3


@triton.jit(do_not_specialize=["stride_eb", "B", "S", "K"])  # a new length compiles nothing new
def _gather_sequence_kernel(
    embeds_ptr,
    order_ptr,
    lengths_ptr,
    out_ptr,
    index_ptr,
    carry_ptrs,
    carry_out_ptrs,
    stride_eb,
    stride_es,
    stride_ed,
    carry_strides_b,
    carry_strides_s,
    carry_strides_x,
    pads,
    B,
    S,
    K,
    D: tl.constexpr,
    WIDTHS: tl.constexpr,
    STACKED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    VECTOR: tl.constexpr,
    LEFT: tl.constexpr,
):
    # one program copies BLOCK_D columns of BLOCK_K rows of the embeddings, or BLOCK_C rows of one narrow tensor
    TILES_D: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    pid = tl.program_id(0)
    tiles_k = tl.cdiv(K, BLOCK_K)
    wide = B * tiles_k * TILES_D
    if pid < wide:
        pid_b = (pid // (tiles_k * TILES_D)).to(tl.int64)
        offs_k = pid // TILES_D % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        offs_d = pid % TILES_D * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
        mask_d = offs_d < D
        src = source_of(order_ptr + pid_b * S, tl.load(lengths_ptr + pid_b), offs_k, K, LEFT)
        row = tl.multiple_of(pid_b * stride_eb + src.to(tl.int64) * stride_es, VECTOR)  # int64: B * S * D > 2**31
        col = offs_d.to(tl.int64) * stride_ed
        tile = tl.load(embeds_ptr + row[:, None] + col[None, :], mask=(src >= 0)[:, None] & mask_d[None, :], other=0)
        out = (pid_b * K + offs_k) * D  # [BLOCK_K]
        tl.store(out_ptr + out[:, None] + offs_d[None, :], tile, mask=(offs_k < K)[:, None] & mask_d[None, :])
    else:
        tiles_c = tl.cdiv(K, BLOCK_C)
        job = (pid - wide) // (B * tiles_c)  # 0 writes the index, 1 moves the first tensor
        pid_b = ((pid - wide) // tiles_c % B).to(tl.int64)
        offs_c = (pid - wide) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
        mask_c = offs_c < K
        from_c = source_of(order_ptr + pid_b * S, tl.load(lengths_ptr + pid_b), offs_c, K, LEFT)
        if job == 0:
            tl.store(index_ptr + pid_b * K + offs_c, from_c.to(tl.int64), mask=mask_c)
        for number in tl.static_range(len(WIDTHS)):
            if job == number + 1:
                in_ptr = carry_ptrs[number]
                to_ptr = carry_out_ptrs[number]
                word = tl.full((), pads[number], tl.int64).to(to_ptr.dtype.element_ty)
                from_row = pid_b * decoded(carry_strides_b[number]) + from_c.to(tl.int64) * carry_strides_s[number]
                stride_x = decoded(carry_strides_x[number])
                for x in range(WIDTHS[number]):
                    value = tl.load(in_ptr + from_row + x * stride_x, mask=from_c >= 0, other=word)
                    if STACKED[number]:
                        to = (x * B + pid_b) * K + offs_c
                    else:
                        to = (pid_b * K + offs_c) * WIDTHS[number] + x
                    tl.store(to_ptr + to, value, mask=mask_c)
