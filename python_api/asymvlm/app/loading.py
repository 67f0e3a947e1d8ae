"""From what a user types to a session and its images; every mistake is an InputError in one line."""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from asymvlm.app.session import InputError, Session
from asymvlm.files.json_files import first_line
from asymvlm.files.pictures import PictureError, as_rgb
from asymvlm.models import supported_models

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

VISION_EXTRA = ("torchvision", "num2words")  # what processors with a video part need
VISION_COMMAND = "pip install 'asymvlm-kernels[vision]'"


def load(
    model: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | None = None,
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
) -> Session:
    """Load a model and its processor, from a folder or by hub id.

    Args:
        model: a folder written by ``save_pretrained``, or a hub id.
        dtype: "float32", "bfloat16", "float16"; "auto" is the checkpoint's own.
        device: "cpu", "cuda", "cuda:1", ...; "auto" is CUDA where torch sees it.
        device_map: spreads the weights instead: "auto", "balanced", ... (needs accelerate).
        load_in_8bit, load_in_4bit: quantised weights (CUDA, needs bitsandbytes).
    Raises:
        InputError: if it is not there, not supported, incomplete, or the device is missing; what can be checked before
            weights are read is.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    source = known_source(model)
    target = _device(device, device_map)
    placed = _placement(device_map, load_in_8bit, load_in_4bit, target)
    try:
        # code from a repository is never run, and transformers is not to ask about it on stdin either
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
    except ImportError as error:
        raise InputError(f"cannot load the processor of {model!r}: {_missing_package(error)}") from error
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"cannot load the processor of {model!r}: {first_line(error)}") from error
    if not hasattr(processor, "image_processor"):
        raise InputError(
            f"{model!r} holds a {type(processor).__name__}, wanted a processor that takes images "
            "(processor_config.json or preprocessor_config.json)"
        )
    try:
        pair: Any = AutoModelForImageTextToText.from_pretrained(
            source, dtype=dtype, output_loading_info=True, trust_remote_code=False, **placed
        )
    except Exception as error:  # whatever a damaged checkpoint raises, down to safetensors' own class
        raise InputError(f"cannot load the weights of {model!r}: {first_line(error)}") from error
    loaded, info = pair
    if missing := sorted(info["missing_keys"]):
        logger.warning("%d weights are not in %s and stay random, first: %s", len(missing), model, missing[0])
    return Session(model, (loaded if placed else loaded.to(target)).eval(), processor)


def known_source(model: str) -> str:
    """The folder or hub id of a supported model. Raises InputError where its configuration tells another."""
    from transformers import PretrainedConfig

    source = locate(model)
    try:
        config, _ = PretrainedConfig.get_config_dict(source)
    except (OSError, ValueError, TypeError, AttributeError) as error:  # the last two: JSON, but no object
        raise InputError(f"cannot load model {model!r}: {first_line(error).rstrip('.')}; {_WANTED}") from error
    found = config.get("model_type") if isinstance(config, dict) else None
    supported = supported_models()
    if found not in supported:
        raise InputError(f"model {model!r} has model_type {found!r}, wanted one of {', '.join(supported)}")
    return source


def load_config(model: str) -> Any:
    """The configuration of a supported model, without its weights. Raises InputError where there is none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(known_source(model), trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot read the configuration of {model!r}: {first_line(error)}") from error


def _missing_package(error: ImportError) -> str:
    """What to install; where that is not known, the whole message in one line."""
    message = " ".join(str(error).split())
    for package in VISION_EXTRA:
        if package in message.lower():
            return f"it needs {package}, which is not installed: {VISION_COMMAND}"
    return message


def open_image(path: str | Path) -> Image:
    """Read an image as RGB, upright by its EXIF tag.

    Raises:
        InputError: if the file is missing, cannot be read, or is not an image.
    """
    from PIL import Image, UnidentifiedImageError

    if str(path).startswith(("http://", "https://", "data:")):
        raise InputError(f"image {str(path)[:80]}: an address, wanted a file: download it first")
    file = Path(os.path.expanduser(path))  # os.path raises for no path at all, pathlib for some
    if not os.path.isfile(file):
        found = "a folder" if os.path.isdir(file) else "no such file"
        raise InputError(f"image {path}: {found}, wanted an image file")
    try:
        with Image.open(file) as image:
            return as_rgb(image, f"image {path}")
    except PictureError as error:
        raise InputError(str(error)) from error
    except UnidentifiedImageError as error:
        raise InputError(f"image {path}: {_not_an_image(file)}") from error
    except Image.DecompressionBombError as error:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise InputError(
            f"image {path}: too large to open safely, wanted at most {most:,} pixels: scale it down first "
            f"({first_line(error)})"
        ) from error
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"image {path}: cannot be read ({first_line(error)}), wanted a whole image file") from error


def _not_an_image(file: Path) -> str:
    """What a file is that Pillow does not know, and what to do about it."""
    with file.open("rb") as stream:
        head = stream.read(1024)
    if not head:
        return "the file is empty, wanted an image"
    if b"%PDF" in head:
        return "a PDF, wanted an image: turn its page into one first, with `pdftoppm -r 150 -png` say"
    return "not a format Pillow can read, wanted a PNG, JPEG or the like"


def visible_region(image: Image, image_processor: Any) -> Image:
    """The part of ``image`` that becomes patches: resizing by the short edge, then cropping, loses the margins.

    An image processor with a ``canvas`` of its own pads instead of cropping.
    """
    if hasattr(image_processor, "canvas"):
        canvas: Image = image_processor.canvas(image)
        return canvas
    crop = getattr(image_processor, "crop_size", None)
    size = getattr(image_processor, "size", None)
    if not getattr(image_processor, "do_center_crop", False) or not crop or not size or not size.get("shortest_edge"):
        return image
    scale = min(image.size) / size["shortest_edge"]  # source pixels for one pixel of the model's input
    width, height = min(image.width, crop["width"] * scale), min(image.height, crop["height"] * scale)
    left, top = (image.width - width) / 2, (image.height - height) / 2
    return image.crop((round(left), round(top), round(left + width), round(top + height)))


_WANTED = "wanted a folder written by save_pretrained, or the id of a hub repository within reach"


def locate(model: str) -> str:
    """The folder or hub id that a user means. Raises InputError where it is plainly neither."""
    folder = Path(os.path.expanduser(model))
    if model and os.path.isdir(folder):
        if not (folder / "config.json").is_file():
            raise InputError(f"model folder {model} has no config.json, {_WANTED}")
        return str(folder)
    if os.path.isfile(folder):
        raise InputError(f"model {model} is a file, {_WANTED}")
    if not model or model.startswith(("/", "./", "../", "~")) or model.count("/") > 1:
        raise InputError(f"model {model!r}: no such folder, {_WANTED}")
    return model


def _device(name: str, device_map: str | None) -> torch.device:
    if device_map is not None and name != "auto":
        raise InputError(f"--device {name} and --device-map {device_map} exclude each other, wanted one of them")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device: {name!r} found, wanted auto, cpu, cuda, or one of several like cuda:1") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {name!r} was asked for but torch sees no CUDA device, wanted 'auto' or 'cpu' here")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"--device: {name} found, torch sees {torch.cuda.device_count()} CUDA devices, numbered from 0"
        )
    return device


def _placement(device_map: str | None, eight: bool, four: bool, target: torch.device) -> dict[str, Any]:
    """Arguments of `from_pretrained` that place or quantise weights; empty where the model is moved as a whole."""
    if eight and four:
        raise InputError("--load-in-8bit and --load-in-4bit exclude each other, wanted one of them")
    if not (device_map or eight or four):
        return {}
    wanted = {"accelerate": "--device-map" if device_map else "--load-in-8bit" if eight else "--load-in-4bit"}
    if eight or four:
        wanted["bitsandbytes"] = "--load-in-8bit" if eight else "--load-in-4bit"
    for package, option in wanted.items():
        if importlib.util.find_spec(package) is None:
            raise InputError(f"{option} needs the package {package}, which is not installed: pip install {package}")
    placed: dict[str, Any] = {"device_map": device_map or {"": target}}
    if eight or four:
        from transformers import BitsAndBytesConfig

        placed["quantization_config"] = BitsAndBytesConfig(load_in_8bit=eight, load_in_4bit=four)
    return placed
