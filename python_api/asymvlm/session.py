"""One question to one model, with and without pruning: what the command line and the demo share."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import asymvlm

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")


class InputError(ValueError):
    """Something the caller gave cannot be used. One line: the value found and the value wanted."""


@dataclass(frozen=True)
class Generation:
    """A greedy answer. ``new_tokens`` counts what was generated, an end-of-text token included."""

    text: str
    new_tokens: int


@dataclass(frozen=True)
class FirstToken:
    """Time to first token (ms, one entry a run) and the K/V cache bytes the prompt then holds; None if not countable."""

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

    def prepare(self, images: Sequence[Image], question: str) -> Any:
        """Model inputs for ``images`` followed by ``question``, batch 1, on the model's device and in its dtype.

        Uses the processor's chat template; a processor without one gets its image placeholders, a newline, the question.

        Raises:
            InputError: if the processor cannot build a prompt from them.
        """
        try:
            if getattr(self.processor, "chat_template", None):
                content = [{"type": "image", "image": image} for image in images]
                content.append({"type": "text", "text": question})
                inputs = self.processor.apply_chat_template(
                    [{"role": "user", "content": content}],
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=True,
                    return_tensors="pt",
                )
            else:
                token = getattr(self.processor, "image_token", None)
                if token is None:
                    raise InputError(
                        f"the processor of {self.name} ({type(self.processor).__name__}) has neither a chat template nor "
                        "an image_token; wanted one of them to build a prompt"
                    )
                text = f"{token * len(images)}\n{question}"
                inputs = self.processor(images=list(images), text=text, return_tensors="pt")
        except InputError:
            raise
        except (ValueError, TypeError, IndexError, ImportError) as error:
            raise InputError(f"the processor of {self.name} refused the prompt: {first_line(error)}") from error
        return inputs.to(self.model.device, dtype=self.model.dtype)

    def generate(self, inputs: Any, max_new_tokens: int) -> Generation:
        """Greedy answer, decoded without special tokens."""
        output = self._generate(inputs, max_new_tokens=max_new_tokens)
        tokens = output.sequences[0, inputs["input_ids"].shape[1] :]
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
                    kv_bytes[pruned] = cache_bytes(output.past_key_values)
                if sum(times[False]) + sum(times[True]) > seconds * 1e3:
                    break
        finally:
            handle.enabled = enabled
        return FirstToken(times[False], times[True], kv_bytes[False], kv_bytes[True])

    @torch.inference_mode()
    def _generate(self, inputs: Any, *, max_new_tokens: int) -> Any:
        return self.model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, return_dict_in_generate=True, use_cache=True
        )

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def load(model: str, *, dtype: str = "auto", device: str = "auto") -> Session:
    """Load a model and its processor, from a folder or by hub id.

    Args:
        model: a folder written by ``save_pretrained``, or a hub id.
        dtype: one of `DTYPES`; "auto" is the checkpoint's own.
        device: one of `DEVICES`; "auto" is CUDA where torch sees it.
    Raises:
        InputError: if it is not there, not supported, incomplete, or the device is missing. Checked in that order, before
            any weight is read.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    source = _locate(model)
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"cannot load model {model!r}: {first_line(error)}") from error
    supported = asymvlm.supported_models()
    if config.model_type not in supported:
        raise InputError(f"model {model!r} has model_type {config.model_type!r}, wanted one of {', '.join(supported)}")
    target = _device(device)
    try:
        processor = AutoProcessor.from_pretrained(source)
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        raise InputError(f"cannot load the processor of {model!r}: {first_line(error)}") from error
    if not hasattr(processor, "image_processor"):
        raise InputError(
            f"{model!r} holds a {type(processor).__name__}, wanted a processor that takes images "
            "(processor_config.json or preprocessor_config.json)"
        )
    try:
        loaded, info = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, output_loading_info=True)
    except Exception as error:  # whatever a damaged checkpoint raises, down to safetensors' own class
        raise InputError(f"cannot load the weights of {model!r}: {first_line(error)}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        logger.warning("%d weights are not in %s and stay random, first: %s", len(missing), model, missing[0])
    return Session(model, loaded.to(target).eval(), processor)


def open_image(path: str | Path) -> Image:
    """Read an image as RGB, upright by its EXIF tag.

    Raises:
        InputError: if the file is missing, cannot be read, or is not an image.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    file = Path(path).expanduser()
    if not file.is_file():
        found = "a folder" if file.is_dir() else "no such file"
        raise InputError(f"image {path}: {found}, wanted an image file")
    try:
        with Image.open(file) as image:
            upright = ImageOps.exif_transpose(image)
            return upright.convert("RGB")
    except UnidentifiedImageError as error:
        raise InputError(f"image {path}: not a format Pillow can read, wanted a PNG, JPEG or the like") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"image {path}: cannot be read ({first_line(error)}), wanted a whole image file") from error


def visible_region(image: Image, image_processor: Any) -> Image:
    """The part of ``image`` that becomes patches: a processor that resizes the short edge and crops loses the margins."""
    crop = getattr(image_processor, "crop_size", None)
    size = getattr(image_processor, "size", None)
    if not getattr(image_processor, "do_center_crop", False) or not crop or not size or not size.get("shortest_edge"):
        return image
    scale = min(image.size) / size["shortest_edge"]  # source pixels for one pixel of the model's input
    width, height = min(image.width, crop["width"] * scale), min(image.height, crop["height"] * scale)
    left, top = (image.width - width) / 2, (image.height - height) / 2
    return image.crop((round(left), round(top), round(left + width), round(top + height)))


def cache_bytes(cache: Any) -> int | None:
    """Bytes of keys and values a transformers cache holds, all layers; None for a cache without per-layer tensors."""
    layers = getattr(cache, "layers", None)
    if not layers:
        return None
    tensors = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


def first_line(error: BaseException) -> str:
    """The first line of a message, for errors that must fit in one."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def _locate(model: str) -> str:
    folder = Path(model).expanduser()
    wanted = "wanted a folder written by save_pretrained, or a hub id"
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(f"model folder {model} has no config.json, {wanted}")
        return str(folder)
    if folder.exists():
        raise InputError(f"model {model} is a file, {wanted}")
    if not model or model.startswith(("/", "./", "../", "~")) or model.count("/") > 1:
        raise InputError(f"model {model!r}: no such folder, {wanted}")
    return model


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device 'cuda' was asked for but torch sees no CUDA device, wanted 'auto' or 'cpu' here")
    return torch.device(name)
