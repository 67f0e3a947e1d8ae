"""One rank of a tensor-parallel model, started by torchrun: it answers as the masked whole model."""

from __future__ import annotations

import sys
from pathlib import Path

import tiny
import torch
import transformers
from checks import GREEDY, assert_close, set_tolerance, uniform
from masked_reference import masked_greedy, select
from torch import distributed
from torch.distributed.tensor import DTensor

import asymvlm

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
set_tolerance()
distributed.init_process_group("gloo")
for family in ("llava", "qwen2_5_vl"):
    plain, inputs = tiny.build(family), tiny.make_batch(family, "left_padded")
    selection = select(plain, inputs, 0.5)
    _, logits = masked_greedy(plain, inputs, selection.keep, steps=3)
    folder = Path(sys.argv[1]) / family
    if distributed.get_rank() == 0:
        plain.save_pretrained(folder)
    distributed.barrier()
    model = type(plain).from_pretrained(folder, tp_plan="auto", dtype=torch.float32)
    assert any(isinstance(parameter, DTensor) for parameter in model.parameters()), "nothing was split"
    model.generation_config = plain.generation_config
    with asymvlm.patch(model, vision=uniform(0.5)) as handle:
        found = model.generate(**inputs, **GREEDY, max_new_tokens=3)
    assert torch.equal(handle.last.index, selection.index)
    assert_close(torch.stack(found.logits, 1), logits)
    print(f"rank {distributed.get_rank()}, {family}: the same\n", end="", flush=True)
distributed.destroy_process_group()
