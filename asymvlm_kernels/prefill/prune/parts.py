"""Parts of a tile of rows: what one program computes, and how the last to arrive adds them.

A product of a row and a text is a sum over six chunks of the width, always added in the same order:
``((c0 + c1) + (c2 + c3)) + (c4 + c5)``. So its bits do not depend on which programs computed which chunks, and the
number of parts of a tile may follow the size of the batch: 1, 3 or 6.

Parts work in turns at blocks of ``BLOCK_L`` texts. While there are at least as many blocks as parts, each part takes
one whole; what is left is shared: each part takes one or two chunks' worth of width of one block, and leaves its sums
in scratch. At most ``rounds`` turns are shared (0, 1 or 2: scratch for one block a part each); what would need more is
taken whole, with idle parts. So a part works ``length / BLOCK_L / parts`` of the width, in steps.
"""

from __future__ import annotations

from asymvlm_kernels._triton import constant, tl, triton
from asymvlm_kernels.device import larger_or_nan, prefetch
from asymvlm_kernels.prefill.lifted import needs_lift
from asymvlm_kernels.prefill.prune.product import best_of, norm_of, product_tile

CHUNKS = constant(6)  # of the width
PAIRS = constant(3)  # of chunks


@triton.jit
def shares_of(rest, turn, parts, rounds):
    """How many parts share the width of a block in the next turn, with ``rest`` blocks to go: 6, 3 or 1.

    ``turn``: shared turns so far.
    """
    blocks = tl.maximum(parts // PAIRS, 1)  # of a shared turn
    whole = (rest >= parts) | (tl.cdiv(rest, blocks) > rounds - turn)
    return tl.where(whole, 1, parts // tl.minimum(rest, blocks))


@triton.jit
def slot_size(rounds, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr):
    """Numbers that a part of a tile leaves in scratch: its sums, ``||v||^2``, its best and a flag, a row each."""
    return rounds * (BLOCK_N * BLOCK_L) + 3 * BLOCK_N


@triton.jit
def edge_of(chunk, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """First column of a chunk of the width: chunks are whole steps, and as equal as steps allow."""
    STEPS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    return chunk * STEPS // CHUNKS * BLOCK_D


@triton.jit
def prefetch_rows(
    embeds_ptr,
    first_n,
    part,
    parts,
    stride_s,
    stride_d,
    S,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Ask for the first lines of what a part reads first, before it knows which rows and texts are real.

    2 KB of each row: all that a part of a third of the width reads, where rows are not wider than 6 KB.
    """
    LINE: tl.constexpr = 128 // (embeds_ptr.dtype.element_ty.primitive_bitwidth // 8)
    LINES: tl.constexpr = 16
    row = tl.minimum(first_n + tl.arange(0, BLOCK_N), S - 1).to(tl.int64) * stride_s
    start_d = tl.where(parts == 1, 0, edge_of(part * CHUNKS // parts, D, BLOCK_D))
    col = tl.minimum(start_d + tl.arange(0, LINES) * LINE, D - 1).to(tl.int64) * stride_d
    prefetch(embeds_ptr + row[:, None] + col[None, :])


@triton.jit
def score_part(
    embeds_ptr,
    weight_ptr,
    places_ptr,
    part_ptr,
    squares_ptr,
    offs_n,
    real_n,
    length,
    part,
    parts,
    rounds,
    stride_es,
    stride_ed,
    stride_w,
    EPSILON: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VECTOR: tl.constexpr,
    HIGH_LOW: tl.constexpr,
    LIFT: tl.constexpr,
):
    """One part of one tile into scratch."""
    offs_l = tl.arange(0, BLOCK_L)  # [BLOCK_L]
    own = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    row_n = tl.multiple_of(offs_n.to(tl.int64) * stride_es, VECTOR)  # int64: S * D may pass 2**31
    best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    odd = tl.zeros((BLOCK_L,), tl.int32)
    ends_ptr = part_ptr + rounds * (BLOCK_N * BLOCK_L)
    blocks = tl.cdiv(length, BLOCK_L)
    done = tl.zeros((), tl.int32)
    turn = tl.zeros((), tl.int32)
    is_first = length > 0
    while done < blocks:
        shares = shares_of(blocks - done, turn, parts, rounds)
        block = done + part // shares
        start_l = block * BLOCK_L
        real_l = start_l + offs_l < length
        place = tl.load(places_ptr + start_l + offs_l, mask=real_l, other=0)
        row_l = tl.multiple_of(place.to(tl.int64) * stride_es, VECTOR)
        # chunks of a share: all of a whole block, a pair, or one; a division would take registers
        width = tl.where(shares == 1, CHUNKS, tl.where(shares == CHUNKS, 1, 2))
        first = part % shares * width
        last = tl.where(block < blocks, first + width, first)
        similarity = tl.zeros((BLOCK_L, BLOCK_N), tl.float32)
        square_n = tl.zeros((BLOCK_N,), tl.float32)
        square_l = tl.zeros((BLOCK_L,), tl.float32)
        for chunk in range(first, last, 2):
            of_pair, of_n, of_l = product_tile(
                embeds_ptr,
                weight_ptr,
                row_n,
                row_l,
                real_n,
                real_l,
                edge_of(chunk, D, BLOCK_D),
                tl.where(shares == CHUNKS, -1, edge_of(chunk + 1, D, BLOCK_D)),
                edge_of(tl.minimum(chunk + 2, last), D, BLOCK_D),
                stride_ed,
                stride_w,
                D,
                BLOCK_N,
                BLOCK_L,
                BLOCK_D,
                HIGH_LOW,
                LIFT,
            )
            similarity += of_pair
            square_n += of_n
            square_l += of_l
        if is_first:
            tl.store(ends_ptr + own, square_n)
        if shares == 1:
            best = larger_or_nan(best, best_of(similarity, square_l, real_l, EPSILON))
            odd |= (real_l & needs_lift(square_l)).to(tl.int32)
            done += parts
        else:
            sums_ptr = part_ptr + turn * (BLOCK_N * BLOCK_L)
            tl.store(sums_ptr + offs_l[:, None] * BLOCK_N + own[None, :], similarity, mask=real_l[:, None])
            # every tile writes the same
            tl.store(squares_ptr + (turn * parts + part) * BLOCK_L + offs_l, square_l)
            done += parts // shares
            turn += 1
        is_first = length < 0
    tl.store(ends_ptr + BLOCK_N + own, best)
    tl.store(ends_ptr + 2 * BLOCK_N, tl.max(odd, 0).to(tl.float32))


@triton.jit
def sum_of_shares(first_ptr, step, offsets, mask, shares):
    """The sum over all shares of the width, in the one order of chunks; share ``i`` lies ``i * step`` behind the first.

    Loaded at once: a share that is not there counts as 0.
    """
    total = tl.zeros(offsets.shape, tl.float32)
    both = mask & (tl.zeros(offsets.shape, tl.int32) + shares == CHUNKS)
    for pair in tl.static_range(PAIRS):
        at = pair * (shares // PAIRS)
        one = tl.load(first_ptr + at * step + offsets, mask=mask, other=0.0, cache_modifier=".cg")
        other = tl.load(first_ptr + (at + 1) * step + offsets, mask=both, other=0.0, cache_modifier=".cg")
        total += one + other
    return total


@triton.jit
def add_parts(
    parts_ptr,
    squares_ptr,
    length,
    parts,
    rounds,
    EPSILON: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Scores of one tile from its parts, in a fixed order: the same bits whoever came last.

    With them ``||v||^2``, and whether fp32 cannot square a text.
    """
    slot = slot_size(rounds, BLOCK_N, BLOCK_L)
    offs_l = tl.arange(0, BLOCK_L)  # [BLOCK_L]
    own = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    ends_ptr = parts_ptr + rounds * (BLOCK_N * BLOCK_L)
    blocks = tl.cdiv(length, BLOCK_L)
    shares = shares_of(blocks, 0, parts, rounds)
    every = own < BLOCK_N
    square_n = tl.zeros((BLOCK_N,), tl.float32)
    best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    odd = length < 0
    if shares == 1:  # blocks taken whole come first
        square_n = tl.load(ends_ptr + own, cache_modifier=".cg")
        for part in range(parts):
            best = larger_or_nan(best, tl.load(ends_ptr + part * slot + BLOCK_N + own, cache_modifier=".cg"))
            odd = odd | (tl.load(ends_ptr + part * slot + 2 * BLOCK_N, cache_modifier=".cg") > 0)
    else:
        square_n = sum_of_shares(ends_ptr, slot, own, every, shares)
    done = tl.zeros((), tl.int32)
    turn = tl.zeros((), tl.int32)
    while done < blocks:
        shares = shares_of(blocks - done, turn, parts, rounds)
        if shares == 1:
            done += parts
        else:
            for number in range(parts // shares):
                first = number * shares  # part of the block's first share
                real_l = (done + number) * BLOCK_L + offs_l < length
                sums_ptr = parts_ptr + first * slot + turn * (BLOCK_N * BLOCK_L)
                pair = offs_l[:, None] * BLOCK_N + own[None, :]
                similarity = sum_of_shares(sums_ptr, slot, pair, real_l[:, None] & every[None, :], shares)
                from_ptr = squares_ptr + (turn * parts + first) * BLOCK_L
                square_l = sum_of_shares(from_ptr, BLOCK_L, offs_l, real_l, shares)
                best = larger_or_nan(best, best_of(similarity, square_l, real_l, EPSILON))
                odd = odd | (tl.max((real_l & needs_lift(square_l)).to(tl.int32), 0) > 0)
            done += parts // shares
            turn += 1
    return tl.div_rn(best, norm_of(square_n, EPSILON)), square_n, odd
