"""The comparison with other implementations, without any of them: what counts as equal, and the rules it stands on."""

from __future__ import annotations

import json

import pytest
import torch
from recorded import PEERS, peer_file, read

from bench import plot
from bench.peers import __main__ as command
from bench.peers import dpp, ours, pages, rules
from bench.peers.cases import KV_CASES, Case
from bench.peers.kvpress import Ledger
from bench.peers.records import EQUAL, Side, compare, judge

SMALL = Case("small", "tova", cap=5, window=2, sinks=1, prompt=7, steps=3)


def side(seed: int = 0, steps: int = 4) -> Side:
    generator = torch.Generator().manual_seed(seed)
    held = torch.rand(steps, 2, 2, 2, 9, generator=generator) < 0.5
    return Side(held, torch.randn(steps, 2, 11, generator=generator), {"torch": "2"})


def test_a_side_is_read_as_it_was_written(tmp_path):
    written = side()
    written.save(tmp_path / "side.safetensors")
    read_again = Side.load(tmp_path / "side.safetensors")
    assert compare(written, read_again)["logits_difference"] == 0
    assert read_again.facts == {"torch": "2"}
    Side(written.held, None).save(tmp_path / "choice.safetensors")
    assert compare(Side.load(tmp_path / "choice.safetensors"), Side(written.held, None))["equal"]


@pytest.mark.parametrize("change", ["held", "answer", "logit", "little"])
def test_one_token_one_answer_or_one_logit_that_differs_is_a_difference(change):
    mine, other = side(), side()
    if change == "held":
        other.held[2, 1, 0, 1, 3] ^= True
    elif change == "answer":
        best, second = other.logits[1, 0].topk(2).indices
        other.logits[1, 0, second] = other.logits[1, 0, best] + 1e-6
    else:
        other.logits[0, 0, other.logits[0, 0].argmin()] -= 1.0 if change == "logit" else 1e-6
    found = compare(mine, other)
    assert found["equal"] == (change == "little")
    where = {"step": 2, "layer": 1, "row": 0, "head": 1}
    assert found["first_difference"] == (where if change == "held" else None)
    assert (found["lines"] - found["lines_equal"], found["tokens"] - found["tokens_equal"]) == (
        int(change == "held"),
        int(change == "answer"),
    )


def test_sides_of_different_cases_are_refused():
    with pytest.raises(ValueError, match=r"must hold one shape, got \(4, .* and \(3, "):
        compare(side(), side(steps=3))
    with pytest.raises(ValueError, match=r"must have one shape, got \(4, 2, 11\) and None"):
        compare(side(), Side(side().held, None))
    broken = side()
    broken.logits[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="must be numbers, got NaN"):
        compare(side(), broken)


@pytest.mark.parametrize(
    "expected, peer, published, described, verdict",
    [
        (EQUAL, 0, 0, None, True),
        (EQUAL, 1, 0, None, False),  # the peer changed
        (EQUAL, 0, 1, None, False),  # we are wrong, and so is the peer
        ("a reason", 1, 0, None, True),
        ("a reason", 0, 0, None, False),  # the reason is no more
        ("a reason", 1, 0, 1, True),
        ("a reason", 1, 0, 2, False),  # the reason does not explain it
    ],
)
def test_only_what_is_known_is_as_expected(expected, peer, published, described, verdict):
    sides = {"peer": side(peer), "published": side(published)}
    sides["described"] = None if described is None else side(described)
    found = judge(expected, ours=side(0), **sides)
    assert found["as_expected"] is verdict
    json.dumps(found)


@pytest.mark.parametrize("decoder", ["llama", "qwen2"])
def test_the_decoder_of_the_rules_is_that_of_transformers(decoder):
    case = Case("whole", "tova-newest", decoder=decoder, cap=9, prompt=6, steps=2)
    assert compare(ours.run(case), rules.run(case, rules.PUBLISHED[case.method]))["equal"]
    prompt, fed = case.tokens()
    model = ours.model_of(case)
    with torch.inference_mode():
        logits = model(torch.cat([prompt, fed], 1)).logits[:, case.prompt - 1 :]
    whole = rules.run(case, lambda case, layer, held, attention: held)
    assert torch.allclose(whole.logits.transpose(0, 1), logits, atol=1e-4)


def test_caps_and_kinds_of_the_rules():
    held = torch.ones(2, 2, 7, dtype=torch.bool)
    attention = torch.rand(2, 4, 7, 7, generator=torch.Generator().manual_seed(0)).tril()
    for name, rule in {**rules.PUBLISHED, **rules.DESCRIBED}.items():
        kept = [rule(SMALL, layer, held, attention).sum(-1) for layer in range(3)]
        assert all((count == count.flatten()[0]).all() for count in kept), name
        assert name == "pyramidkv" or all((count == SMALL.cap).all() for count in kept), name
    assert rules.streaming(SMALL, 0, held, attention)[0, 0].tolist() == [True, False, False, True, True, True, True]
    assert {case.method for case in KV_CASES} <= rules.PUBLISHED.keys()


def test_the_ledger_follows_tokens_that_change_their_slots():
    ledger, values = Ledger(), torch.arange(10.0).view(1, 1, 5, 2)
    assert ledger.grow(0, values).tolist() == [[[0, 1, 2, 3, 4]]]
    ledger.shrink(0, values, values[:, :, [3, 0]])
    assert ledger.grow(0, values[:, :, :3]).tolist() == [[[3, 0, 5]]]
    with pytest.raises(RuntimeError, match="only one"):
        ledger.shrink(0, values[:, :, [0, 0, 1]], values[:, :, :1])


def test_greedy_choices_enlarge_the_determinant_the_most():
    x = torch.randn(7, 9, generator=torch.Generator().manual_seed(2)).double()
    kernel, chosen = x @ x.mT, []
    for _ in range(3):
        rest = [number for number in range(7) if number not in chosen]
        sizes = [kernel[[*chosen, number]][:, [*chosen, number]].det() for number in rest]
        chosen.append(rest[int(torch.stack(sizes).argmax())])
    assert dpp.greedy(kernel, 3).nonzero()[:, 0].tolist() == sorted(chosen)


def test_positions_are_the_models_own():
    from transformers import Qwen2VLConfig, Qwen2VLModel

    page = pages.Page("small", question="ab", images=2, rows=2, columns=4)
    model = Qwen2VLModel.__new__(Qwen2VLModel)
    torch.nn.Module.__init__(model)
    names = dict(image_token_id=pages.IMAGE, video_token_id=pages.VIDEO, vision_start_token_id=pages.START)
    model.config = Qwen2VLConfig(vision_config={"spatial_merge_size": pages.MERGE}, **names)
    ids = torch.tensor([page.ids()])
    found, _ = model.get_rope_index(ids, mm_token_type_ids=(ids == pages.IMAGE).int(), image_grid_thw=page.grid())
    assert pages.positions(page, torch.ones(2, page.tokens, dtype=torch.bool)) == found[:, 0].tolist()


def test_peers_are_recorded_and_their_results_are_in_the_document():
    document = (command.ROOT / "docs" / "measurements.md").read_text()
    assert list(PEERS) == list(command.PEERS)
    makefile = (command.ROOT / "Makefile").read_text()
    assert f"\nPEERS := {' '.join(PEERS)}\n" in makefile
    for name, requirements in PEERS.items():
        package, _, version = requirements[0].partition("==")
        assert read(peer_file(name))[package] == version
        content = json.loads((command.RESULTS / f"{name}.json").read_text())
        assert all(record["as_expected"] for record in content["cases"].values())
        assert plot.table(f"peers-{name}", command.RESULTS.parent) in document, "run `python bench/plot.py`"
