"""VQA soft accuracy: answers as the VQA evaluation compares them, and the agreement with ten people."""

from __future__ import annotations

import re
from collections.abc import Sequence

AGREEING = 3  # people whose agreement counts in full
ARTICLES = ("a", "an", "the")
NUMBERS = ("none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {word: str(max(0, place - 1)) for place, word in enumerate(NUMBERS)}  # none and zero are both 0
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
PERIOD, COMMA = re.compile(r"(?!<=\d)\.(?!\d)"), re.compile(r"(?<=\d),+(?=\d)")  # as published, `(?!<=` included
WRITTEN = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"""
# each contraction by the spellings that leave out one of its apostrophes; the last is a slip of the published table
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word for word in WRITTEN.split() for place, sign in enumerate(word) if sign == "'"
} | {"somebody'd": "somebodyd"}


def normalised(answer: str) -> str:
    """An answer without case, articles and punctuation, numbers up to ten as digits."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    plain, joined = text, COMMA.search(text) is not None
    for sign in PUNCTUATION:
        beside_space = f"{sign} " in text or f" {sign}" in text
        plain = plain.replace(sign, "" if beside_space or joined else " ")
    words = [DIGITS.get(word, word) for word in PERIOD.sub("", plain).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(answer: str, accepted: Sequence[str]) -> float:
    """Mean over all but one of the ``accepted`` answers, each left out in turn, of ``min(1, those that agree / 3)``.

    ``accepted`` holds what every person answered, so that an answer stands there as often as it was given.
    """
    found, people = normalised(answer), [normalised(other) for other in accepted]
    agreeing = people.count(found)
    left = [agreeing - (other == found) for other in people]
    return sum(min(1.0, count / AGREEING) for count in left) / len(left) if left else 0.0


__all__ = ["normalised", "vqa_accuracy"]
