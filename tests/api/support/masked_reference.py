"""The independent oracle: pruning a token must equal closing its column in every layer, with everything else in place.

The model runs unpatched on the whole prompt. A custom attention function closes the key columns of dropped tokens on
top of the model's own masks; positions are the model's own. What to drop comes from a literal reading of the method.
Nothing here imports the library under test.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from attending import attending_by
from tiny import EOS, IMAGE, VIDEO, family_of, text_layers, vision_columns
from torch import Tensor, nn
from transformers import PreTrainedModel

Inputs = dict[str, Tensor]


@contextmanager
def closed_columns(model: PreTrainedModel, keep: Tensor) -> Iterator[None]:
    """Close the prompt columns where ``keep`` (B, S) is False, in every decoder layer, for calls inside the context.

    Rows of a batch that ``generate`` repeats (beams, several sequences) follow their sample. Key column j must be
    prompt token j: with a cache, sliding windows stay wider than the sequence.

    An integer ``keep`` is a turn number: a column is open to columns of its own turn and of later ones, and those
    behind the last are of the turn of that.
    """

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor,
        scaling: float,
        dropout: float = 0.0,
        **kwargs: object,
    ) -> tuple[Tensor, None]:
        if kwargs.get("softcap") is not None:
            raise NotImplementedError("this reference does not know soft-capped attention")
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        if keep.dtype == torch.bool:
            is_open = torch.ones(query.shape[0], key.shape[2], dtype=torch.bool)
            is_open[:, : keep.shape[1]] = keep.repeat_interleave(query.shape[0] // keep.shape[0], 0)
            is_open = is_open[:, None]
        else:
            turn = torch.cat([keep, keep[:, -1:].expand(-1, key.shape[2] - keep.shape[1])], 1)
            is_open = turn[:, None] <= turn[:, -query.shape[2] :, None]
        logits = query @ key.mT * scaling + attention_mask
        logits = logits.masked_fill(~is_open[:, None], torch.finfo(logits.dtype).min)
        return (logits.softmax(-1) @ value).transpose(1, 2).contiguous(), None

    mixers = [getattr(layer, name, None) for layer in text_layers(model) for name in family_of(model).recurrent]
    mixers = [mixer for mixer in mixers if mixer is not None]
    try:
        for mixer in mixers:
            mixer.forward = functools.partial(_skip_dropped, mixer, keep)
        with attending_by(model, attend):
            yield
    finally:
        for mixer in mixers:
            del mixer.forward


def _skip_dropped(mixer: nn.Module, keep: Tensor, hidden_states: Tensor, **kwargs: object) -> Tensor:
    """A recurrent layer over the kept tokens of each row, as if the others had never been there; no cache."""
    out, mask = torch.zeros_like(hidden_states), kwargs.get("attention_mask")
    for b, hidden in enumerate(hidden_states):
        kept = torch.ones(len(hidden), dtype=torch.bool)
        kept[: keep.shape[1]] = keep[b]
        if mask is not None:
            kept &= mask[b].bool()
        out[b, kept] = type(mixer).forward(mixer, hidden_states=hidden[None, kept])[0]
    return out


@torch.no_grad()
def masked_forward(model: PreTrainedModel, inputs: Inputs, keep: Tensor, **kwargs: object) -> Tensor:
    """Logits (B, S, vocabulary) of one forward pass, without a cache unless ``kwargs`` have one."""
    with closed_columns(model, keep):
        return model(**inputs, **{"use_cache": False, **kwargs}).logits


@torch.no_grad()
def masked_generate(model: PreTrainedModel, inputs: Inputs, keep: Tensor, **kwargs: object):
    """The model's own ``generate`` on the whole prompt with dropped columns closed."""
    with closed_columns(model, keep):
        return model.generate(**inputs, **kwargs)


@torch.no_grad()
def masked_greedy(
    model: PreTrainedModel,
    inputs: Inputs,
    keep: Tensor,
    steps: int,
    position_ids: Tensor | None = None,
    cache: Callable[[], object] | None = None,
) -> tuple[Tensor, Tensor]:
    """Greedy ids (B, steps) and the logits behind each (B, steps, vocabulary), every step over the whole sequence.

    ``position_ids`` of the prompt, 1-D or M-RoPE, are continued by one a step; by default they are the model's own.
    ``cache`` makes one for each step, which reads the whole sequence all the same: it may watch or change K and V.
    """
    inputs, family = dict(inputs), family_of(model)
    if position_ids is None and not family.mrope:
        position_ids = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0) + family.first_position  # as in generate
    logits = []
    for _ in range(steps):
        extra: dict[str, object] = {} if position_ids is None else {"position_ids": position_ids}
        if cache is not None:
            extra |= {"past_key_values": cache(), "use_cache": True}
        logits.append(masked_forward(model, inputs, keep, **extra)[:, -1])
        token = logits[-1].argmax(-1, keepdim=True)
        assert not (token == EOS).any(), "generate would stop here: draw other weights"
        inputs["input_ids"] = torch.cat([inputs["input_ids"], token], 1)
        for name, value in {
            "attention_mask": 1,
            "token_type_ids": 0,
            "mm_token_type_ids": 0,
            **family.generated,
        }.items():
            if name in inputs:
                inputs[name] = nn.functional.pad(inputs[name], (0, 1), value=value)
        if position_ids is not None:
            following = position_ids.amax((0, -1) if position_ids.ndim == 3 else -1, keepdim=True) + 1
            position_ids = torch.cat([position_ids, following.expand_as(position_ids[..., :1])], -1)
    return inputs["input_ids"][:, -steps:], torch.stack(logits, 1)


@torch.no_grad()
def merged_embeddings(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    """What the unpatched model feeds to decoder layer 0: (B, S, D)."""
    seen: list[Tensor] = []

    def record(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    hook = text_layers(model)[0].register_forward_pre_hook(record, with_kwargs=True)
    try:
        model(**inputs, use_cache=False)
    finally:
        hook.remove()
    return seen[0]


@dataclass(frozen=True)
class Selection:
    """What the method keeps. ``keep`` (B, S) covers text too; ``index`` (B, S') is -1 in padding."""

    keep: Tensor
    index: Tensor
    scores: Tensor  # (B, S) float64, -inf outside vision
    gap: list[float]  # NaN for a row without vision
    vision: list[int]
    kept: list[int]


def importance(embeds: Tensor, vision: Tensor, text: Tensor, weight: Tensor | None = None) -> Tensor:
    """Eq. 1 of one sample: embeds (S, D), masks (S,) -> scores (S,), -inf outside vision."""
    unit = nn.functional.normalize(embeds.double(), dim=-1, eps=1e-12)
    weighted = unit if weight is None else unit * weight.double()
    scores = torch.full(embeds.shape[:1], -torch.inf, dtype=torch.double)
    # a sum over products, not a matrix product: equal rows get bitwise equal scores, so ties stay ties
    scores[vision] = (weighted[vision, None] * unit[None, text]).sum(-1).amax(-1)
    return scores


def importance_gap(scores: Tensor) -> float:
    """The distance between the k-th largest and the k-th smallest of N scores, k = max(1, N // 4)."""
    ordered = scores.sort(descending=True).values
    k = max(1, len(ordered) // 4)
    return float(ordered[k - 1] - ordered[len(ordered) - k])


def count(tokens: int, ratio: float) -> int:
    return min(max(tokens * round(ratio * 1_000_000) // 1_000_000, 1), tokens)


def ranked(scores: Tensor, columns: list[int]) -> list[int]:
    """Columns by falling score, the lower column first among equals."""
    return sorted(columns, key=lambda column: (-float(scores[column]), column))


def select(
    model: PreTrainedModel,
    inputs: Inputs,
    ratio: float | Callable[[float], float],
    weight: Tensor | None = None,
    text_mask: Tensor | None = None,
    first: int = 0,
) -> Selection:
    """Rank each sample's vision tokens over all its images; ``ratio`` may be a function of the importance gap.

    Images and text in columns before ``first`` take no part: an earlier turn's. The last real token predicts the
    answer: where it is vision it is kept and takes no part in the count.
    """
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    text = real & (ids != IMAGE) & (ids != VIDEO)
    text[:, :first] = False
    text = text if text_mask is None else text_mask & text
    last = real & (real.flip(-1).cumsum(-1).flip(-1) == 1)
    images = [
        [[column for column in image if real[b, column] and not last[b, column]] for image in row]
        for b, row in enumerate([image for image in row if image[0] >= first] for row in vision_columns(model, ids))
    ]
    embeds = merged_embeddings(model, inputs)
    keep, scores = real.clone(), torch.full(ids.shape, -torch.inf, dtype=torch.double)
    gaps, kept = [], []
    for b in range(len(ids)):
        columns = [column for image in images[b] for column in image]
        if not columns or not text[b].any():
            gaps.append(float("nan"))
            kept.append(len(columns))
            continue
        vision = torch.zeros_like(text[b])
        vision[columns] = True
        scores[b] = importance(embeds[b], vision, text[b], weight)
        gaps.append(importance_gap(scores[b, columns]))
        best = _best(scores[b], images[b], ratio(gaps[-1]) if callable(ratio) else ratio)
        keep[b, columns] = False
        keep[b, best] = True
        kept.append(len(best))
    vision_counts = [sum(map(len, row)) for row in images]
    prunable = torch.zeros_like(real)
    for b, row in enumerate(images):
        prunable[b, [column for image in row for column in image]] = True
    return Selection(keep, index_of(keep, real, prunable), scores, gaps, vision_counts, kept)


def _best(scores: Tensor, images: list[list[int]], ratio: float) -> list[int]:
    columns = [column for image in images for column in image]
    floors = [min(max(8, len(image) // 16), len(image)) if len(images) > 1 else 0 for image in images]
    guaranteed = [c for image, floor in zip(images, floors, strict=True) for c in ranked(scores, image)[:floor]]
    others = [column for column in ranked(scores, columns) if column not in guaranteed]
    total = max(count(len(columns), ratio), len(guaranteed))
    return guaranteed + others[: total - len(guaranteed)]


def index_of(keep: Tensor, real: Tensor, vision: Tensor) -> Tensor:
    """Kept columns of each row, -1 for padding; behind a row's last ``vision`` token all stays as far from the end.

    ``vision`` (B, S) are the tokens that may go. Rows are filled up on the left.
    """
    rows = []
    for kept, is_real, is_vision in zip(keep.tolist(), real.tolist(), vision.tolist(), strict=True):
        row = [column if stays else None for column, stays in enumerate(kept)]
        begin = is_real.index(True) if True in is_real else len(row)
        behind = max([begin, *(column for column, here in enumerate(is_vision) if here)])
        rows.append(
            [
                -1 if c is None else c
                for place, c in enumerate(row)
                if c is not None or (place > behind and not is_real[place])
            ]
        )
    length = max(map(len, rows))
    return torch.tensor([[-1] * (length - len(row)) + row for row in rows])


def take(values: Tensor, index: Tensor, pad: float = 0.0) -> Tensor:
    """Gather (B, S, ...) along S by a -1 padded index."""
    rows = torch.arange(len(index))[:, None]
    out = values[rows, index.clamp(min=0)].clone()
    out[index < 0] = pad
    return out
