"""CDPruner in OpenVINO GenAI (github.com/openvinotoolkit/openvino.genai): ``python -m bench.peers.openvino OUT``.

Its Python side says nothing of the tokens that its pruner keeps. So a pipeline is run with the exported vision tower,
merger and embeddings, and with a language model that reads out what it is given: as its t-th answer it names the vision
token, or the position, in the t-th column of the prompt.
"""

from __future__ import annotations

import os
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.peers.pages import ANSWERS, FLAG, PAGES, STOP, VOCABULARY, WIDTH, Page, patches, write_checkpoint
from bench.peers.records import Side

VERSIONS = ("openvino-genai", "openvino", "optimum-intel", "transformers", "torch")
SPLIT = "CDPRUNER_SPLIT_THRESHOLD"
AXES = ("temporal", "height", "width")


def export(folder: Path) -> None:
    """A checkpoint in ``folder / "model"`` and its export, with tokenizers, in ``folder / "exported"``."""
    import openvino
    from openvino_tokenizers import convert_tokenizer
    from optimum.exporters.openvino import main_export
    from transformers import PreTrainedTokenizerFast

    model, exported = folder / "model", folder / "exported"
    write_checkpoint(model)
    main_export(str(model), output=exported, task="image-text-to-text")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    for name, part in zip(("tokenizer", "detokenizer"), convert_tokenizer(tokenizer, with_detokenizer=True)):
        openvino.save_model(part, exported / f"openvino_{name}.xml")


def reader(table: np.ndarray, axis: int | None) -> Any:
    """The language model that reads out: the nearest row of ``table`` ``(N, WIDTH)``, N where none is near, or a
    position ``axis``. Answers are ids from `ANSWERS` on; `STOP` follows the last column.
    """
    import openvino
    import openvino.opset13 as ops

    i64 = openvino.Type.i64
    mask, positions = ops.parameter([-1, -1], i64), ops.parameter([3, -1, -1], i64)
    embeds, beams = ops.parameter([-1, -1, WIDTH], np.float32), ops.parameter([-1], np.int32)
    inputs = {"attention_mask": mask, "position_ids": positions, "inputs_embeds": embeds, "beam_idx": beams}
    for name, parameter in inputs.items():
        parameter.output(0).set_names({name})
    rows = ops.convert(ops.shape_of(beams), i64)

    def remember(new: Any, name: str, width: int) -> tuple[Any, Any]:
        empty = ops.broadcast(np.float32(0), ops.concat([rows, np.array([0, width])], 0))
        past = ops.read_value(empty, name, np.float32, openvino.PartialShape([-1, -1, width]))
        whole = ops.concat([ops.gather(past, beams, np.int64(0)), new], 1)
        return whole, ops.assign(whole, name)

    seen, keep_seen = remember(embeds, "seen", WIDTH)
    placed = ops.convert(ops.gather(positions, np.int64(axis or 0), np.int64(0)), np.float32)
    places, keep_places = remember(ops.unsqueeze(placed, np.int64(2)), "places", 1)
    answers = ops.greater(ops.gather(seen, np.int64(WIDTH - 1), np.int64(2)), np.float32(FLAG / 2))
    answered = ops.reduce_sum(ops.convert(answers, i64), np.array([0, 1]))
    columns = ops.subtract(ops.reduce_sum(mask, np.array([0, 1])), answered)
    column = ops.minimum(answered, ops.subtract(columns, np.int64(1)))
    if axis is None:
        row = ops.gather(ops.squeeze(seen, np.int64(0)), column, np.int64(0))
        far = ops.reduce_sum(ops.power(ops.subtract(table, row), np.float32(2)), np.array([1]))
        least = ops.topk(far, np.int64(1), 0, "min", "value", index_element_type="i64")
        near = ops.less(ops.squeeze(least.output(0), np.int64(0)), np.float32(1e-6))
        found = ops.select(near, ops.squeeze(least.output(1), np.int64(0)), np.int64(len(table)))
    else:
        found = ops.convert(ops.gather(ops.squeeze(places, np.array([0, 2])), column, np.int64(0)), i64)
    found = ops.select(ops.less(answered, columns), found, np.int64(STOP))
    answer = ops.one_hot(ops.add(found, np.int64(ANSWERS)), np.int64(VOCABULARY), np.float32(1), np.float32(0), axis=0)
    logits = ops.unsqueeze(answer, np.array([0, 1]))
    logits.output(0).set_names({"logits"})
    return openvino.Model([ops.result(logits)], [keep_seen, keep_places], [*inputs.values()], "reader")


def vision_tokens(model: Path, page: Page) -> np.ndarray:
    """The page's vision tokens ``(N, WIDTH)`` in torch, from pixels prepared by ourselves."""
    from transformers import Qwen2VLForConditionalGeneration

    tower = Qwen2VLForConditionalGeneration.from_pretrained(model).model.visual.eval()
    with torch.inference_mode():
        found = tower(patches(page), grid_thw=page.grid())
    return getattr(found, "pooler_output", found).numpy()


def read_out(exported: Path, page: Page, table: np.ndarray, axis: int | None) -> list[int]:
    """What the reader says about each column of the pruned prompt."""
    import openvino
    import openvino_genai

    class Answers(openvino_genai.StreamerBase):
        def __init__(self) -> None:
            super().__init__()
            self.ids: list[int] = []

        def write(self, ids: Any) -> Any:
            self.ids += ids if isinstance(ids, list) else [ids]
            return openvino_genai.StreamingStatus.RUNNING

        def end(self) -> None:
            pass

    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder)
        for file in exported.iterdir():
            if not file.name.startswith("openvino_language_model"):
                (there / file.name).symlink_to(file.resolve())
        openvino.save_model(reader(table, axis), there / "openvino_language_model.xml", compress_to_fp16=False)
        os.environ.pop(SPLIT, None)  # by default it splits
        os.environ |= {} if page.split else {SPLIT: "0"}
        pipeline = openvino_genai.VLMPipeline(there, "CPU", ATTENTION_BACKEND="SDPA")
        settings = openvino_genai.GenerationConfig()
        settings.max_new_tokens = page.images * page.tokens + 64
        settings.eos_token_id = ANSWERS + STOP
        settings.apply_chat_template = False
        settings.pruning_ratio, settings.relevance_weight = page.percent, page.weight
        answers = Answers()
        pictures = [openvino.Tensor(picture[None]) for picture in page.pixels()]
        pipeline.generate(page.prompt, images=pictures, generation_config=settings, streamer=answers)
    if answers.ids[-1:] != [ANSWERS + STOP]:
        raise RuntimeError(f"the reader must end with {ANSWERS + STOP}, got {answers.ids[-5:]}")
    return [number - ANSWERS for number in answers.ids[:-1]]


def run(folder: Path, page: Page) -> Side:
    """Which vision tokens CDPruner keeps, and where they stand."""
    table = vision_tokens(folder / "model", page)
    named = read_out(folder / "exported", page, table, None)
    kept = [number for number in named if number < len(table)]
    if kept != sorted(set(kept)):
        raise RuntimeError(f"kept tokens must be different ones in order, got {kept}")
    held = torch.zeros(len(table), dtype=torch.bool)
    held[kept] = True
    positions = {name: read_out(folder / "exported", page, table, axis) for axis, name in enumerate(AXES)}
    facts = {name: metadata.version(name) for name in VERSIONS} | {"positions": positions}
    return Side(held.view(1, 1, 1, page.images, page.tokens), None, facts)


def main(out: Path) -> None:
    if not (out / "exported").exists():
        export(out)
    for page in PAGES:
        run(out, page).save(out / f"{page.name}.safetensors")
        print(f"openvino: {page.name}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
