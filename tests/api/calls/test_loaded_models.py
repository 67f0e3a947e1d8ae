"""Models as people load them: offloaded by accelerate, with PEFT adapters, quantised, split over ranks."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from accelerate import cpu_offload
from checks import GREEDY, assert_close, assert_kept_logits, set_tolerance, uniform
from masked_reference import masked_forward, masked_greedy, select
from torch import Tensor, nn
from transformers import PreTrainedModel

import asymvlm


def check(plain: PreTrainedModel, model: PreTrainedModel, handle_of=None) -> None:
    """``model`` answers a padded batch as ``plain`` with dropped columns closed; both ways of calling."""
    family = next(name for name, facts in tiny.FAMILIES.items() if type(plain) is facts.model)
    inputs = tiny.make_batch(family, "left_padded")
    selection = select(plain, inputs, 0.5)
    ids, logits = masked_greedy(plain, inputs, selection.keep, steps=3)
    with torch.no_grad(), asymvlm.patch(handle_of or model, vision=uniform(0.5)) as handle:
        found = model.generate(**inputs, **GREEDY, max_new_tokens=3)
        assert torch.equal(handle.last.index, selection.index)
        forward = model(**inputs).logits
    assert torch.equal(found.sequences[:, -3:], ids)
    assert_close(torch.stack(found.logits, 1), logits)
    assert_kept_logits(forward, masked_forward(plain, inputs, selection.keep), selection)


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen3_vl", "phi3_v"], indirect=True)
def test_a_decoder_on_disk(family, plain, tmp_path: Path):
    """`device_map`: weights come when a module is called, and are gone in between."""
    copy.deepcopy(plain).save_pretrained(tmp_path / "model")  # it writes into the configuration
    device_map = {name: "cpu" for name, _ in plain.named_children() if name != "model"}
    device_map |= {
        f"model.{name}": "disk" if name in ("language_model", "layers") else "cpu"
        for name, _ in plain.model.named_children()
    }
    model = type(plain).from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offloaded", dtype=torch.float32
    )
    assert "disk" in device_map.values()
    assert next(tiny.text_layers(model).parameters()).device.type == "meta"
    model.generation_config = copy.deepcopy(plain.generation_config)
    check(plain, model)
    assert "generate" not in vars(model)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"], indirect=True)
def test_every_module_offloaded(family, plain, model):
    cpu_offload(model, execution_device=torch.device("cpu"))
    check(plain, model)


def lora(model: PreTrainedModel):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    tower = tiny.family_of(model).tower
    names = [name for name, _ in model.named_modules() if name.endswith(("q_proj", "v_proj", "qkv_proj"))]
    targets = [name for name in names if not name.startswith(tower)]
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen3_vl", "phi3_v"], indirect=True)
@pytest.mark.parametrize("patched", ["the peft model", "its base"])
def test_lora(family, plain, model, patched):
    wrapped = lora(model)
    merged = copy.deepcopy(wrapped).merge_and_unload().eval()
    text = tiny.make_batch(family, "text_only")
    assert (merged(**text).logits - plain(**text).logits).abs().max() > 0.1, "the adapter must matter"
    set_tolerance(4e-5)  # merged weights are rounded once more
    check(merged, wrapped, wrapped if patched == "the peft model" else wrapped.get_base_model())
    check(plain, wrapped.unload())


@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_lora_comes_and_goes_under_a_patch(family, plain, model):
    set_tolerance(4e-5)
    wrapped, inputs = lora(model), tiny.make_batch(family, "left_padded")
    merged = copy.deepcopy(wrapped).merge_and_unload().eval()

    def logits(answering) -> Tensor:
        return torch.stack(answering.generate(**inputs, **GREEDY, max_new_tokens=2).logits, 1)

    keep = select(plain, inputs, 0.5).keep
    with asymvlm.patch(wrapped, vision=uniform(0.5)) as handle:
        with pytest.raises(RuntimeError, match="patched already"):
            asymvlm.patch(wrapped.get_base_model())
        adapted = masked_greedy(merged, inputs, keep, steps=2)[1]
        assert_close(logits(wrapped), adapted)
        with wrapped.disable_adapter():
            assert_close(logits(wrapped), masked_greedy(plain, inputs, keep, steps=2)[1])
        whole = wrapped.merge_and_unload()
        assert handle.model is whole
        assert_close(logits(whole), adapted)
    assert "generate" not in vars(whole)


@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_virtual_tokens_are_refused(family, model):
    peft = pytest.importorskip("peft")
    decoder = model.config.text_config
    sizes = dict(token_dim=decoder.hidden_size, num_layers=decoder.num_hidden_layers, num_attention_heads=4)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, **sizes)
    wrapped = peft.get_peft_model(model, config)
    with pytest.raises(NotImplementedError, match="PROMPT_TUNING puts virtual tokens before the prompt"):
        asymvlm.patch(wrapped)
    assert "generate" not in vars(model)


class Int8Linear(nn.Module):
    """A linear layer as quantisers leave it: no floating-point weight to read, one scale a row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


def quantise(model: PreTrainedModel, by: str) -> None:
    """Every linear layer of the decoder."""
    if by == "torchao":
        quantization = pytest.importorskip("torchao.quantization")  # in no extra: it is slow to import
        quantization.quantize_(tiny.text_layers(model), quantization.Int8WeightOnlyConfig())
        return
    for module in list(tiny.text_layers(model).modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, Int8Linear(child))


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen3_vl", "phi3_v"], indirect=True)
@pytest.mark.parametrize("by", ["hand", "torchao"])
def test_quantised_linears(family, model, by):
    quantise(model, by)
    assert not any(
        type(parameter) is nn.Parameter and parameter.ndim == 2
        for parameter in tiny.text_layers(model)[0].mlp.parameters()
    )
    check(copy.deepcopy(model), model)


@pytest.mark.slow
def test_ranks_of_a_tensor_parallel_model_keep_the_same_tokens(tmp_path: Path):
    """Two ranks with gloo; the script checks itself."""
    script = Path(__file__).parent / "tensor_parallel.py"
    roots = [str(Path(__file__).parents[3] / folder) for folder in ("", "python_api", "tests/api", "tests/api/support")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(roots), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("the same") == 4
