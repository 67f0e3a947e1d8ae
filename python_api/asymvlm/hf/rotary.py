"""Rotary embeddings of a decoder, as a rotation of keys that are in the cache already: positions add up."""

from __future__ import annotations

import inspect
import sys
from typing import Any, cast

import torch
from torch import nn

from asymvlm.hf.errors import MechanismError
from asymvlm.hf.masks import FULL

PLAIN = ("default", "linear", "llama3", "yarn")  # frequencies do not depend on the length of a prompt


class KeyRotation:
    """Moves keys of full-attention layers to other positions.

    Args:
        decoder: with a ``rotary_emb``. attention: the self-attention of one of its full-attention layers.
        config: the decoder's.
    Raises:
        NotImplementedError: for rotary embeddings of another form, and layers without any.
        MechanismError: if keys at a later position are not the ones that this rotates to.
    """

    def __init__(self, decoder: nn.Module, attention: nn.Module, config: Any) -> None:
        parameters = getattr(config, "rope_parameters", None) or {}
        parameters = parameters.get(FULL, parameters)
        if (kind := parameters.get("rope_type", "default")) not in PLAIN:
            self._refuse(f"the rope_type {kind!r} is none of {', '.join(PLAIN)}")
        self._rotary: Any = getattr(decoder, "rotary_emb", None)
        self._apply: Any = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
        if self._rotary is None or self._apply is None:
            self._refuse(f"{type(decoder).__name__} has no rotary_emb with apply_rotary_pos_emb")
        if getattr(config, "no_rope_layers", None) or not getattr(attention, "use_rope", True):
            self._refuse("some layers have no rotary embedding")
        found = getattr(self._rotary, f"{FULL}_inv_freq", getattr(self._rotary, "inv_freq", None))
        if not isinstance(found, torch.Tensor):
            self._refuse(f"{type(self._rotary).__name__} has no inv_freq")
        self._frequencies = cast("torch.Tensor", found).double()  # (D / 2,)
        width = getattr(attention, "head_dim", None)
        if width != 2 * len(self._frequencies):
            self._refuse(f"{2 * len(self._frequencies)} of the {width} columns of a head are rotated")
        self._neighbours = False  # which columns make a pair: two neighbours, or one of each half
        self._axes = 3 if parameters.get("mrope_section") else 1
        self._check()

    @staticmethod
    def _refuse(found: str) -> None:
        raise NotImplementedError(f"keys are rotated to new positions under plain rotary embeddings: {found}")

    def __call__(self, keys: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """Keys ``(B, G, n, D)`` fp32 that lie ``shift`` ``(B,)`` positions further on."""
        angle = shift.to(keys.device).double()[:, None, None, None] * self._frequencies.to(keys.device)
        cos, sin = angle.cos().float(), angle.sin().float()  # (B, 1, 1, D / 2)
        if self._neighbours:
            first, second = keys[..., 0::2], keys[..., 1::2]
        else:
            first, second = keys.chunk(2, -1)
        turned = [first * cos - second * sin, second * cos + first * sin]
        return torch.stack(turned, -1).flatten(-2) if self._neighbours else torch.cat(turned, -1)

    def _check(self) -> None:
        device, start, shift = self._frequencies.device, 5, 100
        keys = torch.linspace(-1, 1, 2 * len(self._frequencies), device=device).reshape(1, 1, 1, -1)
        before, after = (self._at(keys, position) for position in (start, start + shift))
        tolerance = 1e-3 * float(before.abs().max())
        for self._neighbours in (False, True):
            found = self(before, torch.tensor([shift], device=device))
            if found.shape == after.shape and torch.allclose(found, after, rtol=0, atol=tolerance):
                return
        raise MechanismError("rotating keys to new positions", "the decoder's own keys lie elsewhere")

    @torch.no_grad()
    def _at(self, keys: torch.Tensor, position: int) -> torch.Tensor:
        """As the decoder has keys at a position."""
        places = torch.full((1, 1), position, device=keys.device)
        places = places.expand(3, 1, 1) if self._axes == 3 else places
        kind = {"layer_type": FULL} if "layer_type" in inspect.signature(self._rotary.forward).parameters else {}
        cos, sin = self._rotary(keys[:, 0], places, **kind)
        if cos.ndim == 4:  # one for each axis, all alike
            cos, sin = cos[0], sin[0]
        rotated: torch.Tensor = self._apply(keys, keys, cos, sin)[1]
        return rotated
