"""Twenty drawn pages as local data sets, task files on them, and what runs a task on the plug-in."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from bench.tinyvlm.evaluate import make_samples

ROOT = Path(__file__).parents[2]
CHECKPOINT, SCORER = ROOT / "bench/tinyvlm/checkpoint", ROOT / "bench/quality/scorers/default-0"
WRAPPED = f"model=llava_hf,pretrained={CHECKPOINT},device=cpu,device_map=cpu"
PAGES = """\
task: drawn_{name}
dataset_path: {folder}
dataset_kwargs: {{load_from_disk: true}}
test_split: test
output_type: generate_until
doc_to_visual: !function {functions}.chartqa_doc_to_visual
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 8, temperature: 0, do_sample: false}}
"""
ANLS = """\
metric_list:
  - {metric: anls, aggregation: mean, higher_is_better: true}
"""
RELAXED = """\
process_results: !function lmms_eval.tasks.chartqa.utils.chartqa_process_results
metric_list:
  - {metric: relaxed_overall, aggregation: mean, higher_is_better: true}
"""
OURS = """\
include: {file}
task: drawn_{name}
dataset_path: {folder}
dataset_kwargs: {{load_from_disk: true}}
test_split: test
generation_kwargs: {{max_new_tokens: 6, temperature: 0, do_sample: false}}
lmms_eval_specific_kwargs: {{default: {{pre_prompt: "", post_prompt: ""}}}}
"""


def judge(prompt: str) -> str:
    """Stands in for a judge where there is no network: fails on one answer, so that a missing judgement shows."""
    if "Q1 last" in prompt:
        raise RuntimeError("no network")
    return "overall: 7" if "overall: N" in prompt else "8 6\nbecause"


def write(folder: Path, tasks: Path) -> Path:
    """Data sets in ``folder``, and a folder of tasks on them; ``tasks`` are those that the package brings."""
    import datasets

    def save(name: str, rows: list[dict[str, Any]], features: Any = None) -> None:
        found = datasets.Dataset.from_list(rows, features=features)
        datasets.DatasetDict({"test": found}).save_to_disk(folder / name)

    drawn = make_samples("test", 20, seed=3)
    pages = [drawn.pages.image(place, 8) for place in range(20)]
    asked = [(turn.question, turn.answer) for turn in drawn.turns]
    rows = [
        {"image": page, "question": question, "answer": answer, "type": "human_test"}
        for page, (question, answer) in zip(pages, asked, strict=True)
    ]
    save("pages", rows)
    save("covers", [{"image": pages[0], "questions": [asked[0][0]] * 2, "answers": [asked[0][1].upper() + ".", "no"]}])
    bench = {"caption": ["a page"], "category": "conv", "gpt_answer": "12"}
    save("bench", [{"image": pages[0], "question": q, **bench} for q in (asked[0][0], "Q1 last")])
    dialogue = {"id": "0", "images": pages[:2], "questions": ["<ImageHere>" + asked[0][0], "<ImageHere>Q1 last"]}
    texts, images = datasets.Sequence(datasets.Value("string")), datasets.Sequence(datasets.Image())
    features = {"id": datasets.Value("string"), "images": images, "questions": texts, "answers": texts}
    save("dialogues", [{**dialogue, "answers": ["12", "13"]}], datasets.Features(features))

    made = folder / "made"
    made.mkdir()
    functions = "lmms_eval.tasks.chartqa.utils"
    for name, metric in (("anls", ANLS), ("relaxed", RELAXED)):
        (made / f"{name}.yaml").write_text(
            PAGES.format(name=name, folder=folder / "pages", functions=functions) + metric
        )
    for name, file in (("covers", "ocrvqa"), ("bench", "llava_bench_judged"), ("dialogues", "mmdu")):
        text = OURS.format(file=tasks / f"{file}.yaml", name=name, folder=folder / name)
        (made / f"{name}.yaml").write_text(text)
    return made


class Runs:
    """Runs of lmms-eval over the drawn tasks; each is done once."""

    def __init__(self, tasks: Path) -> None:
        from lmms_eval.tasks import TaskManager

        self.tasks = TaskManager("ERROR", include_path=str(tasks), include_defaults=False, model_name="asymvlm")
        self.run = cache(self._run)

    def _run(self, task: str, options: str = "", model: str = "asymvlm", simple: bool = False) -> dict[str, Any]:
        from lmms_eval.evaluator import simple_evaluate

        arguments = WRAPPED if model == "asymvlm" else WRAPPED.partition(",")[2]
        found: dict[str, Any] = simple_evaluate(
            model,
            model_args=f"{arguments}{options and ','}{options}",
            tasks=[f"drawn_{task}"],
            task_manager=self.tasks,
            batch_size=1,
            bootstrap_iters=0,
            force_simple=simple,
        )
        return found

    def answers(self, *args: Any, **kwargs: Any) -> list[Any]:
        found = self.run(*args, **kwargs)
        (samples,) = found["samples"].values()
        return [sample["filtered_resps"][0] for sample in samples]

    def result(self, task: str, metric: str, options: str = "") -> float:
        return float(self.run(task, options)["results"][f"drawn_{task}"][f"{metric},none"])
