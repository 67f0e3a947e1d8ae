"""Machine code of every shipped kernel for five architectures: spills, tensor cores, 128-bit access, shared memory."""

from __future__ import annotations

import re
from typing import Any

import pytest

SHARED_MEMORY = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}  # KB a block
TENSOR_CORE = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
REGISTERS = 65536  # of one SM


def count(build: dict[str, Any], pattern: str) -> int:
    return sum(number for opcode, number in build["opcodes"].items() if re.match(pattern, opcode))


def select(builds: list[dict[str, Any]], case: str, kernel: str = "") -> list[dict[str, Any]]:
    found = [build for build in builds if re.search(case, build["case"]) and kernel in build["kernel"]]
    assert {build["arch"] for build in found} == set(SHARED_MEMORY)
    return found


def failing(builds: list[dict[str, Any]]) -> list[str]:
    return [f"{build['case']}: {build['kernel']} on sm_{build['arch']}" for build in builds]


def test_every_kernel_is_built_for_every_architecture(builds):
    for kernel in (
        "_fold_text_kernel",
        "_score_tokens_kernel",
        "_score_tokens_grad_kernel",
        "_importance_gap_kernel",
        "_select_tokens_kernel",
        "_gather_rows_kernel",
        "_score_select_kernel",
        "_gather_sequence_kernel",
    ):
        select(builds, "", kernel)


def test_nothing_spills(builds):
    # ptxas reserves 8 bytes of stack around the subroutine of a division and never touches them
    assert not failing([b for b in builds if count(b, "LDL|STL") or b["local"] or b["stack"] > 8])


def test_shared_memory_and_registers_fit(builds):
    assert not failing([b for b in builds if b["shared"] > SHARED_MEMORY[b["arch"]] * 1024])
    assert not failing([b for b in builds if b["registers"] * b["warps"] * 32 > REGISTERS])


def test_halves_are_multiplied_by_tensor_cores(builds):
    scores = select(builds, "^score (b?float16)", "_score_tokens_k") + select(builds, "b?float16", "_score_select")
    assert not failing([b for b in scores if not count(b, TENSOR_CORE[b["arch"]])])


def test_fp32_is_not_rounded_to_tf32(builds):
    scores = select(builds, "^score float32", "_score_tokens_k") + select(builds, "float32", "_score_select")
    assert not failing([b for b in scores if count(b, "HMMA|HGMMA|UTC.*MMA") or not count(b, "FFMA")])


@pytest.mark.parametrize(
    "kernel", ["_fold_text", "_score_tokens_k", "_score_tokens_g", "_gather_rows", "_score_select", "_gather_sequence"]
)
def test_wide_rows_move_16_bytes_at_a_time(builds, kernel):
    wide = select(builds, "wide", kernel)
    assert not failing([b for b in wide if not count(b, r"LDG(STS)?\.(.*\.)?128")])
    if not kernel.startswith("_score_tokens"):  # which write one number a row, one row a hundred
        assert not failing([b for b in wide if not count(b, r"STG\.(.*\.)?128")])


def test_a_copy_has_no_narrow_load_of_rows(builds):
    # all loads of a wide gather are 128 bits, but the 64-bit ones of the index
    wide = select(builds, "gather .* wide")
    assert not failing([b for b in wide if count(b, r"LDG(?!\.(.*\.)?(128|64))")])


def test_no_fused_budget_is_contracted(builds):
    # float64 of Method B: PyTorch rounds the product, then the sum
    fused = select(builds, "", "_score_select")
    assert not failing([b for b in fused if count(b, "DFMA") or not count(b, "DMUL")])
