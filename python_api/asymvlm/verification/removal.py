"""What the model computes once a patch is gone."""

from __future__ import annotations

import torch

from asymvlm.verification.measure import TIMES_NOISE
from asymvlm.verification.report import FAIL, PASS, CheckRow
from asymvlm.verification.runs import run
from asymvlm.verification.subject import Noise, Subject


def check_removal(subject: Subject) -> list[CheckRow]:
    """Outputs after removal are those of before: bit for bit, where the model repeats itself bit for bit."""
    subject.tell("the model after removal")
    base = subject.base
    after = run(subject.model, subject.sample, base.tokens.shape[1], forced=base.tokens)
    equal = torch.equal(after.logits, base.logits) and torch.equal(after.hidden, base.hidden)
    difference = 0.0 if equal else Noise().add(after, base, subject.real)
    allowed = TIMES_NOISE * subject.again
    fine = equal or 0 < difference <= allowed
    note = "bit for bit" if equal else "not bit for bit"
    return [CheckRow("removal: outputs", PASS if fine else FAIL, difference, subject.again, allowed, note)]
