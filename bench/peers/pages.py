"""A tiny random Qwen2-VL with its tokenizer, and prompts with an image, as both sides of the vision comparison load."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.peers.records import EQUAL

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
BYTES, VOCABULARY = 256, 768
START, END, IMAGE, VIDEO = (BYTES + SPECIAL.index(f"<|{name}|>") for name in
                            ("vision_start", "vision_end", "image_pad", "video_pad"))  # fmt: skip
ANSWERS, STOP = 512, 255  # ids from ANSWERS on say a number each; ANSWERS + STOP says that there are no more
FLAG = 1e4  # last entry of the embeddings of these ids, which tells them from all others
WIDTH, PATCH, MERGE = 64, 14, 2
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
MEAN, STD = 0.5, 0.5


@dataclass(frozen=True)
class Page:
    """One prompt of ``images`` pictures and a question, and how a peer is to prune it.

    ``percent`` of each image's tokens go; ``weight`` and ``split`` are the peer's own settings. Embeddings of small
    letters have one norm, those of capitals have many.
    """

    name: str
    question: str = "what does it say"
    images: int = 1
    rows: int = 6
    columns: int = 8
    percent: int = 50
    weight: float = 1.0
    split: bool = False
    expected: str = EQUAL

    @property
    def prompt(self) -> str:
        return PICTURE * self.images + self.question

    @property
    def tokens(self) -> int:
        """Vision tokens of an image."""
        return self.rows * self.columns

    def pixels(self) -> np.ndarray:
        """``(images, height, width, 3)`` uint8: coloured tiles with noise, so that some tokens are alike."""
        draw = np.random.default_rng(7)
        side = PATCH * MERGE
        tiles = draw.integers(0, 256, (self.images, self.rows // 2, self.columns // 2, 3))
        coarse = tiles.repeat(2 * side, 1).repeat(2 * side, 2)
        return np.clip(coarse + draw.integers(-60, 61, coarse.shape), 0, 255).astype(np.uint8)

    def grid(self) -> torch.Tensor:
        """Patches of each image: ``(images, 3)``, frames, rows and columns."""
        return torch.tensor([[1, self.rows * MERGE, self.columns * MERGE]] * self.images)

    def ids(self) -> list[int]:
        """Token ids with one placeholder for each vision token, as a processor makes them."""
        found = [START, *[IMAGE] * self.tokens, END] * self.images
        alphabet = _alphabet()
        return found + [alphabet.index("Ġ" if letter == " " else letter) for letter in self.question]


def positions(page: Page, held: torch.Tensor) -> list[list[int]]:
    """Temporal, height and width positions of the model's own, of all columns that stay; ``held`` ``(images, tokens)``.

    Text counts on from the largest position of a whole image, pruned or not.
    """
    found: list[tuple[int, int, int]] = []
    start = 0
    for image in held.tolist():
        found.append((start,) * 3)
        start += 1
        for number, stays in enumerate(image):
            if stays:
                found.append((start, start + number // page.columns, start + number % page.columns))
        start += max(page.rows, page.columns)
        found.append((start,) * 3)
        start += 1
    found += [(start + number,) * 3 for number in range(len(page.question))]
    return [list(axis) for axis in zip(*found)]


def _alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def patches(page: Page) -> torch.Tensor:
    """What Qwen2-VL's image processor makes of images that need no resizing: ``(patches, 3 * 2 * PATCH * PATCH)``."""
    pixels = torch.from_numpy(page.pixels()).float() / 255
    pixels = ((pixels - MEAN) / STD).permute(0, 3, 1, 2)[:, None].repeat(1, 2, 1, 1, 1)  # an image is two equal frames
    cut = pixels.unflatten(4, (page.columns, MERGE, PATCH)).unflatten(3, (page.rows, MERGE, PATCH))
    # (images, frames, channels, rows, MERGE, PATCH, columns, MERGE, PATCH): a block of MERGE x MERGE stands together
    return cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, 3 * 2 * PATCH * PATCH)


def write_checkpoint(folder: Path) -> None:
    """Write the model, its tokenizer and the settings of its image processor."""
    from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    text: dict[str, Any] = dict(vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, rope_parameters=rope,
                bos_token_id=BYTES, eos_token_id=BYTES, pad_token_id=BYTES)  # fmt: skip
    vision = dict(depth=2, embed_dim=32, num_heads=2, hidden_size=WIDTH, mlp_ratio=2, patch_size=PATCH,
                  spatial_merge_size=MERGE, temporal_patch_size=2)  # fmt: skip
    places: dict[str, Any] = dict(
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END
    )
    model: Any = Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **places)
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5)
        rows = model.get_input_embeddings().weight
        rows /= rows.norm(dim=1, keepdim=True)
        capitals = [_alphabet().index(chr(letter)) for letter in range(ord("A"), ord("Z") + 1)]
        rows[capitals] *= torch.linspace(0.2, 5.0, len(capitals))[:, None]
        rows[ANSWERS:] = torch.tensor([0.0] * (WIDTH - 1) + [FLAG])
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=_tokenizer(), eos_token=SPECIAL[0], pad_token=SPECIAL[0]).save_pretrained(
        folder
    )
    images = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": PATCH, "merge_size": MERGE,
              "temporal_patch_size": 2, "min_pixels": PATCH**2, "max_pixels": 2**24,
              "image_mean": [MEAN] * 3, "image_std": [STD] * 3}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(images))


def _tokenizer() -> Any:
    """One token a byte, the special ones, and a token for every other id."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    made = Tokenizer(models.BPE({letter: number for number, letter in enumerate(_alphabet())}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    made.add_tokens([AddedToken(f"<{number}>") for number in range(BYTES + len(SPECIAL), VOCABULARY)])
    return made


MEAN_FIRST = "it averages the question's embeddings before it normalises, so that long ones weigh more"
BLENDED = "below weight 1 its kernel is a blend, (1 - weight) * similarity + weight * the conditional kernel"
HALVES = "by default it chooses half of the tokens in each half of an image, each with a relevance scale of its own"
EACH_IMAGE = "it keeps the same share of each image, where we choose among all images of a row"
ROUNDED = "it rounds the number of tokens to the nearest, we round down"

PAGES = (
    Page("published"),
    Page("published-keep-quarter", percent=75),
    Page("published-keep-tenth", rows=4, columns=10, percent=90),
    Page("published-two-tokens", rows=4, columns=10, percent=95),
    Page("uneven-share", percent=90, expected=ROUNDED),
    Page("two-images", images=2, rows=4, columns=6, expected=EACH_IMAGE),
    Page("capitals", question="WHAT DOES IT SAY", expected=MEAN_FIRST),
    Page("blend", weight=0.5, expected=BLENDED),
    Page("halves", split=True, expected=HALVES),
    Page("defaults", weight=0.5, split=True, expected=f"{BLENDED}; {HALVES}"),
)
