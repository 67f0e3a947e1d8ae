"""A LLaVA-class checkpoint with seeded random weights, built once without network and kept in a cache folder.

Everything in it is an ordinary transformers object written by ``save_pretrained``: a SigLIP tower, an MLP projector,
a Llama decoder, a PIL image processor, a BPE tokenizer and a chat template. It has a real model's shape, not its skill.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.demo.page import CUSTOMER, FACTS, ITEMS, NOTES, QUESTION, SENDER

VERSION = 1  # raise it when what `build` writes changes: the old folder is then left alone and a new one made
IMAGE_TOKEN = "<image>"
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", IMAGE_TOKEN)
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}{{ message['role'] | upper }}: "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@dataclass(frozen=True)
class Size:
    """Shape of the checkpoint. The default gives 24 x 24 = 576 vision tokens, 11.9 M parameters, 47 MB in fp32."""

    image: int = 336
    patch: int = 14
    tower_width: int = 192
    tower_layers: int = 2
    width: int = 384
    layers: int = 6
    heads: int = 6
    vocabulary: int = 400

    @property
    def grid(self) -> int:
        """Patches on a side."""
        return self.image // self.patch


def cached_checkpoint(size: Size | None = None) -> Path:
    """Folder of the checkpoint, built on the first call.

    It lies in ``$XDG_CACHE_HOME`` (default ``~/.cache``) under ``asymvlm/demo-<version>``. It is written beside its
    place and renamed into it: an interrupted build leaves no half checkpoint, and of two at once the first one stays.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "asymvlm"
    folder = root / f"demo-{VERSION}"
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".demo-{VERSION}-", dir=root))
    try:
        build(scratch, size or Size())
        try:
            scratch.rename(folder)
        except OSError:  # another process was faster: a rename onto a filled folder is refused
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def build(folder: Path, size: Size, *, seed: int = 0) -> None:
    """Write model, processor, tokenizer and chat template to ``folder``. The global random state is left as it was."""
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    tokenizer = _tokenizer(size.vocabulary)
    processor = LlavaProcessor(
        # named by its PIL class: the plain name is the torchvision variant, and torchvision is no requirement
        image_processor=SiglipImageProcessorPil(size={"height": size.image, "width": size.image}),
        tokenizer=tokenizer,
        patch_size=size.patch,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN,
    )
    config = LlavaConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": size.width,
            "intermediate_size": size.width * 8 // 3,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.heads,
            "max_position_embeddings": 4096,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": size.tower_width,
            "intermediate_size": size.tower_width * 8 // 3,
            "num_hidden_layers": size.tower_layers,
            "num_attention_heads": max(1, size.tower_width // 64),
            "image_size": size.image,
            "patch_size": size.patch,
            "vision_use_head": False,
        },
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=size.grid**2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    _enliven(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _enliven(model: Any) -> None:
    """Scale the random matrices: as initialised, patches get nearly equal features and answers repeat one token."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "position_embedding" not in name:
                parameter.mul_(5 if "language_model" in name or "lm_head" in name else 3)


def _tokenizer(vocabulary: int) -> Any:
    """A byte-level BPE trained on the demo page's words; its alphabet is printable ASCII, so any answer prints."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    space, newline = "Ġ", "Ċ"  # how ByteLevel writes them
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=[chr(code) for code in range(33, 127)] + [space, newline],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    pad, bos, eos, image = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        extra_special_tokens={"image_token": image},
    )


def _corpus() -> Iterator[str]:
    yield f"USER: {QUESTION}\nASSISTANT:"
    yield from (*SENDER, *CUSTOMER, *NOTES)
    for name, value in FACTS:
        yield f"{name} {value}"
    for name, quantity, price in ITEMS:
        yield f"{name} {quantity} {price:,.2f} {quantity * price:,.2f}"
