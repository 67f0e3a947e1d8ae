"""Bytes and launches of the ops of other methods: a model, to hold measurements against.

The floor reads each input that is needed once and writes each output once. What a choice reads beside it, step by
step, is counted apart: one program reads it, and at these sizes most of it lies in L2.
"""

from __future__ import annotations

from asymvlm_kernels.prefill.greedy.reference import ROUND
from bench.ops.methods.shapes import MethodShape
from bench.ops.prefill.floors import Traffic

METHOD_OPS = ("attention_column_sums", "cosine_matrix", "farthest_points", "dpp_map", "drop_similar")
LAUNCHES = {"attention_column_sums": 2, "farthest_points": 2, "dpp_map": 1, "drop_similar": 1}
FP32, INDEX = 4, 8  # bytes


def method_traffic(op: str, shape: MethodShape, itemsize: int) -> Traffic:
    """Byte count of ``op``, written out."""
    B, N, K = shape.B, shape.N, shape.K
    matrix, rows = B * N * N * FP32, B * K * N * FP32
    read, written, reread = matrix, B * N, 0
    if op == "attention_column_sums":
        read = B * N * (shape.H + shape.G) * shape.D * itemsize + B * N * INDEX
        written, reread = B * shape.G * N * FP32, 2 * B * N * shape.H * FP32  # the sums of the queries
    elif op == "cosine_matrix":
        read, written = B * N * shape.width * itemsize, matrix
    elif op == "farthest_points":
        reread = rows
    elif op == "dpp_map":
        read = rows + B * N * FP32
        reread = rows + B * (K * (K - 1) // 2) * N * FP32  # the factor, written once and read at each step
    elif op == "drop_similar":
        left = range(N, K, -ROUND)
        reread = B * sum((length + 1) // 2 * (length // 2) for length in left) * FP32
    else:
        raise ValueError(f"op must be one of {', '.join(METHOD_OPS)}, got {op!r}")
    return Traffic(read, written, reread, LAUNCHES.get(op, 1))
