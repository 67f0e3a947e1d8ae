"""A dialogue over one cache: each turn feeds what is new, so earlier turns are neither encoded nor prefilled again.

What the model generated stays as the ids it generated. A later turn is what the chat template puts behind an answer:
rendered around a marker in place of the answer, and tokenised from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from asymvlm.cache.eviction_cache import EvictionCache
from asymvlm.eviction.call import kind_of
from asymvlm.files.pictures import as_page
from asymvlm.hf.arguments import IDS, MASK, cache_of
from asymvlm.hf.generation import generate_callee, setting
from asymvlm.models import adapter_for
from asymvlm.patched.handle import HANDLE, PatchHandle
from asymvlm.report.pruning import PruningReport

if TYPE_CHECKING:
    from PIL.Image import Image

MARK = "0a1b2c3d4e5f"  # stands for an answer while a template is rendered; no template writes that


@dataclass(frozen=True)
class Reply:
    """One answer. ``new_tokens`` counts what was generated, an end included; ``report`` is ``handle.last``."""

    text: str
    new_tokens: int
    report: PruningReport | None


class Conversation:
    """Questions about images, one after another, on the cache of the model's own chat template.

    Works with any supported model that was patched, and without a patch. Where `TextEviction` or `TurnEviction` is
    part of the patch, ``cache`` is the `EvictionCache` of the dialogue.

    Args:
        model: a supported vision-language model. processor: its processor, with a chat template.
        options: arguments of every ``generate``, like ``max_new_tokens`` or ``do_sample``.
    Raises:
        ValueError: if the processor has no chat template.
    """

    def __init__(self, model: Any, processor: Any, **options: Any) -> None:
        if not getattr(processor, "chat_template", None):
            raise ValueError(f"a conversation needs a chat template, {type(processor).__name__} has none")
        self.model = model
        self.processor = processor
        self.options = options
        self.messages: list[dict[str, Any]] = []
        self.ids: torch.Tensor | None = None  # (1, columns): all that was said, generated ids as they were generated
        self.cache: Any = None
        self._per_token: dict[str, torch.Tensor] = {}  # token types and the like, (1, columns)
        self._adapter = adapter_for(model)

    def ask(self, question: str, images: Sequence[Image] = (), **options: Any) -> Reply:
        """Say something, with images of its own or none, and return the model's answer.

        Raises:
            ValueError: if ``question`` holds the marker of an image, the template hides where an answer ends, or pixels
                hold no brightness (`as_rgb`).
            NotImplementedError: for new images in a later turn of a family that cannot take them.

        A call that fails leaves the conversation as it was, but for tokens in the cache: start a new one then.
        """
        token = getattr(self.processor, "image_token", None)
        if token and token in question:
            raise ValueError(f"the question holds {token!r}, the placeholder of an image, wanted text without it")
        images = [as_page(image, f"image {number}") for number, image in enumerate(images, 1)]
        content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
        content += [{"type": "text", "text": question}]
        message = {"role": "user", "content": content}
        new = self._first(message) if self.ids is None else self._later(message, images)
        new = {name: _placed(value, self.model) for name, value in new.items()}
        ids, per_token = self._joined(new)
        inputs = {name: value for name, value in new.items() if name not in (IDS, MASK, *per_token)}
        handle: PatchHandle | None = self.model.__dict__.get(HANDLE)
        evicts = handle is not None and (handle.text, handle.turns, handle.cache) != (None, None, None)
        if self.cache is None and handle is not None and evicts:
            self.cache = EvictionCache(self.model.config, **kind_of(handle.cache or handle.text))
        with torch.no_grad():
            result = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                **per_token,
                **inputs,
                **({} if self.cache is None else {generate_callee(self.model).cache: self.cache}),
                **{**self.options, **options},
                return_dict_in_generate=True,
            )
        answer = result.sequences[:, ids.shape[1] :]
        self.cache, self.ids = cache_of(result), self._without_end(result.sequences, answer)
        self._per_token = {
            name: torch.nn.functional.pad(value, (0, self.ids.shape[1] - value.shape[1]))
            for name, value in per_token.items()
        }
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        text = tokenizer.decode(answer[0], skip_special_tokens=True).strip()
        self.messages += [message, {"role": "assistant", "content": [{"type": "text", "text": text}]}]
        return Reply(text, answer.shape[1], None if handle is None else handle.last)

    def _first(self, message: dict[str, Any]) -> dict[str, Any]:
        inputs = self.processor.apply_chat_template(
            [message], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        return dict(inputs)

    def _later(self, message: dict[str, Any], images: Sequence[Image]) -> dict[str, Any]:
        """Ids behind the last answer, up to where the next one begins."""
        question = [part for part in self.messages[-2]["content"] if part["type"] == "text"]
        around = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": [{"type": "text", "text": MARK}]},
            message,
        ]
        text = self.processor.apply_chat_template(around, add_generation_prompt=True, tokenize=False)
        if text.count(MARK) != 1:
            raise ValueError(
                f"the chat template must write an answer once, found it {text.count(MARK)} times: it hides where the "
                "answer ends"
            )
        given = {"images": list(images)} if images else {}
        inputs = dict(
            self.processor(text=[text.split(MARK)[1]], add_special_tokens=False, return_tensors="pt", **given)
        )
        handle: PatchHandle | None = self.model.__dict__.get(HANDLE)
        if self._adapter.mrope and self._adapter.brings_vision(inputs) and (handle is None or handle.vision.bypassed):
            raise NotImplementedError(
                f"{self._adapter.model_type} takes new images in a later turn only with vision pruning: "
                "patch(vision=VisionPruning(...))"
            )
        return inputs

    def _joined(self, new: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        ids: torch.Tensor = new[IDS]
        names = [
            name for name, value in new.items()
            if name not in (IDS, MASK) and torch.is_tensor(value) and value.shape == ids.shape
        ]  # fmt: skip
        if self.ids is None:
            return ids, {name: new[name] for name in names}
        before = {name: self._per_token.get(name, torch.zeros_like(self.ids)) for name in names}
        per_token = {name: torch.cat([before[name].to(new[name]), new[name]], 1) for name in names}
        return torch.cat([self.ids, ids], 1), per_token

    def _without_end(self, sequences: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
        """Without the end that the model generated: the template writes it, and the decoder has not seen that token."""
        ends = setting(self.model, self.options, "eos_token_id")
        ends = ends if isinstance(ends, (list, tuple)) else [ends]
        return sequences[:, :-1] if answer.shape[1] and int(answer[0, -1]) in ends else sequences


def _placed(value: Any, model: Any) -> Any:
    if not torch.is_tensor(value):
        return value
    return value.to(model.device, model.dtype) if value.is_floating_point() else value.to(model.device)
