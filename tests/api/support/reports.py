"""A made-up evaluation for its report, and what a page of it holds."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from asymvlm.evaluation.run import Evaluation

HOSTILE = "</td><script>alert('&')</script> \"quoted\" <img src=x onerror=alert(1)>"
KEEPS = (0.5, 0.25)
METHODS = ("asymvlm", "random", "cache:snapkv")
EMPTY = {"br", "hr", "img", "input", "link", "meta"}


def row(method: str, keep: float | str, value: float) -> dict[str, Any]:
    found: dict[str, Any] = {"value": value, "error": 0.05}
    if method != "full":
        found["to_full"] = {"difference": value - 0.9, "error": 0.04, "p_value": 0.0001, "better": 1, "worse": 5}
    costs = {"first_token_ms": 300 * (1 if method == "full" else float(keep)), "tokens_per_second": None}
    costs |= {"kv_bytes": 2**20, "peak_bytes": None}
    held = {"kept": 8.0, "vision_tokens": 16.0, "average_kept": 16.0 * (1 if method == "full" else float(keep))}
    return {"method": method, "keep": keep, "samples": 4, "metrics": {"anls": found}, **held, "costs": costs}


def line(sample: int, method: str, keep: float | str, score: float, gap: float | None = None) -> dict[str, Any]:
    return {
        "sample": sample,
        "method": method,
        "keep": keep,
        "answer": HOSTILE,
        "scores": {"anls": score},
        "kept": 8,
        "vision_tokens": 16,
        "gap": gap,
    }


def evaluation() -> Evaluation:
    """Four samples, the whole model right on three of them; gaps are those of ``asymvlm``."""
    rows = [row("full", 1.0, 0.9)]
    rows += [row(method, keep, 0.2 + 0.5 * keep) for method in METHODS for keep in KEEPS]
    right = {("asymvlm", 0.25): {0}, ("random", 0.5): {0, 1}, ("random", 0.25): set(), ("cache:snapkv", 0.25): {1}}
    answers = []
    for sample in range(4):
        answers.append(line(sample, "full", 1.0, float(sample < 3)))
        for method in METHODS:
            for keep in KEEPS:
                score = float(sample in right.get((method, keep), {0, 1, 2, 3}))
                answers.append(line(sample, method, keep, score, sample / 10 if method == "asymvlm" else None))
    samples = [
        {"sample": number, "id": HOSTILE, "images": [None], "question": HOSTILE, "answers": [HOSTILE], "group": None}
        for number in range(4)
    ]
    summary = {"model": HOSTILE, "samples": 4, "metrics": ["anls"], "baseline": None, "rows": rows}
    summary |= {"skipped": [{"method": "fastv", "keep": 0.1, "reason": HOSTILE}]}
    record = {"format": 1, "settings": {"arms": [], "metrics": ["anls"]}, "noted": {"command": HOSTILE}}
    return Evaluation(summary, record, samples, answers, [])


class Tags(HTMLParser):
    """The tags of a page with their attributes, and its text; closing tags must close what was opened last."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def plots(page: str) -> list[str]:
    """The SVG documents of a page, legends apart."""
    return [
        '<svg class="plot"' + part.partition("</svg>")[0] + "</svg>" for part in page.split('<svg class="plot"')[1:]
    ]


def written(folder: Path, **more: Any) -> str:
    from asymvlm.evaluation.page import write_report

    write_report(evaluation(), folder / "report.html", **more)
    return (folder / "report.html").read_text(encoding="utf-8")
