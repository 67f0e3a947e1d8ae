"""Several turns for chat models that answer one: every turn is asked with all turns before it, the answers the model's.

Each turn is a prompt of its own, prefilled whole: no K/V cache is carried from turn to turn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any


def answer_in_turns(model: Any, requests: Sequence[Any]) -> list[list[str]]:
    """Answers, one list a request, one string a turn, by the protocol of ``generate_until_multi_round``.

    The first turn's messages are ``doc_to_messages(doc)``, later ones come with ``round_idx`` and the answers so far as
    ``(messages, over, answers, info)``.

    Args:
        model: a chat model of lmms-eval; its ``generate_until`` answers a turn.
        requests: instances whose arguments are ``(context, doc_to_messages, generation_kwargs, doc_id, task, split)``.
    """
    return [_answers(model, request) for request in requests]


def _answers(model: Any, request: Any) -> list[str]:
    context, doc_to_messages, options, place, task, split = request.arguments
    doc = model.task_dict[task][split][place]
    answers: list[str] = []
    messages, over, info = doc_to_messages(doc), False, None
    while not over:
        asked = (context, _Fixed(messages), dict(options), place, task, split)
        turn = dataclasses.replace(request, request_type="generate_until", arguments=asked, resps=[])
        (answer,) = model.generate_until([turn])
        answers.append(getattr(answer, "text", answer))
        given = doc_to_messages(doc, round_idx=len(answers), previous_output=list(answers), previous_round_info=info)
        if not isinstance(given, tuple):  # the task knows one turn
            break
        messages, over, _, info = given
    return answers


class _Fixed:
    """A ``doc_to_messages`` that has read its sample."""

    def __init__(self, messages: Any) -> None:
        self.messages = messages

    def __call__(self, doc: Any) -> Any:
        return self.messages


__all__ = ["answer_in_turns"]
