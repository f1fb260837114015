"""Every number of a line of metrics.jsonl, on paper: two steps of two MoE blocks with three experts, no two alike."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from limoe_dist.config.schema import Log as LogSettings
from limoe_dist.config.schema import Moe, Run, Train
from limoe_dist.model.moe_layer import MoeRecord
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.train import metrics
from limoe_dist.train.metrics import Window
from limoe_dist.train.step import Losses, StepResult

CPU = torch.device("cpu")
# 12 pairs in 3 routing groups.
RUN = Run(
    train=Train(batch_pairs=12),
    moe=Moe(blocks=(1, 3), num_experts=3, group_pairs=4),
    log=LogSettings(tensorboard=False),
)
NAMES = ("importance", "load", "z", "local_image", "local_text", "global_image", "global_text", "mutual_information")


def f64(*values: float | list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def record(losses: list[float], routed: Tensor, kept: Tensor, entropy: Tensor, tokens: Tensor) -> MoeRecord:
    """A record with the first losses of NAMES; more of them are not switched on."""
    named = {name: f64(value)[0] for name, value in zip(NAMES, losses, strict=False)}
    return MoeRecord(named, routed, kept, entropy, tokens)


# Losses number 1 to 7 of block 1 are 3 n and 3 (n + 2); all 8 of block 3 are 30 n and 30 (n + 2).
FIRST = {
    3: record(
        [30 * n for n in range(1, 9)], f64([7, 1], [1, 8], [6, 3]), f64([6, 1], [1, 5], [4, 3]), f64(7, 3), f64(14, 6)
    ),
    1: record(
        [3 * n for n in range(1, 8)], f64([4, 1], [3, 5], [3, 2]), f64([3, 1], [0, 4], [2, 2]), f64(6, 2), f64(12, 8)
    ),
}
SECOND = {
    3: record(
        [30 * (n + 2) for n in range(1, 9)],
        f64([5, 1], [2, 9], [3, 0]),
        f64([5, 0], [2, 7], [1, 0]),
        f64(5, 1),
        f64(10, 2),
    ),
    1: record(
        [3 * (n + 2) for n in range(1, 8)],
        f64([7, 2], [1, 5], [6, 1]),
        f64([6, 2], [0, 3], [4, 1]),
        f64(3, 3),
        f64(18, 4),
    ),
}
WANTED: dict[str, Any] = {
    "step": 40,
    "time": 77.0,
    # (2 + 5) / 2 and (0.5 + 1) / 2.
    "contrastive": 3.5,
    "aux": 0.75,
    "loss": 4.25,
    # 12 pairs a step: (3 + 6) / 24 and (7 + 11) / 24.
    "accuracy_image_to_text": 0.375,
    "accuracy_text_to_image": 0.75,
    # (1.5 + 8.5) / 2.
    "grad_norm": 5.0,
    "lr": 0.3,
    # 1 / 20.
    "temperature": 0.05,
    # 2 steps of 12 pairs in 3 + 5 s.
    "pairs_per_s": 3.0,
    "seconds_per_step": 4.0,
    "memory_bytes": 3072,
    # The mean of both blocks: (n + 1 + 10 n + 10) / 2; the last: (0 + 90) / 2.
    **{f"aux_{name}": 5.5 * (n + 1) for n, name in enumerate(NAMES[:-1], start=1)},
    "aux_mutual_information": 45.0,
}
BLOCKS: dict[str, dict[str, Any]] = {
    "1": {
        # Mean of 3 n and 3 (n + 2), divided by 3 groups.
        **{name: n + 1.0 for n, name in enumerate(NAMES[:-1], start=1)},
        "mutual_information": 0.0,
        # Images: kept (5 + 10) of (10 + 14); texts: (7 + 6) of (8 + 8).
        "success_image": 15 / 24,
        "success_text": 13 / 16,
        # Images: (6 + 3) / (12 + 18); texts: (2 + 3) / (8 + 4).
        "entropy_image": 0.3,
        "entropy_text": 5 / 12,
        # Images 11, 4 and 9 of 24: half of an even share is 4. Texts 3, 10 and 3 of 16: half is 2.67.
        "experts_image": 3,
        "experts_text": 3,
        "kept": [[4.5, 1.5], [0.0, 3.5], [3.0, 1.5]],
    },
    "3": {
        **{name: 10.0 * n + 10 for n, name in enumerate(NAMES, start=1)},
        # Images: kept (11 + 8) of (14 + 10); texts: (9 + 7) of (12 + 10).
        "success_image": 19 / 24,
        "success_text": 16 / 22,
        # Images: (7 + 5) / (14 + 10); texts: (3 + 1) / (6 + 2).
        "entropy_image": 0.5,
        "entropy_text": 0.5,
        # Images 12, 3 and 9 of 24: half of an even share is 4. Texts 2, 17 and 3 of 22: half is 3.67.
        "experts_image": 2,
        "experts_text": 1,
        "kept": [[5.5, 0.5], [1.5, 6.0], [2.5, 1.5]],
    },
}


def scaled(records: dict[int, MoeRecord], share: float) -> dict[int, MoeRecord]:
    return {
        index: MoeRecord(
            {name: value * share for name, value in part.losses.items()},
            part.routed_E2 * share,
            part.kept_E2 * share,
            part.entropy_2 * share,
            part.tokens_2 * share,
        )
        for index, part in records.items()
    }


def results(share: float = 1.0) -> list[StepResult]:
    """Both steps, as a rank sees them that has that share of every sum; the norm is that of the whole gradient."""

    def one(contrastive: float, aux: float, correct: Tensor, records: dict[int, MoeRecord], norm: float, rate: float):
        losses = Losses(f64(contrastive)[0] * share, f64(aux)[0] * share, correct * share, scaled(records, share))
        return StepResult(losses, f64(norm)[0], rate, None)

    return [one(2.0, 0.5, f64(3, 7), FIRST, 1.5, 0.1), one(5.0, 1.0, f64(6, 11), SECOND, 8.5, 0.3)]


class Clock:
    def __init__(self, now: float = 100.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(metrics.time, "perf_counter", clock)
    monkeypatch.setattr(metrics.time, "time", lambda: 77.0)
    # In KiB.
    monkeypatch.setattr(metrics.resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=3 + 5 * who))
    return clock


def two_steps(clock: Clock) -> dict[str, Any]:
    window = Window(RUN, Mesh.single(), CPU)
    first, second = results()
    # 7 s before the first step and 20 s between the steps count for nothing, nor does the time until the summary.
    clock.now = 107.0
    window.restart_clock()
    clock.now = 110.0
    window.add(first)
    clock.now = 130.0
    window.restart_clock()
    clock.now = 135.0
    window.add(second)
    clock.now = 150.0
    return window.summary(step=40, scale=torch.tensor(20.0))


def compare(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Nested lists and objects too, number by number, in the same order of keys."""
    assert list(found) == list(wanted) if "success_image" not in wanted else set(found) == set(wanted)
    for name, value in wanted.items():
        assert torch.tensor(found[name]).tolist() == pytest.approx(value, abs=1e-12) if name != "kept" else True, name
        if name == "kept":
            torch.testing.assert_close(f64(*found[name]), f64(*value), rtol=1e-12, atol=1e-12)


def test_a_line_of_two_steps(clock: Clock) -> None:
    found = two_steps(clock)
    blocks = found.pop("blocks")
    assert found == pytest.approx(WANTED, rel=1e-12)
