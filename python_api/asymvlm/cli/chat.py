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
from asymvlm.cache.eviction_cache import CacheStats
from asymvlm.cli import console, options, tables
from asymvlm.files.json_files import first_line
from asymvlm.patch import patch
from asymvlm.patched.conversation import Conversation, Reply
from asymvlm.settings.budget_file import budget_to_dict

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
    text_threshold: int | None,
    text_retention: str | None,
    turn_threshold: int,
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
    text = options.parse_text_eviction(text_threshold, text_retention)
    turns = options.parse_turn_eviction(turn_threshold, turn_retention)
    first = options.read_images(image or [])
    mistakes: list[str] = []
    with console.stdout_reserved(as_json):
        console.hush_transformers(progress=not as_json)
        session = console.open_session(model, **loading)
        try:
            vision = options.vision_settings(session, learned, any_model, chosen, scored)
            handle = patch(session.model, vision=vision, text=text, turns=turns)
            with handle:
                torch.manual_seed(seed)
                talk = Conversation(session.model, session.processor, max_new_tokens=max_new_tokens, **sampling)
                lines = questions(talk, first, mistakes, quiet=as_json)
                record = [turn(talk, *asked, as_json) for asked in lines]
        except ValueError as error:
            raise error if isinstance(error, InputError) else InputError(first_line(error)) from error
    if as_json:
        console.print_json(to_record(session, text, turns, vision.budget, record))
    # at a terminal they were seen; a script should know that a question went without its image
    return console.EXIT_USAGE if mistakes and not sys.stdin.isatty() else 0


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
                console.print_line(cache_line(talk.cache.stats()))
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
            console.print_line(cache_line(talk.cache.stats()), style="dim")
    else:
        with Live(console=console.out, refresh_per_second=12) as live:
            writer = _Writer(talk, live)
            reply = talk.ask(question, images, streamer=writer)
            live.update(view(reply.text, talk.cache.stats()))
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
        self._live.update(view(text, self._talk.cache.stats() if self._talk.cache is not None else None))

    def end(self) -> None:
        pass


def _record(question: str, images: int, reply: Reply) -> dict[str, Any]:
    assert reply.report is not None
    return {
        "question": question,
        "images": images,
        "answer": reply.text,
        "new_tokens": reply.new_tokens,
        "eviction": reply.report.eviction and reply.report.eviction.to_dict(),
    }


def to_record(session: Session, text: Any, turns: Any, budget: Any, record: list[dict[str, Any]]) -> dict[str, Any]:
    """The dialogue as JSON. Sizes in bytes."""
    return {
        "model": session.name,
        "device": str(session.device),
        "dtype": session.dtype,
        "budget": budget_to_dict(budget),
        "text": {"threshold": text.threshold, "retention": text.retention},
        "turns_policy": {"threshold": turns.threshold, "retention": turns.retention},
        "turns": record,
    }
