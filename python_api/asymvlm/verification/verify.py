"""`verify`: every check in turn on one model, patched and unpatched in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import transformers
from torch import nn

from asymvlm.files.json_files import first_line
from asymvlm.hf.peft import unwrapped
from asymvlm.models import adapter_for
from asymvlm.settings.eviction import TextEviction
from asymvlm.settings.policies import VisionPruning
from asymvlm.verification import samples
from asymvlm.verification.batch import check_batch
from asymvlm.verification.evicting import check_eviction
from asymvlm.verification.pruning import check_pruning
from asymvlm.verification.removal import check_removal
from asymvlm.verification.report import FAIL, PASS, SKIPPED, CheckRow, Verification
from asymvlm.verification.state import changes, snapshot
from asymvlm.verification.subject import Subject

WITHOUT_MEASURE = "the unpatched model could not be measured against itself, see above"


def verify(
    model: nn.Module,
    inputs: Mapping[str, Any] | None = None,
    *,
    vision: VisionPruning | None = None,
    text: TextEviction | None = None,
    processor: Any = None,
    steps: int = 8,
    progress: Callable[[str], None] | None = None,
) -> Verification:
    """Prove on this model, device, dtype and attention that pruning and eviction equal masking, and leave no trace.

    The pruned run is compared with a run of the unpatched model on all tokens that cannot see the dropped ones, the
    evicting run with one that cannot see the evicted ones, a batch with its samples, and the model after removal with
    the model before. A difference may be four times the unpatched model's own (run again, padded otherwise, in another
    batch), and at least a floor by dtype. The model is used in place; about 15 short calls of ``generate``.

    Args:
        model: a supported model in eval mode, without a patch; a PEFT model around one.
        inputs: of ``model.generate``: ``input_ids`` ``(B, S)``, pixels, ... on the model's device, padded on the left.
            One row lets a batch be checked too. None has them made by ``processor``, or drawn where the family allows.
        vision: the pruning to verify; None means ``VisionPruning()``.
        text: the eviction to verify, with a small threshold in place of its own; None means the usual settings.
        processor: makes inputs from a drawn picture and a question, where none are given.
        steps: tokens to decode in the checks of pruning, at least 2.
        progress: called with a few words before each part.
    Returns:
        `Verification`. An error inside a check is a failed row.
    Raises:
        ValueError: for a model or inputs that nothing can be verified on, naming what to pass.
        RuntimeError: if the model is patched.
    """
    model = unwrapped(model)
    adapter = adapter_for(model)
    if any("asymvlm" in name for name in model.__dict__):
        raise RuntimeError(f"{type(model).__name__} is patched: remove the handle first, verify patches by itself")
    if model.training:
        raise ValueError(f"{type(model).__name__} is in training mode, where runs differ: call model.eval() first")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
        raise ValueError(f"steps must be a whole number of at least 2, got {steps!r}")
    vision = VisionPruning() if vision is None else vision
    vision.check_model(model)
    if vision.inside is not None:
        raise NotImplementedError(f"{vision.method!r} works inside the decoder, which verify does not know")
    if inputs is None:
        inputs = samples.made_for(model, adapter) if processor is None else samples.made_by(processor, model)
    tell = progress or (lambda words: None)
    subject = Subject(model, adapter, vision, text, samples.checked(adapter, inputs), steps, tell)
    subject.run_unpatched()
    before = snapshot(model)  # after a run: transformers adds to a model on first use
    parts: list[tuple[str, Callable[[Subject], list[CheckRow]]]] = [
        ("pruned against masked", check_pruning),
        ("batch against its samples", check_batch),
        ("evicting against masked", check_eviction),
    ]
    rows = _guarded("unpatched against itself", Subject.measure_noise, subject)
    lost = any(row.verdict == FAIL for row in rows)  # there is no measure to compare by
    for name, part in parts:
        rows += [CheckRow(name, SKIPPED, note=WITHOUT_MEASURE)] if lost else _guarded(name, part, subject)
    rows += _guarded("removal: outputs", check_removal, subject)
    left = changes(before, snapshot(model))
    note = f"changed: {', '.join(left[:5])}{' ...' if len(left) > 5 else ''}" if left else ""
    rows.append(CheckRow("removal: attributes, hooks, configuration", FAIL if left else PASS, note=note))
    return Verification(type(model).__name__, _environment(model), rows)


def _guarded(name: str, part: Callable[[Subject], list[CheckRow]], subject: Subject) -> list[CheckRow]:
    """The rows of a part; an error in it is a failed row, whatever it is: that is what was asked for."""
    try:
        return part(subject)
    except Exception as error:
        return [CheckRow(name, FAIL, note=f"{type(error).__name__}: {first_line(error)}")]


def _environment(model: Any) -> dict[str, str]:
    device = torch.device(model.device)
    attention = cast("Any", model.config).get_text_config()._attn_implementation
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "attention": str(attention),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
