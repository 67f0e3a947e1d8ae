"""Options that several commands take. What they mean is worked out in `asymvlm.cli.options`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Store = Literal["device", "host"]
ScoredText = Literal["all", "user"]

Model = Annotated[str, typer.Option("--model", "-m", help="Folder written by save_pretrained, or a hub id.")]
Images = Annotated[list[Path], typer.Option("--image", "-i", help="Image file; repeat it for several.")]
Question = Annotated[
    str, typer.Option("--question", "-q", help="What to ask about the image; @FILE reads it from a file, - from stdin.")
]
Keep = Annotated[  # text, so that a value that is no number is told like one out of range
    str | None,
    typer.Option(
        "--keep", "-k", metavar="RATIO", help="Share of the vision tokens to keep, in (0, 1].", show_default="0.5"
    ),
]
Budget = Annotated[
    Path | None,
    typer.Option(
        "--budget", help='JSON file with a budget, e.g. {"type": "uniform", "ratio": 0.5}; instead of --keep.'
    ),
]
Scorer = Annotated[
    str | None,
    typer.Option("--scorer", "-s", help="Scorer: a folder, or a hub id. Brings its budget; cosine similarity if none."),
]
AnyModel = Annotated[
    bool, typer.Option("--any-model", help="Use --scorer on a model it was not trained for, of equal width.")
]
Scored = Annotated[
    ScoredText,
    typer.Option("--text", help="What vision is scored against: all text tokens, or the words of the user's turns."),
]
Method = Annotated[
    str | None,
    typer.Option(
        "--method", help="What decides which vision tokens stay, by name: see asymvlm methods. Not the scorer's."
    ),
]
SpreadScores = Annotated[
    bool | None,
    typer.Option(
        "--spread/--no-spread",
        help="Hand scores on to neighbours on the same line of an image.",
        show_default="as the scorer's budget was calibrated, where that is used",
    ),
]
AtLeastRelevant = Annotated[
    bool,
    typer.Option("--at-least-relevant", help="Keep all tokens that look relevant where these are unusually many."),
]
TextThreshold = Annotated[
    int | None, typer.Option("--text-threshold", help="Generated tokens that are held before any is evicted.")
]
TextRetention = Annotated[
    str | None,
    typer.Option(
        "--text-retention",
        metavar="RATIO",
        help="Share of the threshold that remains after an eviction, in (0, 1].",
        show_default="0.5",
    ),
]
Longest = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens.")]
Temperature = Annotated[
    float | None, typer.Option("--temperature", help="Draw the answer at this temperature; greedy if none.")
]
TopP = Annotated[
    float | None, typer.Option("--top-p", help="Draw from the likeliest tokens that hold this probability.")
]
Seed = Annotated[int, typer.Option("--seed", help="Of what is drawn.")]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Weights' type; auto is the checkpoint's own.")]
Device = Annotated[
    str, typer.Option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ...; auto is CUDA where there is one.")
]
DeviceMap = Annotated[
    str | None,
    typer.Option("--device-map", metavar="MAP", help="Spread the weights over devices: auto, balanced, sequential."),
]
EightBit = Annotated[bool, typer.Option("--load-in-8bit", help="Weights in 8 bits (CUDA, needs bitsandbytes).")]
FourBit = Annotated[bool, typer.Option("--load-in-4bit", help="Weights in 4 bits (CUDA, needs bitsandbytes).")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, everything else on stderr.")]

# where train, calibrate and evaluate get their samples from
Data = Annotated[
    Path | None, typer.Option("--data", help='JSONL file, {"image": ..., "question": ..., "answer": ...} a line.')
]
Dataset = Annotated[
    str | None, typer.Option("--dataset", help="Name or folder for datasets.load_dataset, instead of --data.")
]
Split = Annotated[str, typer.Option("--split", help="Split of --dataset.")]
Columns = Annotated[str, typer.Option("--columns", help="Columns of --dataset that hold image, question and answer.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Use the first samples only.")]
COLUMNS = "image,question,answer"
