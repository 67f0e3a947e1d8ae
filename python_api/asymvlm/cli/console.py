"""What every command shares at its edges: one-line errors, exit codes, JSON on stdout and nothing else there."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import typer
from rich.console import Console

from asymvlm.app.loading import load, locate
from asymvlm.app.session import InputError, Session
from asymvlm.files.json_files import first_line

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

logger = logging.getLogger(__name__)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

# typer carries its own copy of click in some versions and imports click in others; this names the class in both
UsageError: type[Exception] = typer.BadParameter.__bases__[0]


def guarded(work: Callable[[], Any], *, name: str) -> int:
    """Do a command's work and return its exit code; a mistake of the caller is one line on stderr and code 2.

    Errors that are not the caller's keep their traceback: hiding a bug helps nobody.
    """
    try:
        code = work()
    except InputError as error:
        return _fail(name, str(error), EXIT_USAGE)
    except Interrupted as error:
        say(f"{name}: {error}")
        return EXIT_INTERRUPTED
    except torch.OutOfMemoryError as error:
        return _fail(name, f"out of memory ({first_line(error)}): try --dtype bfloat16 or a smaller image", EXIT_FAILED)
    return code if isinstance(code, int) else 0


def run_app(app: typer.Typer, argv: Sequence[str] | None, *, name: str) -> int:
    """`guarded` around a typer app of one's own, whose usage errors are one line too."""
    try:
        return guarded(lambda: app(args=argv, prog_name=name, standalone_mode=False), name=name)
    except UsageError as error:
        return _fail(name, f"{error.format_message()} (see {name} --help)", EXIT_USAGE)  # type: ignore[attr-defined]
    except typer.Abort:
        return _fail(name, "aborted", EXIT_FAILED)


def configure_logging(*, verbose: bool) -> None:
    """Send our own log to stderr: warnings, or everything (and the traceback behind a one-line error).

    Without ``verbose`` the advice of other libraries is dropped: it would bury that one line.
    """
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    for package in ("asymvlm", "asymvlm_kernels"):
        logging.getLogger(package).setLevel(logging.DEBUG if verbose else logging.WARNING)
    if not verbose:
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it reports each retry of a connection
        warnings.simplefilter("ignore")


def hush_transformers(*, progress: bool) -> None:
    """Stop transformers' advice and loading bars; ``progress`` leaves the hub's download bars (on stderr) alone."""
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if progress:
        enable_progress_bars()
    else:
        disable_progress_bars()


@contextlib.contextmanager
def stdout_reserved(reserved: bool) -> Iterator[None]:
    """Send what libraries print inside the block to stderr, so that stdout holds the JSON object alone."""
    with contextlib.redirect_stdout(sys.stderr) if reserved else contextlib.nullcontext():
        yield


def print_text(text: str) -> None:
    """An answer as the model wrote it: its lines are its own, so none is broken at a terminal's width."""
    out.file.write(f"{text}\n")


def print_line(line: str, style: str | None = None) -> None:
    """A line of ours, in one piece at any width."""
    out.print(line, style=style, markup=False, soft_wrap=True)


def say(line: str) -> None:
    """A line on stderr, beside the result: what is being waited for, what the result rests on."""
    err.print(line, markup=False, soft_wrap=True)


class Interrupted(Exception):
    """Ctrl-C, or SIGTERM, in work that can go on later; the message says how far it got."""


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM ends what runs in the block as Ctrl-C does, so that it can save; either becomes `Interrupted`."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, interrupt) if in_main else None
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(str(error) or "interrupted") from error
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before)


def open_session(model: str, **options: Any) -> Session:
    """Load a model, and say so: it may take minutes. Says too where prompts will be made without a chat template."""
    locate(model)
    say(f"loading {model}")
    session = load(model, **options)
    if not session.has_chat_template:
        say(f"{model} has no chat template: its prompt is an image placeholder for each image and the bare question")
    return session


def print_json(record: dict[str, Any]) -> None:
    """One JSON object on one line of stdout. Raises ValueError on NaN or infinity, which are not JSON."""
    sys.stdout.write(json.dumps(record, allow_nan=False) + "\n")


def _fail(name: str, message: str, code: int) -> int:
    logger.debug("traceback of the error below", exc_info=True)
    sys.stderr.write(f"{name}: error: {' '.join(message.splitlines())}\n")
    return code
