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
    return tl.load(order_ptr + rank, mask=real, other=-1, cache_modifier=".cg")  # may be of this very launch


@triton.jit
def decoded(odd):
    """Inverse of `encoded`."""
    return ((odd - 3) >> 1).to(tl.int64)


def encoded(stride: int) -> int:
    """Odd and not 1: in a tuple Triton always compiles anew for 1 and for multiples of 16."""
    return 2 * stride + 3


@triton.jit
def move_rows(
    pid_b,
    tile,
    embeds_ptr,
    order_ptr,
    length,
    out_ptr,
    stride_eb,
    stride_es,
    stride_ed,
    K,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
    LEFT: tl.constexpr,
):
    """Copy COLUMNS columns of ROWS rows of the embeddings."""
    TILES_D: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    offs_k = tile // TILES_D * ROWS + tl.arange(0, ROWS)  # [ROWS]
    offs_d = tile % TILES_D * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    mask_d = offs_d < D
    src = source_of(order_ptr, length, offs_k, K, LEFT)
    row = tl.multiple_of(pid_b * stride_eb + src.to(tl.int64) * stride_es, VECTOR)  # int64: B * S * D > 2**31
    col = offs_d.to(tl.int64) * stride_ed
    values = tl.load(embeds_ptr + row[:, None] + col[None, :], mask=(src >= 0)[:, None] & mask_d[None, :], other=0)
    out = (pid_b * K + offs_k) * D  # [ROWS]
    tl.store(out_ptr + out[:, None] + offs_d[None, :], values, mask=(offs_k < K)[:, None] & mask_d[None, :])


@triton.jit
def move_numbers(
    pid_b,
    tile,
    job,
    order_ptr,
    length,
    index_ptr,
    carry_ptrs,
    carry_out_ptrs,
    carry_strides_b,
    carry_strides_s,
    carry_strides_x,
    pads,
    B,
    K,
    WIDTHS: tl.constexpr,
    STACKED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    LEFT: tl.constexpr,
):
    """Write BLOCK_C places of the index (job 0), or of one narrow tensor."""
    offs_c = tile * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    mask_c = offs_c < K
    from_c = source_of(order_ptr, length, offs_c, K, LEFT)
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


@triton.jit
def gather_item(
    pid_b,
    item,
    embeds_ptr,
    order_ptr,
    lengths_ptr,
    out_ptr,
    index_ptr,
    carry_ptrs,
    carry_out_ptrs,
    strides,
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
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    VECTOR: tl.constexpr,
    LEFT: tl.constexpr,
):
    """One piece of the shortened sequence of one sample: rows of the embeddings, last ones first, then the numbers."""
    TILES_D: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    stride_eb, stride_es, stride_ed = strides
    order_ptr += pid_b * S
    length = tl.load(lengths_ptr + pid_b, cache_modifier=".cg")
    wide = tl.cdiv(K, ROWS) * TILES_D
    if item < wide:
        tile = wide - 1 - item  # the rows that were scored last are still in L2
        move_rows(
            pid_b,
            tile,
            embeds_ptr,
            order_ptr,
            length,
            out_ptr,
            stride_eb,
            stride_es,
            stride_ed,
            K,
            D,
            ROWS,
            COLUMNS,
            VECTOR,
            LEFT,
        )
    else:
        tiles_c = tl.cdiv(K, BLOCK_C)
        move_numbers(
            pid_b,
            (item - wide) % tiles_c,
            (item - wide) // tiles_c,
            order_ptr,
            length,
            index_ptr,
            carry_ptrs,
            carry_out_ptrs,
            carry_strides_b,
            carry_strides_s,
            carry_strides_x,
            pads,
            B,
            K,
            WIDTHS,
            STACKED,
            BLOCK_C,
            LEFT,
        )


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
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    VECTOR: tl.constexpr,
    LEFT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    items = tl.num_programs(0) // B
    pid_b = (B - 1 - tl.program_id(0) // items).to(tl.int64)  # the sample that was scored last is still in L2
    if OVERLAP:
        tl.extra.cuda.gdc_wait()  # for the end of the first launch
    gather_item(
        pid_b,
        tl.program_id(0) % items,
        embeds_ptr,
        order_ptr,
        lengths_ptr,
        out_ptr,
        index_ptr,
        carry_ptrs,
        carry_out_ptrs,
        (stride_eb, stride_es, stride_ed),
        carry_strides_b,
        carry_strides_s,
        carry_strides_x,
        pads,
        B,
        S,
        K,
        D,
        WIDTHS,
        STACKED,
        ROWS,
        COLUMNS,
        BLOCK_C,
        VECTOR,
        LEFT,
    )
