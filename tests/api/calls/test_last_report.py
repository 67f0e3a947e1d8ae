"""Each call's report is where the call was made: on its result, and as ``handle.last`` of its thread or task."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref

import pytest
import torch
from checks import uniform
from tiny import make_batch

import asymvlm
from asymvlm import TextEviction

BATCHES = ["single", "two_images", "left_padded"]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"], indirect=True)
def test_threads_see_their_own_calls(family, model):
    calls, wrong = [make_batch(family, name) for name in BATCHES], []
    barrier = threading.Barrier(len(calls))

    def work(inputs: dict[str, torch.Tensor]) -> None:
        for _ in range(4):
            barrier.wait()
            result = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
            output = model(**inputs)
            barrier.wait()
            last = handle.last
            real = inputs["attention_mask"].sum(1).tolist()
            if (
                last is not output.pruning_report
                or not last.tokens_before == real == result.pruning_report.tokens_before
            ):
                wrong.append(last.tokens_before)

    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5)) as handle:
        threads = [threading.Thread(target=lambda x=x: work(x)) for x in calls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert handle.last is not None, "a thread that made no call sees the newest of any"


@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_tasks_see_their_own_calls(family, model):
    async def work(name: str) -> bool:
        inputs = make_batch(family, name)
        output = model(**inputs)
        await asyncio.sleep(0.01)
        return handle.last is output.pruning_report

    async def gather() -> list[bool]:
        model(**make_batch(family, "single"))
        return await asyncio.gather(*map(work, BATCHES))

    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5)) as handle:
        assert all(asyncio.run(gather()))


@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_a_report_dies_with_its_patch_and_its_thread(family, model):
    inputs, dead = make_batch(family, "single"), []
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5)) as handle:
        thread = threading.Thread(target=lambda: dead.append(weakref.ref(model(**inputs).pruning_report)))
        thread.start()
        thread.join()
        model(**inputs)
        gc.collect()
        assert dead[0]() is None
        dead.append(weakref.ref(handle.last))
    del handle
    gc.collect()
    assert dead[1]() is None


def test_an_image_calls_numbers_do_not_stand_beside_a_later_text_call(family, model):
    images, text = make_batch(family, "single"), make_batch(family, "text_only")
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5), text=TextEviction(8, 0.5)) as handle:
        model.generate(**images, max_new_tokens=12)
        assert handle.last.vision_tokens == [16]
        result = model.generate(**text, max_new_tokens=12, return_dict_in_generate=True)
    assert handle.last is result.pruning_report
    assert handle.last.vision_tokens == [0, 0]
    assert handle.last.tokens_before == text["attention_mask"].sum(1).tolist()
    assert handle.last.notes[0] == "no image in the call"
    assert all(handle.last.eviction.evicted)


def test_a_later_turn_is_told_in_the_whole_conversation(family, model):
    inputs = make_batch(family, "single")
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5)) as handle:
        first = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True)
        report = handle.last
        more = torch.tensor([[60, 61, 62]])
        conversation = {name: value for name, value in inputs.items() if value.shape[:2] == inputs["input_ids"].shape}
        new = first.sequences.shape[1] + 3 - inputs["input_ids"].shape[1]
        conversation = {name: torch.nn.functional.pad(value, (0, new), value=0) for name, value in conversation.items()}
        conversation["attention_mask"] = torch.ones_like(conversation["input_ids"])
        conversation["input_ids"] = torch.cat([first.sequences, more], 1)
        model.generate(**conversation, past_key_values=first.past_key_values, max_new_tokens=2)
    assert handle.last.notes[0] == "a later turn: its images were pruned in an earlier one"
    assert (handle.last.vision_tokens, handle.last.kept) == (report.vision_tokens, report.kept)
    assert handle.last.tokens_before == [conversation["input_ids"].shape[1]]
    assert handle.last.tokens_after == [report.tokens_after[0] + new]
    assert handle.last.index[:, : report.index.shape[1]].equal(report.index)
