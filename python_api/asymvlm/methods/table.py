"""The tables of methods that `asymvlm methods` and the documents print."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from asymvlm.methods.before.base import BeforeMethod
from asymvlm.methods.cached.base import CachedMethod
from asymvlm.methods.inside.base import InsideMethod
from asymvlm.methods.registry import OURS
from asymvlm.models import registered, supported_models
from asymvlm.models.adapter import Adapter

MOMENTS: dict[type[Any], tuple[str, str]] = {  # name of the moment, and the settings that take such a method
    BeforeMethod: ("before the decoder", "VisionPruning"),
    InsideMethod: ("between its layers", "VisionPruning"),
    CachedMethod: ("in the K/V cache", "TextEviction, CacheLimit"),
}
NEEDS = {
    "needs_text": "a question",
    "needs_grid": "grids of images",
    "needs_pixels": "pixels of tokens",
    "needs_tower": "tower features",
    "needs_tower_attention": "tower attention",
    "needs_attention": "attention",
    "needs_labels": "labels of heads",
}
HEADER = ("`method=`", "class", "what it does", "paper", "needs", "families")


@dataclass(frozen=True)
class Row:
    """One method. ``families`` are names of `config.model_type`; a checkpoint may be refused for its own settings."""

    name: str
    class_name: str
    moment: str
    settings: str
    does: str
    paper: str
    needs: tuple[str, ...]
    families: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def rows() -> Iterator[Row]:
    """The library's own methods, in the order of the registry."""
    adapters = [adapter for name in supported_models() if (adapter := registered(name)) is not None]
    for kind in OURS:
        moment, settings = next(told for base, told in MOMENTS.items() if issubclass(kind, base))
        yield Row(
            name=kind.name,
            class_name=kind.__name__,
            moment=moment,
            settings="CacheLimit" if getattr(kind, "needs_limit", False) else settings,
            does=(kind.__doc__ or "").strip().splitlines()[0].replace("``", "`"),
            paper=kind.paper,
            needs=needs(kind),
            families=tuple(adapter.model_type for adapter in adapters if not why_not(kind, adapter)),
        )


def needs(kind: type[Any]) -> tuple[str, ...]:
    """What a method reads beside the tokens themselves."""
    found = [words for flag, words in NEEDS.items() if getattr(kind, flag, False) is True]
    return ("attention", *found) if issubclass(kind, InsideMethod) else tuple(found)


def why_not(kind: type[Any], adapter: Adapter) -> str:
    """Why a family cannot serve a method, whatever the checkpoint; empty where it can."""
    if issubclass(kind, InsideMethod):
        several = getattr(kind, "needs_one_axis", False) and adapter.mrope
        return adapter.closed_between_layers or ("positions of several axes" if several else "")
    for flag, told in (("needs_tower", "tower_tokens"), ("needs_tower_attention", "tower_attention")):
        if getattr(kind, flag, False) and getattr(adapter, told) is None:
            return f"its adapter does not tell its {told}"
    if getattr(kind, "needs_pixels", False) and adapter.pixels is None:
        return "its adapter does not tell which pixels a token has"
    if issubclass(kind, CachedMethod) and adapter.chunked:
        return "layers that attend in chunks"
    if issubclass(kind, CachedMethod) and kind.scope == "head" and adapter.latent_keys:
        return "one latent for all heads in the cache"
    return ""


def families_in_words(row: Row) -> str:
    """All, all but a few, or the few."""
    known = supported_models()
    missing = [name for name in known if name not in row.families]
    if not missing:
        return "all"
    if len(missing) <= len(row.families):
        return f"all but {', '.join(missing)}"
    return ", ".join(row.families)


def markdown() -> str:
    """A table for each moment, in Markdown, without a line break at its end."""
    parts, found = [], list(rows())
    for moment, _ in MOMENTS.values():
        lines = [HEADER, ("---",) * len(HEADER), *(_cells(row) for row in found if row.moment == moment)]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        parts.append(f"### {moment[0].upper()}{moment[1:]}\n\n{table}")
    return "\n\n".join(parts)


def _cells(row: Row) -> tuple[str, ...]:
    needed = ", ".join(row.needs) or "-"
    return f'`"{row.name}"`', f"`{row.class_name}`", row.does, row.paper or "-", needed, families_in_words(row)
