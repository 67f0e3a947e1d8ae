"""What `asymvlm evaluate` prints: the plan of a run, and its table."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from rich.markup import escape
from rich.table import Table

from asymvlm.cli import console
from asymvlm.cli.tables import bytes_in_words
from asymvlm.evaluation.arms import keep_in_words
from asymvlm.evaluation.plan import Plan
from asymvlm.evaluation.run import Evaluation


def plan_lines(plan: Plan) -> Iterator[str]:
    """Samples, settings, and those that are left out."""
    size = plan.limits.batch_size
    yield f"{len(plan.samples)} samples in {len(plan.batches)} batches of {size}, judged by " + ", ".join(
        metric.name for metric in plan.metrics
    )
    yield f"{len(plan.arms.arms)} settings, {plan.generations} generations: " + ", ".join(
        arm.label for arm in plan.arms.arms
    )
    yield from skipped_lines(plan.arms.skipped)


def skipped_lines(skipped: list[dict[str, Any]]) -> Iterator[str]:
    for entry in skipped:
        yield f"left out: {entry['method']} {keep_in_words(entry['keep'])}: {entry['reason']}"


def show(result: Evaluation) -> None:
    """A table for each metric, and one of what the settings cost."""
    summary = result.summary
    for metric in summary["metrics"]:
        console.out.print(_table(summary, metric))
    console.out.print(_costs(summary))
    for line in skipped_lines(summary["skipped"]):
        console.print_line(line)
    console.print_line(
        "± is one standard error, differences are paired by sample, p-values are not corrected for their number"
    )
    if result.folder is not None:
        console.print_line(f"wrote {result.folder}")


def duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _table(summary: dict[str, Any], metric: str) -> Table:
    baseline = summary["baseline"]
    heads = ["method", "keep", "tokens", metric, "to full", "p", *([f"to {baseline}", "p"] if baseline else [])]
    table = _empty(f"{metric}, {summary['samples']} samples", heads)
    for row in summary["rows"]:
        judged = row["metrics"][metric]
        cells = [row["method"], keep_in_words(row["keep"]), f"{row['average_kept']:.1f}"]
        cells += [_number(judged["value"], judged["error"]), *_difference(judged.get("to_full"))]
        table.add_row(*cells, *(_difference(judged.get("to_baseline")) if baseline else ()))
    return table


def _costs(summary: dict[str, Any]) -> Table:
    heads = ["method", "keep", "first token", "tokens/s", "K/V a sample", "peak memory"]
    table = _empty("costs; the time to the first token is the median over batches", heads)
    for row in summary["rows"]:
        costs = row["costs"]
        rate, held, peak = costs["tokens_per_second"], costs["kv_bytes"], costs["peak_bytes"]
        table.add_row(
            row["method"],
            keep_in_words(row["keep"]),
            f"{costs['first_token_ms']:.1f} ms",
            "-" if rate is None else f"{rate:.1f}",
            "-" if held is None else bytes_in_words(held),
            "-" if peak is None else bytes_in_words(peak),
        )
    return table


def _empty(title: str, heads: list[str]) -> Table:
    table = Table(title=escape(title), title_justify="left", title_style="bold")
    for name in heads:
        table.add_column(escape(name), justify="left" if name == "method" else "right", overflow="fold")
    return table


def _number(value: float, error: float | None, sign: str = "") -> str:
    return f"{value:{sign}.3f}" + ("" if error is None else f"\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{error:.3f}")


def _difference(found: dict[str, Any] | None) -> tuple[str, str]:
    if found is None:
        return "", ""
    return _number(found["difference"], found["error"], "+"), f"{found['p_value']:.2g}"
