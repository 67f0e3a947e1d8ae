"""Which tokens of a prompt the user wrote: what ``VisionPruning(text="user")`` scores against.

A call has only ids. A chat template says, once rendered with probes, which ids open a user's turn and which close it:
what stays the same while the probe changes is the template's. What was found is tried on a dialogue before it is used.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from asymvlm.hf.arguments import IDS

# they start and end unlike each other, so that what all of them share is none of theirs
USER = ("alpha", "zebra?", "my days", "green.")
ANSWER = ("omega", "no.", "four")
BEFORE = ((), (("user", USER[0]), ("assistant", ANSWER[0])), (("system", "Be brief."),))
WHITE = " \t\r\n\u00a0\u0120\u010a\u0109\u010d\u2581"  # also as byte-level and SentencePiece vocabularies spell it


@dataclass(frozen=True)
class UserTurns:
    """Ids around a user's turn, and ids that are nobody's words.

    A turn begins behind ``begin`` and ends before the next ``end``, or with the row. ``template`` holds ids inside it
    that are not scored: special and added tokens, white space.
    """

    begin: tuple[int, ...]
    end: tuple[int, ...]
    template: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if not self.begin or not self.end:
            raise ValueError(f"begin and end must be ids that open and close a turn, got {self.begin} and {self.end}")

    @classmethod
    def of(cls, processor: Any) -> UserTurns:
        """Read them from the chat template of a processor or tokenizer.

        Raises:
            ValueError: if it has no chat template, or one whose turns cannot be told apart by their ids.
        """
        name, tokenizer = type(processor).__name__, getattr(processor, "tokenizer", processor)
        if getattr(processor, "chat_template", None) is None:
            raise ValueError(
                f"text='user' needs a chat template to tell the user's turns, {name} has none: "
                "pass a (B, S) bool mask or UserTurns"
            )
        render, special, white = _Renderer(processor, tokenizer), _special_ids(tokenizer), _white_ids(tokenizer)
        begin: tuple[int, ...] = ()
        end: tuple[int, ...] = ()
        for before in (BEFORE, BEFORE[:2]):  # some templates write the system's words into the user's turn
            begin, end = _markers(render, special, white, before)
            if begin and end:
                turns = cls(begin, end, frozenset(special | white))
                if _finds_the_probes(turns, render, tokenizer):
                    return turns
        raise ValueError(
            f"text='user' cannot tell the user's turns by the chat template of {name} (turns open with ids "
            f"{list(begin)}, close with {list(end)}): pass a (B, S) bool mask or UserTurns"
        )

    def find(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The user's words in ``input_ids`` ``(B, S)``, without synchronisation.

        Returns:
            ``(B, S)`` bool, and ``(B,)`` bool: rows that have a user's turn at all.
        """
        place = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        begins = _matches(input_ids, self.begin).roll(len(self.begin) - 1, -1)  # at the last id of each
        opened = place.where(begins, -1).cummax(-1).values
        closed = place.where(_matches(input_ids, self.end), -1).cummax(-1).values
        words = (opened > closed) & (opened < place)
        template = torch.tensor(sorted(self.template), device=input_ids.device, dtype=input_ids.dtype)
        return words & ~torch.isin(input_ids, template), opened[:, -1] >= 0


def _matches(input_ids: torch.Tensor, wanted: Sequence[int]) -> torch.Tensor:
    """``(B, S)`` bool: where ``wanted`` starts. Never in the last columns, where it would not fit."""
    found = torch.zeros_like(input_ids, dtype=torch.bool)
    if len(wanted) <= input_ids.shape[1]:
        windows = input_ids.unfold(1, len(wanted), 1)
        found[:, : windows.shape[1]] = (windows == torch.tensor(wanted, device=input_ids.device)).all(-1)
    return found


@dataclass(frozen=True)
class _Renderer:
    """Conversations to ids, in the form of content that the template takes."""

    processor: Any
    tokenizer: Any

    def __call__(self, *turns: tuple[str, str], image: bool = False, answer: bool = True) -> list[int] | None:
        """Ids of (role, text) turns, the last with an image before its text; None if the template refuses."""
        for form in (_parts, _text):
            messages = [{"role": role, "content": form(text, False)} for role, text in turns]
            messages[-1]["content"] = form(turns[-1][1], image)
            try:
                text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
            except Exception:  # whatever a template raises about roles and contents it does not know
                continue
            printed = isinstance(text, str) and "'type': 'text'" in text  # a template for strings prints the list
            if isinstance(text, str) and not printed and all(probe in text for _, probe in turns):
                return list(self.tokenizer(text, add_special_tokens=False)[IDS])
        return None


def _parts(text: str, image: bool) -> Any:
    return [*([{"type": "image"}] if image else []), {"type": "text", "text": text}]


def _text(text: str, image: bool) -> Any:
    return text


def _markers(
    render: _Renderer, special: set[int], white: set[int], before: Sequence[Sequence[tuple[str, str]]]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What stands before and behind every user's probe, whatever is said ``before``; empty where nothing does."""
    heads = []
    for turns in before:
        texts, images = ([render(*turns, ("user", probe), image=image) for probe in USER] for image in (False, True))
        known = [ids for ids in (*texts, *images) if ids is not None]
        if known:
            heads.append(_common(known))
    tails = [_common_end([ids for probe in USER if (ids := render(("user", probe))) is not None])]
    answered = []
    for answer in ANSWER:
        dialogues = [render(("user", probe), ("assistant", answer), answer=False) for probe in USER]
        answered.append(_common_end([ids for ids in dialogues if ids is not None]))
    tails.append(_common(answered))
    begin, end = _common_end(heads), _common(tails)
    # white space at the user's words may become one token with them
    while begin and begin[-1] in white:
        begin.pop()
    while end and end[0] in white:
        end.pop(0)
    if end and end[0] in special:
        end = end[:1]  # it closes a turn whoever comes next
    cuts = [at + len(end) for at in range(len(begin) - len(end) + 1) if end and begin[at : at + len(end)] == end]
    begin = begin[max(cuts, default=0) :]
    cuts = [at for at, token in enumerate(begin) if token in special]
    return tuple(begin[min(cuts, default=0) :]), tuple(end)


def _finds_the_probes(turns: UserTurns, render: _Renderer, tokenizer: Any) -> bool:
    """Whether the words found in a dialogue are the user's, all of them, and nobody else's."""
    dialogue = [("user", USER[0]), ("assistant", ANSWER[0]), ("user", USER[1]), ("assistant", ANSWER[1])]
    for length, image in ((1, False), (1, True), (3, False), (4, False)):
        ids = render(*dialogue[:length], image=image, answer=length < 4)
        if ids is None:
            continue
        words, _ = turns.find(torch.tensor([ids]))
        found = tokenizer.decode([token for token, is_word in zip(ids, words[0].tolist(), strict=True) if is_word])
        said = "".join(text for role, text in dialogue[:length] if role == "user")
        found = "".join(found.split())
        # an image may stand there as text, which its processor replaces
        if found != "".join(said.split()) and not (image and found.endswith(said)):
            return False
    return True


def _special_ids(tokenizer: Any) -> set[int]:
    return {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}


def _white_ids(tokenizer: Any) -> set[int]:
    return {token for text, token in tokenizer.get_vocab().items() if not text.strip(WHITE) or text == "<0x0A>"}


def _common(sequences: Sequence[Sequence[int]]) -> list[int]:
    """The longest start that all have."""
    return [tokens[0] for tokens in itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*sequences))]


def _common_end(sequences: Sequence[Sequence[int]]) -> list[int]:
    return _common([sequence[::-1] for sequence in sequences])[::-1]


__all__ = ["UserTurns"]
