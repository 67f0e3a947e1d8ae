"""`asymvlm chat`: a dialogue about images in the terminal, with the K/V cache filling and shrinking beside it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from transformers.generation.streamers import BaseStreamer

from asymvlm.app.loading import open_image
from asymvlm.app.session import InputError, Session
from asymvlm.cache.eviction_cache import CacheStats, EvictionCache
from asymvlm.cli import console, options, tables
from asymvlm.files.json_files import first_line
from asymvlm.patch import patch
from asymvlm.patched.conversation import Conversation, Reply
from asymvlm.patched.handle import HANDLE
from asymvlm.settings.budget_file import budget_to_dict
from asymvlm.settings.eviction import TextEviction, TurnEviction

THRESHOLD = 512  # tokens, of both kinds of eviction
HELP = "/image FILE shows an image with your next question, /stats the cache, /quit ends (so does end of input)"


def chat(
    *,
    model: str,
    image: list[Path] | None,
    keep: str | None,
    budget: Path | None,
    scorer: str | None,
    any_model: bool,
    scored: options.ScoredText,
    spread: bool | None,
    at_least_relevant: bool,
    recall: str | None,
    text_threshold: int | None,
    text_retention: str | None,
    turn_threshold: int | None,
    turn_retention: str | None,
    max_new_tokens: int,
    temperature: float | None,
    top_p: float | None,
    seed: int,
    as_json: bool,
    **loading: Any,
) -> int:
    """Talk about images. Questions are read from the terminal, or one a line from standard input."""
    learned = options.load_scorer(scorer)
    chosen = options.parse_budget_of(learned, keep, budget)
    sampling = options.parse_sampling(temperature, top_p)
    text, turns = _eviction(
        recall,
        text_threshold=text_threshold,
        text_retention=text_retention,
        turn_threshold=turn_threshold,
        turn_retention=turn_retention,
    )
    first = options.read_images(image or [])
    mistakes: list[str] = []
    with console.stdout_reserved(as_json):
        console.hush_transformers(progress=not as_json)
        session = console.open_session(model, **loading)
        try:
            vision = options.vision_settings(
                *(session, learned, any_model, chosen, scored),
                spread=spread,
                at_least_relevant=at_least_relevant,
                recall=recall,
            )
            handle = patch(session.model, vision=vision, text=text, turns=turns)
            with handle:
                torch.manual_seed(seed)
                talk = Conversation(session.model, session.processor, max_new_tokens=max_new_tokens, **sampling)
                lines = questions(talk, first, mistakes, quiet=as_json)
                record = [turn(talk, *asked, as_json) for asked in lines]
        except ValueError as error:
            raise error if isinstance(error, InputError) else InputError(first_line(error)) from error
        except NotImplementedError as error:  # of recall, for this family or attention
            raise InputError(f"cannot prune {session.name}: {first_line(error)}") from error
    if as_json:
        console.print_json(to_record(session, text, turns, vision.budget, record))
    # at a terminal they were seen; a script should know that a question went without its image
    return console.EXIT_USAGE if mistakes and not sys.stdin.isatty() else 0


def _eviction(recall: str | None, **given: Any) -> tuple[TextEviction | None, TurnEviction | None]:
    """What leaves the cache; nothing where dropped vision tokens come back to it.

    Raises:
        InputError: for a value out of range, or one beside ``--recall``.
    """
    if recall is not None:
        if asked := [name for name, value in given.items() if value is not None]:
            raise InputError(f"--recall {recall} found beside --{asked[0].replace('_', '-')}, wanted one of them")
        return None, None
    text, turns = (given[name] for name in ("text_threshold", "turn_threshold"))
    return (
        options.parse_text_eviction(THRESHOLD if text is None else text, given["text_retention"]),
        options.parse_turn_eviction(THRESHOLD if turns is None else turns, given["turn_retention"]),
    )


def questions(
    talk: Conversation, first: list[Any], mistakes: list[str], *, quiet: bool
) -> Iterator[tuple[str, list[Any]]]:
    """What the user says and shows, turn by turn; commands are answered here.

    A command that cannot be followed is told in a line, added to ``mistakes``, and the dialogue goes on.
    """

    def mistaken(words: str) -> None:
        console.say(words)
        mistakes.append(words)

    images, interactive = list(first), sys.stdin.isatty() and not quiet
    if interactive:
        console.out.print(HELP, style="dim", markup=False)
    while True:
        try:
            line = console.out.input("[bold]you[/bold] ") if interactive else next(sys.stdin)
        except (EOFError, StopIteration):
            return
        command, _, argument = line.strip().partition(" ")
        if command == "/quit":
            return
        if command == "/image":
            try:
                images.append(open_image(Path(argument.strip())))
            except InputError as error:
                mistaken(f"{error}; nothing is shown")
        elif command == "/stats":
            if not quiet and talk.cache is not None:
                console.print_line(cache_words(talk))
        elif command.startswith("/"):
            mistaken(f"unknown command {command}; {HELP}")
        elif command:
            yield line.strip(), images
            images = []


def turn(talk: Conversation, question: str, images: list[Any], quiet: bool) -> dict[str, Any]:
    """One question and its answer, shown as it is written."""
    if quiet or not console.out.is_terminal:
        reply = talk.ask(question, images)
        if not quiet:
            console.print_text(reply.text)
            console.print_line(cache_words(talk), style="dim")
    else:
        with Live(console=console.out, refresh_per_second=12) as live:
            writer = _Writer(talk, live)
            reply = talk.ask(question, images, streamer=writer)
            live.update(view(reply.text, _stats(talk)))
        if _stats(talk) is None:
            console.print_line(cache_words(talk), style="dim")
    return _record(question, len(images), reply)


def view(text: str, stats: CacheStats | None) -> RenderableType:
    """An answer so far, with a bar of the slots in use under it."""
    if stats is None or not stats.capacity:
        return Text(text)
    row = Table.grid(padding=(0, 1))
    row.add_row(
        ProgressBar(total=stats.capacity, completed=stats.physical, width=30), Text(cache_line(stats), style="dim")
    )
    return Group(Text(text), row)


def _stats(talk: Conversation) -> CacheStats | None:
    return talk.cache.stats() if isinstance(talk.cache, EvictionCache) else None


def cache_words(talk: Conversation) -> str:
    """What the cache of a dialogue holds, in one line: slots, or vision tokens where these come back."""
    stats = _stats(talk)
    if stats is not None:
        return cache_line(stats)
    report = talk.model.__dict__[HANDLE].last
    if report is None or report.recall is None:
        return "cache: no vision tokens yet"
    beside = tables.bytes_in_words(report.recall.stored_bytes)
    held = f"{report.kept[0]:,} of {report.vision_tokens[0]:,} vision tokens"
    return f"cache: {held}, {report.recall.recalled[0]:,} of them came back, {beside} beside it"


def cache_line(stats: CacheStats) -> str:
    """What a cache of one row holds, in one line."""
    held, evicted = (counts[0] if counts else 0 for counts in (stats.held, stats.evicted))
    return (
        f"cache: {stats.physical:,} of {stats.capacity:,} slots, {stats.logical:,} tokens so far, {held:,} generated "
        f"ones held, {evicted:,} evicted, {tables.bytes_in_words(stats.nbytes)}"
    )


class _Writer(BaseStreamer):
    """Shows the answer and the cache at every token."""

    def __init__(self, talk: Conversation, live: Live) -> None:
        self._talk, self._live = talk, live
        self._ids: list[int] = []
        self._in_prompt = True
        self._tokenizer = getattr(talk.processor, "tokenizer", talk.processor)

    def put(self, value: torch.Tensor) -> None:
        if self._in_prompt:
            self._in_prompt = False
            return
        self._ids += value.flatten().tolist()
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True).strip()
        self._live.update(view(text, _stats(self._talk)))

    def end(self) -> None:
        pass


def _record(question: str, images: int, reply: Reply) -> dict[str, Any]:
    eviction, recall = (getattr(reply.report, name, None) for name in ("eviction", "recall"))
    return {
        "question": question,
        "images": images,
        "answer": reply.text,
        "new_tokens": reply.new_tokens,
        "eviction": eviction and eviction.to_dict(),
        "recall": recall and recall.to_dict(),
    }


def to_record(session: Session, text: Any, turns: Any, budget: Any, record: list[dict[str, Any]]) -> dict[str, Any]:
    """The dialogue as JSON. Sizes in bytes."""
    return {
        "model": session.name,
        "device": str(session.device),
        "dtype": session.dtype,
        "budget": budget_to_dict(budget),
        "text": text and {"threshold": text.threshold, "retention": text.retention},
        "turns_policy": turns and {"threshold": turns.threshold, "retention": turns.retention},
        "turns": record,
    }
