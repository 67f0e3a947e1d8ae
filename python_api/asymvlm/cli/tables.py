"""The report of a call as a table, for `asymvlm run` and the demo."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from asymvlm.app.session import FirstToken

if TYPE_CHECKING:
    from asymvlm.cache.report import EvictionReport
    from asymvlm.report.pruning import PruningReport


def report_table(report: PruningReport, *, first_token: FirstToken | None = None, title: str | None = None) -> Table:
    """Row 0 of a report, full against pruned. With ``first_token``, its times and measured K/V bytes too.

    The fastest run stands beside the median: on a busy machine the two differ, and a reader should see it.
    """
    table = Table(
        title=escape(title) if title else None, title_justify="left", title_style="bold", caption_justify="left"
    )
    table.add_column("")
    for name in ("full", "pruned", "saved"):
        table.add_column(name, justify="right")
    before, after = report.tokens_before[0], report.tokens_after[0]
    vision, kept = report.vision_tokens[0], report.kept[0]
    table.add_row("prompt tokens", f"{before:,}", f"{after:,}", _saved(before, after))
    table.add_row("vision tokens (K kept)", f"{vision:,}", f"{kept:,}", _saved(vision, kept))
    full_bytes, pruned_bytes, name = report.kv_bytes_before, report.kv_bytes, "K/V cache after prefill"
    if first_token is not None:
        full_bytes, pruned_bytes, name = first_token.full_kv_bytes, first_token.pruned_kv_bytes, f"{name}, measured"
    if full_bytes is not None and pruned_bytes is not None:
        table.add_row(name, bytes_in_words(full_bytes), bytes_in_words(pruned_bytes), _saved(full_bytes, pruned_bytes))
    flops, fewer = report.flops_before[0], report.flops_after[0]
    table.add_row("language model FLOPs, prefill", _flops(flops), _flops(fewer), _saved(flops, fewer))
    if report.vision_flops is not None:
        table.add_row("vision tower FLOPs", _flops(report.vision_flops), _flops(report.vision_flops), "-")
    if first_token is not None:
        full, pruned = first_token.full_median_ms, first_token.pruned_median_ms
        table.add_row("time to first token, median", f"{full:.1f} ms", f"{pruned:.1f} ms", _saved(full, pruned))
        full, pruned = min(first_token.full_ms), min(first_token.pruned_ms)
        table.add_row("time to first token, fastest", f"{full:.1f} ms", f"{pruned:.1f} ms", _saved(full, pruned))
        table.caption = f"Time to first token: {first_token.method}."
    return table


def decision_line(report: PruningReport) -> str:
    """What the budget decided for row 0, in one line."""
    tier, gap = report.tier[0], report.gap[0]
    return (
        f"importance gap {'not computed' if math.isnan(gap) else f'{gap:.4f}'}, keep ratio {report.keep_ratio[0]:.4g}, "
        f"K = {report.kept[0]:,} of {report.vision_tokens[0]:,}{f', tier {tier}' if tier else ''}"
    )


def _saved(before: float, after: float) -> str:
    return f"{1 - after / before:.1%}" if before else "-"


def eviction_line(report: EvictionReport) -> str:
    """What text eviction did to row 0, in one line."""
    stats = report.cache
    return (
        f"text eviction: {report.evicted[0]:,} of {report.evicted[0] + stats.held[0]:,} generated tokens evicted, "
        f"{stats.physical:,} slots in use, K/V {bytes_in_words(stats.kv_bytes)}"
    )


def bytes_in_words(count: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:,.2f} {unit}"
    return f"{count} B"


def _flops(count: int) -> str:
    for unit, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if count >= scale:
            return f"{count / scale:,.2f} {unit}FLOP"
    return f"{count:,} FLOP"
