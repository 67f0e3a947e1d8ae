"""What ``--model_args`` asks of the patch, apart from what is the wrapped model's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from asymvlm.evaluation.arms import CACHE, FULL, OWN, Arm, Choices, make_arms
from asymvlm.settings.eviction import TextEviction
from asymvlm.settings.scorer import Scorer

PAPER = "paper"
SWITCHES = {"true": True, "1": True, "false": False, "0": False}
KINDS = {"keep": "a ratio in (0, 1], or own", "retention": "a ratio in (0, 1]", "text": "all or user"}
KINDS |= dict.fromkeys(("threshold", "recent", "seed"), "a whole number") | {"spread": "true or false"}


@dataclass(frozen=True)
class Asked:
    """The patch that is asked for.

    Args:
        method: what vision tokens stay by, or, behind ``cache:``, tokens of the K/V cache; ``"full"`` keeps all.
        keep: ratio in (0, 1], as `asymvlm.evaluate` holds it for the method; ``"own"`` is the method's own budget.
        scorer: folder or hub name of a learned weight, for ``method="asymvlm"``.
        spread: scores are spread over neighbours; None does as the scorer's own budget was calibrated. Of ``"asymvlm"``
            and ``"cosine"``.
        text: what scores: ``"all"`` text, or the ``"user"``'s.
        seed: of methods that draw.
        threshold, retention, recent, evict: of `TextEviction`; ``evict`` is its method, or ``"paper"``, the setting of
            the AsymVLM paper. Without a threshold nothing is evicted.
    Raises:
        ValueError: for settings that do not go together.
    """

    method: str = "asymvlm"
    keep: float | str = OWN
    scorer: str | None = None
    spread: bool | None = None
    text: str = "all"
    seed: int = 0
    threshold: int | None = None
    retention: float | None = None
    recent: int | None = None
    evict: str | None = None

    def __post_init__(self) -> None:
        if self.method == FULL and self.keep not in (OWN, 1.0):
            raise ValueError(f"keep={self.keep} found beside method={FULL}, which keeps every token")
        if self.scorer is not None and self.method != "asymvlm":
            raise ValueError(f"scorer={self.scorer} found beside method={self.method}, it is of method=asymvlm")
        if self.spread and self.method not in ("asymvlm", "cosine"):
            raise ValueError(f"spread=true found beside method={self.method}, wanted method=asymvlm")
        if (self.threshold is None) != (self.retention is None):
            raise ValueError(f"threshold={self.threshold}, retention={self.retention} found, wanted both or neither")
        if self.threshold is None and (self.evict is not None or self.recent is not None):
            raise ValueError("evict or recent found without threshold and retention, wanted all of them")
        if self.threshold is not None and self.method.startswith(CACHE):
            raise ValueError(f"threshold={self.threshold} found beside method={self.method}, wanted one of them")

    @property
    def whole(self) -> bool:
        """Whether no token goes."""
        return self.threshold is None and (self.method == FULL or self.keep == 1)

    def arm(self, model: Any, processor: Any) -> Arm:
        """The settings for a model. Raises ValueError where it cannot serve them."""
        name, cache = self.method.removeprefix(CACHE), self.method.startswith(CACHE)
        scorer = None if self.scorer is None else Scorer.from_pretrained(self.scorer)
        choices = Choices(
            methods={} if cache or self.method == FULL else {name: name},
            keep=[1.0 if self.method == FULL else self.keep],
            cache={name: name} if cache else {},
            scorer=scorer,
            spread=self.spread,
            text=self.text,
            seed=self.seed,
        )
        return make_arms(model, processor, choices).arms[-1]

    def text_eviction(self) -> TextEviction | None:
        """Settings of the eviction of generated tokens. Raises ValueError for values out of range."""
        if self.threshold is None or self.retention is None:
            return None
        given: dict[str, Any] = {} if self.recent is None else {"recent": self.recent}
        if self.evict == PAPER:
            return TextEviction.paper(self.threshold, self.retention, **given)
        return TextEviction(self.threshold, self.retention, method=self.evict, **given)


NAMES = frozenset(entry.name for entry in fields(Asked))


def split(options: Mapping[str, Any]) -> tuple[Asked, dict[str, Any]]:
    """The patch that is asked for, and the options that are the wrapped model's.

    Raises:
        ValueError: for a value that is none of its kind.
    """
    asked = {name: _read(name, value) for name, value in options.items() if name in NAMES}
    return Asked(**asked), {name: value for name, value in options.items() if name not in NAMES}


def _read(name: str, value: Any) -> Any:
    """A value as lmms-eval parsed it from the command line, where ``spread=True`` is a bool and ``keep=1`` an int."""
    try:
        if name == "spread":
            return SWITCHES[str(value).lower()]
        if name in ("threshold", "recent", "seed"):
            return int(str(value))
        if name == "text" and value not in ("all", "user"):
            raise ValueError
        ratio = name == "retention" or (name == "keep" and value != OWN)
        if ratio and (isinstance(value, bool) or not 0 < float(value) <= 1):
            raise ValueError
        return float(value) if ratio else str(value)
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{name}={value} found in --model_args, wanted {KINDS[name]}") from None


__all__ = ["NAMES", "Asked", "split"]
