"""Bytes, launches and predicted time of the decode ops: a model, to hold measurements against.

The floor reads each K and V once. What the split adds is counted apart: the partial outputs, and with scores the
logits, are written by the first launch and read by the second. They are a few megabytes, which an H100's L2 holds: free
at best, paid in full at worst.
"""

from __future__ import annotations

import torch

from asymvlm_kernels.tuning.decode import attend_config, split_slots
from bench.harness.tables import markdown
from bench.ops.decode.shapes import BATCH, SINGLES, DecodeShape
from bench.ops.prefill.floors import ASSUMED, Device, Traffic

DECODE_OPS = ("attend", "attend_scores", "move_slots")
LAUNCHES = {"attend": 2, "attend_scores": 2, "move_slots": 1}
FP32, INDEX = 4, 8  # bytes
DTYPES = {2: torch.bfloat16, 4: torch.float32}


def parts(shape: DecodeShape, itemsize: int) -> int:
    """Into how many parts the cache is split."""
    dtype = DTYPES[itemsize]
    vector = 16 // itemsize if shape.D * itemsize % 16 == 0 else 1
    config = attend_config(shape.H // shape.G, shape.D, dtype, vector, False, 90)
    return -(-shape.S // split_slots(shape.S, shape.G, 1, 2 * shape.D * itemsize, config.block_n, 0))


def decode_traffic(op: str, shape: DecodeShape, itemsize: int) -> Traffic:
    """Byte count of ``op``, written out."""
    B, S, H, G, D = shape.B, shape.S, shape.H, shape.G, shape.D
    cache, rows = 2 * B * G * S * D * itemsize, B * H * D * itemsize
    between = 2 * B * H * parts(shape, itemsize) * (D + 1) * FP32 if S else 0
    if op == "attend":
        read, written, reread = cache + rows, rows, between
    elif op == "attend_scores":
        read, written, reread = cache + rows, rows + B * S * FP32, between + 2 * B * H * S * FP32
    elif op == "move_slots":
        moved = B * round(shape.freed * shape.keep)  # a hole is filled where it lies before the last survivor
        bytes_moved = 2 * shape.layers * moved * G * D * itemsize
        read, written, reread = bytes_moved + 2 * B * shape.freed * INDEX, bytes_moved, 0
    else:
        raise ValueError(f"op must be one of {', '.join(DECODE_OPS)}, got {op!r}")
    return Traffic(read, written, reread, LAUNCHES[op])


def predicted_decode_us(op: str, shape: DecodeShape, itemsize: int, device: Device) -> tuple[float, float]:
    """Microseconds (model): the floor and the launches, and the same with everything between them paid in full."""
    traffic = decode_traffic(op, shape, itemsize)
    best = traffic.minimal / device.copy_gbs / 1e3 + traffic.launches * device.launch_us
    return best, best + traffic.reread / device.copy_gbs / 1e3


def scores_on_top(shape: DecodeShape, itemsize: int) -> float:
    """What scores add to the bytes of a step at worst, as a share."""
    plain, scored = (decode_traffic(op, shape, itemsize) for op in ("attend", "attend_scores"))
    return (scored.minimal + scored.reread) / (plain.minimal + plain.reread) - 1


def main() -> None:
    """Print the predictions as a table."""
    head = ("size", "parts", "plain, us", "with scores, us", "scores on top, at most", "hole-fill, us")
    rows = []
    for shape in (*SINGLES, BATCH):
        columns = [predicted_decode_us(op, shape, 2, ASSUMED["h100"]) for op in DECODE_OPS]
        plain, scored = (f"{low:.1f} to {high:.1f}" for low, high in columns[:2])
        more = f"{scores_on_top(shape, 2):.1%}"
        rows.append([shape.name, str(parts(shape, 2)), plain, scored, more, f"{columns[2][0]:.0f}"])
    print(markdown(head, rows))


if __name__ == "__main__":
    main()
