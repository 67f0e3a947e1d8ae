"""The tables of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from asymvlm.evaluation.arms import FULL, keep_in_words
from asymvlm.evaluation.page.figures import held
from asymvlm.evaluation.page.values import in_words, unit

Row = Mapping[str, Any]
MIB = 2**20
NONE = "–"


def of_metric(rows: Sequence[Row], metric: str, baseline: str | None) -> str:
    """Each setting's value, and its paired differences to the whole model and to the baseline."""
    head = ["method", "keep", f"{metric}, %" if unit(metric) else metric, "to full", "p", "better / worse"]
    if baseline is not None:
        head += [f"to {baseline}", "p"]
    lines = []
    for row in rows:
        found = row["metrics"][metric]
        cells = [*_names(row), in_words(metric, found["value"], found["error"])]
        cells += _difference(metric, found.get("to_full"))
        if baseline is not None:
            cells += _difference(metric, found.get("to_baseline"))[:2]
        lines.append(cells)
    return table(f"{metric}: value ± one standard error, and differences sample by sample", head, lines)


def of_costs(rows: Sequence[Row]) -> str:
    """What each setting held and took."""
    head = ["method", "keep", "tokens held, %", "first token, ms", "tokens / s", "K/V, MiB", "peak, MiB"]
    lines = []
    for row in rows:
        costs = row["costs"]
        speed, cache, peak = costs["tokens_per_second"], costs["kv_bytes"], costs["peak_bytes"]
        told = [NONE if speed is None else f"{speed:.1f}"]
        told += [NONE if size is None else f"{size / MIB:.2f}" for size in (cache, peak)]
        lines.append([*_names(row), f"{held(row):.1f}", f"{costs['first_token_ms']:.1f}", *told])
    return table("What it took: medians over batches, K/V bytes a sample", head, lines)


def of_skipped(skipped: Sequence[Row]) -> str:
    """Settings that a method cannot hold."""
    lines = [[row["method"], keep_in_words(row["keep"]), row["reason"]] for row in skipped]
    return table("Left out", ["method", "keep", "reason"], lines, "words") if lines else ""


def of_facts(facts: Sequence[tuple[str, str]]) -> str:
    """Names and values."""
    rows = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(told)}</td></tr>' for name, told in facts)
    return f'<div class="wide" tabindex="0"><table class="facts">{rows}</table></div>'


def table(caption: str, head: Sequence[str], lines: Sequence[Sequence[str]], kind: str = "numbers") -> str:
    """A table that scrolls within itself where the page is narrower; the first cell of a line names it.

    Args:
        kind: ``"words"`` breaks the lines of its last column instead.
    """
    named = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in lines
    )
    inside = f"<caption>{escape(caption)}</caption><thead><tr>{named}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="wide" tabindex="0"><table class="{kind}">{inside}</table></div>'


def _names(row: Row) -> list[str]:
    return [row["method"], "1" if row["method"] == FULL else keep_in_words(row["keep"])]


def _difference(metric: str, found: Row | None) -> list[str]:
    if found is None:
        return [NONE] * 3
    told = in_words(metric, found["difference"], found["error"], sign="+")
    return [told, _p(found["p_value"]), f"{found['better']} / {found['worse']}"]


def _p(value: float | None) -> str:
    if value is None:
        return NONE
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


__all__ = ["of_costs", "of_facts", "of_metric", "of_skipped", "table"]
