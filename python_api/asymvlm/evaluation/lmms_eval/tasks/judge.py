"""Who judges free answers: a function of the caller's, or a model behind the interface of lmms-eval.

The environment variable ``ASYMVLM_JUDGE`` names a function ``module:function`` from a prompt to a reply. Without it the
judge is that of lmms-eval: ``API_TYPE`` (``openai``, ``azure``, ``local``, ...) and ``MODEL_VERSION``, with its key.
"""

from __future__ import annotations

import importlib
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

Judge = Callable[[str], str]
VARIABLE = "ASYMVLM_JUDGE"
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
TRIES = 3
_found: dict[str, Judge] = {}


class NoJudgeError(ValueError):
    """There is nobody to judge."""


def find_judge() -> Judge:
    """The judge that the environment names. Raises NoJudgeError if it cannot be had."""
    name = os.environ.get(VARIABLE, "")
    if name not in _found:
        _found[name] = _function(name) if name else _server()
    return _found[name]


def check(dataset: Any) -> Any:
    """The data set as it is: for ``process_docs``, so that a missing judge is told before anything is generated."""
    find_judge()
    return dataset


def reply(prompt: str, read: Callable[[str], Any]) -> Any:
    """What ``read`` makes of the judge's reply; None where the judge failed or cannot be read `TRIES` times.

    ``read`` raises ValueError for a reply that it cannot read.
    """
    judge = find_judge()
    for _ in range(TRIES):
        try:
            return read(judge(prompt))
        except Exception as error:
            failure = error
    from loguru import logger

    logger.warning(f"a judgement failed {TRIES} times and is left out: {type(failure).__name__}: {failure}")
    return None


def mean(values: Sequence[float | None]) -> float:
    """Over what was judged; NaN if nothing was."""
    judged = [value for value in values if value is not None]
    return sum(judged) / len(judged) if judged else math.nan


def unjudged(values: Sequence[Any]) -> int:
    """How many judgements are missing."""
    return sum(value is None for value in values)


def _function(name: str) -> Judge:
    module, colon, function = name.partition(":")
    try:
        if not colon:
            raise ValueError("no colon in it")
        found = getattr(importlib.import_module(module), function)
    except Exception as error:
        raise NoJudgeError(f"{VARIABLE}={name} found, wanted module:function ({error})") from error
    if not callable(found):
        raise NoJudgeError(f"{VARIABLE}={name} is a {type(found).__name__}, wanted a function of a prompt")
    return found


def _server() -> Judge:
    from lmms_eval.llm_judge import ProviderFactory, Request, ServerConfig

    kind, model = os.environ.get("API_TYPE", "openai").lower(), os.environ.get("MODEL_VERSION", "gpt-4o-2024-11-20")
    try:
        server = ProviderFactory.create_provider(kind, ServerConfig(model_name=model))
    except Exception as error:
        raise NoJudgeError(f"API_TYPE={kind} gives no judge ({error}), wanted one, or {VARIABLE}") from error
    if not server.is_available():
        raise NoJudgeError(f"the judge of API_TYPE={kind} is not available, wanted its package and key, or {VARIABLE}")

    def judge(prompt: str) -> str:
        answer = server.evaluate(Request(messages=[{"role": "user", "content": prompt}], config=server.config))
        if not answer.success:
            raise RuntimeError(f"{model} failed: {answer.error_message}")
        return str(answer.content)

    return judge


__all__ = ["NUMBER", "NoJudgeError", "check", "find_judge", "mean", "reply", "unjudged"]
