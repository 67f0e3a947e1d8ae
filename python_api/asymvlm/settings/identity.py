"""Which model a learned weight belongs to.

Scores are computed from merged embeddings, before decoder layer 0: vision tower, projector and embedding table decide
them, and the gaps that a budget compares. So the identity of a model is a fingerprint of these parameters. Its name
stands in where no fingerprint can match (quantised or offloaded weights).
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from asymvlm.hf.decoder import decoder_of

SAMPLES = 16  # values read of each parameter


@dataclasses.dataclass(frozen=True)
class ModelIdentity:
    """The model a weight was trained for. Unknown parts are empty."""

    width: int
    model_type: str = ""
    model_id: str = ""  # hub id or folder that it was loaded from
    fingerprint: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.width, int) or isinstance(self.width, bool) or self.width < 1:
            raise ValueError(f"width must be a whole number of at least 1, got {self.width!r}")
        for name in ("model_type", "model_id", "fingerprint"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be text, got {getattr(self, name)!r}")

    def why_not(self, other: ModelIdentity) -> str:
        """Empty where ``other`` is the same model, else what differs."""
        if self.width != other.width:
            return f"width {other.width} found, {self.width} wanted"
        if self.model_type and other.model_type and self.model_type != other.model_type:
            return f"model_type {other.model_type!r} found, {self.model_type!r} wanted"
        if not self.fingerprint or self.fingerprint == other.fingerprint:
            return ""
        if self.model_id == other.model_id and is_hub_id(self.model_id):
            return ""  # another revision, or the same weights quantised
        if not other.fingerprint and not self.model_id:
            return ""
        return (
            f"{other.model_id or 'a model without a name'} found, whose vision tower, projector or embeddings differ "
            f"from those of {self.model_id or 'the model it was trained for'}"
        )


def identify(model: nn.Module) -> ModelIdentity:
    """The identity of a supported model. Reads a few values of each parameter in front of the decoder's layers."""
    config: Any = model.config
    return ModelIdentity(
        width=int(config.get_text_config().hidden_size),
        model_type=str(config.model_type),
        model_id=str(getattr(config, "_name_or_path", "") or ""),
        fingerprint=fingerprint(model),
    )


def fingerprint(model: nn.Module) -> str:
    """Hash of samples of every parameter that scores depend on, rounded to bf16: one checkpoint in fp32 and in bf16
    gives the same. Empty where parameters are not in memory."""
    decoder = decoder_of(model)
    behind = {id(parameter) for name in ("layers", "norm") for parameter in _parameters(getattr(decoder, name, None))}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    tied = {id(parameter) for parameter in _parameters(getattr(model, "get_input_embeddings", lambda: None)())}
    behind |= {id(parameter) for parameter in _parameters(head)} - tied
    pieces, digest = [], hashlib.sha256()
    for name, parameter in model.named_parameters():
        if id(parameter) in behind:
            continue
        if parameter.is_meta:
            return ""
        # the last part alone: wrappers and transformers versions rename what stands in front
        digest.update(f"{name.rpartition('.')[2]} {tuple(parameter.shape)};".encode())
        flat = parameter.detach().flatten()
        places = torch.linspace(0, max(len(flat) - 1, 0), min(SAMPLES, len(flat)), dtype=torch.float64)
        pieces.append(flat[places.long().to(flat.device)].to(torch.bfloat16))
    devices = {piece.device for piece in pieces}
    for device in sorted(devices, key=str):  # one copy to the host a device
        values = torch.cat([piece for piece in pieces if piece.device == device]).cpu()
        digest.update(values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:32]


def is_hub_id(name: str) -> bool:
    """A name like ``owner/model`` that is no folder here."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def _parameters(module: nn.Module | None) -> list[nn.Parameter]:
    return [] if module is None else list(module.parameters())


__all__ = ["ModelIdentity", "fingerprint", "identify", "is_hub_id"]
