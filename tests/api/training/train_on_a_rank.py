"""One of several processes that train a scorer on a tiny model: `test_training_ranks.py` starts them.

python tests/api/training/train_on_a_rank.py RANK WORLD FOLDER
"""

from __future__ import annotations

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import tiny
import torch
import torch.distributed as dist

from asymvlm import train_scorer

ROWS = (tiny.ONE, tiny.LONGER, tiny.LONGEST)
SETTINGS = {"batch_size": 3, "epochs": 3, "keep_ratio": (0.4, 0.6), "progress": False}


def samples() -> list[dict[str, torch.Tensor]]:
    """Five: the last step of an epoch has two, so that two ranks get unequal shares of each step."""
    return [tiny.make_inputs("llava", (ROWS[i % 3],), seed=i) for i in range(5)]


def main(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    initial = torch.full((32,), 1.0 + 0.1 * rank)  # ranks that disagree: the first one's weight is taken
    scorer = train_scorer(
        tiny.build("llava"), samples(), initial=initial, validation=samples()[:3], checkpoint=folder, **SETTINGS
    )
    torch.save(
        {"weight": scorer.weight, "gaps": scorer.gaps.mean, "ranks": scorer.training["ranks"]}, f"{folder}/{rank}.pt"
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
