"""End to end: time to first token, K/V bytes, peak memory and decoding speed at several keep ratios.

``python -m bench.bench_generate`` measures the 0.4 B model on a CPU, ``--device cuda`` the 8 B one in bf16 at batch
1, 4 and 16. The kept tokens are first checked against plain PyTorch: a wrong answer ends the run. Ratios are measured
in turn, round by round, so that a machine that slows down slows them all.
"""

from __future__ import annotations

import argparse
import ctypes
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "python_api")]

import torch  # noqa: E402

import asymvlm  # noqa: E402
import asymvlm.prompt.shorten  # noqa: E402
from asymvlm.hf.arguments import cache_of  # noqa: E402
from asymvlm.hf.merge import merge_embeddings  # noqa: E402
from asymvlm.prompt import choosing, shorten  # noqa: E402
from asymvlm.report.crowded import silence  # noqa: E402
from bench import vlm  # noqa: E402
from bench.harness import environment, results  # noqa: E402

RATIOS = (1.0, 0.75, 0.5, 0.25)
NEW_TOKENS = 32


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=tuple(vlm.SIZES), help="0.4B on a CPU, 8B on a GPU")
    parser.add_argument("--batch", type=int, nargs="+", help="1 on a CPU; 1, 4 and 16 on a GPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--file", type=Path, help="results file to merge into")
    options = parser.parse_args(args)
    if options.threads:
        torch.set_num_threads(options.threads)
    gpu = options.device == "cuda"
    size = vlm.SIZES[options.size or ("8B" if gpu else "0.4B")]
    dtype = torch.bfloat16 if gpu else torch.float32
    day = f"{datetime.now(UTC):%Y-%m-%d}-generate.json"
    file = options.file or ROOT / "bench" / "results" / environment.device_slug(options.device) / day
    command = "python -m bench.bench_generate " + " ".join(sys.argv[1:] if args is None else args)
    run = results.add_run(file, {"command": command.strip(), "environment": environment.describe(options.device)})
    model = vlm.build(size, options.device, dtype)
    for batch in options.batch or ((1, 4, 16) if gpu else (1,)):
        inputs = vlm.make_inputs(model, size, batch)
        check(model, inputs)
        record = measure(model, inputs, options.rounds) | {"run": run}
        key = f"{size.name}/{str(dtype).removeprefix('torch.')}/batch {batch}/{size.vision_tokens} vision tokens"
        results.add_case(file, key, record)
        print(key, *(f"  {ratio}: {row}" for ratio, row in record["ratios"].items()), sep="\n", flush=True)
    print(f"results: {file}")
    return 0


def check(model: Any, inputs: dict[str, torch.Tensor], ratio: float = 0.5) -> None:
    """The kept index against the literal equation in float64, up to near ties. Raises SystemExit on a wrong one."""
    with asymvlm.patch(model, vision=vision(ratio)) as handle:
        embeds = merge_embeddings(model, handle.adapter, inputs)["inputs_embeds"]
        result = model.generate(**inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    assert handle.last is not None
    index = handle.last.index
    for row, ids in enumerate(inputs["input_ids"]):
        image = ids == vlm.IMAGE_TOKEN
        unit = torch.nn.functional.normalize(embeds[row].double(), dim=-1)
        score = (unit[image] @ unit[~image].T).amax(-1)
        kept = torch.zeros_like(image)
        kept[index[row]] = True
        chosen, count = kept[image], int(image.sum() * ratio)
        if int(chosen.sum()) != count or bool((~kept[~image]).any()):
            raise SystemExit(f"wrong answer: row {row} keeps {int(chosen.sum())} vision tokens, wanted {count}")
        if score[chosen].min() < score[~chosen].max() - 1e-5:
            raise SystemExit(f"wrong answer: row {row} drops a token that scores higher than one it keeps")
    length = cache_of(result).get_seq_length()
    if length != index.shape[1] + 1:
        raise SystemExit(f"wrong answer: the cache holds {length} tokens, wanted {index.shape[1] + 1}")


def vision(ratio: float) -> asymvlm.VisionPruning:
    settings = asymvlm.VisionPruning(budget=asymvlm.UniformBudget(ratio))
    silence(settings)  # random weights find nothing relevant
    return settings


def measure(model: Any, inputs: dict[str, torch.Tensor], rounds: int) -> dict[str, Any]:
    """Medians of ``rounds`` rounds, after one that is not counted, for every ratio."""
    times: dict[float, list[dict[str, float]]] = {ratio: [] for ratio in RATIOS}
    found: dict[float, dict[str, Any]] = {}
    for number in range(rounds + 1):
        for ratio in RATIOS:
            with asymvlm.patch(model, vision=vision(ratio)) as handle, stages() as spent, peak_memory() as peak:
                first = timed(lambda: model.generate(**inputs, max_new_tokens=1, do_sample=False))
            assert handle.last is not None
            report = handle.last
            if number:
                times[ratio].append({"first_token": first, **spent})
            found[ratio] = {"kv_mib": round((report.kv_bytes or 0) / 2**20, 2), "tokens": report.tokens_after[0]}
            found[ratio]["peak_mib"] = round(max(peak[0], found[ratio].get("peak_mib", 0.0)), 1)
    ratios = {}
    for ratio in RATIOS:
        with asymvlm.patch(model, vision=vision(ratio)):
            longer = timed(lambda: model.generate(**inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS))
        medians = {name: statistics.median(entry[name] for entry in times[ratio]) for name in times[ratio][0]}
        spread = [entry["first_token"] for entry in times[ratio]]
        prefill = medians["first_token"] - medians["merge"] - medians["prune"]
        ratios[str(ratio)] = {
            "first_token_ms": round(1e3 * medians["first_token"], 2),
            "first_token_range_ms": [round(1e3 * min(spread), 2), round(1e3 * max(spread), 2)],
            "merge_ms": round(1e3 * medians["merge"], 2),
            "prune_ms": round(1e3 * medians["prune"], 3),
            "prune_share_of_prefill": round(medians["prune"] / prefill, 5),
            "tokens_per_second": round(len(inputs["input_ids"]) * NEW_TOKENS / longer, 2),
            **found[ratio],
        }
    return {"ratios": ratios, "rounds": rounds}


@contextmanager
def stages() -> Iterator[dict[str, float]]:
    """Seconds spent in the merge (tower, projector) and in our own work, by wrapping both for the time of a block."""
    spent = {"merge": 0.0, "prune": 0.0}

    def timed_call(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            synchronize()
            started = time.perf_counter()
            result = original(*args, **kwargs)
            synchronize()
            spent[name] += time.perf_counter() - started
            return result

        return call

    merge, prune = shorten.merge_embeddings, choosing.prune_sequence
    shorten.merge_embeddings, choosing.prune_sequence = timed_call("merge", merge), timed_call("prune", prune)
    try:
        yield spent
    finally:
        shorten.merge_embeddings, choosing.prune_sequence = merge, prune


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """MiB above the start of the block: of the CUDA allocator, or of the process where Linux can reset its peak."""
    peak = [0.0]
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak
        peak[0] = (torch.cuda.max_memory_allocated() - before) / 2**20
        return
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls left would hide what this one takes
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):
        yield peak
        peak[0] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        return
    before_kib = status("VmRSS")
    yield peak
    peak[0] = (status("VmHWM") - before_kib) / 2**10


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def timed(call: Callable[[], Any]) -> float:
    synchronize()
    started = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - started


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    raise SystemExit(main())
