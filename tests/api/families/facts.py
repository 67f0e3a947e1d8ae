"""What tiny models of all families have in common: vocabulary, text settings, images, and the record of a family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

VOCAB = 120
PAD, EOS, BOS = 0, 1, 2
IMAGE, VIDEO, BEGIN_IMAGE, END_IMAGE, ROW_END, AUDIO = 100, 101, 102, 103, 104, 105
TOKENS_PER_IMAGE = 16  # prunable ones

TEXT = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
    pad_token_id=PAD,
    eos_token_id=EOS,
    bos_token_id=BOS,
    tie_word_embeddings=False,
)
MROPE = dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=10000.0)
VISION = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=4)


@dataclass(frozen=True)
class Images:
    """The images (or videos) of a call. Each draws its own pixels, whatever batch it is in."""

    count: int
    seed: int = 0
    first: int = 0

    def __len__(self) -> int:
        return self.count

    def draw(self, *shape: int) -> Tensor:
        """``(count, *shape)``."""
        pixels = torch.empty(self.count, *shape)
        for i in range(self.count):
            pixels[i].normal_(generator=torch.Generator().manual_seed(1000 * (1 + self.seed) + self.first + i))
        return pixels


@dataclass(frozen=True)
class Family:
    """How to build one family's tiny model and what its processor adds to ``input_ids`` and ``attention_mask``."""

    model: type[PreTrainedModel]
    config: Callable[..., PretrainedConfig]
    processor: Callable[[Tensor, Images], dict[str, Tensor]]
    tower: str  # the vision tower's module path
    image: tuple[int, ...] = (IMAGE,) * TOKENS_PER_IMAGE  # the ids one image becomes
    separators: frozenset[int] = frozenset()  # which of its placeholders hold a learned separator
    video: Callable[[Images], tuple[list[int], dict[str, Tensor]]] | None = None  # ids of a video, and its inputs
    video_alone: bool = False  # transformers takes no image beside a video
    video_separators: frozenset[int] = frozenset()
    pixels: str = "pixel_values"  # the input that holds the images
    mrope: bool = False
    first_position: int = 0
    bare_images: bool = True  # False where the family needs begin and end tokens around an image
    norm_offset: float = 0.0  # what the norms add to their weight: Gemma's scale is 1 + weight
    chunked_prefill: bool = True  # False where prefill in chunks is wrong without any patch
    recurrent: tuple[str, ...] = ()  # token mixers of a layer that carry a state instead of K and V
    # of logits, fp32: about twice what the unpatched model is from itself in float64, on the worst CPU seen
    atol: float = 2e-5
    attention: str = "sdpa"
    seed: int = 2  # of the parameters
    generated: dict[str, int] = field(default_factory=dict)  # token types of generated tokens, 0 if not named
    broken: str = ""  # why the unpatched model answers nothing at all on this transformers
    wrong_without_patch: dict[str, str] = field(default_factory=dict)  # test -> why the unpatched model fails it
