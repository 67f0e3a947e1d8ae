"""What is compared: prompts, caps and weights that both sides make alike, without a library between them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.peers.records import EQUAL

VOCABULARY, WIDTH, INNER, LAYERS, HEADS, KV_HEADS, HEAD = 256, 64, 96, 3, 4, 2, 16
ROPE_THETA, NORM_EPS = 10000.0, 1e-5


@dataclass(frozen=True)
class Case:
    """One method at one size. ``expected`` is `EQUAL`, or the reason why the peer keeps other tokens.

    The prompt is prefilled, then ``steps`` given tokens follow one by one. ``cap`` is the number of tokens that stay;
    where the method acts ``once``, behind the prefill, the cache grows again afterwards.
    """

    name: str
    method: str
    decoder: str = "llama"
    cap: int = 24
    window: int = 8
    sinks: int = 4
    once: bool = False
    eager: bool = False
    prompt: int = 40
    steps: int = 24
    rows: int = 2
    expected: str = EQUAL

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Ids of the prompts ``(rows, prompt)`` and those fed afterwards ``(rows, steps)``.

        No id comes twice in a row: the first layer's values do not know positions, and tell tokens apart by their ids.
        """
        generator = torch.Generator().manual_seed(11)
        rows = [8 + torch.randperm(VOCABULARY - 8, generator=generator) for _ in range(self.rows)]
        ids = torch.stack(rows)[:, : self.prompt + self.steps]
        return ids[:, : self.prompt], ids[:, self.prompt :]


def weights(decoder: str) -> dict[str, Tensor]:
    """Random fp32 weights of a Llama or Qwen2 decoder, by their names in transformers; Qwen2 has biases on q, k, v."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int, gain: float = 1.0) -> Tensor:
        return gain * torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    found = {"model.embed_tokens.weight": draw(VOCABULARY, WIDTH), "lm_head.weight": draw(VOCABULARY, WIDTH)}
    found["model.norm.weight"] = 1 + 0.1 * torch.randn(WIDTH, generator=generator)
    for layer in range(LAYERS):
        here = f"model.layers.{layer}."
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            # a sharp softmax: choices far from ties
            found[f"{here}self_attn.{name}_proj.weight"] = draw(heads * HEAD, WIDTH, gain=1.0 if name == "v" else 1.6)
            if decoder == "qwen2":
                found[f"{here}self_attn.{name}_proj.bias"] = 0.1 * torch.randn(heads * HEAD, generator=generator)
        found[f"{here}self_attn.o_proj.weight"] = draw(WIDTH, HEADS * HEAD, gain=1.5)
        found[f"{here}mlp.gate_proj.weight"] = draw(INNER, WIDTH)
        found[f"{here}mlp.up_proj.weight"] = draw(INNER, WIDTH)
        found[f"{here}mlp.down_proj.weight"] = draw(WIDTH, INNER)
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{here}{name}.weight"] = 1 + 0.1 * torch.randn(WIDTH, generator=generator)
    return found


def text_config() -> dict[str, object]:
    """Arguments of a text configuration of transformers with these sizes."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "rms_norm_eps": NORM_EPS,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


NEWEST_STAYS = "it always keeps the newest token, which the paper's rule may drop at once"
OTHER_LAYERS = "the caps of its layers count the window, which the paper's layers keep beside their caps"
LOSES_SINKS = (
    "its choice goes by slot, and a top-k of equal scores leaves slots in another order: from the first step on others "
    "than the oldest go, from the third on the sinks"
)

KV_CASES = (
    Case("tova-generated", "tova-newest", cap=48, steps=48),
    Case("tova-newest", "tova-newest"),
    Case("tova-newest-eager", "tova-newest", eager=True),
    Case("tova-newest-qwen2", "tova-newest", decoder="qwen2"),
    Case("tova-newest-long", "tova-newest", steps=160, cap=32),
    Case("tova", "tova", expected=NEWEST_STAYS),
    Case("snapkv", "snapkv", once=True),
    Case("snapkv-eager", "snapkv", once=True, eager=True),
    Case("snapkv-qwen2", "snapkv", decoder="qwen2", once=True),
    Case("pyramidkv", "pyramidkv", once=True, expected=OTHER_LAYERS),
    Case("streaming-prompt", "streaming", once=True),
    Case("streaming-reindexed-prompt", "streaming-reindexed", once=True),
    Case("streaming", "streaming", expected=LOSES_SINKS),
)
