"""Phi-3.5-Vision on transformers' own Phi-3. Parameter names are those of the released checkpoints.

The public model is flat: one module holds the decoder's weights and the image path, and merges before it decodes. Here
the decoder has a module of its own inside it, without parameters, so that merging and decoding can be told apart.
"""

from __future__ import annotations

import inspect
import math
from typing import Any, cast

import torch
from torch import nn
from transformers import GenerationMixin, initialization
from transformers.cache_utils import Cache
from transformers.generation.logits_process import LogitsProcessorList
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.phi3.modeling_phi3 import Phi3Model, Phi3PreTrainedModel

from asymvlm.models.phi3_v.cache_name import NATIVE, takes_the_cache
from asymvlm.models.phi3_v.configuration_phi3_v import Phi3VConfig
from asymvlm.models.phi3_v.image_embedding_phi3_v import Phi3VImageEmbedding

IMAGES = ("pixel_values", "image_sizes")
SWITCH = "_phi3_v_switch"  # on a cache: the columns after which positions pass the LongRoPE switch


class Phi3VEmbedding(nn.Embedding):
    """Token embeddings that read an image placeholder (-1, -2, ...) as token 0, as the public code does.

    The merge overwrites those rows; nothing else ever sees them.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.clamp_min(0))


class Phi3VDecoder(nn.Module):
    """The decoder of a `Phi3VModel` as a module of its own; its weights stay where the checkpoint has them."""

    def __init__(self, owner: Phi3VModel) -> None:
        super().__init__()
        self._owner = (owner,)  # in a tuple, so that it is no submodule: the tree of modules has no cycle

    @property
    def layers(self) -> nn.ModuleList:
        return self._owner[0].layers

    def forward(self, **kwargs: Any) -> Any:
        """`Phi3Model.forward` on ``inputs_embeds``."""
        return Phi3Model.forward(self._owner[0], **kwargs)

    forward.__signature__ = inspect.signature(Phi3Model.forward)  # type: ignore[attr-defined]


class Phi3VPreTrainedModel(Phi3PreTrainedModel):
    config: Phi3VConfig
    config_class = Phi3VConfig
    input_modalities = ["image", "text"]
    _no_split_modules = ["Phi3DecoderLayer", "CLIPEncoderLayer"]
    # fine-tuned copies of the hub's code may hold the token embeddings twice, or CLIP's position numbers
    _keys_to_ignore_on_load_unexpected = [r"vision_embed_tokens\.wte\.", r"embeddings\.position_ids$"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Phi3VImageEmbedding):
            initialization.zeros_(module.glb_GN)
            initialization.zeros_(module.sub_GN)


class Phi3VModel(Phi3VPreTrainedModel, Phi3Model):
    """The decoder with images written over their placeholders."""

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__(config)
        self.embed_tokens = Phi3VEmbedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.vision_embed_tokens = Phi3VImageEmbedding(config)
        self.language_model = Phi3VDecoder(self)
        self.post_init()

    def placeholders(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Bool of the same shape: where image tokens go."""
        return (input_ids < 0) | (input_ids == self.config.image_token_id)

    @takes_the_cache
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """`Phi3Model.forward` on the merged embeddings.

        Args:
            input_ids: ``(B, S)``; the placeholders of a row's k-th image are -k. It is not modified.
            pixel_values, image_sizes: the images of all rows in reading order, as `Phi3VImageEmbedding` takes them.
        Raises:
            ValueError: if there are more or fewer placeholders than image tokens, or images without ``input_ids``.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        no_images = pixel_values is None and cache is None  # nor any earlier, in a cache
        if no_images and input_ids is not None and self.placeholders(input_ids).any():
            raise ValueError("input_ids hold image placeholders, wanted pixel_values and image_sizes with them")
        if pixel_values is not None:
            if input_ids is None:
                raise ValueError("pixel_values need input_ids: embeddings do not tell where the images go")
            tokens = self.vision_embed_tokens(pixel_values, image_sizes).to(inputs_embeds)
            placeholders = self.placeholders(input_ids)
            if (found := int(placeholders.sum())) != len(tokens):
                raise ValueError(f"input_ids must hold {len(tokens)} image placeholders, one a token, got {found}")
            inputs_embeds = inputs_embeds.masked_scatter(placeholders[..., None], tokens)
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{NATIVE: cache},
            use_cache=use_cache,
            **kwargs,
        )


class Phi3VForCausalLM(Phi3VPreTrainedModel, GenerationMixin):
    """Phi-3.5-Vision with its language-model head, under the name the hub's ``config.json`` gives it."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__(config)
        self.model = Phi3VModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @takes_the_cache
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits of the tokens that ``logits_to_keep`` asks for, and the loss where there are ``labels`` (B, S)."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{NATIVE: getattr(outputs, NATIVE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return result if as_dict else result.to_tuple()

    @takes_the_cache
    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        cache: Cache | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As for every decoder; the step that passes the LongRoPE switch starts over with an empty cache and images.

        Keys cached with the short factors do not fit queries with the long ones. The switch is a matter of positions,
        not of columns: a prompt that lost tokens but kept its positions switches where the whole one does.
        """
        images = {name: kwargs.get(name) for name in IMAGES}
        start_over = False
        if cache is not None and self.config.longrope_switch != math.inf:
            if is_first_iteration:
                setattr(cache, SWITCH, self.config.longrope_switch - _columns_missing(input_ids, kwargs))
            switch = getattr(cache, SWITCH, self.config.longrope_switch)
            start_over = input_ids.shape[1] > switch and 0 < int(cache.get_seq_length()) <= switch
        if start_over:
            cache, kwargs = None, {**kwargs, "next_sequence_length": None}
        generation: Any = super()
        inputs = generation.prepare_inputs_for_generation(
            input_ids, **{NATIVE: cache}, is_first_iteration=is_first_iteration, **kwargs
        )
        return {**inputs, **images} if start_over else inputs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Beams and several sequences repeat a row with all its images, not image by image."""
        images = {name: kwargs.pop(name) for name in IMAGES if kwargs.get(name) is not None}
        generation: Any = super()
        expanded, kwargs = generation._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **kwargs
        )
        if images and expand_size > 1:
            lengths = self.model.vision_embed_tokens.lengths(images["image_sizes"])
            counts = _images_in_rows(self.model.placeholders(input_ids).sum(-1).tolist(), lengths)
            rows = torch.arange(len(lengths)).split(counts)
            order = torch.cat([row for row in rows for _ in range(expand_size)])
            images = {name: value[order.to(value.device)] for name, value in images.items()}
        return expanded, {**kwargs, **images}

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        generation: Any = super()
        return _NonNegativeIds(generation._get_logits_processor(*args, **kwargs))


class _NonNegativeIds(LogitsProcessorList):
    """Penalties look scores up by prompt id, and an image placeholder is none: they see token 0 in its place."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> Any:
        return super().__call__(cast("torch.LongTensor", input_ids.clamp_min(0)), cast("Any", scores), **kwargs)


def _images_in_rows(tokens: list[int], lengths: list[int]) -> list[int]:
    """How many images each row holds, from its image tokens and the lengths of all images in reading order."""
    counts, left = [], list(lengths)
    for total in tokens:
        before = len(left)
        while total > 0 and left:
            total -= left.pop(0)
        counts.append(before - len(left))
    return counts


def _columns_missing(input_ids: torch.Tensor, kwargs: dict[str, Any]) -> int:
    """How much further positions are than columns at the end of the prompt (of this chunk): 0 for a whole prompt."""
    positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    if positions is None:
        return 0
    return int(positions.max()) + 1 - (input_ids if mask is None else mask).shape[1]
