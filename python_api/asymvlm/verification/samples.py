"""Inputs to verify with: checked, padded otherwise, a second sample beside the first, or made for the model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from asymvlm.app.session import InputError, Session
from asymvlm.files.json_files import first_line
from asymvlm.models.adapter import Adapter
from asymvlm.verification.runs import pad_token

QUESTION = "What does the picture show? Answer in one sentence."
WANTED = "pass inputs=processor(...) of one question about one image, or processor=... to have them made"
ADDED = 3  # tokens that the second sample is longer by

Sample = dict[str, Any]


def checked(adapter: Adapter, inputs: Mapping[str, Any]) -> Sample:
    """A sample, or several rows, in the form that the checks need.

    Raises:
        ValueError: naming what was found and what is wanted.
    """
    if not isinstance(inputs, Mapping):
        raise ValueError(f"inputs must be a mapping of model inputs, got {type(inputs).__name__}: {WANTED}")
    sample = {name: value for name, value in inputs.items() if value is not None and name != "labels"}
    ids = sample.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
        found = tuple(ids.shape) if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise ValueError(f"inputs must have input_ids of shape (B, S), got {found}: {WANTED}")
    if not any(name in sample for name in adapter.triggers):
        raise ValueError(f"inputs must have an image ({' or '.join(adapter.triggers)}), got {sorted(sample)}: {WANTED}")
    for name in ("inputs_embeds", "position_ids", "past_key_values", "cache"):
        if name in sample:
            raise ValueError(f"inputs must leave {name} out: the checks need what the model makes of a whole prompt")
    mask = sample.setdefault("attention_mask", torch.ones_like(ids))
    if not isinstance(mask, torch.Tensor) or mask.shape != ids.shape:
        raise ValueError(f"attention_mask must have the shape of input_ids {tuple(ids.shape)}, got another one")
    if not bool(mask[:, -1].all()):
        raise ValueError("inputs must be padded on the left, as generate wants them, got padding behind the last token")
    return sample


def left_padded(model: Any, adapter: Adapter, sample: Sample, more: int) -> Sample:
    """The same sample behind ``more`` columns of padding."""
    fill = {**adapter.per_token, "input_ids": pad_token(model), "attention_mask": 0}
    shape = sample["input_ids"].shape
    return {
        name: nn.functional.pad(value, (more, 0), value=fill.get(name, 0)) if _per_token(value, shape) else value
        for name, value in sample.items()
    }


def second_sample(model: nn.Module, adapter: Adapter, sample: Sample) -> Sample:
    """Another sample for a batch: other pixels, and a longer text, whose last token is repeated."""
    ids = sample["input_ids"]
    vision = adapter.vision_mask(model, ids)[0]
    real = sample["attention_mask"][0].bool() & ~vision
    last = ids[:, real.nonzero()[-1]]
    longer = dict(sample)
    for name, value in sample.items():
        if name in adapter.triggers and isinstance(value, torch.Tensor) and value.is_floating_point():
            longer[name] = value.flip(-1)
        elif _per_token(value, ids.shape):
            tail = {"input_ids": last, "attention_mask": torch.ones_like(last)}.get(name)
            tail = torch.full_like(last, adapter.per_token.get(name, 0)) if tail is None else tail
            longer[name] = torch.cat([value, tail.to(value).expand(-1, ADDED)], 1)
    return longer


def collated(model: Any, adapter: Adapter, samples: list[Sample]) -> Sample:
    """One batch of several samples, left padded."""
    longest = max(sample["input_ids"].shape[1] for sample in samples)
    rows = [left_padded(model, adapter, s, longest - s["input_ids"].shape[1]) for s in samples]
    batch: Sample = {}
    for name, value in rows[0].items():
        values = [row[name] for row in rows]
        if isinstance(value, torch.Tensor):
            batch[name] = torch.cat(values)
        elif isinstance(value, list):
            batch[name] = [item for each in values for item in each]
        else:
            batch[name] = value
    return batch


def made_by(processor: Any, model: Any) -> Sample:
    """A question about a drawn picture. Raises ValueError if the processor refuses it."""
    return dict(Session(type(model).__name__, model, processor).prepare([drawn_picture()], QUESTION))


def made_for(model: Any, adapter: Adapter) -> Sample:
    """A drawn picture among drawn tokens, for families whose images are pixels of one size and nothing else.

    Raises:
        ValueError: for other families, saying what to pass.
    """
    try:
        vision = model.config.vision_config
        if adapter.triggers != ("pixel_values",) or adapter.protect is not None or adapter.mrope:
            raise InputError("its images need more than pixels")
        size = vision.image_size
        height, width = (size, size) if isinstance(size, int) else size
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(1, getattr(vision, "num_channels", 3), height, width, generator=generator)
        ((rows, columns),) = adapter.grids(model, {"pixel_values": pixels})["image_token_id"]
        (image,) = adapter.token_ids(model).values()
    except (AttributeError, KeyError, ValueError, TypeError) as error:
        why = first_line(error) if isinstance(error, InputError) else "its images need more than pixels of one size"
        raise ValueError(f"cannot make inputs for {adapter.model_type!r} alone ({why}): {WANTED}") from error
    configs = (model.config.to_dict(), model.config.get_text_config().to_dict())
    special = {value for config in configs for name, value in config.items() if "token" in name and type(value) is int}
    usable = [token for token in range(model.config.get_text_config().vocab_size) if token not in {*special, image}]
    words = torch.randint(len(usable), (18,), generator=generator).tolist()
    text = [usable[word] for word in words]
    ids = torch.tensor([[*text[:4], *[image] * (rows * columns), *text[4:]]], device=model.device)
    types = {}
    if "token_type_ids" in inspect.signature(type(model).forward).parameters:
        types["token_type_ids"] = torch.zeros_like(ids) if adapter.open_prompt else (ids == image).long()
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels.to(model.device, model.dtype),
        **types,
    }


def drawn_picture() -> Any:
    """An RGB picture that differs from patch to patch, 448 x 336."""
    from PIL import Image, ImageDraw

    picture = Image.linear_gradient("L").resize((448, 336)).convert("RGB")
    draw = ImageDraw.Draw(picture)
    for number in range(24):
        x, y = 70 * (number % 6), 80 * (number // 6)
        draw.ellipse((x + 8, y + 8, x + 20 + 2 * number, y + 66), fill=(10 * number, 40, 240 - 9 * number))
        draw.text((x + 30, y + 30), str(number * number), fill=(255, 255, 0))
    return picture


def _per_token(value: Any, shape: torch.Size) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == shape and not value.is_floating_point()
