"""Train the small VLM on easy-vqa: ``python -m bench.public.train --out DIR``, 17 minutes of a busy CPU core.

Size and recipe are those of `bench.tinyvlm.train`, from scratch on images of easy-vqa's training split: first tower and
embeddings (align), then everything with 16 to 144 of 144 vision tokens (mix). What a cell shows is told by the
questions about its image; where the shape lies, by the pixels that are not background.
"""

from __future__ import annotations

import functools
import math
import sys
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from asymvlm.cli import console
from bench.public.batches import KEPT, NOTHING, Batch, make_batch
from bench.public.easy_vqa import VOCABULARY, Pictures, make_samples, pictures
from bench.tinyvlm.batches import IGNORED
from bench.tinyvlm.evaluate import exact_match_by_kind
from bench.tinyvlm.glyphs import BLANK, BOS
from bench.tinyvlm.losses import TINY, decode, likeness
from bench.tinyvlm.model import build, vision_features
from bench.tinyvlm.train import Stage, Training, command, match_norms, share_right

CHECKED = 300  # validation questions looked at after the last stage
STAGES = (
    Stage("align", 400, 32, 2e-3, warmup=50, align_only=True),
    Stage("mix", 400, 16, 1.5e-3, kept=KEPT, look_weight=0.2),
)


class Temperature(nn.Module):
    """The one parameter that only training has: how sharply a vision token resembles a word."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(math.log(10.0)))


class EasyVqa(Training):
    """Training on easy-vqa; the state on disk is that of `Training`."""

    vocabulary: ClassVar[tuple[str, ...]] = VOCABULARY
    extra: Temperature

    @functools.cached_property
    def pictures(self) -> Pictures:
        return pictures("train")

    def fresh(self) -> tuple[Any, Temperature]:
        model = build(seed=self.seed, vocabulary=VOCABULARY)
        match_norms(model, self.pictures.pixels[:8])
        return model, Temperature()

    def losses(self) -> tuple[torch.Tensor, dict[str, float]]:
        stage, key = self.current, [self.seed, sum(self.current.name.encode()), self.step]
        kept = int(np.random.default_rng([*key, 1]).choice(list(stage.kept), p=list(stage.kept.values())))
        batch = make_batch(self.pictures, key, stage.batch, kept)
        vision = vision_features(self.model, batch.pixels)
        alignment = alignment_loss(self.model, self.extra.scale, vision, batch.meaning)
        if stage.align_only:
            return alignment, {"alignment": alignment.item()}
        answer, look, predicted = answer_loss(self.model, vision, batch)
        record = {
            "answer": answer.item(),
            "alignment": alignment.item(),
            "look": look.item(),
            "right": share_right(predicted, batch.labels),
        }
        return answer + alignment + stage.look_weight * look, record

    def check(self) -> dict[str, float]:
        return exact_match_by_kind(self.model, make_samples("validation", CHECKED, seed=self.seed))


def alignment_loss(model: Any, scale: torch.Tensor, vision: torch.Tensor, meaning: torch.Tensor) -> torch.Tensor:
    """A projected vision token resembles the words of what it shows, shape and background weighing alike
    whatever their sizes. ``vision`` ``(B, 144, D)``, ``meaning`` as in `Batch`.
    """
    likely = likeness(model, scale, vision).gather(-1, meaning.clamp_min(0))
    empty = meaning == BLANK
    drawn = (meaning != NOTHING) & ~empty
    shape, background = ((likely * part).sum() / part.sum().clamp_min(1) for part in (drawn, empty))
    return -shape - background


def answer_loss(model: Any, vision: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross-entropy of the answers; minus the logarithm of the probability with which one head looks at the shape where
    an answer is due; and ``(B, T)``, the token that the model puts in place of each text token.
    """
    embed, count = model.get_input_embeddings(), batch.kept.shape[1]
    rows = vision.gather(1, batch.kept[..., None].expand(-1, -1, vision.shape[-1]))
    begin = embed.weight[BOS].expand(len(rows), 1, -1)
    hidden, look = decode(model, torch.cat([begin, rows, embed(batch.text)], 1), batch.positions, batch.visible)
    before = slice(count, -1)  # the row in front of each text token
    logits = model.lm_head(hidden[:, before])
    answer = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED)
    seen = (look[:, before, 1 : 1 + count] * batch.shown.gather(1, batch.kept)[:, None]).sum(-1)
    asked = batch.labels >= 0
    return answer, -((seen + TINY).log() * asked).sum() / asked.sum(), logits.argmax(-1)


if __name__ == "__main__":
    app = command(EasyVqa, STAGES, "Train the small VLM on easy-vqa from scratch.")
    sys.exit(console.run_app(app, None, name="python -m bench.public.train"))
