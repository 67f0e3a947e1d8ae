"""A conversation whose dropped vision tokens come back, beside two oracles that do not know the library.

K and V that are kept: a run over the whole conversation, in which a column is open from the turn on in which it came
back. K and V that are recomputed: a run over the whole conversation in which K and V of all columns of earlier turns
are put back to what they were, but for the vision tokens that are computed; what the cache does not hold is closed.
"""

from __future__ import annotations

import torch
from checks import GREEDY, assert_close
from masked_reference import Selection, masked_greedy, select
from test_multi_turn import longer, without_images
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from asymvlm import Recall

ANSWER = 2
NEVER = 99
KEEP, STAY, LEAVE = Recall(vision_kv="keep"), Recall(), Recall(unwanted="leave")


class Pinned(DynamicCache):
    """Looks empty; K and V of ``pinned`` (B, columns) are those of ``memory``, by layer. Remembers all in ``seen``."""

    def __init__(self, memory: list[tuple[Tensor, Tensor]], pinned: Tensor) -> None:
        super().__init__()
        self.memory, self.pinned, self.seen = memory, pinned, {}

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        found = [keys, values]
        if self.memory:
            columns = self.pinned.shape[1]
            for place, (now, then) in enumerate(zip(found, self.memory[layer], strict=True)):
                old = pad(then, (0, 0, 0, now.shape[2] - then.shape[2]))
                where = pad(self.pinned, (0, now.shape[2] - columns))[:, None, :, None]
                found[place] = torch.where(where, old, now)
        self.seen[layer] = (found[0], found[1])
        return self.seen[layer]


class Talk:
    """A conversation on one cache, and when each of its columns was there to be seen, (B, S)."""

    def __init__(self, family: str, plain, handle, inputs: dict[str, Tensor], ratio: float = 0.25):
        self.family, self.plain, self.handle, self.ratio = family, plain, handle, ratio
        self.inputs, self.turn, self.memory = inputs, 0, []
        keep = select(plain, inputs, ratio).keep
        self.when = torch.where(keep | ~inputs["attention_mask"].bool(), 0, NEVER)
        self.result = self.generate(inputs)
        assert handle.last.recall.recalled == [0] * len(keep)

    def generate(self, sent: dict[str, Tensor], **given):
        self.result = self.handle.model.generate(**sent, **given, **GREEDY, max_new_tokens=ANSWER)
        return self.result

    def ask(self, recall: Recall = KEEP, *, forgotten: bool = False) -> list[int]:
        """Another question; how many tokens came back before it. ``forgotten``: none can."""
        assert self.handle.vision.recall == recall
        self.turn += 1
        conversation = longer(self.family, self.inputs, self.result.sequences, seed=self.turn)
        real, known = conversation["attention_mask"].bool(), self.result.sequences.shape[1] - 1
        new = (torch.arange(real.shape[1]) >= known).expand_as(real)
        wanted = select(self.plain, conversation, self.ratio, text_mask=new)
        before = pad(self.when, (0, real.shape[1] - self.when.shape[1]), value=self.turn - 1)
        before[:, known:] = self.turn
        there = before != NEVER
        held = there if forgotten else _held(there, wanted, recall)
        computed = _computed(there, held, wanted, recall)
        self.when = torch.where(held & there, before, torch.where(held, self.turn, NEVER))
        self.generate(without_images(conversation), past_key_values=self.result.past_key_values)
        self._check_report(there & real, held & real, computed, forgotten=forgotten)
        if recall == KEEP:
            assert not self.memory, "its oracle knows no K and V that were recomputed"
            ids, logits = masked_greedy(self.plain, conversation, self.when, steps=ANSWER)
        else:
            ids, logits = self._pinned(conversation, before, held, ~computed & ~new)
        assert torch.equal(self.result.sequences, torch.cat([conversation["input_ids"], ids], 1))
        assert_close(torch.stack(self.result.logits, 1), logits)
        return self.handle.last.recall.recalled

    def _pinned(self, conversation: dict[str, Tensor], before: Tensor, held: Tensor, pinned: Tensor):
        caches: list[Pinned] = []

        def cache() -> Pinned:
            caches.append(Pinned(self.memory, pinned))
            return caches[-1]

        if not self.memory:  # K and V so far
            masked_greedy(self.plain, conversation, before, steps=1, cache=cache)
            self.memory = _by_layer(caches[-1])
        found = masked_greedy(self.plain, conversation, held, steps=ANSWER, cache=cache)
        self.memory = _by_layer(caches[-1])
        return found

    def _check_report(self, there: Tensor, held: Tensor, computed: Tensor, *, forgotten: bool) -> None:
        report, index = self.handle.last.recall, self.handle.last.index
        counts = [(held & ~there).sum(-1), (there & ~held).sum(-1), computed.sum(-1)]
        assert [report.recalled, report.left, report.computed] == [count.tolist() for count in counts]
        assert bool(report.note) == forgotten
        for row, columns in enumerate(index.tolist()):
            found = [column for column in columns if column >= 0]
            masked = [column for column in found if not held[row, column]]
            assert sorted({*found} - {*masked}) == held[row].nonzero()[:, 0].tolist()


def _held(there: Tensor, wanted: Selection, recall: Recall) -> Tensor:
    """What the cache holds when the question is read; padding counts as held."""
    prunable = wanted.scores.isfinite()
    ranked = prunable & wanted.keep
    return torch.where(prunable, ranked if recall.leaves else ranked | there, True)


def _computed(there: Tensor, held: Tensor, wanted: Selection, recall: Recall) -> Tensor:
    """Whose K and V are computed."""
    if not recall.recomputes:
        return held & ~there
    return held & wanted.scores.isfinite() & (held != there).any(-1, keepdim=True)


def _by_layer(cache: Pinned) -> list[tuple[Tensor, Tensor]]:
    return [cache.seen[layer] for layer in sorted(cache.seen)]
