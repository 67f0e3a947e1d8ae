"""The model: a real ``LlavaForConditionalGeneration``, 0.65 M parameters, 144 vision tokens, and its processor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bench.tinyvlm.glyphs import BOS, EOS, IMAGE, PAD, SPECIAL, VOCABULARY
from bench.tinyvlm.pages import CELL, GRID, SIDE

NUM_VISION = GRID * GRID
CHECKPOINT = Path(__file__).parent / "checkpoint"  # made by `python -m bench.tinyvlm.train`
# Each turn is question, answer, end of text: what the model was trained on, and nothing else.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)


@dataclass(frozen=True)
class Size:
    """Shape of the model."""

    width: int = 96
    heads: int = 4
    layers: int = 4
    mlp: int = 256
    tower_width: int = 96
    tower_layers: int = 2
    tower_mlp: int = 192


def build(size: Size | None = None, *, seed: int = 0, vocabulary: Sequence[str] = VOCABULARY) -> Any:
    """The model with fresh weights, a token for each entry of ``vocabulary``, which begins with `SPECIAL`.

    The global random state is left as it was.
    """
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

    size = size or Size()
    vision = SiglipVisionConfig(
        hidden_size=size.tower_width,
        intermediate_size=size.tower_mlp,
        num_hidden_layers=size.tower_layers,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=CELL,
        vision_use_head=False,
    )
    text = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=size.width,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=NUM_VISION,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        _initialise(model)
    return model


@torch.no_grad()
def _initialise(model: Any) -> None:
    """Start as trained transformers look: queries resemble keys in half of the heads, outputs undo values.

    From transformers' own initialisation look-up stays at chance far longer (`Trockman and Kolter 2023`, "Mimetic
    Initialization of Self-Attention Layers", arXiv:2305.09828).
    """
    model.get_input_embeddings().weight.normal_(0, 0.12)
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        half = attention.q_proj.weight.shape[0] // 2
        attention.q_proj.weight.normal_(0, 0.06)
        attention.k_proj.weight.normal_(0, 0.06)
        attention.q_proj.weight[:half].normal_(0, 0.1)
        attention.k_proj.weight[:half].copy_(attention.q_proj.weight[:half])
        nn.init.orthogonal_(attention.v_proj.weight).mul_(0.4)
        attention.o_proj.weight.copy_(attention.v_proj.weight.T)


def vision_features(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """``(B, 3, 96, 96)`` -> ``(B, 144, D)``: what the model writes over its image placeholders, nothing captured.

    Llava reads the tower's last hidden state BEFORE its post-layernorm, which therefore stays untrained.
    """
    tower = model.model.vision_tower
    tower = getattr(tower, "vision_model", tower)  # transformers 5.17 nests it
    hidden = tower.encoder(inputs_embeds=tower.embeddings(pixels)).last_hidden_state
    return model.model.multi_modal_projector(hidden)


def to_model_pixels(pixels: np.ndarray) -> torch.Tensor:
    """``(B, 96, 96)`` uint8, or ``(B, 96, 96, 3)`` in colour -> ``(B, 3, 96, 96)`` float32 in [-1, 1], as the processor
    gives it for the same page.
    """
    levels = (torch.from_numpy(pixels).to(torch.float32) / 255 - 0.5) / 0.5
    return levels[:, None].expand(-1, 3, -1, -1) if levels.ndim == 3 else levels.permute(0, 3, 1, 2).contiguous()


def build_processor(vocabulary: Sequence[str] = VOCABULARY) -> Any:
    """Image processor (any picture becomes 96 x 96 by the mean of its pixels), tokenizer and chat template."""
    from PIL.Image import Resampling
    from transformers import LlavaProcessor
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    return LlavaProcessor(
        # named by its PIL class: the plain name is the torchvision variant, and torchvision is no requirement
        image_processor=SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}, resample=Resampling.BOX),
        tokenizer=_tokenizer(vocabulary),
        patch_size=CELL,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
        image_token="<image>",
    )


def _tokenizer(vocabulary: Sequence[str]) -> Any:
    """Whole words and single glyphs. A question mark is dropped, and a question may start with a capital."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    first_words = {word.capitalize(): word for word in ("what", "how", "is", "list", "read")}
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(r"[?.!]"), ""),
            *(normalizers.Replace(Regex(rf"\b{capital}\b"), word) for capital, word in first_words.items()),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[a-z]+|\S"), behavior="isolated")]
    )
    tokenizer.decoder = decoders.Fuse()  # "482", not "4 8 2"
    pad, bos, eos, image, unknown, blank = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unknown,
        extra_special_tokens={"image_token": image, "blank_token": blank},
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


__all__ = ["CHECKPOINT", "NUM_VISION", "Size", "build", "build_processor", "to_model_pixels", "vision_features"]
