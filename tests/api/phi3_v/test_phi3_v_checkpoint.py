"""A folder laid out as the hub's must load with our classes, without its code, no key missing and none left over."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checks import uniform
from phi3_v_tiny import CROP, VOCAB, picture, write_processor_files
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, pipeline

import asymvlm
from asymvlm.models.phi3_v import Phi3VConfig, Phi3VForCausalLM, Phi3VProcessor

DATA = json.loads((Path(__file__).parent / "data" / "phi3_v_keys.json").read_text())
# config.json of microsoft/Phi-3.5-vision-instruct, without its 48 numbers of each of the two factors
HUB_CONFIG = dict(
    _name_or_path="Phi-3.5-vision-instruct",
    architectures=["Phi3VForCausalLM"],
    attention_dropout=0.0,
    auto_map={
        "AutoConfig": "configuration_phi3_v.Phi3VConfig",
        "AutoModelForCausalLM": "modeling_phi3_v.Phi3VForCausalLM",
    },
    bos_token_id=1,
    embd_layer=dict(
        embedding_cls="image",
        hd_transform_order="sub_glb",
        projection_cls="mlp",
        use_hd_transform=True,
        with_learnable_separator=True,
    ),
    embd_pdrop=0.0,
    eos_token_id=2,
    hidden_act="silu",
    hidden_size=3072,
    img_processor=dict(
        image_dim_out=1024,
        model_name="openai/clip-vit-large-patch14-336",
        name="clip_vision_model",
        num_img_tokens=144,
    ),
    initializer_range=0.02,
    intermediate_size=8192,
    max_position_embeddings=131072,
    model_type="phi3_v",
    num_attention_heads=32,
    num_hidden_layers=32,
    num_key_value_heads=32,
    original_max_position_embeddings=4096,
    pad_token_id=32000,
    resid_pdrop=0.0,
    rms_norm_eps=1e-05,
    rope_scaling=dict(
        type="su", short_factor=[1.0 + i / 48 for i in range(48)], long_factor=[1.0 + i for i in range(48)]
    ),
    rope_theta=10000.0,
    sliding_window=262144,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    transformers_version="4.38.1",
    use_cache=True,
    vocab_size=32064,
)
# the same model at reduced width: every layer and every key, 1/96 of the hidden size
WIDTH, INNER, TOWER, TOWER_INNER, HEADS = 32, 64, 16, 32, 4
REDUCED = {
    **HUB_CONFIG,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "img_processor": {**HUB_CONFIG["img_processor"], "image_dim_out": TOWER, "num_img_tokens": 4},
    "rope_scaling": dict(type="su", short_factor=[1.0, 1.1, 1.3, 1.6], long_factor=[1.5, 2.5, 4.0, 8.0]),
    # not in the hub's file, which means CLIP-L/336
    "vision_config": dict(hidden_size=TOWER, intermediate_size=TOWER_INNER, num_attention_heads=2, image_size=CROP),
}
PROBLEMS = ("missing_keys", "unexpected_keys", "mismatched_keys")
SIZES = {3072: WIDTH, 8192: INNER, 16384: 2 * INNER, 9216: 3 * WIDTH, 32064: VOCAB}
TOWER_SIZES = {1024: TOWER, 4096: TOWER_INNER, 577: (CROP // 14) ** 2 + 1}


def checkpoint_keys() -> dict[str, list[int]]:
    keys = {}
    for pattern, shape in DATA["keys"].items():
        layers = DATA["text_layers"] if "{t}" in pattern else DATA["vision_layers"] if "{v}" in pattern else 1
        keys |= {pattern.replace("{t}", str(i)).replace("{v}", str(i)): shape for i in range(layers)}
    return keys


def reduced_shape(key: str, shape: list[int]) -> list[int]:
    if "_GN" in key or "img_projection" in key:  # 4096 is four merged patches here, not the tower's inner width
        return [4 * TOWER if size == 4096 else SIZES.get(size, size) for size in shape]
    sizes = TOWER_SIZES if "img_processor" in key else SIZES
    return [sizes.get(size, size) for size in shape]


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for key, shape in checkpoint_keys().items():
        noise = torch.randn(reduced_shape(key, shape), generator=generator)
        weights[key] = noise / math.sqrt(noise[0].numel()) if noise.ndim > 1 else 0.1 * noise + ("norm" in key)
    return {key: value.to(torch.bfloat16) for key, value in weights.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, weights: dict[str, torch.Tensor]) -> Path:
    """Two shards with an index, a flat config that names remote code, the processor's files."""
    folder = tmp_path_factory.mktemp("hub")
    names = list(weights)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, keys in shards.items():
        save_file({key: weights[key] for key in keys}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: file for file, keys in shards.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(REDUCED))
    (folder / "generation_config.json").write_text(json.dumps(dict(bos_token_id=2, eos_token_id=[1], pad_token_id=0)))
    for name in ("configuration", "modeling", "processing"):
        (folder / f"{name}_phi3_v.py").write_text("raise RuntimeError('code from the hub must not run')\n")
    write_processor_files(folder)
    return folder


def test_keys_and_shapes_at_full_size():
    with torch.device("meta"):
        model = Phi3VForCausalLM(Phi3VConfig(**HUB_CONFIG))
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == checkpoint_keys()
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_146_621_440


def test_defaults_are_the_released_configuration():
    found, expected = Phi3VConfig().to_dict(), Phi3VConfig(**HUB_CONFIG).to_dict()
    loaded_only = ("rope_parameters", "architectures", "auto_map", "dtype", "_name_or_path", "transformers_version")
    assert {name: value for name, value in expected.items() if name not in loaded_only} == {
        name: value for name, value in found.items() if name not in loaded_only
    }


@pytest.mark.parametrize("auto", [AutoModelForImageTextToText, AutoModelForCausalLM])
@pytest.mark.parametrize("trust", [None, False, True])
def test_every_key_loads_into_our_class(folder, weights, auto, trust, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run the hub's code"))
    model, info = auto.from_pretrained(folder, output_loading_info=True, trust_remote_code=trust)
    assert type(model) is Phi3VForCausalLM
    assert not any(info[kind] for kind in PROBLEMS)
    found = model.state_dict()
    assert found.keys() == weights.keys()
    assert model.dtype == torch.bfloat16
    assert all(torch.equal(found[key], value) for key, value in weights.items())


def test_a_saved_model_has_the_checkpoints_keys(folder, weights, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    saved = [key for file in files for key in safe_open(file, "pt").keys()]  # noqa: SIM118, it is no dict
    assert sorted(saved) == sorted(weights)
    again, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in PROBLEMS)
    assert again.config.rope_parameters == model.config.rope_parameters
    assert again.config.vision_config.to_dict() == model.config.vision_config.to_dict()
    ids = torch.tensor([[2, 9, 10, 11]])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_embeddings_stored_twice_are_read_once(folder, weights, tmp_path):
    """Fine-tuned copies of the hub's code may hold the token embeddings under a second name, and position numbers."""
    tower = "model.vision_embed_tokens.img_processor.vision_model."
    extra = {
        "model.vision_embed_tokens.wte.weight": weights["model.embed_tokens.weight"].clone(),
        tower + "embeddings.position_ids": torch.arange(17)[None],
    }
    save_file({**weights, **extra}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(REDUCED))
    _, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in PROBLEMS)


def test_the_pipeline_answers_from_the_folder(folder):
    ask = pipeline("image-text-to-text", model=str(folder), dtype=torch.float32)
    assert type(ask.model) is Phi3VForCausalLM
    assert type(ask.processor) is Phi3VProcessor
    pictures = [picture(90, 47, seed=1), picture(50, 50, seed=2)]
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": each}, {"type": "text", "text": "what is this?"}]}]
        for each in pictures
    ]
    options = dict(generate_kwargs=dict(do_sample=False, max_new_tokens=5), return_full_text=False)
    processor = AutoProcessor.from_pretrained(folder)

    def expected(chat: list[dict]) -> str:
        inputs = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        ids = ask.model.generate(**inputs, do_sample=False, max_new_tokens=5)
        return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    for batch in (chats[:1], chats):
        answers = ask(text=batch, batch_size=len(batch), **options)
        found = [
            answer[0]["generated_text"] if isinstance(answer, list) else answer["generated_text"] for answer in answers
        ]
        assert [text.strip() for text in found] == [expected(chat).strip() for chat in batch]
    with asymvlm.patch(ask.model, vision=uniform(0.5)) as handle:
        ask(text=chats[0], **options)
        assert handle.last.kept == [10]


@pytest.mark.parametrize("first", ["asymvlm", "transformers"])
@pytest.mark.slow
def test_importing_the_library_is_enough_in_any_order(folder, first):
    second = "transformers" if first == "asymvlm" else "asymvlm"
    code = (
        f"import {first}, {second}\n"
        f"print(type(transformers.AutoConfig.from_pretrained({str(folder)!r})).__module__)\n"
        "assert 'phi3_v' in asymvlm.supported_models()"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "asymvlm.models.phi3_v.configuration_phi3_v"


@pytest.mark.parametrize(
    "part,value,message",
    [
        ("embd_layer", {"hd_transform_order": "glb_sub"}, "hd_transform_order.* must be 'sub_glb', got 'glb_sub'"),
        ("embd_layer", {"projection_cls": "linear"}, "projection_cls.* must be 'mlp', got 'linear'"),
        ("img_processor", {"name": "siglip"}, "name.* must be 'clip_vision_model', got 'siglip'"),
        ("img_processor", {"type_feature": "cls_patch"}, "type_feature.* must be 'patch', got 'cls_patch'"),
        ("img_processor", {"image_dim_out": 768}, "image_dim_out.* must be 1024, got 768"),
    ],
)
def test_another_image_path_is_refused(part, value, message):
    with pytest.raises(ValueError, match=message):
        AutoConfig.for_model("phi3_v", **{part: value})
