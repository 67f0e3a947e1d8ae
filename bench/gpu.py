"""Everything a GPU should prove, in one command: ``make gpu``, or ``python bench/gpu.py`` in a bare checkout.

Each step runs in a process of its own with a time limit, and what it found is written at once, so a step that fails or
hangs loses nothing of the others. The first compiles every kernel of the others in parallel; then come the tests that
say most, the times, a profile, the sanitizer, all tests, and whole models. Results go to
``<results>/<device>/<date>*``, at most a dozen files; a second run merges into those of the day, and ``--resume`` skips
what the same sources have passed or measured. It takes at most 9 minutes, or ``--seconds``. The peers that
torch.compile tunes and the optional CUDA library run by name: ``make gpu ARGS="--only methods compiled flex cuda"``.

``--dry-run`` prints the plan, and what each step would compile that the first did not. ``--cache DIR`` takes a cache
along; ``--only warm --device cpu --arch 90 --cache DIR`` fills it on a machine without a GPU.
Exit code: 0 all passed, 1 a step failed, 2 no such device.
"""

from __future__ import annotations

import argparse
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "python_api")]

import torch  # noqa: E402

from asymvlm_kernels.warming import cache  # noqa: E402
from bench.harness import environment, results, tables  # noqa: E402
from bench.proof import plan  # noqa: E402
from bench.proof.running import is_done, run_step  # noqa: E402
from bench.proof.steps import BY_NAME, JOBS, SECONDS, STEPS, chosen  # noqa: E402


def main(args: list[str] | None = None) -> int:
    options = _options(args)
    if options.device == "cuda" and not options.dry_run and not torch.cuda.is_available():
        print("bench/gpu.py: torch sees no CUDA device here (--device cpu measures the CPU)", file=sys.stderr)
        return 2
    if options.arch is None and options.device == "cuda":
        major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
        options.arch = 10 * major + minor
    names = chosen(options)
    if options.dry_run:
        plan.show(names, options)
        return 0
    if options.cache is not None and options.cache.exists():
        print(f"== cache: {cache.adopt(options.cache)} builds in {options.cache}", flush=True)
    if options.device == "cuda" and not (compiler := cache.c_compiler())["ok"]:
        print(f"== C compiler: {compiler['reason']}", flush=True)
    place = options.results.resolve() / environment.device_slug(options.device)
    file = place / f"{datetime.now(UTC):%Y-%m-%d}.json"
    statuses = []
    rest = 0.0
    for name in names:
        if options.resume and is_done(name, file):
            print(f"== {name}: passed already", flush=True)
            continue
        own = options.limit or STEPS[name].limit * options.seconds / SECONDS
        limit = own + rest if STEPS[name].takes_rest and not options.limit else own
        started = time.monotonic()
        statuses.append(run_step(name, options, file, limit))
        rest = max(rest + own - (time.monotonic() - started), 0.0)
        told = tables.summary(results.load(file))
        file.with_name(f"{file.stem}-tables.md").write_text(told + "\n")
        print(told, flush=True)
    print(f"results: {file}", flush=True)
    return 1 if {"failed", "timeout"} & set(statuses) else 0


def _options(args: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=tuple(STEPS), help=f"steps to run; {', '.join(BY_NAME)} run only if named"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: tests this script, measures nothing")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and run nothing")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="folder of the results")
    parser.add_argument("--cache", type=Path, help="Triton's cache, brought along or to be filled")
    parser.add_argument("--arch", type=int, help="compute capability to compile for, 90; that of the device if none")
    parser.add_argument("--jobs", type=int, default=JOBS, help="compilations at a time")
    parser.add_argument("--resume", action="store_true", help="skip what these sources have passed or measured")
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all steps that no name asks for")
    parser.add_argument("--limit", type=float, help="seconds a step, instead of its share")
    return parser.parse_args(args)


if __name__ == "__main__":
    raise SystemExit(main())
