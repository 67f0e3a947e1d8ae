"""Prompts that a task has for one model: lmms-eval picks them by the name behind ``--model``, which here is another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from loguru import logger

PICKED = ("lmms_eval_specific_kwargs", "model_specific_generation_kwargs", "model_specific_target_kwargs")


def other_prompts(wrapped: str, requests: Sequence[Any]) -> list[str]:
    """Names of the tasks that would ask the model otherwise if it ran under its own name."""
    found = {}
    for task in _tasks(requests):
        told = [getattr(task.config, field, None) for field in PICKED]
        if any(isinstance(kwargs, dict) and wrapped in kwargs for kwargs in told):
            found[str(task.config.task)] = True
    return list(found)


def warn_of_other_prompts(wrapped: str, requests: Sequence[Any]) -> None:
    """Say so: figures of one method beside another stay comparable, those of ``--model NAME`` are not."""
    for task in other_prompts(wrapped, requests):
        logger.warning(
            f"{task} has settings of its own for --model {wrapped}, not applied under --model asymvlm: "
            "compare with --model asymvlm --model_args method=full"
        )


def _tasks(requests: Sequence[Any]) -> Iterable[Any]:
    """The task objects behind requests, by the bound functions among their arguments."""
    seen: dict[int, Any] = {}
    for request in requests:
        for argument in request.args:
            task = getattr(argument, "__self__", None)
            if hasattr(task, "config"):
                seen[id(task)] = task
    return seen.values()


__all__ = ["other_prompts", "warn_of_other_prompts"]
