"""What the model is trained on. The first term is the task; the other three make it learnable in minutes on a CPU.

1. Cross-entropy of the answer tokens.
2. Alignment: a projected vision token resembles the embedding of its glyph (0.6) and of its entry's key (0.4).
3. A throw-away head tells a cell's column within its entry.
4. One attention head looks at the cell that holds the next answer token; without it look-up starts hundreds of steps
   later.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bench.tinyvlm.batches import IGNORED, Batch
from bench.tinyvlm.glyphs import BOS
from bench.tinyvlm.model import vision_features
from bench.tinyvlm.pages import ENTRY

KEY_SHARE = 0.4  # of the alignment that goes to the entry's key rather than to the cell's own glyph
COLUMN_WEIGHT = 0.3
LOOK_LAYER, LOOK_HEAD = 2, 0  # the head that is shown where to look
TINY = 1e-6


class Supervision(nn.Module):
    """Parameters that only training has: the temperature of the alignment and the column head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.column = nn.Linear(width, ENTRY + 1)


@dataclass(frozen=True)
class Losses:
    """Scalars, and ``predicted`` ``(B, T)``: the token that the model puts in place of each text token."""

    answer: torch.Tensor
    alignment: torch.Tensor
    look: torch.Tensor
    predicted: torch.Tensor


def alignment_loss(model: Any, extra: Supervision, vision: torch.Tensor, meaning: torch.Tensor) -> torch.Tensor:
    """Terms 2 and 3. ``vision`` ``(B, 144, D)``, ``meaning`` as in `Batch`."""
    likely = likeness(model, extra.scale, vision).gather(-1, meaning[..., :2])
    aligned = -((1 - KEY_SHARE) * likely[..., 0] + KEY_SHARE * likely[..., 1]).mean()
    column = F.cross_entropy(extra.column(vision).flatten(0, 1), meaning[..., 2].flatten())
    return aligned + COLUMN_WEIGHT * column


def likeness(model: Any, scale: torch.Tensor, vision: torch.Tensor) -> torch.Tensor:
    """``(B, N, V)`` log-probabilities of the token that each of ``(B, N, D)`` vision tokens resembles, by cosine."""
    embeddings = model.get_input_embeddings().weight
    return (F.normalize(vision, dim=-1) @ F.normalize(embeddings, dim=-1).T * scale.exp()).log_softmax(-1)


def all_losses(model: Any, extra: Supervision, batch: Batch) -> Losses:
    """All terms in one forward through the kept vision tokens, at their original positions."""
    vision = vision_features(model, batch.pixels)
    kept = vision.gather(1, batch.kept[..., None].expand(-1, -1, vision.shape[-1]))
    embed = model.get_input_embeddings()
    begin = embed.weight[BOS].expand(len(kept), 1, -1)
    hidden, look = decode(model, torch.cat([begin, kept, embed(batch.text)], 1), batch.positions)
    before = slice(kept.shape[1], -1)  # the rows whose next token is a text token
    logits = model.lm_head(hidden[:, before])
    answer = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED)
    shown = batch.kept[:, None] == batch.cells[..., None]  # (B, T, K)
    seen = (look[:, before, 1 : 1 + kept.shape[1]] * shown).sum(-1)
    asked = batch.cells >= 0
    look_loss = -((seen + TINY).log() * asked).sum() / asked.sum().clamp_min(1)
    return Losses(answer, alignment_loss(model, extra, vision, batch.meaning), look_loss, logits.argmax(-1))


def decode(
    model: Any, embeddings: torch.Tensor, positions: torch.Tensor, visible: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The decoder over ``(B, S, D)`` rows: last hidden states, and the probabilities ``(B, S, S)`` of the shown head.

    ``visible`` bool, ``(B, S, S)`` or what expands to it: the columns that a row may see, beside the causal rule.

    The layers are called one by one with an explicit mask: the decoder itself would take gaps in ``positions`` for
    packed sequences and cut attention there.
    """
    decoder = model.model.language_model
    length = embeddings.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=embeddings.device).tril()[None, None]
    if visible is not None:
        causal = causal & visible[:, None]
    rotary = decoder.rotary_emb(embeddings, positions)
    hidden, look = embeddings, embeddings.new_zeros(())
    for number, layer in enumerate(decoder.layers):
        if number == LOOK_LAYER:
            look = _attention(layer, hidden, rotary, causal[:, 0])
        hidden = layer(hidden, attention_mask=causal, position_ids=positions, position_embeddings=rotary)
    return decoder.norm(hidden), look


def _attention(
    layer: Any, hidden: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], causal: torch.Tensor
) -> torch.Tensor:
    """Attention probabilities of one head, worked out beside the layer, which does not hand them out."""
    attention, width = layer.self_attn, layer.self_attn.head_dim
    head = slice(LOOK_HEAD * width, (LOOK_HEAD + 1) * width)
    rows = layer.input_layernorm(hidden)
    cos, sin = rotary
    query, key = (
        side * cos + torch.cat([-side[..., width // 2 :], side[..., : width // 2]], -1) * sin
        for side in (F.linear(rows, projection.weight[head]) for projection in (attention.q_proj, attention.k_proj))
    )
    return (query @ key.mT / math.sqrt(width)).masked_fill(~causal, float("-inf")).softmax(-1)


__all__ = ["Losses", "Supervision", "alignment_loss", "all_losses", "decode", "likeness"]
