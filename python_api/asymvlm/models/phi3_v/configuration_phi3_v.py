"""Configuration of Phi-3-Vision and Phi-3.5-Vision: the hub's flat ``config.json``, read by transformers' own parts."""

from __future__ import annotations

import math
from typing import Any

from transformers import CLIPVisionConfig
from transformers.models.phi3.configuration_phi3 import Phi3Config

# what the public code builds without it being in config.json: CLIP ViT-L/14 at 336 pixels
CLIP_L_336: dict[str, Any] = dict(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
    projection_dim=768,
    hidden_act="quick_gelu",
)
EMBD_LAYER: dict[str, Any] = dict(
    embedding_cls="image",
    hd_transform_order="sub_glb",
    projection_cls="mlp",
    use_hd_transform=True,
    with_learnable_separator=True,
)


class Phi3VConfig(Phi3Config):
    """A `Phi3Config` with an image tower. Defaults are those of ``microsoft/Phi-3.5-vision-instruct``.

    ``vision_config`` (a dict or a `CLIPVisionConfig`) is ours: the hub's file has none and means CLIP-L/336.
    ``image_token_id`` is a further placeholder beside the negative ids, for engines that take none (vLLM puts 32044).
    ``rope_scaling`` may be spelled the hub's way (type ``"su"``) or transformers' (``"longrope"``).

    Raises:
        ValueError: if ``embd_layer`` or ``img_processor`` ask for another image path than the released models'.
    """

    model_type = "phi3_v"

    max_position_embeddings: int = 131072
    eos_token_id: int | list[int] | None = 2
    image_token_id: int = -1
    vision_config: Any = None
    embd_layer: Any = None
    img_processor: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.vision_config, CLIPVisionConfig):
            self.vision_config = CLIPVisionConfig(**{**CLIP_L_336, **(self.vision_config or {})})
        vision = self.vision_config
        self.embd_layer = {**EMBD_LAYER, **(self.embd_layer or {})}
        self.img_processor = {
            "name": "clip_vision_model",
            "model_name": "openai/clip-vit-large-patch14-336",
            "image_dim_out": vision.hidden_size,
            "num_img_tokens": self.crop_side**2,
            **(self.img_processor or {}),
        }
        for part, name, wanted in (
            *(("embd_layer", name, wanted) for name, wanted in EMBD_LAYER.items()),
            ("img_processor", "name", "clip_vision_model"),
            ("img_processor", "image_dim_out", vision.hidden_size),
            ("img_processor", "num_img_tokens", self.crop_side**2),
            ("img_processor", "type_feature", "patch"),
        ):
            found = getattr(self, part).get(name, wanted)
            if found != wanted:
                raise ValueError(f"{part}[{name!r}] must be {wanted!r}, got {found!r}: no released model has another")
        if self.sliding_window is not None and self.sliding_window >= self.max_position_embeddings:
            self.sliding_window = (
                None  # the hub's 262144 closes nothing, yet would make every cache layer a sliding one
            )
        if kwargs.get("rope_scaling"):
            kwargs["rope_scaling"] = _spelled_for_transformers(kwargs["rope_scaling"])
        super().__post_init__(**kwargs)

    @property
    def crop_side(self) -> int:
        """Tokens along a side of one crop: patches merged two by two, 12 for 336 pixels."""
        return self.vision_config.image_size // self.vision_config.patch_size // 2

    @property
    def longrope_switch(self) -> float:
        """Sequences longer than this take LongRoPE's long factors; infinite where the rotary embedding is plain."""
        rope: Any = self.rope_parameters or {}
        return rope["original_max_position_embeddings"] if rope.get("rope_type") == "longrope" else math.inf


def _spelled_for_transformers(rope_scaling: dict[str, Any]) -> dict[str, Any]:
    kind = rope_scaling.get("rope_type", rope_scaling.get("type"))
    factors = {name: value for name, value in rope_scaling.items() if name != "type"}
    return {**factors, "rope_type": "longrope" if kind == "su" else kind}
