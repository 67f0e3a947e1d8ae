"""The options of `asymvlm evaluate` and what its `--help` says; `asymvlm.cli.evaluate` does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from asymvlm_cli import options
from asymvlm_cli.config import from_file
from asymvlm_cli.work import do


def evaluate(
    model: options.Model,
    samples: options.Data = None,
    dataset: options.Dataset = None,
    split: options.Split = "validation",
    columns: options.Columns = options.COLUMNS,
    limit: options.Limit = None,
    methods: Annotated[
        str, typer.Option("--method", metavar="NAMES", help="Methods to compare, see asymvlm methods; also cosine.")
    ] = "asymvlm",
    keep: Annotated[
        str,
        typer.Option(
            "--keep", "-k", metavar="RATIOS", help="Shares of the vision tokens; own: the budget of a scorer or method."
        ),
    ] = "1,0.75,0.5,0.33,0.22,0.11",
    cache: Annotated[
        str | None,
        typer.Option("--cache", metavar="NAMES", help="Methods of the K/V cache, which hold these shares of a prompt."),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            help="exact, anls, relaxed, vqa, pope-f1, mme-plus, or module:function; repeatable.",
            show_default="exact",
        ),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option("--baseline", help="Compare with this method too, at equal share.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--out", "--output", "-o", help="Folder of the results; goes on with what is there.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", help="HTML page to write: plots, tables, pictures of lost answers.")
    ] = None,
    scorer: options.Scorer = None,
    any_model: options.AnyModel = False,
    spread: options.SpreadScores = None,
    at_least_relevant: options.AtLeastRelevant = False,
    scored: options.Scored = "all",
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Prompts at a time.")] = 1,
    max_new_tokens: options.Longest = 32,
    seed: Annotated[int, typer.Option("--seed", help="Of methods that draw, and of p-values.")] = 0,
    config: Annotated[
        Path | None,
        typer.Option("--config", callback=from_file, is_eager=True, help="YAML file of these options; flags win."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, time one batch of each setting, write nothing.")
    ] = False,
    dtype: options.DtypeOption = "auto",
    device: options.Device = "auto",
    device_map: options.DeviceMap = None,
    load_in_8bit: options.EightBit = False,
    load_in_4bit: options.FourBit = False,
    as_json: options.Json = False,
) -> None:
    """Compare methods on your own questions: answers with error bars, times, bytes. Interrupted, it goes on."""
    do("evaluate", locals())


__all__ = ["evaluate"]
