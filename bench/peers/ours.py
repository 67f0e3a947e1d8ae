"""What this library does with a case, on a VLM whose decoder has the case's weights; the prompts are text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LogitsProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

import asymvlm
from asymvlm.methods import TOVA, CachedMethod, LastRow, PyramidKV, SnapKV, StreamingLLM
from bench.peers.cases import HEAD, KV_HEADS, LAYERS, ROPE_THETA, WIDTH, Case, text_config, weights
from bench.peers.records import Side


class Fed(LogitsProcessor):
    """Feeds given tokens, whatever the logits are."""

    def __init__(self, fed: Tensor, prompt: int) -> None:
        self.fed, self.prompt = fed, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = min(input_ids.shape[1] - self.prompt, self.fed.shape[1] - 1)  # behind the last one none is fed
        return torch.full_like(scores, -torch.inf).scatter_(1, self.fed[:, step, None], 0.0)


def model_of(case: Case) -> Any:
    """LLaVA around the Llama decoder, Qwen2.5-VL around Qwen2's; towers of the smallest size, never run."""
    rope = {"rope_type": "default", "rope_theta": ROPE_THETA}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "patch_size": 4}
    if case.decoder == "llama":
        vision = {"model_type": "clip_vision_model", "image_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        text = {"model_type": "llama", **text_config()}
        llava = LlavaConfig(text_config=text, vision_config=vision | sizes, image_token_index=3, image_seq_length=4)
        model: Any = LlavaForConditionalGeneration(llava)
    else:
        text = text_config() | {"rope_parameters": rope | {"mrope_section": [HEAD // 4, HEAD // 8, HEAD // 8]}}
        vision = {"depth": 1, "num_heads": 2, "out_hidden_size": WIDTH, "fullatt_block_indexes": [0]}
        qwen = Qwen2_5_VLConfig(text_config=text, vision_config=vision | sizes, image_token_id=3, video_token_id=4)
        model = Qwen2_5_VLForConditionalGeneration(qwen)
    found = weights(case.decoder)
    model.lm_head.load_state_dict({"weight": found.pop("lm_head.weight")})
    model.model.language_model.load_state_dict({name.removeprefix("model."): value for name, value in found.items()})
    model.generation_config.eos_token_id = None
    model.set_attn_implementation("eager" if case.eager else "sdpa")
    return model.eval()


@dataclass(frozen=True)
class NewestStays(TOVA):
    """TOVA as kvpress has it: the newest token always stays."""

    def recent(self, limit: int) -> int:
        return 1


class OncePerPrompt(StreamingLLM):
    """StreamingLLM as a press of kvpress has it: behind the prompt, and the cache grows again."""

    moments = ("prompt",)


def settings_of(case: Case) -> dict[str, Any]:
    """Arguments of `asymvlm.patch` for the case."""
    if case.cap > case.prompt:  # a limit that only generated tokens can reach
        whole = LastRow("layer", sinks=0)
        return {"text": asymvlm.TextEviction(threshold=case.cap - case.prompt, retention=1.0, method=whole)}
    streaming = OncePerPrompt if case.once else StreamingLLM
    methods: dict[str, CachedMethod] = {
        "tova": TOVA(),
        "tova-newest": NewestStays(),
        "snapkv": SnapKV(window=case.window),
        "pyramidkv": PyramidKV(window=case.window),
        "streaming": streaming(positions="original", sinks=case.sinks),
        "streaming-reindexed": streaming(sinks=case.sinks),
    }
    return {"cache": asymvlm.CacheLimit(methods[case.method], tokens=case.cap)}


def held_by(cache: Any, case: Case) -> Tensor:
    """``(layers, rows, K/V heads, columns)`` bool: the tokens in an `EvictionCache`."""
    found = torch.zeros(LAYERS, case.rows, KV_HEADS, case.prompt + case.steps, dtype=torch.bool)
    tables = cache.tables * (LAYERS // len(cache.tables))
    for layer, table in enumerate(tables):
        slots = table.slot_pos.unflatten(0, (case.rows, table.heads)).long()
        one_hot = F.one_hot((slots + 1).clamp_min(0), found.shape[-1] + 1)[..., 1:].sum(-2).bool()
        found[layer] = one_hot.expand(case.rows, KV_HEADS, -1)
    return found


@torch.inference_mode()
def run(case: Case) -> Side:
    """What our patch holds and answers."""
    model, held = model_of(case), []
    prompt, fed = case.tokens()

    def note(module: Any, arguments: Any, output: Any) -> None:
        name = "cache" if "cache" in output else "past_key_values"  # transformers 5.24, and before
        held.append(held_by(output[name], case))

    with asymvlm.patch(model, **settings_of(case)):
        hook = model.register_forward_hook(note)
        found = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=case.steps + 1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            logits_processor=[Fed(fed, case.prompt)],
        )
        hook.remove()
    return Side(torch.stack(held), torch.stack(found.logits))
