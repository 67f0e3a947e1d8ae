"""Phi-3.5-Vision, which transformers 5 does not have: configuration, model and processor, registered as ``phi3_v``.

After ``import asymvlm``, ``from_pretrained`` on a released checkpoint takes these classes, not the hub's code.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # at the top it may want torchvision

from asymvlm.models.phi3_v.adapter import ADAPTER
from asymvlm.models.phi3_v.configuration_phi3_v import Phi3VConfig
from asymvlm.models.phi3_v.image_processing_phi3_v import Phi3VImageProcessor
from asymvlm.models.phi3_v.modeling_phi3_v import Phi3VForCausalLM, Phi3VModel
from asymvlm.models.phi3_v.processing_phi3_v import Phi3VProcessor


def _register() -> None:
    auto: Any  # the registries are typed for transformers' own classes
    AutoConfig.register("phi3_v", Phi3VConfig, exist_ok=True)
    for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
        auto.register(Phi3VConfig, Phi3VForCausalLM, exist_ok=True)
    AutoImageProcessor.register(Phi3VConfig, slow_image_processor_class=Phi3VImageProcessor, exist_ok=True)
    AutoProcessor.register(Phi3VConfig, Phi3VProcessor, exist_ok=True)


_register()

__all__ = ["ADAPTER", "Phi3VConfig", "Phi3VForCausalLM", "Phi3VImageProcessor", "Phi3VModel", "Phi3VProcessor"]
