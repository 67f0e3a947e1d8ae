"""Markdown of the quality results, for the markers of README.md. Every figure comes from ``bench/results/quality``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.harness import results
from bench.harness.tables import markdown

HALF = "0.5"
MOST = 0.75  # there a learned scorer is near the whole page
KINDS = ("value", "exists", "count", "list")
FIRST = "seed-0"  # the committed checkpoint; the other files are of models trained with other seeds
Cell = dict[str, Any]


def block(name: str, folder: Path) -> str:
    """The text of a marker: ``quality-`` and one of `BLOCKS`."""
    content = results.load(folder / f"{FIRST}.json")
    part = {"quality-pruning": "uniform"}.get(name, name.removeprefix("quality-"))
    if part not in content["parts"]:
        return "Nothing measured yet."
    measured = content["parts"][part]
    text = BLOCKS[name](measured)
    if name == "quality-pruning":
        others = {file.stem: results.load(file)["parts"].get("uniform") for file in sorted(folder.glob("seed-*.json"))}
        text += "\n\n" + model_seeds({stem: found for stem, found in others.items() if found})
    if name == "quality-safety":
        others = {file.stem: results.load(file)["parts"].get("safety") for file in sorted(folder.glob("seed-*.json"))}
        text += "\n\n" + safe_seeds({stem: found for stem, found in others.items() if found})
    return f"{caption(content['runs'][measured['run']], measured)}\n\n{text}"


def caption(run: Cell, measured: Cell) -> str:
    return (
        f"The small VLM of `bench/tinyvlm`, exact match on {measured['samples']} test pages; transformers "
        f"{run['transformers']}, torch {run['torch']}, {run['device']}, commit {run['commit']}, {run['time'][:10]}.\n"
        f"`{run['command']}`"
    )


def pruning(measured: Cell) -> str:
    """Methods by keep ratio, then the paired comparisons."""
    ratios = list(next(iter(measured["rates"].values())))
    rows = [
        [method, *(cell(rates[ratio]) for ratio in ratios), ", ".join(f"{run:.3f}" for run in rates["0.5"]["runs"])]
        for method, rates in measured["rates"].items()
    ]
    rows.insert(0, ["full", *[cell(measured["full"])] * len(ratios), ""])
    head = ("method", *(f"keep {ratio}" for ratio in ratios), "seeds at 0.5")
    return markdown(head, rows) + "\n\n" + comparisons(measured["paired"])


def comparisons(pairs: list[Cell]) -> str:
    """Paired differences on the same samples, by keep ratio where both sides have one."""
    rows: dict[str, dict[str, str]] = {}
    for pair in pairs:
        first, ratio = pair["first"].rsplit("/", 1)
        second = pair["second"].rsplit("/", 1)[0]
        rows.setdefault(f"{first} − {second}", {})[ratio] = difference(pair)
    ratios = [ratio for ratio in falling(rows.values()) if float(ratio) < MOST]
    head = ("paired difference", *(f"keep {ratio}" for ratio in ratios))
    return markdown(head, [[name, *(row.get(ratio, "-") for ratio in ratios)] for name, row in rows.items()])


def model_seeds(found: dict[str, Cell]) -> str:
    """The headline rows of every trained model."""
    ratios = falling(rates for measured in found.values() for rates in measured["rates"].values())
    ratios, rows = [ratio for ratio in ratios if float(ratio) < MOST], []
    for stem, measured in found.items():
        for method, rates in measured["rates"].items():
            if method in ("random", "spiral", "cosine") or method.startswith("learned"):
                cells = [cell(rates[ratio]) if ratio in rates else "-" for ratio in ratios]
                rows.append([stem.replace("-", " "), cell(measured["full"]), method, *cells])
    return markdown(("model", "full", "method", *(f"keep {ratio}" for ratio in ratios)), rows)


def falling(rows: Iterable[Cell]) -> list[str]:
    """The keep ratios of some rows, largest first."""
    return sorted({ratio for row in rows for ratio in row}, key=float, reverse=True)


def methods(measured: Cell) -> str:
    """Every method by share held, its difference to ours, and at half of the tokens by kind of question."""
    ratios = falling(measured["rates"].values())
    full, ours = measured["full"], measured["ours"]
    head = ("method", *(f"keep {ratio}" for ratio in ratios))
    rows = [["full", *[cell(full)] * len(ratios)]]
    for name, rates in measured["rates"].items():
        rows.append([name, *(cell(rates[ratio]) if ratio in rates else "-" for ratio in ratios)])
    paired: dict[str, dict[str, str]] = {}
    for pair in measured["paired"]:
        name, ratio = pair["first"].rsplit("/", 1)
        if pair["second"].rsplit("/", 1)[0] == ours:
            paired.setdefault(f"{name} − {ours}", {})[ratio] = difference(pair)
    others = [[name, *(row.get(ratio, "-") for ratio in ratios)] for name, row in paired.items()]
    kinds = list(full["kinds"])
    by_kind = [["full", *(cell(full["kinds"][kind]) for kind in kinds)]]
    for name, rates in measured["rates"].items():
        if HALF in rates:
            by_kind.append([name, *(cell(rates[HALF]["kinds"][kind]) for kind in kinds)])
    return "\n\n".join([
        markdown(head, rows),
        markdown(("paired difference", *head[1:]), others),
        f"By kind of question, keep {HALF}:",
        markdown(("method", *kinds), by_kind),
    ])  # fmt: skip


def costs(measured: Cell) -> str:
    """Work, bytes and time of every method, as shares of the unpruned model's."""
    ratios = sorted({ratio for found in measured["costs"].values() for ratio in found} - {"1"}, key=float, reverse=True)
    full = measured["costs"]["full"]["1"]
    rows = [["full", *[f"1 / 1 / {full['ms']:.0f} ms"] * len(ratios)]]
    for name, found in measured["costs"].items():
        if name != "full":
            cells = [found.get(ratio) for ratio in ratios]
            told = [
                "-" if one is None else f"{one['flops']:.2f} / {one['kv']:.2f} / {one['ms']:.0f} ms" for one in cells
            ]
            rows.append([name, *told])
    head = ("prefill FLOPs / K/V bytes / time", *(f"keep {ratio}" for ratio in ratios))
    return (
        f"{full['rows']} prompts in one batch: prefill FLOPs by the paper's formula and K/V bytes measured, as shares "
        f"of the unpruned model's, and the time to the first token, tower included, median of {measured['rounds']}.\n\n"
        f"{markdown(head, rows)}"
    )


def caches(measured: Cell) -> str:
    """Table 3 in shape, all methods of the cache at equal bytes."""
    shares = list(next(iter(measured["rates"].values())))
    rows = [["nothing goes", *[cell(measured["full"])] * len(shares), ""]]
    for name, rates in measured["rates"].items():
        held = ", ".join(f"{measured['bytes'][name][share] / 1024:.0f}" for share in shares)
        rows.append([name, *(cell(rates[share]) for share in shares), held])
    head = ("method", *(f"share {share}" for share in shares), "KiB of tokens at the end")
    return (
        f"Share of right tokens in transcripts of up to {measured['generated']} tokens behind prompts of "
        f"{measured['prompt']}, {measured['samples']} pages. The cache holds as many tokens as the prompt has, and a "
        f"share of {measured['held']} more.\n\n{markdown(head, rows)}"
    )


def recall(measured: Cell) -> str:
    """Dialogues of eight questions over one page: the last answer, and the vision tokens held by then."""
    rows = [["the whole page", "", cell(measured["full"]), "", ""]]
    for scores, ratios in measured["rates"].items():
        for keep, found in ratios.items():
            rows.append([f"**{scores}**", keep, "", "", ""])
            for name, one in found.items():
                held, returned = (measured[table][scores][keep].get(name) for table in ("held", "returned"))
                share = "" if returned is None else f"{returned:.2f}"
                rows.append([name, keep, cell(one), share, f"{held[0]:.0f} to {held[-1]:.0f}"])
    head = ("dialogues of eight questions", "keep", "last answer right", "loss returned", "vision tokens held")
    return markdown(head, rows)


def budgets(measured: Cell) -> str:
    """Table 5 in shape: adaptive budgets beside a uniform one that keeps as many tokens."""
    head = ("average", "budget", "kept", "uniform", "adaptive", "paired difference", "seeds")
    rows = []
    for average, methods in measured["averages"].items():
        for name, row in methods.items():
            runs = ", ".join(f"{run:.3f}" for run in row["runs"])
            rows.append(
                [average, name, f"{row['kept']:.3f}", cell(row["uniform"]), cell(row), difference(row["paired"]), runs]
            )
        rows += [
            [average, f"{name}, uniform", average, cell(found[average]), "", "", ""]
            for name, found in measured.get("controls", {}).items()
        ]
    return markdown(head, rows)


def eviction(measured: Cell) -> str:
    """Table 3 in shape: transcripts by share of right tokens, conversations by the last answer."""
    lines, talks = measured["transcripts"], measured["conversations"]
    retentions = list(next(iter(lines["rates"].values())))
    head = ("generated tokens: what goes", *(f"retention {retention}" for retention in retentions))
    rows = [["nothing", *[cell(lines["full"]["tokens"])] * len(retentions)]]
    rows += [[name, *(cell(rates[r]["tokens"]) for r in retentions)] for name, rates in lines["rates"].items()]
    first = (
        f"Share of right tokens in transcripts of 60 to 72 tokens, {lines['samples']} pages; at most "
        f"{lines['threshold']} generated tokens are held.\n\n" + markdown(head, rows)
    )
    retentions = list(next(iter(talks["rates"].values())))
    dropped = talks["dropped"]
    head = ("earlier turns: what goes", *(f"retention {r} ({dropped[r]} tokens)" for r in retentions))
    rows = [["nothing", *[cell(talks["full"])] * len(retentions)]]
    rows += [[name, *(cell(rates[retention]) for retention in retentions)] for name, rates in talks["rates"].items()]
    second = f"Exact match of the last of eight answers, {talks['samples']} conversations.\n\n" + markdown(head, rows)
    return f"{first}\n\n{second}"


def beyond(measured: Cell) -> str:
    """What is not in the paper, against the paper's scorer."""
    ratios = list(next(iter(measured["rates"].values())))
    pairs = {(pair["first"], pair["second"]): pair for pair in measured["paired"]}
    baseline = measured["baseline"]
    head = ["variant"]
    for ratio in ratios:
        head += [f"keep {ratio}", f"− {baseline}"]
    rows = []
    for name, rates in measured["rates"].items():
        row = [name]
        for ratio in ratios:
            row += [cell(rates[ratio]), difference(pairs[f"{name}/{ratio}", f"{baseline}/{ratio}"])]
        rows.append(row)
    return markdown(tuple(head), rows)


def safety(measured: Cell) -> str:
    """What each setting keeps and answers on every kind of pages, all together and by kind of question."""
    parts = []
    for name, rows in measured["pages"].items():
        head = ("setting", "kept", "right", "− all tokens", "the floor gives", "warned of", *KINDS)
        lines = [
            [
                setting,
                f"{row['kept']:.3f}",
                cell(row),
                difference(row["full"]) if row["kept"] < 1 else "",
                difference(row["floor"]) if "floor" in row else "",
                f"{row['warned']:.2f}" if row["kept"] < 1 else "",
                *(f"{row['kinds'][kind]['mean']:.3f} ({row['kinds'][kind]['kept']:.2f})" for kind in KINDS),
            ]
            for setting, row in rows.items()
        ]
        parts.append(f"Pages {name}; by kind of question, kept shares in brackets:\n\n{markdown(head, lines)}")
    return "\n\n".join(parts)


def safe_seeds(found: dict[str, Cell]) -> str:
    """Every setting on every trained model: what it keeps, and its difference to all tokens, by kind of pages."""
    settings = list(dict.fromkeys(name for part in found.values() for name in next(iter(part["pages"].values()))))
    pages = list(next(iter(found.values()))["pages"])
    rows = []
    for setting in settings:
        for stem, part in found.items():
            measured = [part["pages"][kind].get(setting) for kind in pages]
            if all(measured):
                told = [
                    cell(row) if row["kept"] == 1 else f"{difference(row['full'])}, kept {row['kept']:.3f}"
                    for row in measured
                ]
                rows.append([setting, stem.replace("-", " "), *told])
    return f"Every trained model, differences to all tokens:\n\n{markdown(('setting', 'model', *pages), rows)}"


def cell(value: Cell) -> str:
    return f"{value['mean']:.3f} ± {value['error']:.3f}"


def difference(pair: Cell) -> str:
    """A paired difference with its standard error; the exact test's p where it is worth a look."""
    p = pair["p_value"]
    return f"{pair['difference']:+.3f} ± {pair['error']:.3f}" + (f" (p = {p:.2g})" if p > 0.001 else "")


BLOCKS = {
    "quality-pruning": pruning,
    "quality-methods": methods,
    "quality-costs": costs,
    "quality-budgets": budgets,
    "quality-caches": caches,
    "quality-recall": recall,
    "quality-eviction": eviction,
    "quality-beyond": beyond,
    "quality-safety": safety,
}

__all__ = ["BLOCKS", "block"]
