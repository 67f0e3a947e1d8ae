"""The report as one HTML page: no script, nothing fetched, whatever a sample or a model wrote is escaped."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from asymvlm.evaluation.arms import FULL, keep_in_words
from asymvlm.evaluation.page import figures, tables
from asymvlm.evaluation.page.lost import RIGHT, Lost, View
from asymvlm.evaluation.page.svg import key
from asymvlm.evaluation.page.values import in_words, unit

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 0 1rem 3rem; max-width: 62rem; background: #fff; color: #1a1a1a;
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 1.5rem 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; }
figure { margin: 0; min-width: 0; }
figcaption { font-size: .875rem; }
.plots { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
.plot { display: block; width: 100%; height: auto; font-size: 12px; fill: #1a1a1a; }
.keys { list-style: none; margin: .5rem 0; padding: 0; display: flex; flex-wrap: wrap; gap: .25rem 1rem; }
.key { vertical-align: -2px; margin-right: .35rem; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .25rem; }
th, td { padding: .25rem .75rem .25rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid #ddd; }
th:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
.facts th, .facts td { text-align: left; white-space: normal; vertical-align: top; }
.words th:last-child, .words td:last-child { text-align: left; white-space: normal; }
.side { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 9.5rem), 1fr)); }
.side img { display: block; width: 100%; height: auto; border: 1px solid #bbb; }
.wrong { color: #9c1c00; } .right { color: #00592f; }
"""
# a browser holds the page to it: no script runs and nothing is fetched
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def document(
    summary: Mapping[str, Any],
    record: Mapping[str, Any],
    answers: Sequence[Mapping[str, Any]],
    lost: Sequence[Lost],
    number_lost: int,
) -> str:
    """The page.

    Args:
        summary, record, answers: of ``summary.json``, ``run.json`` and ``answers.jsonl``.
        lost: the samples to show, with their pictures.
        number_lost: how many samples some setting lost.
    """
    rows, lead = summary["rows"], summary["metrics"][0]
    title = f"{summary['model']}: {lead} on {summary['samples']} samples"
    parts = [f"<h1>{escape(title)}</h1>", _headline(rows, lead), _plots(rows, answers, lead)]
    parts.append("<h2>Answers</h2>")
    parts += [tables.of_metric(rows, metric, summary["baseline"]) for metric in summary["metrics"]]
    parts.append(
        "<p>Differences are paired, sample by sample, with one standard error; p is two-sided and not corrected for "
        "the number of comparisons.</p>"
    )
    parts += ["<h2>Costs</h2>", tables.of_costs(rows), tables.of_skipped(summary["skipped"])]
    parts += [_lost(lost, number_lost, lead), "<h2>How it was measured</h2>", tables.of_facts(_facts(record))]
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{STYLE}</style>'
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body><main>{"".join(parts)}</main></body></html>\n'


def _headline(rows: Sequence[Mapping[str, Any]], metric: str) -> str:
    found = rows[0]["metrics"][metric]
    told = in_words(metric, found["value"], found["error"]) + unit(metric).replace(",", "")
    return f"<p>With all vision tokens the model reaches {escape(metric)} {told}.</p>"


def _plots(rows: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, Any]], metric: str) -> str:
    names = enumerate(figures.methods_of(rows))
    legend = "".join(f"<li>{key(place)}{escape(name)}</li>" for place, name in names)
    shown = [
        _figure(
            figures.against_tokens(rows, metric),
            "Answers against tokens held: of the vision tokens in an average layer, or, dashed, of the prompt in the "
            "cache. Bars are one standard error.",
        ),
        _figure(figures.against_time(rows, metric), "Answers against the time to the first token."),
    ]
    if (found := figures.gaps_of(answers)) is not None:
        told = f"Importance gaps of the samples by {found[0]}: where it is large, a few tokens stand out."
        shown.append(_figure(figures.of_gaps(*found), told))
    return f'<ul class="keys">{legend}</ul><div class="plots">{"".join(shown)}</div>'


def _figure(inside: str, caption: str) -> str:
    return f"<figure>{inside}<figcaption>{escape(caption)}</figcaption></figure>"


def _lost(lost: Sequence[Lost], number: int, metric: str) -> str:
    told = f"On {number} samples the whole model is right and some setting is wrong"
    if not lost:
        return f"<h2>Lost answers</h2><p>{told}.</p>"
    more = f"; here are {len(lost)}" if len(lost) < number else ""
    intro = f"<p>{told}{more}. An answer is right where {escape(metric)} gives it {RIGHT:g} or more."
    if any(view.pictures for one in lost for view in one.views):
        intro += (
            " Pictures show what the decoder saw: patches that stay have the colour of their score, light yellow to "
            "red, the others are veiled."
        )
    elif not any(view.why for one in lost for view in (one.full, *one.views)):
        intro += " This page was made without the model, and so without pictures."
    intro += "</p>"
    return "<h2>Lost answers</h2>" + intro + "".join(_sample(one) for one in lost)


def _sample(one: Lost) -> str:
    accepted = " or ".join(f"“{answer}”" for answer in one.sample["answers"])
    head = f"<h3>{escape(str(one.sample['id']))}: {escape(one.sample['question'])}</h3>"
    wanted = f"<p>accepted: {escape(accepted)}</p>"
    return f'<section>{head}{wanted}<div class="side">{"".join(map(_view, [one.full, *one.views]))}</div></section>'


def _view(view: View) -> str:
    name = "the page, all tokens" if view.method == FULL else f"{view.method} {keep_in_words(view.keep)}"
    alt = "The page" if view.method == FULL else f"The page under {name}: {view.kept} patches or tokens stay"
    images = "".join(
        f'<img src="data:image/png;base64,{base64.b64encode(picture).decode()}" alt="{escape(alt, quote=True)}">'
        for picture in view.pictures
    )
    why = "" if view.pictures or not view.why else f" No picture: {escape(view.why)}."
    verdict = "right" if view.right else "wrong"
    told = f"{escape(name)}: {view.kept} of {view.vision_tokens} tokens, “{escape(view.answer)}”"
    caption = f'<figcaption>{told}, <strong class="{verdict}">{verdict}</strong>.{why}</figcaption>'
    return f"<figure>{images}{caption}</figure>"


def _facts(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The record, one line a field; nested ones under dotted names."""
    facts: list[tuple[str, str]] = []
    for name, found in record.items():
        if isinstance(found, Mapping):
            facts += [(f"{name}.{inner}", told) for inner, told in _facts(found)]
        elif name not in ("arms", "skipped"):
            facts.append((name, ", ".join(map(str, found)) if isinstance(found, (list, tuple)) else str(found)))
    return facts


__all__ = ["document"]
