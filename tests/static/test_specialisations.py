"""A real call specialises as the launch configuration wants, and a new length compiles nothing new."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from compiled import run

from asymvlm_kernels.prefill.prune.tokens import Kept, Scratch, Tokens
from asymvlm_kernels.prefill.reference import EPSILON
from asymvlm_kernels.tuning import prune
from asymvlm_kernels.tuning.prefill import fold_config, gather_config, score_config, select_config


@pytest.fixture(scope="module")
def calls() -> dict[str, Any]:
    pytest.importorskip("triton")
    return json.loads(run("specialisations.py"))


def test_score_tokens(calls):
    fold, score = calls["score"]
    launch = score_config(torch.bfloat16, 8, 90)
    constants = {"EPSILON": EPSILON, "D": 3072, "WIDTH": 3072, "VECTOR": 8, "HIGH_LOW": True}
    assert fold["constants"] == {**constants, "BLOCK_D": fold_config(3072).block_d, "stride_td": 1, "stride_w": 1}
    tile = {"BLOCK_N": launch.block_n, "BLOCK_L": launch.block_l, "BLOCK_D": launch.block_d}
    absent = {"best_ptr": None, "norm_ptr": None}  # what the gradient needs costs other calls nothing
    assert score["constants"] == {**constants, **tile, **absent, "stride_vd": 1, "stride_mn": 1, "stride_tm": 1}
    assert fold["divisible"] == ["text_ptr", "weight_ptr", "folded_ptr", "unlift_ptr", "stride_tl"]
    pointers = ["vision_ptr", "folded_ptr", "unlift_ptr", "vision_mask_ptr", "text_mask_ptr", "scores_ptr"]
    assert score["divisible"] == [*pointers, "stride_vn"]


def test_score_tokens_of_odd_rows(calls):
    _, score = calls["score odd"]
    assert score["constants"]["VECTOR"] == 1
    assert score["constants"]["WIDTH"] == 128  # t' is padded, so its loads stay wide
    assert "stride_vn" not in score["divisible"]


def test_gather_rows(calls):
    (gather,) = calls["gather"]
    launch = gather_config(3072, 2)
    tile = {"BLOCK_K": launch.block_k, "BLOCK_D": launch.block_d}
    assert gather["constants"] == {"D": 3072, "VECTOR": 8, **tile, "stride_rd": 1, "stride_ik": 1}
    assert gather["divisible"] == ["rows_ptr", "index_ptr", "out_ptr", "stride_rs"]


def test_select_tokens_and_importance_gap(calls):
    launch = select_config(2500)
    (select,), (gap,) = calls["select"], calls["gap"]
    constants = {"BLOCK_N": launch.block_n, "CHUNKED": False}
    assert gap["constants"] == constants
    assert select["constants"] == {**constants, "ROWS": 32 * launch.num_warps, "WIDTH": launch.width}
    assert select["divisible"] == ["scores_ptr", "counts_ptr", "mask_ptr", "index_ptr"]


def test_the_two_launches_of_prune_sequence(calls):
    (score,), (gather,) = calls["score_select"], calls["gather_sequence"]
    launch = prune.score_select_config(3072, torch.bfloat16, 8, 90)
    tile = {"BLOCK_N": launch.block_n, "BLOCK_L": launch.block_l, "BLOCK_D": launch.block_d}
    wide = {"EPSILON": EPSILON, "D": 3072, "VECTOR": 8, "HIGH_LOW": True, "LIFT": False}
    rank = {"BLOCK_S": 4096, "THREADS": 32 * launch.num_warps, "LONG": False, "OVERLAP": False}
    given = {"tokens": Tokens._fields.index("lines"), "kept": Kept._fields.index("own")}
    given["scratch"] = Scratch._fields.index("spread_keys")
    rank |= {"BY_SCORES": False, **{f"{name}.{place}": None for name, place in given.items()}}
    strides = dict.fromkeys(("stride_ed", "stride_w", "stride_vs", "stride_ts", "stride_ps"), 1)
    assert score["constants"] == {**tile, **wide, **rank, **strides}
    pointers = {f"tokens.{Tokens._fields.index(name)}" for name in ("embeds", "weight")}
    assert {*pointers, f"scratch.{Scratch._fields.index('parts')}", "stride_es"} <= set(score["divisible"])
    assert not {"S", "parts", "rounds", "capacity", "ratio_0", "number_0"} & set(score["divisible"])
    assert gather["constants"]["VECTOR"] == 8
    assert {"embeds_ptr", "out_ptr", "stride_es"} <= set(gather["divisible"])
    assert not {"S", "K", "B"} & set(gather["divisible"])
    assert not any(name.startswith("carry_strides_b") for name in gather["divisible"])


PREFILL = ("score", "gather", "select", "gap", "score_select", "score_select by scores", "gather_sequence")
DECODE = ("attend", "score_from_lse", "plan", "move")
TRAINING = ("key_bias_attention", "key_bias_attention_grad")


@pytest.mark.parametrize("op", PREFILL + DECODE + TRAINING)
def test_a_new_length_compiles_nothing_new(calls, op):
    assert calls[f"kinds of {op}"] == 1
