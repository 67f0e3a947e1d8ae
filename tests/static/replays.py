"""What a replay hands the driver, against what Triton's own launch hands it: the kernel, the grid and every argument.

On a GPU that is not there (`bench.harness.fake_gpu`), with allocations that come to lie where those of the other way
lay. Calls are all the cases of the `cases_*.py`, and random ones whose tensors differ in size, stride, type, alignment
and memory shared. Prints one JSON object:

    PYTHONPATH=. python tests/static/replays.py
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "0"  # a kernel decorated for the interpreter launches nothing
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import argparse
import ctypes
import functools
import importlib
import json
import math
import mmap
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from asymvlm_kernels.decode import attend
from asymvlm_kernels.launch import forget, interface, record
from asymvlm_kernels.launch.tape import MISFIT, Tape
from asymvlm_kernels.prefill import gather, score, select
from asymvlm_kernels.prefill.prune import known_length
from bench.harness.fake_gpu import Launch, fake_gpu

SPACE = 1 << 33  # bytes of addresses, which nothing reads or writes
GROUPS = [importlib.import_module(path.stem) for path in sorted(Path(__file__).parent.glob("cases_*.py"))]
NEAR = 64  # numbers before and behind a random tensor


class Arena:
    """Allocates one piece behind the other, from the same start after each `again`."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, SPACE)
        self.start = -ctypes.addressof(ctypes.c_char.from_buffer(self.memory)) % 512
        self.again()

    def again(self) -> None:
        self.offset = self.start

    def take(self, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        count = math.prod(size)
        if count == 0:
            return plain_empty(size, dtype=dtype)
        whole = torch.frombuffer(self.memory, dtype=dtype, count=count, offset=self.offset)
        self.offset += -(-count * dtype.itemsize // 512) * 512
        return whole.as_strided(size, stride)

    def empty(self, size: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        size = tuple(size)
        return self.take(size, tuple(math.prod(size[axis + 1 :]) for axis in range(len(size))), dtype)


plain_empty = torch.empty
Call = tuple[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]]  # name, launcher, what it is given


def plain(value: Any) -> Any:
    """An argument as the driver reads it."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    return tuple(plain(item) for item in value) if isinstance(value, tuple) else value


class Check:
    """Runs calls both ways and keeps count."""

    def __init__(self, heard: list[Launch], arena: Arena) -> None:
        self.heard, self.arena = heard, arena
        self.calls, self.replays = 0, Counter()
        self.wrong: list[str] = []

    def both(self, call: Call) -> None:
        """The call as it is made, then the same one by Triton's launch."""
        replayed = []
        replay = Tape.replay

        def counted(tape: Tape, *given: Any) -> Any:
            results = replay(tape, *given)
            replayed.append(results is not MISFIT)
            return results

        with patch.object(Tape, "replay", counted):
            got = self._launches(call)
        with patch.object(record.interface, "driver_if_plain", lambda: None):
            want = self._launches(call)
        self.calls += 1
        self.replays[call[0]] += any(replayed)
        if any(replayed) and got != want:
            self.wrong.append(call[0])

    def _launches(self, call: Call) -> Any:
        _, launcher, arguments, options = call
        self.heard.clear()
        self.arena.again()
        results = launcher(*arguments, **options)
        return [
            (id(launch.kernel), launch.grid, launch.stream, plain(launch.arguments)) for launch in self.heard
        ], described(results)


def described(results: Any) -> Any:
    if isinstance(results, torch.Tensor):
        return results.data_ptr(), results.shape, results.stride(), results.dtype
    return tuple(map(described, results)) if isinstance(results, (tuple, list)) else results


def shipped() -> Iterator[Call]:
    for group in GROUPS:
        for case in group.cases():
            if isinstance(case.call, functools.partial):
                yield case.name, case.call.func, case.call.args, case.call.keywords


class Draw:
    """Random calls: most are alike, and the others differ in a few things."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def one(self, *choices: Any) -> Any:
        """The first, mostly."""
        return choices[0] if self.random.random() < 0.9 else self.random.choice(choices)

    def tensor(self, size: tuple[int, ...], dtype: torch.dtype, memory: torch.Tensor | None = None) -> torch.Tensor:
        """Of any stride but the last, at any place of ``memory``."""
        room = self.one(0, 8, 3)  # between rows
        wide = (*size[:-1], size[-1] + room)
        shift = self.one(0, 1, 2, 8)
        count = math.prod(wide)
        if memory is None:
            memory = plain_empty(count + NEAR, dtype=dtype)
        return memory[shift : shift + count].view(wide)[..., : size[-1]]

    def mask(self, size: tuple[int, ...]) -> torch.Tensor | None:
        return self.tensor(size, torch.bool) if self.one(True, False) else None

    def prune(self) -> tuple[Any, ...]:
        B, S, D, dtype = self.one(1, 2), self.one(40, 64), self.one(16, 70), self.one(torch.bfloat16, torch.float32)
        masks = [self.tensor((B, S), torch.bool) for _ in range(2)]
        weight = self.tensor((D,), torch.float32) if self.one(False, True) else None
        floats, ids = self.tensor((B, S), torch.float32), self.tensor((B, S), torch.int64)
        carry = [floats, ids, self.one(ids, self.tensor((B, S), torch.int64))]
        pads = [self.one(0.0, -0.0, 1.5, float("nan")), self.one(0, -1), 1]
        budget = self.one(([300_000] * 3, [0.0, 0.0]), ([], [0.5, 1.0, self.one(0.0, 0.1), 0.1, 0.9]))
        given = self.tensor((B, S), torch.float32) if weight is None and self.one(False, True) else None
        tokens = (self.tensor((B, S, D), dtype), *masks, self.mask((B, S)), weight)
        capacity, left = self.one(S, 20), self.one(False, True)
        rules = {
            (S, True): (ids, S, 0.7, []),
            (20, False): (None, 0, 1.0, [0.2, 0.1]),
            (20, True): (ids, 4, 1.0, [0.0, 0.1]),
        }
        rule = rules.get((capacity, left), ())  # of what is drawn already, so that other launchers draw as before
        return (*tokens, *budget, carry, pads, [False] * 3, capacity, left, given, *rule)

    def attend(self) -> tuple[Any, ...]:
        B, S, H, G, D, dtype = 1, self.one(64, 80), 4, 2, self.one(16, 40), self.one(torch.bfloat16, torch.float32)
        q, k, v = self.tensor((B, 1, H, D), dtype), *(self.tensor((B, S, G, D), dtype) for _ in range(2))
        if self.random.random() < 0.2:  # of one memory, at one distance or another
            both = plain_empty(2 * S * G * D + NEAR, dtype=dtype)
            k, v = (both[at : at + S * G * D].view(B, S, G, D) for at in (0, S * G * D + self.one(0, 8)))
        lengths = self.tensor((B,), torch.int32) if self.one(False, True) else None
        places = (None, None)
        if self.one(False, True):
            places = self.tensor((B, S), torch.int32), self.tensor((B, 1), torch.int64)
        scored = self.one(0, 1)
        numbers = (self.one(0.1, 0.5), self.one(-1, 5), -1, 0.0, self.one(0, 2), not scored, scored)
        return q, k, v, lengths, None, *places, *numbers

    def rows(self) -> tuple[Any, ...]:
        B, S, K = 2, self.one(33, 64), 16
        rows = self.tensor((B, S, self.one(8, 24)), self.one(torch.float32, torch.int64))
        return rows, self.tensor((B, K), torch.int64), self.one(0, 0.0, -0.0, 1, 2)

    def scores(self) -> tuple[Any, ...]:
        N, L, D, dtype = self.one(48, 65), self.one(1, 16), self.one(16, 32), self.one(torch.bfloat16, torch.float32)
        vision, text = self.tensor((2, N, D), dtype), self.tensor((2, L, D), dtype)
        weight = self.tensor((D,), torch.float32) if self.one(False, True) else None
        return vision, text, weight, self.mask((2, N)), self.mask((2, L))

    def ranks(self) -> tuple[Any, ...]:
        B, N = self.one(1, 2), self.one(48, 64)
        scores, mask = self.tensor((B, N), torch.float32), self.mask((B, N))
        return scores, self.tensor((B,), self.one(torch.int32, torch.int64)), mask, self.one(16, 17)


DRAWN = {
    "prune": (known_length._prune_static_triton, Draw.prune),
    "attend": (attend._attend_slots_triton, Draw.attend),
    "rows": (gather._gather_rows_triton, Draw.rows),
    "scores": (score._score_tokens_triton, Draw.scores),
    "ranks": (select._select_tokens_triton, Draw.ranks),
}


FACTS = {"shape": 0, "stride": 1, "dtype": 2, "alignment": 4}  # places in the key of a tensor


def thinned(key: tuple[Any, ...], without: str) -> tuple[Any, ...]:
    """A key of `describe` that says nothing of ``without``."""
    found: list[Any] = []
    rest = list(key)
    while rest:
        first = rest.pop(0)
        if isinstance(first, torch.Size):
            facts = [first, *(rest.pop(0) for _ in range(4))]
            found += [None if number == FACTS.get(without) else fact for number, fact in enumerate(facts)]
        elif first is None:
            found.append(None)
        else:
            value = rest.pop(0)
            if first in (list, tuple):
                value = thinned(value, without)
            found += [first, None if without == "number" and first in (int, float) else value]
    return tuple(found)


def run(without: str, calls: Iterable[Call], check: Check) -> dict[str, Any]:
    """``calls`` both ways, from no tape on, with a key that says nothing of ``without``."""
    describe = record.describe

    def thin(*given: Any) -> Any:
        key = describe(*given)
        return key and thinned(key, without)

    forget()
    shared = (lambda recorder: []) if without == "shared memory" else record.Recorder._together
    with patch.object(record, "describe", thin), patch.object(record.Recorder, "_together", shared):
        for call in calls:
            check.both(call)
    return {"calls": check.calls, "replays": dict(check.replays), "wrong": check.wrong}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=100, help="random calls of each launcher")
    options = parser.parse_args()
    heard: list[Launch] = []
    arena = Arena()
    draw = Draw(0)
    known = [call for call in shipped() for _ in range(3)]  # the third is a replay
    drawn = [(name, launcher, make(draw), {}) for _ in range(options.draws) for name, (launcher, make) in DRAWN.items()]
    with (
        fake_gpu(heard.append),
        patch.dict(interface.ALLOCATORS, cpu=arena.take),
        patch.object(torch, "empty", arena.empty),
    ):
        report = {"shipped": run("", known, Check(heard, arena)), "drawn": run("", drawn, Check(heard, arena))}
        report |= {
            f"without {fact}": run(fact, drawn, Check(heard, arena)) for fact in (*FACTS, "number", "shared memory")
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
