"""A LLaVA-class checkpoint with seeded random weights, built without network.

Everything in it is an ordinary transformers object written by ``save_pretrained``: a SigLIP tower, an MLP projector,
a Llama decoder, a PIL image processor, a BPE tokenizer and a chat template. It has a real model's shape, not its skill.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

QUESTION = "What is due?"
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
    """Shape of the checkpoint. The default gives 4 x 4 = 16 vision tokens."""

    image: int = 56
    patch: int = 14
    tower_width: int = 32
    tower_layers: int = 1
    width: int = 48
    layers: int = 2
    heads: int = 2
    vocabulary: int = 160

    @property
    def grid(self) -> int:
        """Patches on a side."""
        return self.image // self.patch


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
    """A byte-level BPE trained on one prompt; its alphabet is printable ASCII, so any answer prints."""
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
    tokenizer.train_from_iterator([f"USER: {QUESTION}\nASSISTANT:"], trainer)
    pad, bos, eos, image = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        extra_special_tokens={"image_token": image},
    )
