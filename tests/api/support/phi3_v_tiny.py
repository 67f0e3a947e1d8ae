"""A tiny random-weight Phi-3.5-Vision, inputs for it, and what the method keeps of them, read literally.

Crops are 56 pixels of 4 x 4 patches, so 2 x 2 tokens; an image of h x w crops has (hw + 1) * 4 + 1 + (h + 1) * 2
tokens, of which the 2 (h + 1) row ends and the one before the global view are separators.
"""

from __future__ import annotations

import functools
import json
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from masked_reference import Selection, _best, importance, importance_gap, index_of, merged_embeddings
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from torch import Tensor
from transformers import GenerationConfig

from asymvlm.models.phi3_v import Phi3VConfig, Phi3VForCausalLM

VOCAB, PAD, EOS, BOS = 120, 0, 1, 2
CROP, SIDE, CROPS = 56, 2, 4  # pixels and tokens along a crop, most crops of an image
VISION = dict(
    hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=CROP, patch_size=14
)
SHORT, LONG = [1.0, 1.1, 1.3, 1.6], [1.5, 2.5, 4.0, 8.0]


def config(switch: int = 256, **overrides: object) -> Phi3VConfig:
    """``switch``: sequences longer than this take the long factors."""
    settings = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4 * switch,
        original_max_position_embeddings=switch,
        rope_scaling=dict(type="su", short_factor=SHORT, long_factor=LONG),
        rope_theta=10000.0,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=BOS,
        vision_config=VISION,
    )
    return Phi3VConfig(**{**settings, **overrides})


def draw(model: torch.nn.Module, seed: int = 2) -> None:
    """Every parameter, the separators and 1-D ones too; layers outweigh the last token, so that answers vary."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "_GN" in name or parameter.ndim < 2:
                is_scale = "norm" in name and name.endswith("weight")
                parameter.copy_(noise if "_GN" in name else 0.1 * noise + is_scale)
            else:
                gain = 1.0 if "embed_tokens.weight" in name or "lm_head" in name else 1.35
                parameter.copy_(gain * noise / parameter[0].numel() ** 0.5)


@functools.cache
def tiny_model(switch: int = 256, attention: str = "sdpa") -> Phi3VForCausalLM:
    """Shared by the session: a test that patches or changes it takes a deep copy."""
    settings = config(switch)
    settings._attn_implementation = attention
    model = Phi3VForCausalLM(settings)
    draw(model)
    with torch.no_grad():
        model.lm_head.weight[[PAD, EOS, BOS]] = 0  # a greedy answer never stops early
    model.generation_config = GenerationConfig(pad_token_id=PAD, eos_token_id=EOS, bos_token_id=BOS)
    model = model.float().eval()
    model.generate(**make_batch("single"), max_new_tokens=2)  # transformers adds attributes of its own on first use
    return model


@dataclass(frozen=True)
class Row:
    """Text, images with one token between them, text. An image is its rows and columns of crops."""

    before: tuple[int, ...]
    images: tuple[tuple[int, int], ...]
    after: tuple[int, ...]

    def ids(self) -> list[int]:
        ids = [BOS, *self.before]
        for number, layout in enumerate(self.images, start=1):
            ids += [-number] * len(separators(*layout)) + [BOS]
        return ids + list(self.after)


ONE = Row((5, 6, 7), ((2, 2),), (8, 9, 10, 11))
LONGER = Row((13, 14), ((1, 3),), (15, 16, 17, 18, 19, 20, 21))
TWO = Row((22, 23, 24), ((2, 1), (1, 4)), (26, 27, 28))
TEXT_ONLY = Row((29, 30), (), (31, 32, 33))
BATCHES: dict[str, tuple[tuple[Row, ...], str]] = {
    "single": ((ONE,), "left"),
    "two_images": ((TWO,), "left"),
    "left_padded": ((ONE, LONGER, TWO), "left"),
    "right_padded": ((ONE, LONGER, TWO), "right"),
    "image_free_row": ((ONE, TEXT_ONLY, TWO), "left"),
    "text_only": ((TEXT_ONLY, Row((34,), (), (35, 36, 37, 38, 39))), "left"),
}
GENERATED = ["single", "two_images", "left_padded", "image_free_row"]


def separators(h: int, w: int, side: int = SIDE) -> list[bool]:
    """Which tokens of an image are separators: the crops' row ends, the one before the global view, its row ends."""
    crop_row, global_row = [False] * (w * side) + [True], [False] * side + [True]
    return crop_row * (h * side) + [True] + global_row * side


def make_inputs(rows: Sequence[Row], padding: str = "left", seed: int = 0) -> dict[str, Tensor]:
    """What the processor would return for ``rows``; the n-th image of a batch draws its pixels from seed + n."""
    sequences = [row.ids() for row in rows]
    length = max(map(len, sequences))
    inputs = {"input_ids": torch.full((len(rows), length), PAD)}
    inputs["attention_mask"] = torch.zeros_like(inputs["input_ids"])
    for b, sequence in enumerate(sequences):
        start = length - len(sequence) if padding == "left" else 0
        inputs["input_ids"][b, start : start + len(sequence)] = torch.tensor(sequence)
        inputs["attention_mask"][b, start : start + len(sequence)] = 1
    layouts = [layout for row in rows for layout in row.images]
    if layouts:
        pixels = torch.zeros(len(layouts), 1 + CROPS, 3, CROP, CROP)
        for n, (h, w) in enumerate(layouts):
            generator = torch.Generator().manual_seed(1000 + seed + n)
            pixels[n, : 1 + h * w] = torch.randn(1 + h * w, 3, CROP, CROP, generator=generator)
        inputs["pixel_values"] = pixels
        inputs["image_sizes"] = torch.tensor(layouts) * CROP
    return inputs


def make_batch(name: str, seed: int = 0) -> dict[str, Tensor]:
    rows, padding = BATCHES[name]
    return make_inputs(rows, padding, seed)


def single_rows(name: str) -> list[dict[str, Tensor]]:
    """The rows of ``make_batch``, each by itself, unpadded, with its own images."""
    rows, _ = BATCHES[name]
    first = [sum(len(before.images) for before in rows[:b]) for b in range(len(rows))]
    return [make_inputs((row,), seed=n) for row, n in zip(rows, first, strict=True)]


def is_separator(inputs: dict[str, Tensor]) -> Tensor:
    """(B, S) bool."""
    flat = [flag for h, w in (inputs["image_sizes"] // CROP).tolist() for flag in separators(h, w)]
    mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    mask[inputs["input_ids"] < 0] = torch.tensor(flat)
    return mask


def select(
    model: Phi3VForCausalLM,
    inputs: dict[str, Tensor],
    ratio: float | Callable[[float], float],
    labels: Tensor | None = None,
) -> Selection:
    """As `masked_reference.select`: separators are kept, and no part of what is ranked or counted."""
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    prunable = (ids < 0) & ~is_separator(inputs)
    text = real & (ids >= 0) if labels is None else real & (ids >= 0) & (labels == -100)
    embeds = merged_embeddings(model, inputs)
    keep, scores = real.clone(), torch.full(ids.shape, -torch.inf, dtype=torch.double)
    gaps, kept = [], []
    for b in range(len(ids)):
        columns = prunable[b].nonzero()[:, 0].tolist()
        if not columns:
            gaps.append(float("nan"))
            kept.append(0)
            continue
        scores[b] = importance(embeds[b], prunable[b], text[b])
        gaps.append(importance_gap(scores[b, columns]))
        images = [[c for c in columns if ids[b, c] == -number] for number in range(1, 1 - int(ids[b].min()))]
        best = _best(scores[b], images, ratio(gaps[-1]) if callable(ratio) else ratio)
        keep[b, columns] = False
        keep[b, best] = True
        kept.append(len(best))
    return Selection(keep, index_of(keep, real, prunable), scores, gaps, prunable.sum(-1).tolist(), kept)


PUBLIC_TEMPLATE = (
    "{% for message in messages %}{{'<|' + message['role'] + '|>' + '\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}{{- '<|assistant|>\n' -}}"
    "{% endif %}"
)


def write_processor_files(folder: Path, crop: int = CROP, num_crops: int = CROPS) -> None:
    """Files as the hub has them, with a character-level tokenizer of the tiny vocabulary in place of Llama's."""
    specials = ["<|endoftext|>", "</s>", "<s>", "<unk>", "<|user|>", "<|assistant|>", "<|end|>", "<|system|>"]
    words = [*specials, "▁", "\n", *string.ascii_lowercase, *"?.,!"]
    vocabulary = {word: token for token, word in enumerate([*words, *(f"word{i}" for i in range(len(words), VOCAB))])}
    characters = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    characters.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    characters.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]  # as Llama's: one leading space off
    )
    characters.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in specials])
    characters.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    characters.save(str(folder / "tokenizer.json"))
    auto_map = {"AutoProcessor": "processing_phi3_v.Phi3VProcessor"}
    tokenizer = dict(
        tokenizer_class="LlamaTokenizer",
        bos_token="<s>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        padding_side="right",
        chat_template=PUBLIC_TEMPLATE,
        processor_class="Phi3VProcessor",
        auto_map=auto_map,
    )
    images = dict(
        auto_map={**auto_map, "AutoImageProcessor": "processing_phi3_v.Phi3VImageProcessor"},
        num_crops=num_crops,
        image_mean=[0.48145466, 0.4578275, 0.40821073],
        image_std=[0.26862954, 0.26130258, 0.27577711],
        processor_class="Phi3VProcessor",
        image_processor_type="Phi3VImageProcessor",
        num_img_tokens=(crop // 28) ** 2,
        crop_pixels=crop,  # ours: the hub's is always 336
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "preprocessor_config.json").write_text(json.dumps(images))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
