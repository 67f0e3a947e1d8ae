"""What a patched model refuses before it begins, in the caller's words."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from asymvlm.hf.arguments import CACHE, past_length
from asymvlm.hf.decoder import decoder_of
from asymvlm.hf.generation import setting
from asymvlm.hf.growing_layers import check_grows
from asymvlm.prompt.state import PromptState
from asymvlm.settings.policies import VisionPruning
from asymvlm.tokens.roles import check_prompt


def check_call(call: dict[str, Any], state: PromptState | None) -> None:
    """Refuse a call that pruning cannot serve, in the caller's words."""
    cache = call.get(CACHE)
    if state is None and past_length(cache) > 0:
        raise NotImplementedError(
            f"pruning needs an empty cache, got one of {past_length(cache)} tokens: pass the whole conversation"
        )
    if call.get("assistant_model") is not None:
        raise NotImplementedError("an assistant_model is not supported: it would see a prompt of another length")
    if state is None:
        check_prompt(call)


def check_recall(vision: VisionPruning, model: nn.Module, call: dict[str, Any]) -> None:
    """Refuse a call whose cache dropped tokens could not return to."""
    if not vision.recall:
        return
    name = setting(model, call, "cache_implementation")
    if name not in (None, "dynamic") and (name != "hybrid" or call.get("cache_implementation") == name):
        raise NotImplementedError(f"recall needs a cache that grows (cache_implementation None), got {name!r}")
    if call.get(CACHE) is not None:
        check_grows(call[CACHE])


def check_trainable(model: nn.Module) -> None:
    """Tower, projector and embeddings get no gradient, so none of them may ask for one."""
    decoder, whole = decoder_of(model), cast("Any", model)
    served = {id(parameter) for parameter in cast("Any", decoder).layers.parameters()}
    served |= {id(parameter) for name, parameter in decoder.named_parameters() if "embed" not in name}
    head, tied = whole.get_output_embeddings(), whole.get_input_embeddings().weight
    served |= {id(p) for p in ([] if head is None else head.parameters()) if p is not tied}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in served:
            raise RuntimeError(
                f"{name} asks for a gradient, and a patched model has none for the vision tower, the projector and the "
                "embeddings: freeze them (requires_grad_(False)), or train without the patch"
            )


def check_inside(vision: VisionPruning, arguments: dict[str, Any], model: nn.Module, logits: str) -> None:
    """Refuse a plain forward that such a method cannot serve."""
    if model.training:
        raise NotImplementedError(f"{vision.method!r} works inside the decoder, outside of training: call model.eval()")
    if arguments.get("labels") is not None and logits != "original":
        raise NotImplementedError(
            f"{vision.method!r} works inside the decoder, without labels: its logits have fewer columns; patch with "
            "logits='original'"
        )
