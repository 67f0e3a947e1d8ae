"""Train a scorer and calibrate its budget from Python, on pages that examples/make_pages.py wrote.

python examples/make_pages.py pages 16
python examples/train_in_python.py pages
"""

import json
import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import asymvlm

MODEL = "bench/tinyvlm/checkpoint"
OPTIONS = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
folder = Path(sys.argv[1])
processor = AutoProcessor.from_pretrained(MODEL)
model = AutoModelForImageTextToText.from_pretrained(MODEL).eval()


def read(split):
    """One dict a line: image, question, answer."""
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def prompt(record):
    """Model inputs of the question."""
    page = {"type": "image", "image": Image.open(folder / record["image"])}
    content = [page, {"type": "text", "text": record["question"]}]
    return dict(processor.apply_chat_template([{"role": "user", "content": content}], **OPTIONS))


def with_answer(record):
    """Model inputs of the question with the answer behind it, and labels that mark the answer."""
    inputs = prompt(record)
    ids = processor.tokenizer(record["answer"], add_special_tokens=False)["input_ids"]
    answer = torch.tensor([[*ids, processor.tokenizer.eos_token_id]])
    labels = torch.cat([torch.full_like(inputs["input_ids"], -100), answer], 1)
    ids = torch.cat([inputs["input_ids"], answer], 1)
    return {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def right(model, sample):
    """The metric: called with the model pruned; more is better."""
    inputs = {name: value for name, value in sample.items() if name != "wanted"}
    output = model.generate(**inputs, max_new_tokens=16)
    answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return float(answer.strip() == sample["wanted"])


scorer = asymvlm.train_scorer(model, [with_answer(record) for record in read("scorer")])  # the model stays as it is
held_out = [{**prompt(record), "wanted": record["answer"]} for record in read("calibration")]
ladder = (0.3, 0.5, 0.7)  # keep ratios to measure; None means eight
chosen = asymvlm.calibrate_budget(model, scorer, held_out, right, average=0.5, method="relative", ratios=ladder)
for rung in chosen.ladder:
    print(f"uniform {rung['keep_ratio']:.2f}: {rung['metric']:.3f} right")
print(f"{chosen.budget} keeps {chosen.average:.3f}: {chosen.metric:.3f} right")
chosen.scorer.save_pretrained(folder / "scorer")  # VisionPruning(scorer=...) reads the weight with its budget
