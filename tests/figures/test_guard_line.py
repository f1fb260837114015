"""A line of guard.jsonl, from the losses that a run has seen to the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from limoe_dist.config import schema
from limoe_dist.train import ledger
from limoe_dist.train.guard import Guard
from limoe_dist.train.votes import NOBODY

LOSSES = [2.0, 2.5, 1.5, 2.0, 3.0, 2.0, 1.0, 2.5]
"""Median 2; distances from it 0 0 0 1/2 1/2 1/2 1 1, of which the lower middle one is 1/2 (torch's median)."""


def test_every_number_of_an_event_by_hand(tmp_path: Path) -> None:
    guard = Guard(schema.Guard(spike="rollback", spike_window=8, spike_z=5.0), torch.device("cpu"))
    for loss in LOSSES:
        judged = guard.read(guard.judge(torch.tensor([*NOBODY.numbers(), loss]).double(), torch.tensor(1.0).double()))
        assert guard.decide(judged, step=1) is None
    votes = torch.tensor([*NOBODY.numbers(), 9.0]).double()
    judged = guard.read(guard.judge(votes, torch.tensor(4.5).double()))
    event = guard.decide(judged, step=9)
    assert event is not None
    ledger.append(tmp_path, event.passing(96, 144).told("back from step 8", to_step=6))
    line = json.loads((tmp_path / "guard.jsonl").read_text())
    assert line.pop("time") == pytest.approx(event.time)
    text = line.pop("text")
    # (9 - 2) / (1.4826 * 0.5) = 9.44
    assert text.startswith("step 9: the loss 9 ")
    assert "9.4 robust standard deviations" in text
    assert line == {
        "kind": "spike",
        "action": "rollback",
        "step": 9,
        "loss": 9.0,
        "grad_norm": 4.5,
        "z": pytest.approx(7 / (1.4826 * 0.5)),
        "first": 96,
        "end": 144,
        "to_step": 6,
    }
