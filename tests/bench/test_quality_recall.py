"""The bench of recall counts and judges what a patched `generate` recalls and says, fed a dialogue turn by turn."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

import asymvlm
from asymvlm import Recall, Scorer, Spread, UniformBudget, VisionPruning
from asymvlm.methods import AsymVLM, BeforeMethod, VisionPrompt
from bench.quality import recall
from bench.quality.conversations import EARLIER, make_talks
from bench.quality.scorers import SCORERS, load_model
from bench.tinyvlm.glyphs import BOS, EOS, IMAGE
from bench.tinyvlm.model import CHECKPOINT, NUM_VISION, to_model_pixels
from bench.tinyvlm.pages import make_pages

COUNT, KEEP = 6, 0.25
MODES = {recall.KEPT: Recall(vision_kv="keep"), recall.RECOMPUTED: Recall(), recall.LEAVING: Recall(unwanted="leave")}


class Asked(BeforeMethod):
    """The score of AsymVLM against a question alone, without the tokens that begin and end a text."""

    needs_text = True

    def __init__(self, scorer: Scorer) -> None:
        self.scored_by = AsymVLM(scorer)

    def scores(self, prompt: VisionPrompt) -> torch.Tensor:
        words = ~torch.isin(prompt.tokens.ids, torch.tensor([BOS, EOS]))
        return self.scored_by.scores(dataclasses.replace(prompt, text=prompt.text & words))


class TrueAnswer(LogitsProcessor):
    """Lets a model say what stands in the dialogue, and notes what it would have said."""

    def __init__(self, dialogue: torch.Tensor) -> None:
        self.dialogue, self.own = dialogue, []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.own.append(int(scores.argmax()))
        said = torch.full_like(scores, float("-inf"))
        said[:, self.dialogue[input_ids.shape[1]]] = 0
        return said


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(CHECKPOINT)


def test_patched_turns_recall_and_say_what_the_dialogues_say(model: Any) -> None:
    scorer = Scorer.from_pretrained(SCORERS / "default-0")
    talks, pages = make_talks(model, COUNT), make_pages([0, 20], COUNT, "test", (6, 12))
    scored = recall.scores(model, talks, scorer.weight, Spread())
    held = recall._held(scored, recall.wanted(scored, int(NUM_VISION * KEEP)))
    right = {
        name: recall.last_answer(model, talks, held[name], recomputed=name != recall.KEPT).tolist() for name in MODES
    }
    told = [tuple(right[name][row] for name in MODES) for row in range(COUNT)]
    assert len(set(told)) > 1, "dialogues that tell the modes apart"
    row = told.index(max(told, key=lambda one: len(set(one))))
    dialogue = torch.cat([torch.tensor([BOS] + [IMAGE] * NUM_VISION), talks.text[row]])
    turns = torch.nn.functional.pad(talks.turn[row], (1 + NUM_VISION, 0))
    spoken = torch.nn.functional.pad(talks.answer[row], (1 + NUM_VISION, 0))
    for name, mode in MODES.items():
        sent: dict[str, Any] = {"pixel_values": to_model_pixels(pages.pixels[row : row + 1])}
        settings = VisionPruning(method=Asked(scorer), budget=UniformBudget(KEEP), spread=Spread(), recall=mode)
        with asymvlm.patch(model, vision=settings) as handle:
            for turn in range(EARLIER + 1):
                place = (spoken & (turns == turn)).nonzero()[:, 0].tolist()
                ids, truth = dialogue[None, : place[0]], TrueAnswer(dialogue)
                output = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    **sent,
                    max_new_tokens=len(place),
                    do_sample=False,
                    return_dict_in_generate=True,
                    logits_processor=LogitsProcessorList([truth]),
                )
                sent = {"past_key_values": output.past_key_values}
                assert handle.last.kept == [int(held[name][row, turn].sum())]
        assert (truth.own == dialogue[place].tolist()) == right[name][row]
