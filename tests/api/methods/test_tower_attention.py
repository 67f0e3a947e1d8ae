"""What a vision tower attends to, beside a tower that keeps its whole attention matrix."""

from __future__ import annotations

import copy

import pytest
import torch
from seen_prompts import see, seen
from shared_models import build_once
from tiny import make_batch
from torch import Tensor

import asymvlm
from asymvlm.methods import VisPruner
from asymvlm.models import FAMILIES, adapter_for
from asymvlm.settings.policies import VisionPruning

TOLD = [
    *("llava", "llava_next", "llava_next_video", "llava_onevision", "gemma3", "paligemma", "phi3_v"),
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "glm4v", "glm4v_moe", "glm46v"),
]


def attention_of(model, inputs: dict[str, Tensor], number: int) -> tuple[Tensor, Tensor]:
    """Rows that look, ``(..., patches)``, and keys, of layer ``number`` of a tower: all of its softmax, in float64."""
    tower = model.get_submodule(adapter_for(model).tower)
    modules = [module for module in tower.modules() if hasattr(module, "k_proj") or hasattr(module, "qkv")]
    found = []

    def read(module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        if hasattr(module, "qkv"):
            query, key, _ = module.qkv(hidden).double().unflatten(-1, (3, module.num_heads, -1)).unbind(1)
            turned = [turn(rows, *kwargs["position_embeddings"]) for rows in (query, key)]
            ends = kwargs["cu_seqlens"].tolist()
            frame = torch.tensor([sum(place >= end for end in ends) for place in range(len(hidden))])
            apart = (frame[:, None] != frame).double() * -1e9
            chances = torch.softmax(torch.einsum("ihd,jhd->hij", *turned) * module.scaling + apart, -1)
            sizes = torch.tensor([int((frame == one).sum()) for one in frame.tolist()])
            found.append((chances.mean(0).sum(0) / sizes, key.mean(1)))
            return
        query, key = (
            make(hidden).double().unflatten(-1, (module.num_heads, -1)) for make in (module.q_proj, module.k_proj)
        )
        chances = torch.softmax(torch.einsum("pihd,pjhd->phij", query, key) * module.scale, -1).mean(1)
        looking = chances[:, 0] if type(module).__name__.startswith("CLIP") else chances.mean(1)
        found.append((looking, key.mean(2)))

    hook = modules[number].register_forward_pre_hook(read, with_kwargs=True)
    with torch.no_grad():
        see(model, inputs)
    hook.remove()
    return found[0]


def turn(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + half) of ``(patches, H, D)``."""
    first, second = rows.chunk(2, -1)
    return rows * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


@pytest.mark.parametrize("family", TOLD, indirect=True)
def test_attention_and_keys_are_those_of_the_whole_matrix(family, plain):
    inputs, prompt, adapter = make_batch(family, "left_padded"), seen(family, "left_padded"), adapter_for(plain)
    last = -2 if family == "phi3_v" else -1  # whose tower stops there
    looking, keys = attention_of(copy.deepcopy(plain), inputs, last)
    grids = [grid for kind in adapter.grids_of(plain, inputs).values() for grid in kind]
    places = prompt.tokens.vision & ~prompt.tokens.separators
    for found, rows in ((prompt.tower_attention[..., None], looking[..., None]), (prompt.tower_keys, keys)):
        wanted = adapter.tower_tokens(plain, inputs, rows, grids)
        torch.testing.assert_close(found[places].double(), wanted, rtol=1e-5, atol=1e-6)
        assert not found[~places].any()


def test_every_family_that_tells_its_tower_is_held_to_the_whole_matrix():
    known = {module.ADAPTER.model_type for module in FAMILIES if module.ADAPTER.tower_attention is not None}
    assert known == set(TOLD)


@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_the_layer_is_the_one_whose_output_the_projector_reads(family, model):
    inputs = make_batch(family, "single")
    looking = [attention_of(model, inputs, number)[0][0, 1:] for number in (0, 1)]
    assert (looking[0] - looking[1]).abs().max() > 1e-3
    for state, number in ((-1, 1), (-2, 0), (1, 0), (2, 1)):
        model.config.vision_feature_layer = state
        prompt = see(model, inputs)
        found = prompt.tower_attention[prompt.tokens.vision].double()
        torch.testing.assert_close(found, looking[number], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"], indirect=True)
def test_no_hook_stays_and_none_is_set_for_others(family, model):
    inputs = make_batch(family, "single")

    def hooks():
        return [name for name, module in model.named_modules() if module._forward_hooks]

    seen_hooks = []
    layer = adapter_for(model).tower_attention(model).attention
    layer.register_forward_pre_hook(lambda *args: seen_hooks.append(len(hooks())))
    for method in ("vispruner", "divprune"):
        with torch.no_grad(), asymvlm.patch(model, vision=VisionPruning(method=method)):
            before = hooks()
            model(**inputs)
            assert hooks() == before
    assert seen_hooks[0] > seen_hooks[1]


def test_towers_that_cannot_be_read_are_refused():
    vision, inputs = VisionPruning(method=VisPruner()), make_batch("mistral3", "single")
    with pytest.raises(NotImplementedError, match="mistral3 adapter does not say where its vision tower attends"):
        asymvlm.prune_inputs(build_once("mistral3"), vision, **inputs)
    model = copy.deepcopy(build_once("llava"))
    model.config.vision_feature_layer = [-2, -1]
    with pytest.raises(NotImplementedError, match=r"is read from one layer, got vision_feature_layer \[-2, -1\]"):
        asymvlm.prune_inputs(model, vision, **make_batch("llava", "single"))
    model = copy.deepcopy(build_once("llava"))
    for module in list(model.model.vision_tower.modules()):
        if hasattr(module, "q_proj"):
            module.__class__ = type("OtherAttention", (type(module),), {})
    with pytest.raises(NotImplementedError, match="from CLIPAttention or SiglipAttention, got OtherAttention in CLIP"):
        asymvlm.prune_inputs(model, vision, **make_batch("llava", "single"))
    layer = {**make_batch("llava", "single"), "vision_feature_layer": -2}
    with pytest.raises(NotImplementedError, match="leave out vision_feature_layer, got -2"):
        asymvlm.prune_inputs(build_once("llava"), vision, **layer)
