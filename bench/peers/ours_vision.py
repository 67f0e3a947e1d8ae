"""What this library's CDPruner keeps of a page, on the checkpoint that the peer exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import asymvlm
from asymvlm.methods import CDPruner
from asymvlm_kernels import UniformBudget
from bench.peers.pages import END, IMAGE, START, Page, patches
from bench.peers.records import Side


@torch.inference_mode()
def run(model_folder: Path, page: Page) -> Side:
    """The choice behind a forward pass of the patched model. As the peer, it reads the question alone."""
    from transformers import Qwen2VLForConditionalGeneration

    model: Any = Qwen2VLForConditionalGeneration.from_pretrained(model_folder).eval()
    ids = torch.tensor([page.ids()])
    pruning = asymvlm.VisionPruning(
        method=CDPruner(),
        budget=UniformBudget(1 - page.percent / 100),
        text=~torch.isin(ids, torch.tensor([START, END, IMAGE])),
    )
    with asymvlm.patch(model, pruning) as handle:
        model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=patches(page),
            image_grid_thw=page.grid(),
            mm_token_type_ids=(ids == IMAGE).int(),
        )
        assert handle.last is not None
        kept = handle.last.index[0]
    held = torch.zeros(ids.shape[1], dtype=torch.bool)
    held[kept[kept >= 0]] = True
    return Side(held[ids[0] == IMAGE].view(1, 1, 1, page.images, page.tokens), None)
