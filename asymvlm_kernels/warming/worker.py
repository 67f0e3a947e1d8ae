"""The process that `warm` starts: reads what to warm from standard input, tells what it did in lines of JSON.

A process of its own, because it takes the launch away from every kernel, and because it forks.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, TextIO


def main(orders: dict[str, Any], told: TextIO) -> None:
    """``orders``: ``calls``, ``arch``, ``jobs``, and ``compile``, False to tell only what would be compiled."""
    from asymvlm_kernels.warming.calls import call_all, from_json
    from asymvlm_kernels.warming.compiling import compile_builds, distinct
    from asymvlm_kernels.warming.recording import recording

    def tell(record: dict[str, Any]) -> None:
        told.write(json.dumps(record) + "\n")
        told.flush()

    started = time.perf_counter()
    with recording(orders["arch"]) as recorded:
        for calls in orders["calls"]:
            call_all(from_json(calls))
    builds = distinct(recorded)
    tell({"builds": [build.key for build in builds], "seconds": round(time.perf_counter() - started, 3)})
    if orders["compile"]:
        for outcome in compile_builds(builds, orders["jobs"]):
            tell(outcome)
    tell({"done": True})


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "w") as own:
        os.dup2(2, 1)  # whatever else prints must not stand between the lines
        main(json.loads(sys.stdin.read()), own)
