"""The commands: their options and what `--help` says. The function of the same name in `asymvlm.cli` does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from asymvlm_cli import options
from asymvlm_cli.evaluation import evaluate
from asymvlm_cli.work import do

Preset = Literal["default", "paper"]
MaskedRows = Literal["text", "all"]
Method = Literal["threshold", "linear", "relative"]
Metric = Literal["exact", "anls", "relaxed"]


def run(
    model: options.Model,
    image: options.Images,
    question: options.Question,
    keep: options.Keep = None,
    budget: options.Budget = None,
    scorer: options.Scorer = None,
    any_model: options.AnyModel = False,
    scored: options.Scored = "all",
    spread: options.SpreadScores = None,
    at_least_relevant: options.AtLeastRelevant = False,
    method: options.Method = None,
    text_threshold: options.TextThreshold = None,
    text_retention: options.TextRetention = None,
    max_new_tokens: options.Longest = 64,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    seed: options.Seed = 0,
    dtype: options.DtypeOption = "auto",
    device: options.Device = "auto",
    device_map: options.DeviceMap = None,
    load_in_8bit: options.EightBit = False,
    load_in_4bit: options.FourBit = False,
    compare: Annotated[bool, typer.Option("--compare", help="Run unpruned too, and time both.")] = False,
    as_json: options.Json = False,
) -> None:
    """Ask a question about images with pruned vision tokens, and show what was saved."""
    do("run", locals())


def chat(
    model: options.Model,
    image: Annotated[list[Path] | None, typer.Option("--image", "-i", help="Image of the first question.")] = None,
    keep: options.Keep = None,
    budget: options.Budget = None,
    scorer: options.Scorer = None,
    any_model: options.AnyModel = False,
    scored: options.Scored = "all",
    spread: options.SpreadScores = None,
    at_least_relevant: options.AtLeastRelevant = False,
    recall: Annotated[
        options.Store | None,
        typer.Option(
            "--recall",
            help="Let dropped vision tokens, stored on the device or the host, come back; then nothing is evicted.",
        ),
    ] = None,
    text_threshold: Annotated[
        int | None,
        typer.Option(
            "--text-threshold", help="Generated tokens that are held before any is evicted.", show_default="512"
        ),
    ] = None,
    text_retention: options.TextRetention = None,
    turn_threshold: Annotated[
        int | None,
        typer.Option(help="Earlier answers leave whole once they hold more tokens than this.", show_default="512"),
    ] = None,
    turn_retention: Annotated[
        str | None,
        typer.Option(metavar="RATIO", help="Share of earlier answers' tokens that stays.", show_default="0.5"),
    ] = None,
    max_new_tokens: options.Longest = 512,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    seed: options.Seed = 0,
    dtype: options.DtypeOption = "auto",
    device: options.Device = "auto",
    device_map: options.DeviceMap = None,
    load_in_8bit: options.EightBit = False,
    load_in_4bit: options.FourBit = False,
    as_json: options.Json = False,
) -> None:
    """Talk about images. Questions are read from the terminal, or one a line from standard input."""
    do("chat", locals())


def heatmap(
    model: options.Model,
    image: options.Images,
    question: options.Question,
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG, PDF, SVG or JPEG to write.")],
    keep: options.Keep = None,
    budget: options.Budget = None,
    scorer: options.Scorer = None,
    any_model: options.AnyModel = False,
    scored: options.Scored = "all",
    spread: options.SpreadScores = None,
    at_least_relevant: options.AtLeastRelevant = False,
    dtype: options.DtypeOption = "auto",
    device: options.Device = "auto",
    device_map: options.DeviceMap = None,
    load_in_8bit: options.EightBit = False,
    load_in_4bit: options.FourBit = False,
    as_json: options.Json = False,
) -> None:
    """Draw the importance of every patch over the images, with the kept patches outlined and the gap in the title."""
    do("heatmap", locals())


def train(
    model: options.Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the scorer.")],
    samples: options.Data = None,
    dataset: options.Dataset = None,
    split: options.Split = "train",
    columns: options.Columns = options.COLUMNS,
    limit: options.Limit = None,
    validation: Annotated[Path | None, typer.Option("--validation", help="JSONL file; keeps the best epoch.")] = None,
    preset: Annotated[Preset, typer.Option("--preset", help="Settings to start from.")] = "default",
    keep: Annotated[
        str | None, typer.Option("--keep", "-k", metavar="RATIOS", help="Keep ratio to train for; several: 0.3,0.5.")
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Passes over the samples.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Samples a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", "--lr")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", help="tau of the soft mask.")] = None,
    strength: Annotated[float | None, typer.Option("--strength", help="C of the soft mask.")] = None,
    patience: Annotated[int | None, typer.Option("--patience", help="Stop after so many epochs without gain.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the order of samples.")] = 0,
    masked_rows: Annotated[
        MaskedRows | None,
        typer.Option("--masked-rows", help="Rows under the soft mask, text (cheaper) or all; the preset's if none."),
    ] = None,
    checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, one more forward.")
    ] = False,
    save_every: Annotated[
        int, typer.Option("--save-every", min=1, help="Steps between two saves; a minute is the most in any case.")
    ] = 100,
    restart: Annotated[bool, typer.Option("--restart", help="Do not go on from an interrupted run.")] = False,
    scored: options.Scored = "all",
    dtype: options.DtypeOption = "auto",
    device: options.Device = "auto",
    device_map: options.DeviceMap = None,
    load_in_8bit: options.EightBit = False,
    load_in_4bit: options.FourBit = False,
    as_json: options.Json = False,
) -> None:
    """Train a scorer. Interrupted, the same command goes on; under torchrun, all processes train one weight."""
    do("train", locals())


def calibrate(
    model: options.Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the scorer with its budget.")],
    scorer: options.Scorer = None,
    any_model: options.AnyModel = False,
    samples: options.Data = None,
    dataset: options.Dataset = None,
    split: options.Split = "validation",
    columns: options.Columns = options.COLUMNS,
    limit: options.Limit = None,
    average: Annotated[float, typer.Option("--average", help="Share of the vision tokens to keep on average.")] = 0.65,
    method: Annotated[Method, typer.Option("--method", help="How a sample's share follows from its scores.")] = (
        "threshold"
    ),
    minimum: Annotated[float | None, typer.Option("--minimum", help="Lowest share.")] = None,
    maximum: Annotated[float | None, typer.Option("--maximum", help="Highest share.")] = None,
    metric: Annotated[Metric, typer.Option("--metric", help="What an answer is judged by.")] = "exact",
    max_new_tokens: options.Longest = 32,
    scored: options.Scored = "all",
    spread: Annotated[
        bool,
        typer.Option("--spread", help="Hand scores on to neighbours on a line; stored with the scorer."),
    ] = False,
    background: Annotated[
        int,
        typer.Option("--background", min=0, help="Tokens least like the question that stay besides; stored likewise."),
    ] = 0,
    dtype: options.DtypeOption = "auto",
    device: options.Device = "auto",
    device_map: options.DeviceMap = None,
    load_in_8bit: options.EightBit = False,
    load_in_4bit: options.FourBit = False,
    as_json: options.Json = False,
) -> None:
    """Choose the budget that answers best at an average share. Interrupted, the same command goes on."""
    do("calibrate", locals())


def doctor(as_json: options.Json = False) -> None:
    """Show versions, devices, the chosen backend and supported models, and test pruning against plain PyTorch."""
    do("doctor", locals())


def verify(
    model: options.Model,
    image: Annotated[
        list[Path] | None,
        typer.Option("--image", "-i", help="Image file; repeat it for several. A drawn picture if none."),
    ] = None,
    question: Annotated[
        str | None,
        typer.Option("--question", "-q", help="What to ask about it; @FILE reads it from a file, - from stdin."),
    ] = None,
    keep: options.Keep = None,
    budget: options.Budget = None,
    scorer: options.Scorer = None,
    any_model: options.AnyModel = False,
    scored: options.Scored = "all",
    spread: options.SpreadScores = None,
    at_least_relevant: options.AtLeastRelevant = False,
    steps: Annotated[int, typer.Option(min=2, help="Tokens to decode in the checks of pruning.")] = 8,
    dtype: options.DtypeOption = "auto",
    device: options.Device = "auto",
    device_map: options.DeviceMap = None,
    load_in_8bit: options.EightBit = False,
    load_in_4bit: options.FourBit = False,
    attention: Annotated[
        str | None,
        typer.Option("--attn", help="Attention: sdpa, eager, flash_attention_2, ...; the model's own if none."),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Verify on this machine that a pruned run is the masked run of the same tokens. Exit code 1 if a check fails."""
    do("verify", locals())


def warmup(
    model: options.Model,
    lengths: Annotated[
        str | None,
        typer.Option("--lengths", metavar="NUMBERS", help="Tokens of the prompts to come: 700,3000. All if none."),
    ] = None,
    dtype: options.DtypeOption = "auto",
    arch: Annotated[
        int | None,
        typer.Option("--arch", help="GPU to compile for, 90 for compute capability 9.0; the one that is here if none."),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, help="Compilations at a time; one a processor if none.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option("--cache", help="Folder to compile into; Triton's own if none.", show_default=False)
    ] = None,
    methods: Annotated[
        bool, typer.Option("--methods", help="Also what other methods need: attention by column, greedy choices.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Compile all kernels that a patched model will need, before the first call. Exit code 1 if a build fails."""
    do("warmup", locals())


def methods(as_json: options.Json = False) -> None:
    """List the methods: when each decides, where it was published, what it needs, which families it serves."""
    do("methods", locals())


COMMANDS = (run, chat, heatmap, train, calibrate, evaluate, doctor, verify, warmup, methods)
