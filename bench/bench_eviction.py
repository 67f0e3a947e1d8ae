"""What text eviction saves a step, and what of it is eviction: bytes held, bytes written by the cache, time.

``python -m bench.bench_eviction`` decodes one long answer with each of four caches: transformers' `DynamicCache`, which
copies all it holds at every step; ours without eviction, which is only allocated ahead; ours with eviction; and the
same in its static form. What eviction saves is the third against the second. The decoder's MLP is narrow, so that a
step is attention and the cache. A wrong answer ends the run: the caches that evict nothing must agree, and the two that
evict must agree, though they do it by different means.
"""

from __future__ import annotations

import argparse
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
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from transformers import Cache  # noqa: E402

import asymvlm  # noqa: E402
from asymvlm import TextEviction  # noqa: E402
from asymvlm.cache.growing import GrowingTable  # noqa: E402
from asymvlm.hf.arguments import cache_of  # noqa: E402
from bench import vlm  # noqa: E402
from bench.harness import environment, results  # noqa: E402

SIZES = {
    "tiny": vlm.SIZES["tiny"],
    "cpu": vlm.Size("cpu", 512, 12, 512, 8, 8, 512, 280, 64, 1),  # 400 vision tokens, 48 KiB of K and V a token
    "gpu": vlm.Size("gpu", 4096, 32, 512, 32, 8, 512, 630, 64, 1),  # Llama 3 8B's attention, 2025 vision tokens
}
NEVER = 1_000_000  # a threshold that no answer reaches


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=tuple(SIZES))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, help="length of the answer: 768 on a CPU, 2048 on a GPU")
    parser.add_argument("--threshold", type=int, default=128)
    parser.add_argument("--retention", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--file", type=Path, help="results file to merge into")
    options = parser.parse_args(args)
    if options.threads:
        torch.set_num_threads(options.threads)
    gpu = options.device == "cuda"
    size, dtype = SIZES[options.size or ("gpu" if gpu else "cpu")], torch.bfloat16 if gpu else torch.float32
    tokens = options.tokens or (2048 if gpu else 768)
    day = f"{datetime.now(UTC):%Y-%m-%d}-eviction.json"
    file = options.file or ROOT / "bench" / "results" / environment.device_slug(options.device) / day
    command = "python -m bench.bench_eviction " + " ".join(sys.argv[1:] if args is None else args)
    run = results.add_run(file, {"command": command.strip(), "environment": environment.describe(options.device)})
    verify(options.device)
    model = vlm.build(size, options.device, dtype)
    inputs = vlm.make_inputs(model, size, options.batch)
    policy = TextEviction.paper(options.threshold, options.retention)
    rows = measure(model, inputs, policy, tokens, options.rounds)
    key = f"{size.name}/{str(dtype).removeprefix('torch.')}/batch {options.batch}/{tokens} tokens/T {policy.threshold}"
    results.add_case(file, f"{key}/r {policy.retention}", {"run": run, "caches": rows})
    print(key, *(f"  {name}: {row}" for name, row in rows.items()), sep="\n", flush=True)
    print(f"results: {file}")
    return 0


def measure(
    model: Any, inputs: dict[str, torch.Tensor], policy: TextEviction, tokens: int, rounds: int
) -> dict[str, dict[str, float]]:
    """One row a cache. Raises SystemExit on a wrong answer."""
    keep = {"text": TextEviction(NEVER, 1.0)}
    caches: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "DynamicCache": ({}, {}),
        "preallocated": (keep, {}),
        "evicting": ({"text": policy}, {}),
        "evicting, static": ({"text": policy}, {"cache_implementation": "static", "disable_compile": True}),
    }
    rows: dict[str, dict[str, float]] = {name: {} for name in caches}
    answers: dict[str, torch.Tensor] = {}
    length = dict(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, return_dict_in_generate=True)
    for number in range(rounds + 1):
        for name, (patch, options) in caches.items():
            with patched(model, patch), counting(number == 0) as written, stepping(model) as steps:
                answer = model.generate(**inputs, **options, **length)
            row, cache = rows[name], cache_of(answer)
            answers[name] = answer.sequences
            if number == 0:  # counts slow a step down, so they are taken apart from the times
                row["kv_mib"] = round(held_bytes(cache) / 2**20, 3)
                row["written_kib_per_step"] = round(written[0] / (tokens - 1) / 2**10, 1)
                continue
            for kind, seconds in steps().items():
                per_step = round(1e3 * seconds / (tokens - 1), 4)
                row[kind] = min(per_step, row.get(kind, per_step))
    if model.dtype == torch.float32:  # in bf16 another order of slots is another order of sums, and answers part
        check(answers, "DynamicCache", "preallocated")
        check(answers, "evicting", "evicting, static")
    return rows


def verify(device: str) -> None:
    """A small fp32 model on the device, several evictions: raises SystemExit on a wrong answer."""
    size = SIZES["tiny"]
    model = vlm.build(size, device, torch.float32)
    measure(model, vlm.make_inputs(model, size, 2), TextEviction.paper(8, 0.5), 40, 0)


def check(answers: dict[str, torch.Tensor], first: str, second: str) -> None:
    """Both caches must give the same tokens."""
    same = (answers[first] == answers[second]).long().cumprod(1).sum(1) - answers[first].shape[1]
    if int(same.min()) < 0:
        raise SystemExit(f"wrong answer: {second} leaves {first} {-int(same.min())} tokens before the end")


def held_bytes(cache: Cache) -> int:
    """Bytes that the cache's K and V keep allocated at the end of the answer."""
    if isinstance(cache, asymvlm.EvictionCache):
        return cache.stats().kv_bytes
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]  # type: ignore[union-attr]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None)


@contextmanager
def patched(model: Any, settings: dict[str, Any]) -> Iterator[None]:
    if not settings:
        yield
        return
    with asymvlm.patch(model, **settings):
        yield


class _Written(TorchDispatchMode):
    """Adds up the bytes of K and V that are written: into new tensors, into slots, and from slot to slot."""

    NEW = ("cat", "clone", "index", "gather", "index_select", "new_zeros", "new_full")
    INTO_SLOTS = ("copy_", "scatter_", "index_copy_", "index_put_")

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in self.NEW:
            self.total += result.nbytes
        elif name in self.INTO_SLOTS:
            self.total += (args[0] if name == "copy_" else args[-1]).nbytes
        elif name == "move_slots_":
            source, _, tensors = args
            moved = int((source >= 0).sum())
            self.total += sum(moved * tensor.nbytes // (tensor.shape[0] * tensor.shape[1]) for tensor in tensors)
        return result


@contextmanager
def counting(active: bool) -> Iterator[list[int]]:
    """Bytes that cache updates and evictions of one token write, summed over a block."""
    total = [0]
    if not active:
        yield total
        return
    table: Any = GrowingTable
    originals = {(Cache, "update"): Cache.update, (table, "compact"): table.compact}

    def wrapped(original: Callable[..., Any], single: bool) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if single and args[0].shape[2] != 1:
                return original(self, *args, **kwargs)
            mode = _Written()
            with mode:
                result = original(self, *args, **kwargs)
            total[0] += mode.total
            return result

        return call

    for (owner, name), original in originals.items():
        setattr(owner, name, wrapped(original, name == "update"))
    try:
        yield total
    finally:
        for (owner, name), original in originals.items():
            setattr(owner, name, original)


@contextmanager
def stepping(model: Any) -> Iterator[Callable[[], dict[str, float]]]:
    """Seconds from the first decode step to the end of a block: on the clock, and of this process's processors."""
    start: dict[str, float] = {}
    stop: dict[str, float] = {}

    def now() -> dict[str, float]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return {"ms_per_step": time.perf_counter(), "processor_ms_per_step": time.process_time()}

    def after_prefill(*_: Any) -> None:
        if not start:
            start.update(now())

    hook = model.register_forward_hook(after_prefill)
    try:
        yield lambda: {name: stop[name] - start[name] for name in start}
        stop.update(now())
    finally:
        hook.remove()


if __name__ == "__main__":
    raise SystemExit(main())
