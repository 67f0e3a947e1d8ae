"""Triton kernels of key-bias attention: one forward, two backward, in flash form. No tensor of S x S ever exists.

Logits are kept in units of log 2, ``x = (q k^T * scale + bias) * log2(e)``, so that a weight is ``exp2(x - m)``.
A key that may not be seen has ``x = -inf``; a row that sees none has the sum 0 and the logarithm -inf.
"""

from __future__ import annotations

from asymvlm_kernels._triton import HAS_TRITON, tl, triton
from asymvlm_kernels.device import multiply

if HAS_TRITON:  # numbers that kernels may read from their module
    LOG2_E = tl.constexpr(1.4426950408889634)
    LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(ptr, offs_s, stride_s, offs_d, S, D: tl.constexpr, VECTOR: tl.constexpr):
    """Rows ``offs_s`` of one head, ``[rows, BLOCK_D]``; zeros outside the sequence and beyond head_dim."""
    rows = tl.multiple_of(offs_s.to(tl.int64) * stride_s, VECTOR)
    return tl.load(ptr + rows[:, None] + offs_d[None, :], mask=(offs_s < S)[:, None] & (offs_d < D)[None, :], other=0.0)


@triton.jit
def biased_logits(product, bias, offs_m, offs_n, SCALE: tl.constexpr, S):
    """``[M, N]`` logits in units of log 2 from ``q k^T``: keys behind the query or outside the sequence are -inf."""
    logits = product * (SCALE * LOG2_E) + bias[None, :] * LOG2_E
    seen = (offs_n[None, :] <= offs_m[:, None]) & (offs_n < S)[None, :]
    return tl.where(seen, logits, float("-inf"))


@triton.jit
def finite(x):
    """-inf replaced by 0, so that ``-inf - x`` stays -inf where nothing was seen."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit(do_not_specialize=["stride_qb", "stride_kb", "stride_vb", "S"])
def _key_bias_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    out_ptr,
    lse_ptr,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    S,
    H,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VECTOR: tl.constexpr,
):
    # one program: BLOCK_M queries of one head
    pid_m = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    pid_b = (tl.program_id(1) // H).to(tl.int64)
    pid_h = (tl.program_id(1) % H).to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    q_ptr += tl.multiple_of(pid_b * stride_qb + pid_h * stride_qh, VECTOR)
    k_ptr += tl.multiple_of(pid_b * stride_kb + pid_h // GROUP * stride_kh, VECTOR)
    v_ptr += tl.multiple_of(pid_b * stride_vb + pid_h // GROUP * stride_vh, VECTOR)
    q = load_rows(q_ptr, offs_m, stride_qs, offs_d, S, D, VECTOR)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start_n in range(0, tl.minimum((pid_m + 1) * BLOCK_M, S), BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, offs_n, stride_ks, offs_d, S, D, VECTOR)
        bias = tl.load(bias_ptr + pid_b * S + offs_n, mask=offs_n < S, other=0.0)
        product = multiply(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
        logits = biased_logits(product, bias, offs_m, offs_n, SCALE, S)
        higher = tl.maximum(peak, tl.max(logits, 1))
        weights = tl.exp2(logits - finite(higher)[:, None])
        shrink = tl.exp2(peak - finite(higher))
        total = total * shrink + tl.sum(weights, 1)
        v = load_rows(v_ptr, offs_n, stride_vs, offs_d, S, D, VECTOR)
        sums = multiply(weights.to(v.dtype), v, sums * shrink[:, None])
        peak = higher
    sees = total > 0.0
    total = tl.where(sees, total, 1.0)
    out = tl.div_rn(sums, total[:, None] + tl.zeros_like(sums))
    mask_m = offs_m < S
    rows = (pid_b * S + offs_m) * H + pid_h  # of (B, S, H, head_dim), contiguous
    offs_out = rows[:, None] * D + offs_d[None, :]
    tl.store(out_ptr + offs_out, out.to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & (offs_d < D)[None, :])
    lse = tl.where(sees, (finite(peak) + tl.log2(total)) * LN_2, float("-inf"))
    tl.store(lse_ptr + (pid_b * H + pid_h) * S + offs_m, lse, mask=mask_m)


@triton.jit(do_not_specialize=["stride_gb", "S"])
def _key_bias_delta_kernel(
    grad_ptr,
    out_ptr,
    delta_ptr,
    stride_gb,
    stride_gs,
    stride_gh,
    S,
    H,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """``delta = <grad, out>`` of each query and head: what a softmax takes off the gradient of its logits."""
    pid_b = (tl.program_id(1) // H).to(tl.int64)
    pid_h = (tl.program_id(1) % H).to(tl.int64)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    grad_ptr += tl.multiple_of(pid_b * stride_gb + pid_h * stride_gh, VECTOR)
    grad = load_rows(grad_ptr, offs_m, stride_gs, offs_d, S, D, VECTOR).to(tl.float32)
    out = load_rows(out_ptr + (pid_b * S * H + pid_h) * D, offs_m, H * D, offs_d, S, D, 1).to(tl.float32)
    tl.store(delta_ptr + (pid_b * H + pid_h) * S + offs_m, tl.sum(grad * out, 1), mask=offs_m < S)


@triton.jit(do_not_specialize=["stride_gb", "stride_qb", "stride_kb", "stride_vb", "S"])
def _key_bias_grad_key_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    lse_ptr,
    delta_ptr,
    grad_k_ptr,
    grad_v_ptr,
    grad_bias_ptr,
    stride_gb,
    stride_gs,
    stride_gh,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    S,
    G,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VECTOR: tl.constexpr,
):
    # one program: BLOCK_N keys of one key/value head, over all queries of its group; it owns the sums it writes
    pid_b = (tl.program_id(1) // G).to(tl.int64)
    pid_g = (tl.program_id(1) % G).to(tl.int64)
    start = tl.program_id(0) * BLOCK_N
    offs_n = start + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    k_ptr += tl.multiple_of(pid_b * stride_kb + pid_g * stride_kh, VECTOR)
    v_ptr += tl.multiple_of(pid_b * stride_vb + pid_g * stride_vh, VECTOR)
    k = load_rows(k_ptr, offs_n, stride_ks, offs_d, S, D, VECTOR)
    v = load_rows(v_ptr, offs_n, stride_vs, offs_d, S, D, VECTOR)
    bias = tl.load(bias_ptr + pid_b * S + offs_n, mask=offs_n < S, other=0.0)
    grad_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_bias = tl.zeros((BLOCK_N,), tl.float32)
    first = start // BLOCK_M * BLOCK_M  # no query before this block sees its keys
    blocks = tl.cdiv(S - first, BLOCK_M)
    for step in range(GROUP * blocks):  # one loop over heads and queries: two would not be pipelined
        pid_h = pid_g * GROUP + step // blocks
        offs_m = first + step % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < S
        q_rows = q_ptr + tl.multiple_of(pid_b * stride_qb + pid_h * stride_qh, VECTOR)
        grad_rows = grad_ptr + tl.multiple_of(pid_b * stride_gb + pid_h * stride_gh, VECTOR)
        q = load_rows(q_rows, offs_m, stride_qs, offs_d, S, D, VECTOR)
        grad = load_rows(grad_rows, offs_m, stride_gs, offs_d, S, D, VECTOR)
        numbers = (pid_b * G * GROUP + pid_h) * S + offs_m
        lse = tl.load(lse_ptr + numbers, mask=mask_m, other=0.0) * LOG2_E
        delta = tl.load(delta_ptr + numbers, mask=mask_m, other=0.0)
        product = multiply(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
        logits = biased_logits(product, bias, offs_m, offs_n, SCALE, S)
        weights = tl.exp2(logits - finite(lse)[:, None])
        weights = tl.where(mask_m[:, None], weights, 0.0)
        grad_v = multiply(tl.trans(weights.to(grad.dtype)), grad, grad_v)
        change = multiply(grad, tl.trans(v), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
        change = weights * (change - delta[:, None])
        grad_bias += tl.sum(change, 0)
        grad_k = multiply(tl.trans(change.to(q.dtype)), q, grad_k)
    mask = (offs_n < S)[:, None] & (offs_d < D)[None, :]
    offs_out = ((pid_b * S + offs_n) * G + pid_g)[:, None] * D + offs_d[None, :]  # of (B, S, G, head_dim), contiguous
    tl.store(grad_k_ptr + offs_out, (grad_k * SCALE).to(grad_k_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_v_ptr + offs_out, grad_v.to(grad_v_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_bias_ptr + (pid_b * G + pid_g) * S + offs_n, grad_bias, mask=offs_n < S)


@triton.jit(do_not_specialize=["stride_gb", "stride_qb", "stride_kb", "stride_vb", "S"])
def _key_bias_grad_query_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    lse_ptr,
    delta_ptr,
    grad_q_ptr,
    stride_gb,
    stride_gs,
    stride_gh,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    S,
    H,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VECTOR: tl.constexpr,
):
    # one program: BLOCK_M queries of one head
    pid_m = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    pid_b = (tl.program_id(1) // H).to(tl.int64)
    pid_h = (tl.program_id(1) % H).to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < S
    q_ptr += tl.multiple_of(pid_b * stride_qb + pid_h * stride_qh, VECTOR)
    grad_ptr += tl.multiple_of(pid_b * stride_gb + pid_h * stride_gh, VECTOR)
    k_ptr += tl.multiple_of(pid_b * stride_kb + pid_h // GROUP * stride_kh, VECTOR)
    v_ptr += tl.multiple_of(pid_b * stride_vb + pid_h // GROUP * stride_vh, VECTOR)
    q = load_rows(q_ptr, offs_m, stride_qs, offs_d, S, D, VECTOR)
    grad = load_rows(grad_ptr, offs_m, stride_gs, offs_d, S, D, VECTOR)
    numbers = (pid_b * H + pid_h) * S + offs_m
    lse = finite(tl.load(lse_ptr + numbers, mask=mask_m, other=0.0) * LOG2_E)
    delta = tl.load(delta_ptr + numbers, mask=mask_m, other=0.0)
    grad_q = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start_n in range(0, tl.minimum((pid_m + 1) * BLOCK_M, S), BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, offs_n, stride_ks, offs_d, S, D, VECTOR)
        v = load_rows(v_ptr, offs_n, stride_vs, offs_d, S, D, VECTOR)
        bias = tl.load(bias_ptr + pid_b * S + offs_n, mask=offs_n < S, other=0.0)
        product = multiply(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
        weights = tl.exp2(biased_logits(product, bias, offs_m, offs_n, SCALE, S) - lse[:, None])
        change = multiply(grad, tl.trans(v), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
        change = weights * (change - delta[:, None])
        grad_q = multiply(change.to(k.dtype), k, grad_q)
    rows = (pid_b * S + offs_m) * H + pid_h  # of (B, S, H, head_dim), contiguous
    offs_out = rows[:, None] * D + offs_d[None, :]
    mask = mask_m[:, None] & (offs_d < D)[None, :]
    tl.store(grad_q_ptr + offs_out, (grad_q * SCALE).to(grad_q_ptr.dtype.element_ty), mask=mask)
