"""LLaVA-class models with random weights at real sizes, built on the device: what an end-to-end benchmark runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

IMAGE_TOKEN = 9


@dataclass(frozen=True)
class Size:
    """Shape of a model. Vision tokens an image: ``(image // patch) ** 2``."""

    name: str
    width: int
    layers: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int
    image: int
    tower_width: int
    tower_layers: int
    patch: int = 14

    @property
    def vision_tokens(self) -> int:
        return (self.image // self.patch) ** 2


SIZES = {
    size.name: size
    for size in (
        Size("tiny", 64, 2, 128, 4, 2, 256, 56, 32, 1),  # tests of the benchmark itself
        Size("0.4B", 1024, 24, 2816, 16, 8, 32_000, 630, 768, 6),  # a CPU prefills it in seconds
        Size("8B", 4096, 32, 14_336, 32, 8, 128_256, 630, 1024, 24),  # Llama 3 8B behind a CLIP-L tower
    )
}


def build(size: Size, device: str, dtype: torch.dtype) -> Any:
    """The model on ``device``, random weights drawn there, ready for `generate`."""
    config = LlavaConfig(
        text_config=dict(
            model_type="llama", vocab_size=size.vocabulary, hidden_size=size.width, intermediate_size=size.inner,
            num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.kv_heads,
            max_position_embeddings=8192, pad_token_id=0, eos_token_id=1, bos_token_id=2,
        ),
        vision_config=dict(
            model_type="siglip_vision_model", hidden_size=size.tower_width, intermediate_size=4 * size.tower_width,
            num_hidden_layers=size.tower_layers, num_attention_heads=size.tower_width // 32, image_size=size.image,
            patch_size=size.patch, vision_use_head=False,
        ),
        image_token_index=IMAGE_TOKEN, image_seq_length=size.vision_tokens,
        vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(previous)
    return model.eval().requires_grad_(False)


def make_inputs(model: Any, size: Size, batch: int, text: int = 36) -> dict[str, torch.Tensor]:
    """One image and ``text`` text tokens a row, the paper's DocVQA prompt length."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, size.vocabulary, (batch, size.vision_tokens + text), generator=generator)
    ids[:, 4 : 4 + size.vision_tokens] = IMAGE_TOKEN
    pixels = torch.randn(batch, 3, size.image, size.image, generator=generator)
    return {
        "input_ids": ids.to(model.device),
        "attention_mask": torch.ones_like(ids).to(model.device),
        "pixel_values": pixels.to(model.device, model.dtype),
    }
