"""Builds of kernels that were made worse on purpose, one JSON object a line: the gate has to refuse each.

Lost divisibility: Triton no longer knows that pointers and strides are multiples of 16 bytes. An upcast: V becomes fp32
before the product. Too wide a block: more columns a step than registers or shared memory hold.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from unittest.mock import patch

import builds
import cases_decode
import cases_prefill
import triton.language as tl
from builds import Build, record
from triton import jit

from asymvlm_kernels.prefill import score_tile
from asymvlm_kernels.prefill.prune import product

LAUNCHES = {
    "score bfloat16 wide": "_score_tokens_kernel",
    "fused score bfloat16 wide": "_score_select_kernel",
    "gather bfloat16 wide": "_gather_rows_kernel",
    "fused copy bfloat16 wide": "_gather_sequence_kernel",
    "attend plain": "_attend_slots_kernel",
    "move": "_move_slots_kernel",
}


@jit
def multiply_upcast(a, b, sums):
    return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")


def healthy(case: str, arch: int) -> Build:
    cases = [*cases_prefill.cases(), *cases_decode.cases()]
    found = next(each for each in cases if each.name == case)
    return next(build for build in record(found, arch) if build.name == LAUNCHES[case])


def with_block(build: Build, name: str, size: int) -> Build:
    place = (build.kernel.arg_names.index(name),)
    return replace(build, constants=build.constants | {place: size})


def planted() -> Iterator[tuple[str, Build, ModuleType | None]]:
    """Name of the regression, the build, and the module whose product is upcast."""
    for case in LAUNCHES:
        yield "divisibility", replace(healthy(case, 90), attributes={}), None
    yield "upcast", healthy("score bfloat16 wide", 90), score_tile
    yield "upcast", healthy("fused score bfloat16 wide", 80), product
    yield "width", with_block(healthy("score bfloat16 wide", 80), "BLOCK_D", 256), None
    yield "width", with_block(healthy("fused score bfloat16 wide", 80), "BLOCK_D", 64), None
    yield "width", with_block(healthy("gather bfloat16 wide", 80), "BLOCK_D", 4096 * 4), None
    yield "width", with_block(healthy("attend plain", 80), "BLOCK_N", 256), None


def main() -> None:
    for name, build, module in planted():
        if module is None:
            (result,) = builds.compile_all([build], 1)
        else:
            with patch.object(module, "multiply", multiply_upcast):
                (result,) = builds.compile_all([build], 1)
        print(json.dumps({"planted": name, **result}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
