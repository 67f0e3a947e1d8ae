"""The learned weight on disk and on the hub: safetensors, and a config that says what it is and for which model.

`config.json` holds the budget, the gaps seen in training or calibration, the base model, the settings and the versions.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import ModelCard, ModelHubMixin, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import asymvlm_kernels
from asymvlm.files.json_files import check_plain, first_line, read_object
from asymvlm.settings.budget_file import budget_from_dict, budget_to_dict
from asymvlm.settings.identity import ModelIdentity, identify, is_hub_id
from asymvlm.settings.weights import fp32_weight
from asymvlm_kernels import Budget, ScoreBudget, UniformBudget

WEIGHT_FILE, CONFIG_FILE = "scorer.safetensors", "config.json"
FORMAT = 1  # of the config; raised when an older reader would misread it
QUANTILES = tuple(i / 20 for i in range(21))
_PACKAGES = ("torch", "transformers")
_EXAMPLE = '{"format": 1, "base": {"width": 4096}}'
CARD = """---
{{ card_data }}
---

# Scorer of vision tokens for {{ base }}

A learned weight of width {{ width }} that ranks the vision tokens of a prompt by their similarity to its text, so that
the least important ones can be dropped before prefill. Method: {{ paper_url }}.

```python
import asymvlm

handle = asymvlm.patch(model, vision=asymvlm.VisionPruning(scorer="{{ repo_id }}"))
```

Budget: `{{ budget }}`. Trained on: {{ data }}. A budget's gaps belong to this model; others are refused.
"""


@dataclasses.dataclass(frozen=True)
class GapStatistics:
    """Importance gaps of a set of samples under one (model, weight)."""

    mean: float
    quantiles: tuple[float, ...]  # at `QUANTILES`: 0, 0.05, ... 1
    samples: int

    def __post_init__(self) -> None:
        numbers = (self.mean, *self.quantiles)
        if not all(_is_number(value) for value in numbers) or list(self.quantiles) != sorted(self.quantiles):
            raise ValueError(f"gaps must be finite numbers, quantiles rising, got mean {self.mean!r}, {self.quantiles}")
        if len(self.quantiles) != len(QUANTILES):
            raise ValueError(f"gaps must have {len(QUANTILES)} quantiles, got {len(self.quantiles)}")
        if not isinstance(self.samples, int) or isinstance(self.samples, bool) or self.samples < 1:
            raise ValueError(f"gaps must be of 1 sample or more, got samples={self.samples!r}")

    @classmethod
    def of(cls, gaps: torch.Tensor) -> GapStatistics | None:
        """Statistics of ``(n,)`` gaps; NaN gaps do not count. None where nothing is left."""
        known = gaps[~gaps.isnan()].double().cpu()
        if not len(known):
            return None
        quantiles = torch.quantile(known, torch.tensor(QUANTILES, dtype=torch.float64)).tolist()
        return cls(float(known.mean()), tuple(quantiles), len(known))


class Scorer(
    ModelHubMixin,
    library_name="asymvlm",
    tags=["asymvlm", "vision-token-pruning"],
    model_card_template=CARD,
    paper_url="https://arxiv.org/abs/2605.29535",
):
    """A learned weight of Eq. 1, the budget that goes with it, and where it comes from.

    Args:
        weight: ``(D,)`` floating point, kept as fp32 on the CPU.
        base: the model it was trained for; a bare width will do for one made by hand.
        budget: used by ``VisionPruning(scorer=...)`` unless one is given; None means none is known.
        gaps: importance gaps under this model and weight.
        training: settings, data, losses: plain values, for the record.
        calibration: how ``budget`` was chosen, for the record.
    Raises:
        ValueError: on a weight that is not a vector, or not finite in fp32 (`asymvlm.settings.weights`), or a base of
            another width.
    """

    weight: torch.Tensor

    def __init__(
        self,
        weight: torch.Tensor,
        base: ModelIdentity | None = None,
        budget: Budget | ScoreBudget | None = None,
        gaps: GapStatistics | None = None,
        training: Mapping[str, Any] | None = None,
        calibration: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(weight, torch.Tensor) or weight.ndim != 1 or not weight.is_floating_point():
            found = f"{tuple(weight.shape)} {weight.dtype}" if isinstance(weight, torch.Tensor) else repr(weight)
            raise ValueError(f"weight must be a (D,) floating-point tensor, got {found}")
        single = fp32_weight("weight", weight)
        if base is not None and base.width != len(weight):
            raise ValueError(f"weight must have the width {base.width} of {base.model_id!r}, got {len(weight)}")
        self.weight = single.to("cpu", copy=True)
        self.base = ModelIdentity(len(weight)) if base is None else base
        self.budget = budget
        self.gaps = gaps
        for name, record in (("training", training), ("calibration", calibration)):
            if record is not None and not isinstance(record, Mapping):
                raise ValueError(f"{name} must be a mapping of plain values, got {record!r}")
        self.training = dict(training or {})
        self.calibration = dict(calibration or {})

    def __repr__(self) -> str:
        name = self.base.model_id or self.base.model_type or "unknown model"
        return f"Scorer(width={self.base.width}, base={name!r}, budget={self.budget})"

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Scorer) and torch.equal(self.weight, other.weight) and self._record() == other._record()
        )

    __hash__ = None  # type: ignore[assignment]

    def replace(self, **changes: Any) -> Scorer:
        """A copy with some arguments of the constructor changed."""
        fields = ("weight", "base", "budget", "gaps", "training", "calibration")
        unknown = changes.keys() - set(fields)
        if unknown:
            raise ValueError(f"{sorted(unknown)[0]!r} found, wanted one of {', '.join(fields)}")
        return Scorer(**{**{name: getattr(self, name) for name in fields}, **changes})

    def check_model(self, model: nn.Module) -> None:
        """Refuse a model that this weight was not trained for.

        The same model is one of equal width and type whose vision tower, projector and embeddings are the same, or
        that carries the same hub id. A fine-tune that left those parts alone counts as the same.

        Raises:
            ValueError: naming what was found and what was wanted.
        """
        if reason := self.base.why_not(identify(model)):
            hint = "" if "width" in reason else "; scorer.transfer(model) takes the weight over without its budget"
            raise ValueError(f"the scorer was trained for another model: {reason}{hint}")

    def transfer(self, model: nn.Module, *, keep_budget: bool = False) -> Scorer:
        """The same weight for another model of its width and type, such as a fine-tune: the caller vouches for it.

        Gaps belong to one model, so the gap statistics go, and with them the budget unless it is uniform or
        ``keep_budget`` is set; calibrate again.

        Raises:
            ValueError: on another width or ``model_type``.
        """
        target = identify(model)
        if target.width != self.base.width or (self.base.model_type and self.base.model_type != target.model_type):
            raise ValueError(f"the scorer cannot be transferred: {self.base.why_not(target)}")
        keep = keep_budget or isinstance(self.budget, UniformBudget)
        return self.replace(base=target, budget=self.budget if keep else None, gaps=None, calibration={})

    def _record(self) -> dict[str, Any]:
        """The config as JSON."""
        return {
            "format": FORMAT,
            "base": dataclasses.asdict(self.base),
            "budget": None if self.budget is None else budget_to_dict(cast("Any", self.budget)),
            "gaps": self.gaps and dataclasses.asdict(self.gaps) | {"quantiles": list(self.gaps.quantiles)},
            "training": self.training,
            "calibration": self.calibration,
        }

    def _save_pretrained(self, save_directory: Path) -> None:
        versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
        record = {**self._record(), "versions": {"asymvlm-kernels": asymvlm_kernels.__version__, **versions}}
        text = json.dumps(_plain(record), indent=2, allow_nan=False) + "\n"  # before any file is written
        save_file({"weight": self.weight}, save_directory / WEIGHT_FILE)
        (save_directory / CONFIG_FILE).write_text(text, encoding="utf-8")

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The README of a saved scorer: what it is, for which model, and how to use it."""
        base = self.base.model_id if is_hub_id(self.base.model_id) else self.base.model_type or "a model"
        facts = {"base": base, "width": self.base.width, "budget": self.budget, "repo_id": "owner/name"}
        card = super().generate_model_card(
            *args, **{**facts, "data": self.training.get("data") or "unnamed samples", **kwargs}
        )
        if is_hub_id(self.base.model_id):
            card.data["base_model"] = self.base.model_id
        return card

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Scorer:
        """Load a scorer from a folder written by ``save_pretrained``, or from the hub.

        Args:
            pretrained_model_name_or_path: the folder, or a hub id ``owner/name``.
            options: of `huggingface_hub.ModelHubMixin.from_pretrained`: ``revision``, ``token``, ``cache_dir``, ...
        Raises:
            ValueError: if there is no such folder, or what is there is not a scorer.
        """
        name = str(pretrained_model_name_or_path)
        if "\0" in name:
            raise ValueError(f"scorer {name!r}: a path cannot hold a NUL")
        folder = Path(os.path.expanduser(name))
        if os.path.isdir(folder):
            for file in (CONFIG_FILE, WEIGHT_FILE):
                if not (folder / file).is_file():
                    raise ValueError(f"scorer {name}: no {file} in it, wanted a folder written by save_pretrained")
            name = str(folder)
            read_object(folder / CONFIG_FILE, _EXAMPLE)
        elif name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise ValueError(f"scorer {name}: no such folder, wanted one written by save_pretrained, or a hub id")
        try:
            loaded: Scorer = super().from_pretrained(name, **options)
        except (AttributeError, RecursionError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"scorer {name}: its {CONFIG_FILE} is no JSON object ({first_line(error)})") from error
        except (OSError, HfHubHTTPError) as error:  # of the hub; it names the repository, the cache or the network
            reason = first_line(error)
            raise ValueError(f"scorer {name}: no such folder, and the hub does not give it ({reason})") from error
        return loaded

    @classmethod
    def _from_pretrained(cls, *, model_id: str, config: dict[str, Any] | None = None, **options: Any) -> Scorer:
        if Path(model_id).is_dir():
            file = str(Path(model_id) / WEIGHT_FILE)
        else:
            file = hf_hub_download(
                model_id,
                WEIGHT_FILE,
                revision=options.get("revision"),
                cache_dir=options.get("cache_dir"),
                force_download=bool(options.get("force_download")),
                local_files_only=bool(options.get("local_files_only")),
                token=options.get("token"),
            )
        try:
            return cls._read(config, load_file(file))
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError, SafetensorError, OSError) as error:
            raise ValueError(f"scorer {model_id}: not one of ours ({first_line(error)})") from error

    @classmethod
    def _read(cls, config: dict[str, Any] | None, tensors: dict[str, torch.Tensor]) -> Scorer:
        if not isinstance(config, dict) or "base" not in config or "weight" not in tensors:
            raise ValueError(f"wanted {CONFIG_FILE} with a 'base' and {WEIGHT_FILE} with a 'weight'")
        if config.get("format") != FORMAT:
            raise ValueError(f"format {config.get('format')!r} found, this version reads {FORMAT}")
        check_plain(config, CONFIG_FILE)  # also one from the hub, which is read by others
        gaps = config.get("gaps")
        return cls(
            tensors["weight"],
            ModelIdentity(**config["base"]),
            budget_from_dict(config["budget"]) if config.get("budget") else None,
            GapStatistics(**{**gaps, "quantiles": tuple(gaps["quantiles"])}) if gaps else None,
            config.get("training"),
            config.get("calibration"),
        )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _plain(value: Any) -> Any:
    """JSON has neither NaN nor infinity: None stands for both."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


__all__ = ["GapStatistics", "Scorer"]
