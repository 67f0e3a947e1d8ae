"""``patch(logits="original")``: logits in the columns of the labels that they are compared with."""

from __future__ import annotations

import pytest
import torch
from checks import assert_close, uniform
from peft import LoraConfig, get_peft_model
from tiny import make_batch, make_labels
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

import asymvlm
from asymvlm.prompt.columns import spread_out

LAYOUTS = ["left_padded", "right_padded", "image_free_row"]


def test_a_removed_column_gets_what_stands_in_front_of_it():
    rows = torch.arange(1.0, 9.0).reshape(2, 4).requires_grad_()
    index = torch.tensor([[-1, 1, 4, 5], [0, 2, -1, 3]])
    spread = spread_out(rows, index, 6)
    assert spread.tolist() == [[0, 2, 2, 2, 3, 4], [5, 5, 6, 8, 8, 8]]
    spread.sum().backward()
    assert rows.grad.tolist() == [[0, 3, 1, 1], [2, 1, 0, 3]]


@pytest.mark.parametrize("batch", LAYOUTS)
def test_logits_and_the_loss_over_original_columns(family, model, batch):
    """The caller's own loss over all S columns is the model's over the kept ones."""
    inputs = make_batch(family, batch)
    labels = make_labels(inputs)
    with torch.no_grad():
        with asymvlm.patch(model, vision=uniform(0.5)) as handle:
            kept = model(**inputs, labels=labels).logits
            index = handle.last.index
            assert torch.equal(handle.last.at_original_columns(kept), spread_out(kept, index, labels.shape[1]))
            with pytest.raises(ValueError, match="kept columns in front"):
                handle.last.at_original_columns(kept[:, 1:])
        with asymvlm.patch(model, vision=uniform(0.5), logits="original"):
            found = model(**inputs, labels=labels)
            as_tuple = model(**inputs, labels=labels, return_dict=False)
            without = model(**inputs, labels=None, return_dict=False)[0]
            last = model(**inputs, logits_to_keep=1).logits
    assert found.logits.shape[:2] == labels.shape == without.shape[:2]
    rows, slots = (index >= 0).nonzero(as_tuple=True)
    assert torch.equal(found.logits[rows, index[rows, slots]], kept[rows, slots])
    assert_close(cross_entropy(found.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), found.loss)
    assert torch.equal(as_tuple[1], found.logits)
    assert last.shape[1] == 1


def test_a_later_image_by_hand(family, model):
    if family in ("paligemma", "gemma3n"):
        pytest.skip("takes no images in a later turn")
    inputs, more = make_batch(family, "single"), make_batch(family, "single")
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5), logits="original") as handle:
        cache = model(**inputs, use_cache=True).past_key_values
        mask = torch.ones(1, 2 * more["input_ids"].shape[1], dtype=torch.long)
        logits = model(**{**more, "attention_mask": mask}, past_key_values=cache).logits
    assert logits.shape[1] == more["input_ids"].shape[1]
    assert handle.last.columns_before == mask.shape[1]


@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_a_trainer_evaluates_with_metrics_and_trains_with_label_smoothing(family, model, tmp_path):
    inputs, seen = make_batch(family, "single"), []
    row = {name: value[0] for name, value in {**inputs, "labels": make_labels(inputs)}.items()}
    rows = [row] * 3

    def accuracy(prediction) -> dict[str, float]:
        logits, labels = prediction.predictions, prediction.label_ids
        right = logits[:, :-1].argmax(-1) == labels[:, 1:]
        seen.append(logits)
        return {"accuracy": float(right[labels[:, 1:] != -100].mean())}

    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5)) as handle:
        inputs = {name: torch.stack([row[name] for row in rows]) for name in row}
        logits = model(**inputs).logits
        right = handle.last.at_original_columns(logits)[:, :-1].argmax(-1) == inputs["labels"][:, 1:]
        expected = float(right[inputs["labels"][:, 1:] != -100].float().mean())
    lora = get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*q_proj", init_lora_weights=False))
    before = {name: p.clone() for name, p in lora.named_parameters() if p.requires_grad}
    with lora.disable_adapter(), asymvlm.patch(lora, vision=uniform(0.5), logits="original"):
        options = dict(output_dir=str(tmp_path), per_device_eval_batch_size=3, report_to=[], use_cpu=True)
        trainer = Trainer(lora, TrainingArguments(**options), eval_dataset=rows, compute_metrics=accuracy)
        trainer.label_names = ["labels"]
        assert trainer.evaluate(ignore_keys=["past_key_values", "cache"])["eval_accuracy"] == pytest.approx(expected)
        assert seen[0].shape[:2] == (3, len(row["labels"]))
    with asymvlm.patch(lora, vision=uniform(0.5), logits="original"):
        options |= dict(label_smoothing_factor=0.1, max_steps=1, per_device_train_batch_size=3, save_strategy="no")
        Trainer(lora, TrainingArguments(**options), train_dataset=rows).train()
    assert any(not torch.equal(p, before[name]) for name, p in lora.named_parameters() if name in before)


def test_another_word_is_refused(family, model):
    with pytest.raises(ValueError, match="logits must be 'kept' or 'original', got 'all'"):
        asymvlm.patch(model, logits="all")
