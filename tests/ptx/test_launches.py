"""What a GPU is given of every kernel, run on an emulator: the results are those of the references, without a race."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import jobs, lines

Results = list[dict[str, Any]]


def errors(results: Results) -> str:
    return "\n".join(f"{row['case']}, sm_{row['arch']}: {row['error']}" for row in results if row["error"])


def check(results: Results, arch: int) -> None:
    (wanted, *rows) = results
    assert not errors(rows), errors(rows)
    ran = {kernel for row in rows for kernel in row["kernels"]}
    assert not set(wanted["wanted"]) - ran, f"never launched on sm_{arch}: give it a case in launches_*.py"


def test_every_kernel_gives_what_its_reference_gives():
    check(lines("launches.py", "--quick", "--arch", "90"), 90)


def test_kernels_of_the_older_tensor_cores_give_what_their_references_give():
    (_, *rows) = lines("launches.py", "--quick", "--arch", "80")
    assert len(rows) >= 8
    assert not errors(rows), errors(rows)


@pytest.mark.emulates_all
@pytest.mark.parametrize("arch", [80, 90])
def test_every_case_gives_what_its_reference_gives(arch):
    check(lines("launches.py", "--arch", str(arch), "--jobs", jobs()), arch)
