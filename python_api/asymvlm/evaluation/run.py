"""`evaluate`: what each method costs in answers, times and bytes on one's own questions."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from asymvlm.app.samples import Question
from asymvlm.app.session import InputError, Session
from asymvlm.evaluation.answering import Answered, Clock, answer
from asymvlm.evaluation.arms import Arm, Choices, Keep
from asymvlm.evaluation.metrics import Metric, judged, of_callers
from asymvlm.evaluation.page import check_page, write_report
from asymvlm.evaluation.plan import KEEP, Limits, Plan, make_plan, name_of, read_samples
from asymvlm.evaluation.record import NOTED, command_line, make_record
from asymvlm.evaluation.store import ANSWERS, COSTS, SAMPLES, SUMMARY, Store, Unit
from asymvlm.evaluation.summary import summarise
from asymvlm.files.json_files import FileError, read_object
from asymvlm.settings.scorer import Scorer
from asymvlm.training.progress import progress_bar
from asymvlm_kernels import Spread


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What `evaluate` measured.

    Attributes:
        summary: the table, as in ``summary.json``.
        record: what the answers depend on, as in ``run.json``.
        samples, answers, costs: lines of the files of these names.
        folder: where they are; None where none was given.
    """

    summary: dict[str, Any]
    record: dict[str, Any] = field(repr=False)
    samples: list[dict[str, Any]] = field(repr=False)
    answers: list[dict[str, Any]] = field(repr=False)
    costs: list[dict[str, Any]] = field(repr=False)
    folder: Path | None = None

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One object a setting, ``full`` first."""
        rows: list[dict[str, Any]] = self.summary["rows"]
        return rows

    def row(self, method: str, keep: Keep = 1.0) -> dict[str, Any]:
        """Of one setting. Raises KeyError if it was not measured."""
        for row in self.rows:
            if (row["method"], row["keep"]) == (method, keep):
                return row
        measured = ", ".join(f"{row['method']} {row['keep']}" for row in self.rows)
        raise KeyError(f"{method} {keep} was not measured, wanted one of {measured}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for ``json.dumps``; single answers stay in their file."""
        return {"folder": None if self.folder is None else str(self.folder), **self.summary, "record": self.record}


def evaluate(
    model: Any,
    processor: Any,
    samples: str | Path | Sequence[Question | Mapping[str, Any]],
    methods: Sequence[str] | Mapping[str, Any] = ("asymvlm",),
    keep: Keep | Sequence[Keep] = KEEP,
    metric: str | Metric | Callable[..., float] | Sequence[str | Metric | Callable[..., float]] = "exact",
    *,
    out: str | Path | None = None,
    cache: Sequence[str] | Mapping[str, Any] = (),
    scorer: Scorer | str | Path | None = None,
    spread: Spread | bool | None = None,
    at_least_relevant: bool = False,
    text: str = "all",
    baseline: str | None = None,
    batch_size: int = 1,
    max_new_tokens: int = 32,
    limit: int | None = None,
    seed: int = 0,
    report: str | Path | None = None,
    progress: bool = True,
) -> Evaluation:
    """Answer questions with the whole model and with each method at each keep ratio, and compare sample by sample.

    Args:
        model: a supported Hugging Face vision-language model, not patched. It comes back as it was.
        processor: of the model.
        samples: a JSONL file, or records with the fields of its lines, whose images may be PIL images.
        methods: names of methods before or inside the decoder, or methods by names of your own. ``"cosine"`` is
            ``"asymvlm"`` without the ``scorer``. A method inside the decoder holds a ratio on average over its layers.
        keep: ratios in (0, 1]; ``"own"`` is the budget that a scorer or method brings.
        metric: one or more of `asymvlm.evaluation.metrics.METRICS` by name, ``"module:function"``, functions
            ``f(answer, accepted)``, or `asymvlm.evaluation.Metric` objects.
        out: folder of the results. If it holds the beginning of the same run, the run goes on from there.
        cache: methods of the K/V cache, which hold the ratio of a prompt's tokens.
        scorer, spread, at_least_relevant: of the method ``"asymvlm"``, the latter two of ``"cosine"`` too, as in
            `VisionPruning`; ``spread=True`` is ``Spread()``.
        text: what vision is scored against, as in `VisionPruning`.
        baseline: a method that the others are compared with too.
        batch_size: prompts at a time, padded on the left. Rounding may differ with it, so it is part of the record.
        max_new_tokens: longest answer; all answers are greedy.
        limit: use the first samples only.
        seed: of methods that draw, and of p-values.
        report: HTML page to write, as `write_report` does.
        progress: show a bar on stderr.
    Returns:
        `Evaluation`.
    Raises:
        asymvlm.app.session.InputError: a ValueError in one line: the value found and the value wanted. What was
            measured by then stays in ``out``.
    """
    keep = (keep,) if isinstance(keep, (str, int, float)) else keep
    name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    one = not isinstance(metric, (list, tuple))
    plan = make_plan(
        Session(name, model, processor),
        read_samples(samples, limit),
        Choices(
            methods=_named(methods),
            keep=tuple(keep),
            cache=_named(cache),
            scorer=Scorer.from_pretrained(scorer) if isinstance(scorer, (str, Path)) else scorer,
            spread=spread,
            at_least_relevant=at_least_relevant,
            text=text,
            seed=seed,
        ),
        Limits((metric,) if one else tuple(metric), baseline, batch_size, max_new_tokens, seed),  # type: ignore[arg-type]
    )
    page = None if report is None else check_page(report)
    if out is not None:
        found = run(plan, Path(out), progress=progress)
    else:
        with tempfile.TemporaryDirectory() as folder:
            found = run(plan, Path(folder), progress=progress, kept=False)
    if page is not None:
        write_report(found, page, plan)
    return found


def read_results(folder: str | Path) -> Evaluation:
    """A finished run from its folder, for another report or figures of one's own; no model is needed.

    Raises:
        InputError: if a file is missing or cannot be read; a run that is not finished has no ``summary.json``.
    """
    store = Store(Path(folder), ())
    try:
        summary = read_object(store.folder / SUMMARY, '{"format": 1, ...}')
        samples, answers, costs = (store.read(name) for name in (SAMPLES, ANSWERS, COSTS))
    except FileError as error:
        raise InputError(f"{error}, wanted the folder of a finished run") from error
    return Evaluation(summary, store.read_record(), samples, answers, costs, store.folder)


def run(plan: Plan, folder: Path, *, progress: bool, kept: bool = True, clock: Clock = time.perf_counter) -> Evaluation:
    """Do what is left of a plan, and write the table.

    Raises:
        InputError: if the folder holds another run, and for samples and settings that fail as they are used.
    """
    record = make_record(plan.session, plan.samples, plan.settings(), command_line(), of_callers(plan.metrics))
    samples, units = plan.sample_lines(), plan.units
    store = Store(folder, units)
    with store.locked():
        done = store.open(record, samples)
        if done:
            _check_scores(plan, store, record)
        finished = sum(len(unit.samples) for unit in units[:done])
        with progress_bar("evaluating", plan.generations, shown=progress, done=finished) as advance:
            batch, inputs = -1, None
            for place, unit in enumerate(units[done:], done):
                if unit.batch != batch:
                    batch, inputs = unit.batch, _inputs(plan, unit)
                arm = plan.arms.arms[place % len(plan.arms.arms)]
                store.append(unit, *_measured(plan, arm, unit, inputs, clock))
                for _ in unit.samples:
                    advance(arm.label)
        answers, costs = store.read(ANSWERS), store.read(COSTS)
        summary = summarise(samples, answers, costs, plan.metrics, record["settings"], plan.limits.baseline)
        summary = {"model": plan.session.name, **summary}
        store.save_summary(summary)
        return Evaluation(summary, store.read_record(), samples, answers, costs, folder if kept else None)


def _check_scores(plan: Plan, store: Store, record: dict[str, Any]) -> None:
    """Judge what is on file once more by metrics of the caller's own whose code has changed since, or cannot be read.

    Raises:
        InputError: at the first answer that they judge otherwise: its score and those to come would not be comparable.
    """
    known, now = store.read_record()[NOTED].get("metrics", {}), record[NOTED]["metrics"]
    own = [metric for metric in plan.metrics if metric.name in now]
    changed = [metric for metric in own if now[metric.name] is None or now[metric.name] != known.get(metric.name)]
    for number, line in enumerate(store.read(ANSWERS) if changed else [], 1):
        where, accepted = f"{store.folder / ANSWERS}:{number}", plan.samples[line["sample"]].answers
        for metric in changed:
            before, score = line["scores"].get(metric.name), judged(metric, line["answer"], accepted, where)
            if before != score:
                raise InputError(
                    f"{where}: metric {metric.name} gave {before} before it was changed and gives {score} now, "
                    "wanted the same scores to go on, or another folder"
                )


def timed(plan: Plan, clock: Clock) -> dict[Arm, float]:
    """Seconds that each setting takes for the first batch, a warm-up aside; nothing is written.

    Raises:
        InputError: as `run` does.
    """
    seconds: dict[Arm, float] = {}
    inputs = None
    for unit, arm in zip(plan.units, plan.arms.arms, strict=False):
        inputs = _inputs(plan, unit) if inputs is None else inputs
        _measured(plan, arm, unit, inputs, clock)
        begun = clock()
        _measured(plan, arm, unit, inputs, clock)
        seconds[arm] = clock() - begun
    return seconds


def _measured(
    plan: Plan, arm: Arm, unit: Unit, inputs: Any, clock: Clock
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Lines of answers, and what a line of costs says."""
    try:
        found = answer(plan.session, arm, inputs, plan.limits.max_new_tokens, clock)
    except (NotImplementedError, ValueError) as error:  # of a method, for this model or these prompts
        raise InputError(f"{_where(plan, unit)}: {arm.label}: {error}") from error
    cost = {
        "first_token_ms": round(found.first_token_ms, 3),
        "decode_ms": round(found.decode_ms, 3),
        "decoded": sum(found.new_tokens) - len(found.new_tokens),
        "kv_bytes": found.kv_bytes,
        "peak_bytes": found.peak_bytes,
    }
    return [_line(plan, arm, number, row, found) for row, number in enumerate(unit.samples)], cost


def _line(plan: Plan, arm: Arm, number: int, row: int, found: Answered) -> dict[str, Any]:
    sample, report, text = plan.samples[number], found.report, found.texts[row]
    where = sample.where or f"sample {number}"
    gap = report.gap[row]
    return {
        "sample": number,
        "id": name_of(sample, number),
        "method": arm.method,
        "keep": arm.keep,
        "answer": text,
        "new_tokens": found.new_tokens[row],
        "scores": {metric.name: judged(metric, text, sample.answers, where) for metric in plan.metrics},
        "kept": report.kept[row],
        "vision_tokens": report.vision_tokens[row],
        "average_kept": round(report.average_kept[row], 4),
        "prompt_tokens": report.tokens_before[row],
        "gap": None if math.isnan(gap) else gap,
    }


def _inputs(plan: Plan, unit: Unit) -> Any:
    """Model inputs of a batch."""
    rows = []
    for number in unit.samples:
        sample = plan.samples[number]
        try:
            rows.append((sample.open(), sample.question))
        except InputError as error:
            raise InputError(f"{sample.where or f'sample {number}'}: {error}") from error
    try:
        return plan.session.prepare_batch(rows)
    except InputError as error:
        raise InputError(f"{_where(plan, unit)}: {error}") from error


def _where(plan: Plan, unit: Unit) -> str:
    """File and line of a batch's samples."""
    names = [plan.samples[number].where or f"sample {number}" for number in unit.samples]
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


def _named(methods: str | Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Methods by the names that they are told by. Raises InputError for one that is named twice."""
    if isinstance(methods, Mapping):
        return dict(methods)
    names = [methods] if isinstance(methods, str) or not isinstance(methods, Iterable) else list(methods)
    if strange := [name for name in names if not isinstance(name, str)]:
        raise InputError(f"methods: {strange[0]!r} found, wanted names, or a mapping of names of your own to methods")
    if len(set(names)) < len(names):
        raise InputError(f"methods: {', '.join(names)} found, wanted each once")
    return {name: name for name in names}


__all__ = ["Evaluation", "evaluate", "read_results", "run", "timed"]
