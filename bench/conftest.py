"""The fixture that turns a case into a pytest-benchmark run: checked first, compared with its peers, inputs rotated."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.harness import environment, results
from bench.harness.timing import copy_ceiling
from bench.measure import make_sets, measure
from bench.ops.decode.cases import DECODE_CASES
from bench.ops.methods.cases import METHOD_CASES
from bench.ops.prefill.cases import CASES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SECONDS = {"cpu": 0.3, "cuda": 0.05}  # a round of one variant


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["asymvlm"] = environment.describe(DEVICE) | {"ceiling": copy_ceiling(DEVICE)}


@pytest.fixture
def compare(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> Callable[[str, Any, torch.dtype], None]:
    """``compare(op, shape, dtype)``: fails on a wrong answer, else prints and records every variant.

    The table of pytest-benchmark shows ours from call to result; the variants are in ``extra_info``.
    """

    def run(op: str, shape: Any, dtype: torch.dtype) -> None:
        case = (CASES | DECODE_CASES | METHOD_CASES)[op](shape, dtype, DEVICE)
        with torch.no_grad():
            if not benchmark.disabled:
                record = measure(case, DEVICE, SECONDS[DEVICE])
                benchmark.extra_info.update(record)
                with capsys.disabled():
                    print("\n" + results.line(case.key, record))
            sets = itertools.cycle(make_sets(case, DEVICE))
            ours = case.variants["ours"].function

            def finish(*inputs: Any) -> Any:
                output = ours(*inputs)
                if DEVICE == "cuda":
                    torch.cuda.synchronize()
                return output

            benchmark.group = f"{op}, {str(case.dtype).removeprefix('torch.')}"
            benchmark.pedantic(finish, setup=lambda: (next(sets), {}), rounds=20, warmup_rounds=2)

    return run
