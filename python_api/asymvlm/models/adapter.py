"""What one model family must say about itself: facts only, no mechanics."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import nn

from asymvlm.models.tower_attention import TowerLayer

Inputs = Mapping[str, Any]
Grid = tuple[int, int]  # rows and columns of one image's vision tokens, in raster order
Grids = Mapping[str, Sequence[Grid]]  # by the config name of the placeholder, in the order the processor lists images

ENCODED = "mm_encoder_outputs"  # images that the tower has seen already
VISION_INPUTS = (
    "pixel_values",
    "pixel_values_videos",
    "image_grid_thw",
    "video_grid_thw",
    "second_per_grid_ts",
    "image_sizes",
    "vision_feature_layer",
    "vision_feature_select_strategy",
    ENCODED,
)


def no_grids(model: nn.Module, inputs: Inputs) -> Grids:
    return {}


def no_flops(model: nn.Module, inputs: Inputs) -> int | None:
    return None


def _attribute(config: Any, name: str) -> Any:
    return getattr(config, name, None)


def same_ids(input_ids: torch.Tensor) -> torch.Tensor:
    return input_ids


@dataclass(frozen=True)
class Adapter:
    """Facts of one family, which pruning, training and reports read."""

    model_type: str  # config.model_type
    composite: str = "model"  # the module that merges features into the embeddings
    text: str = "language_model"  # the decoder inside the composite; "" where they are one module
    vision_ids: tuple[str, ...] = ("image_token_id",)  # config names of the placeholder ids, dotted in sub-configs
    unify: Callable[[torch.Tensor], torch.Tensor] = same_ids  # input_ids, placeholders of one kind given one id
    triggers: tuple[str, ...] = ("pixel_values",)  # inputs that mean "there is an image"
    drop: tuple[str, ...] = VISION_INPUTS  # inputs never forwarded once the sequence is pruned
    per_token: Mapping[str, int] = field(default_factory=dict)  # inputs of shape (B, S) -> value where padded
    drop_when_pruned: tuple[str, ...] = ()  # per-token inputs that only serve to derive positions
    first_position: int = 0  # position of token 0 when a plain forward makes its own
    mrope: bool = False  # positions have an axis of their own: (3, B, S)
    grids: Callable[[nn.Module, Inputs], Grids] = no_grids  # token grids of the call's images
    vision_flops: Callable[[nn.Module, Inputs], int | None] = no_flops
    # how the grids of an image lie on it (`asymvlm.report.tiles`): "one" alone, "whole first" or "whole last" beside
    # joined crops, by "tags", "separators" or "ovis" in the prompt, by the "canvas" of the image's size, or "unknown"
    tiling: str = "one"
    views: int = 1  # grids an image consists of: 2 for crops and a global view
    # (model, inputs, embeds) -> (B, S) bool: structural tokens, never pruned and in no grid
    protect: Callable[[nn.Module, Inputs, torch.Tensor], torch.Tensor] | None = None
    # (model, inputs) -> {"inputs_embeds": ...}, for a composite that merges and decodes in one module
    merge: Callable[[nn.Module, Inputs], dict[str, Any]] | None = None
    # its forward makes the mask of a first step only for images or a cache never used, so not for one that was reset
    needs_fresh_cache: bool = False
    recurrent: bool = False  # some layers carry a state of what they saw instead of K and V
    latent_keys: bool = False  # the cache holds one latent for all heads (multi-head latent attention)
    chunked: bool = False  # some layers attend within chunks of the prompt
    open_prompt: bool = False  # every prompt token sees every other, whatever the layer's window
    # decoder arguments of shape (B, S, ...) beside the embeddings -> (model, generated ids) to the rows of those
    decoder_rows: Mapping[str, Callable[[nn.Module, torch.Tensor], torch.Tensor | None]] = field(default_factory=dict)
    deepstack: bool = False  # the decoder adds tower features after its first layers
    tower: str = "model.vision_tower"  # the vision tower
    # (model, inputs, the tower's hidden states, grids) -> (tokens, width): its features by vision token, in the order
    # of the grids (`asymvlm.models.tower_tokens`); None where nobody has said how its patches become tokens
    tower_tokens: Callable[[nn.Module, Inputs, torch.Tensor, list[Grid]], torch.Tensor] | None = None
    projector: str | None = None  # the projector, where a token is one patch and its embedding that of the patch alone
    # the attention layer in front of the projector (`asymvlm.models.tower_attention`); None: not told
    tower_attention: Callable[[nn.Module], TowerLayer] | None = None
    # (model, inputs, grids) -> (tokens, n): numbers, equal where pixels are (`asymvlm.models.pixels`); None: not told
    pixels: Callable[[nn.Module, Inputs, list[Grid]], torch.Tensor] | None = None

    def __deepcopy__(self, memo: Any) -> Adapter:
        return self

    def __reduce__(self) -> Any:
        """Pickled by name, so that a patched model can be: some facts of families are functions without one."""
        from asymvlm.models import registered

        if registered(self.model_type) is self:
            return registered, (self.model_type,)
        return Adapter, tuple(getattr(self, one.name) for one in fields(self))

    @property
    def sees(self) -> bool:
        """False for a language model, whose calls never bring vision."""
        return bool(self.triggers)

    @property
    def closed_between_layers(self) -> str:
        """Why no token may go between the layers of its decoder; empty where they may."""
        for reason, found in (
            ("attention in chunks", self.chunked),
            ("recurrent layers", self.recurrent),
            ("features added behind its first layers", self.deepstack),
            ("prompts that attend both ways", self.open_prompt),
            ("a decoder that merges images itself", self.merge is not None),
            ("rows of its own for each layer", bool(self.decoder_rows)),
        ):
            if found:
                return reason
        return ""

    def composite_of(self, model: nn.Module) -> nn.Module:
        return model.get_submodule(self.composite)

    def text_of(self, model: nn.Module) -> nn.Module:
        return self.composite_of(model).get_submodule(self.text)

    def brings_vision(self, inputs: Inputs) -> bool:
        """Whether a call has images or videos, as pixels or encoded."""
        return any(inputs.get(name) is not None for name in self.triggers) or bool(inputs.get(ENCODED))

    def grids_of(self, model: nn.Module, inputs: Inputs) -> Grids:
        """The grids of a call's images; none where they came encoded without what tells their sizes."""
        try:
            return self.grids(model, inputs)
        except (KeyError, TypeError, AttributeError):
            if inputs.get(ENCODED):
                return {}
            raise

    def flops_of(self, model: nn.Module, inputs: Inputs) -> int | None:
        """The tower's work in a call; none was done for images that came encoded."""
        return 0 if inputs.get(ENCODED) else self.vision_flops(model, inputs)

    def separators_of(self, model: nn.Module, inputs: Inputs, embeds: torch.Tensor) -> torch.Tensor | None:
        """``(B, S)`` bool: structural tokens among the vision tokens; None where the family has none.

        Raises:
            ValueError: if images came encoded without the inputs that tell where those tokens are.
        """
        if self.protect is None:
            return None
        try:
            return self.protect(model, inputs, embeds)
        except (KeyError, TypeError) as error:
            if not inputs.get(ENCODED):
                raise
            raise ValueError(
                f"{ENCODED} of {self.model_type} need the processor's other inputs beside them: {error}"
            ) from error

    def token_ids(self, model: nn.Module) -> dict[str, int]:
        """Placeholder ids the config defines, by their config name."""
        config: Any = model.config
        found = {name: functools.reduce(_attribute, name.split("."), config) for name in self.vision_ids}
        return {name: value for name, value in found.items() if value is not None}

    def vision_mask(self, model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
        """``(B, S)`` bool: where the composite writes vision features."""
        mask, unified = torch.zeros_like(input_ids, dtype=torch.bool), self.unify(input_ids)
        for token_id in self.token_ids(model).values():
            mask |= unified == token_id
        return mask
