"""One question to one model, with and without pruning: what the command line and the demo share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from asymvlm.files.json_files import first_line
from asymvlm.files.pictures import PictureError, as_page
from asymvlm.hf.arguments import IDS, MASK, cache_of
from asymvlm.models.flops import cache_bytes

if TYPE_CHECKING:
    from PIL.Image import Image


class InputError(ValueError):
    """Something the caller gave cannot be used. One line: the value found and the value wanted."""


@dataclass(frozen=True)
class Generation:
    """An answer. ``new_tokens`` counts what was generated, an end-of-text token included."""

    text: str
    new_tokens: int


@dataclass(frozen=True)
class FirstToken:
    """Time to first token (ms, one entry a run), and the bytes the K/V cache then holds; None if not countable."""

    full_ms: list[float]
    pruned_ms: list[float]
    full_kv_bytes: int | None
    pruned_kv_bytes: int | None

    @property
    def full_median_ms(self) -> float:
        return statistics.median(self.full_ms)

    @property
    def pruned_median_ms(self) -> float:
        return statistics.median(self.pruned_ms)

    @property
    def method(self) -> str:
        """How it was measured, in words for a table's caption."""
        runs = len(self.full_ms)
        return (
            f"median of {runs} run{'s' if runs > 1 else ''} each, full and pruned in turn, after one warm-up each; "
            "vision tower, scoring and prefill included"
        )


@dataclass(frozen=True)
class Session:
    """A loaded model with its processor."""

    name: str
    model: Any
    processor: Any

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def has_chat_template(self) -> bool:
        return bool(getattr(self.processor, "chat_template", None))

    def prepare(self, images: Sequence[Image], question: str) -> Any:
        """Model inputs for ``images`` followed by ``question``, batch 1, on the model's device and in its dtype.

        Uses the processor's chat template; one without gets its image placeholders, a newline and the question.

        Raises:
            InputError: if ``question`` holds an image placeholder, or the processor cannot build a prompt.
        """
        return self.prepare_batch([(images, question)])

    def prepare_batch(self, rows: Sequence[tuple[Sequence[Image], str]]) -> Any:
        """The same for several prompts at once, padded on the left.

        Raises:
            InputError: as `prepare` does.
        """
        token = getattr(self.processor, "image_token", None)
        for _, question in rows:
            if token and token in question:
                raise InputError(f"the question holds {token!r}, the placeholder of an image, wanted text without it")
        padded = {"padding": True, "padding_side": "left"} if len(rows) > 1 else {}
        try:
            pages = [[as_page(image, f"image {number}") for number, image in enumerate(row, 1)] for row, _ in rows]
            questions = [question for _, question in rows]
            if self.has_chat_template:
                inputs = self._from_template(pages, questions, padded)
            else:
                if token is None:
                    raise InputError(
                        f"the processor of {self.name} ({type(self.processor).__name__}) has neither a chat template "
                        "nor an image_token; wanted one of them to build a prompt"
                    )
                texts = [f"{token * len(row)}\n{question}" for row, question in zip(pages, questions, strict=True)]
                several = len(rows) > 1
                images, text = (pages, texts) if several else (pages[0], texts[0])
                inputs = self.processor(images=images, text=text, return_tensors="pt", **padded)
        except InputError:
            raise
        except PictureError as error:
            raise InputError(str(error)) from error
        except (ValueError, TypeError, IndexError, ImportError) as error:
            raise InputError(f"the processor of {self.name} refused the prompt: {first_line(error)}") from error
        if padded and (MASK not in inputs or not bool(inputs[MASK][:, -1].all())):
            raise InputError(
                f"the processor of {self.name} ({type(self.processor).__name__}) does not pad {len(rows)} prompts on "
                "the left with a mask, wanted one prompt at a time: a batch size of 1"
            )
        return inputs.to(self.model.device, dtype=self.model.dtype)

    def _from_template(self, pages: list[list[Any]], questions: list[str], padded: dict[str, Any]) -> Any:
        """Inputs by the processor's chat template; ``padded`` is empty for a single prompt."""
        talks = []
        for row, question in zip(pages, questions, strict=True):
            content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in row]
            talks.append([{"role": "user", "content": [*content, {"type": "text", "text": question}]}])
        return self.processor.apply_chat_template(
            talks if padded else talks[0],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **({"processor_kwargs": padded} if padded else {}),
        )

    def generate(self, inputs: Any, max_new_tokens: int, *, seed: int = 0, **sampling: Any) -> Generation:
        """An answer decoded without special tokens: greedy, or as ``sampling`` says, drawn from ``seed``."""
        if sampling.get("do_sample"):
            torch.manual_seed(seed)
        output = self._generate(inputs, max_new_tokens=max_new_tokens, **sampling)
        tokens = output.sequences[0, inputs[IDS].shape[1] :]
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        return Generation(tokenizer.decode(tokens, skip_special_tokens=True).strip(), len(tokens))

    def first_token(self, inputs: Any, handle: Any, *, runs: int = 5, seconds: float = 60.0) -> FirstToken:
        """Measure the time to first token with the patch on and off, in turn, so that drift hits both alike.

        Args:
            inputs: from `prepare`.
            handle: from `asymvlm.patch`; its ``enabled`` is restored.
            runs: pairs to measure after a warm-up pair, at least 1.
            seconds: no further pair starts once the measured ones took this long.
        """
        enabled = handle.enabled
        times: dict[bool, list[float]] = {False: [], True: []}
        kv_bytes: dict[bool, int | None] = {}
        try:
            for pair in range(runs + 1):
                for pruned in (False, True):
                    handle.enabled = pruned
                    self._synchronize()
                    start = time.perf_counter()
                    output = self._generate(inputs, max_new_tokens=1)
                    self._synchronize()
                    if pair > 0:  # pair 0 is the warm-up
                        times[pruned].append((time.perf_counter() - start) * 1e3)
                    kv_bytes[pruned] = cache_bytes(cache_of(output))
                if sum(times[False]) + sum(times[True]) > seconds * 1e3:
                    break
        finally:
            handle.enabled = enabled
        return FirstToken(times[False], times[True], kv_bytes[False], kv_bytes[True])

    @torch.inference_mode()
    def _generate(self, inputs: Any, **options: Any) -> Any:
        options = {"do_sample": False, "return_dict_in_generate": True, "use_cache": True} | options
        return self.model.generate(**inputs, **options)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
