"""One training step of a scorer: additive masks against key-bias attention, in time and memory.

``python -m bench.bench_training`` runs the 0.4 B model on a CPU, ``--device cuda`` in bf16. Both injections must give
the same gradient of the weight first: a wrong answer ends the run. Variants are measured in turn, round by round.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "python_api")]

import torch  # noqa: E402

from asymvlm.training import TrainingSettings  # noqa: E402
from asymvlm.training.passes import FrozenModel, MergedBatch  # noqa: E402
from asymvlm.training.scoring import row_losses  # noqa: E402
from bench import vlm  # noqa: E402
from bench.bench_generate import peak_memory, timed  # noqa: E402
from bench.harness import environment, results  # noqa: E402

VARIANTS = {
    "masks": ("mask", False),
    "key-bias attention": ("bias", False),
    "key-bias attention, checkpointed": ("bias", True),
}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of a gradient, as a share of its length


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=tuple(vlm.SIZES), default="0.4B")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--file", type=Path, help="results file to merge into")
    options = parser.parse_args(args)
    if options.threads:
        torch.set_num_threads(options.threads)
    size, dtype = vlm.SIZES[options.size], torch.bfloat16 if options.device == "cuda" else torch.float32
    day = f"{datetime.now(UTC):%Y-%m-%d}-training.json"
    file = options.file or ROOT / "bench" / "results" / environment.device_slug(options.device) / day
    command = "python -m bench.bench_training " + " ".join(sys.argv[1:] if args is None else args)
    run = results.add_run(file, {"command": command.strip(), "environment": environment.describe(options.device)})
    model = vlm.build(size, options.device, dtype)
    inputs = vlm.make_inputs(model, size, options.batch)
    gradients = {name: step(model, inputs, *variant) for name, variant in VARIANTS.items()}
    check(gradients, TOLERANCE[dtype])
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    peaks = dict.fromkeys(VARIANTS, 0.0)
    for _ in range(options.rounds):
        for name, variant in VARIANTS.items():
            with peak_memory() as peak:
                times[name].append(timed(functools.partial(step, model, inputs, *variant)))
            peaks[name] = max(peaks[name], peak[0])
    rows = {
        name: {
            "step_ms": round(1e3 * statistics.median(times[name]), 2),
            "step_range_ms": [round(1e3 * min(times[name]), 2), round(1e3 * max(times[name]), 2)],
            "peak_mib": round(peaks[name], 1),
        }
        for name in VARIANTS
    }
    key = f"{size.name}/{str(dtype).removeprefix('torch.')}/batch {options.batch}/{size.vision_tokens} vision tokens"
    results.add_case(file, key, {"variants": rows, "rounds": options.rounds, "run": run})
    print(key, *(f"  {name}: {row}" for name, row in rows.items()), sep="\n", flush=True)
    print(f"results: {file}")
    return 0


def step(model: Any, inputs: dict[str, torch.Tensor], injection: str, checkpointing: bool) -> torch.Tensor:
    """Both passes and the gradient of the weight, ``(D,)``."""
    frozen = FrozenModel(model, injection=injection, checkpointing=checkpointing)
    weight = torch.ones(frozen.width, device=frozen.device, requires_grad=True)
    with frozen.frozen():
        batch: MergedBatch = frozen.merge(inputs)
        loss = row_losses(frozen, batch, weight, 0.5, TrainingSettings()).sum()
        (gradient,) = torch.autograd.grad(loss, weight)
    return gradient


def check(gradients: dict[str, torch.Tensor], tolerance: float) -> None:
    """Raises SystemExit where a gradient differs from that of the first variant by more than ``tolerance``."""
    name, wanted = next(iter(gradients.items()))
    for other, found in gradients.items():
        away = float((found - wanted).norm() / wanted.norm())
        if not away <= tolerance:
            raise SystemExit(f"wrong answer: the gradient by {other} is {away:.2e} away from that by {name}")


if __name__ == "__main__":
    raise SystemExit(main())
