"""Every number of a line of metrics.jsonl, on paper: two steps of two MoE blocks with three experts, no two alike."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from limoe_dist.config.schema import Log as LogSettings
from limoe_dist.config.schema import Moe, Run, Train
from limoe_dist.model.moe_layer import MoeRecord
from limoe_dist.parallel.mesh import Axis, Mesh
from limoe_dist.parallel.traffic import Traffic
from limoe_dist.train import heartbeat, metrics
from limoe_dist.train.heartbeat import Heartbeat
from limoe_dist.train.metrics import Log, Window, peak_memory, success
from limoe_dist.train.step import Losses, StepResult
from tests.support.ranks import RanksPool

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
        [30 * n for n in range(1, 9)],
        routed=f64([7, 1], [1, 8], [6, 3]),
        kept=f64([6, 1], [1, 5], [4, 3]),
        entropy=f64(7, 3),
        tokens=f64(14, 6),
    ),
    1: record(
        [3 * n for n in range(1, 8)],
        routed=f64([4, 1], [3, 6], [3, 1]),
        kept=f64([3, 1], [0, 4], [2, 1]),
        entropy=f64(6, 2),
        tokens=f64(12, 8),
    ),
}
SECOND = {
    3: record(
        [30 * (n + 2) for n in range(1, 9)],
        routed=f64([5, 1], [2, 9], [3, 0]),
        kept=f64([5, 0], [2, 7], [1, 0]),
        entropy=f64(5, 2),
        tokens=f64(10, 2),
    ),
    1: record(
        [3 * (n + 2) for n in range(1, 8)],
        routed=f64([7, 2], [1, 5], [6, 1]),
        kept=f64([6, 2], [0, 3], [4, 1]),
        entropy=f64(3, 3),
        tokens=f64(18, 4),
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
        # Images: kept (5 + 10) of (10 + 14); texts: (6 + 6) of (8 + 8).
        "success_image": 15 / 24,
        "success_text": 12 / 16,
        # Images: (6 + 3) / (12 + 18); texts: (2 + 3) / (8 + 4).
        "entropy_image": 0.3,
        "entropy_text": 5 / 12,
        # Images 11, 4 and 9 of 24: half of an even share is 4. Texts 3, 11 and 2 of 16: half is 2.67.
        "experts_image": 3,
        "experts_text": 2,
        "kept": [[4.5, 1.5], [0.0, 3.5], [3.0, 1.0]],
    },
    "3": {
        **{name: 10.0 * n + 10 for n, name in enumerate(NAMES, start=1)},
        # Images: kept (11 + 8) of (14 + 10); texts: (9 + 7) of (12 + 10).
        "success_image": 19 / 24,
        "success_text": 16 / 22,
        # Images: (7 + 5) / (14 + 10); texts: (3 + 2) / (6 + 2).
        "entropy_image": 0.5,
        "entropy_text": 0.625,
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

    def one(
        contrastive: float, aux: float, correct: Tensor, records: dict[int, MoeRecord], norm: float, rate: float
    ) -> StepResult:
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
    # 7 s before the first step, 20 s between the steps and the time after the second one do not count.
    clock.now = 107.0
    window.restart_clock()
    clock.now = 110.0
    window.add(first)
    clock.now = 130.0
    window.restart_clock()
    clock.now = 135.0
    window.add(second)
    clock.now = 145.0
    window.restart_clock()
    clock.now = 150.0
    return window.summary(step=40, scale=torch.tensor(20.0))


def compare_line(found: dict[str, Any], *, without: tuple[str, ...] = ()) -> None:
    blocks = found.pop("blocks")
    wanted = {name: value for name, value in WANTED.items() if name not in without}
    assert {name: value for name, value in found.items() if name not in without} == pytest.approx(wanted, rel=1e-12)
    assert blocks.keys() == BLOCKS.keys()
    for index, wanted in BLOCKS.items():
        block = dict(blocks[index])
        # Sums of whole numbers and halves: exact.
        assert block.pop("kept") == wanted["kept"]
        assert block == pytest.approx({name: wanted[name] for name in wanted if name != "kept"}, rel=1e-12)


def test_a_line_is_the_mean_of_its_steps(clock: Clock) -> None:
    compare_line(two_steps(clock))


def test_the_next_line_holds_its_own_steps_and_begins_its_clock_at_the_last_summary(clock: Clock) -> None:
    window = Window(RUN, Mesh.single(), CPU)
    first, second = results()
    clock.now = 110.0
    window.add(first)
    clock.now = 120.0
    window.summary(step=1, scale=torch.tensor(1.0))
    clock.now = 126.0
    window.add(second)
    found = window.summary(step=2, scale=torch.tensor(4.0))
    assert (found["step"], found["loss"], found["grad_norm"], found["lr"]) == (2, 6.0, 8.5, 0.3)
    # 1 step of 12 pairs in the 6 s since the summary; 6 and 11 of 12 pairs.
    assert (found["seconds_per_step"], found["pairs_per_s"], found["temperature"]) == (6.0, 2.0, 0.25)
    assert (found["accuracy_image_to_text"], found["accuracy_text_to_image"]) == (6 / 12, pytest.approx(11 / 12))
    # The second step alone: 3 (1 + 2) / 3 groups, 10 of 14 images kept, 3 / 18 of entropy.
    block = found["blocks"]["1"]
    assert (block["importance"], block["success_image"]) == pytest.approx((3.0, 10 / 14))
    assert block["entropy_image"] == pytest.approx(3 / 18)


def test_an_expert_with_exactly_half_an_even_share_is_in_use_whatever_the_number_of_steps() -> None:
    # Of 16 tokens 2: a mean over 3 steps makes 2 / 3 * 4 less than 16 / 3 / 2.
    routed = f64([2, 1], [5, 5], [6, 5], [3, 5])
    run = RUN.model_copy(update={"moe": RUN.moe.model_copy(update={"num_experts": 4, "blocks": (1,)})})
    window = Window(run, Mesh.single(), CPU)
    nothing = record([], 0 * routed, 0 * routed, f64(0, 0), f64(0, 0))
    for each in (record([], routed, routed, f64(0, 0), f64(16, 16)), nothing, nothing):
        losses = Losses(f64(0)[0], f64(0)[0], f64(0, 0), {1: each})
        window.add(dataclasses.replace(results()[0], losses=losses))
    block = window.summary(step=3, scale=f64(1)[0])["blocks"]["1"]
    assert (block["experts_image"], block["experts_text"]) == (4, 3)


@pytest.mark.parametrize(("absent", "present"), [("image", "text"), ("text", "image")])
def test_a_modality_without_tokens_has_no_rates(clock: Clock, absent: str, present: str) -> None:
    there = f64(0, 1) if absent == "image" else f64(1, 0)
    part = record([], there * f64([4], [2], [0]), there * f64([3], [2], [0]), 3 * there, 6 * there)
    window = Window(RUN, Mesh.single(), CPU)
    clock.now = 101.0
    window.add(StepResult(Losses(f64(1)[0], f64(0)[0], f64(0, 0), {1: part}), f64(1)[0], 0.1, None))
    block = window.summary(step=1, scale=torch.tensor(1.0))["blocks"]["1"]
    names = ("success", "entropy", "experts")
    assert [block[f"{name}_{absent}"] for name in names] == [None, None, 0]
    # 5 of 6 choices kept; experts with 4 and 2 choices, where an even share is 2.
    assert [block[f"{name}_{present}"] for name in names] == pytest.approx([5 / 6, 0.5, 2])


def two_steps_of_a_rank(tp: int, ep: int) -> dict[str, Any]:
    """A quarter of every sum on rank 0 and three quarters on rank 1."""
    mesh = Mesh.build(tp=tp, ep=ep)
    window = Window(RUN, mesh, CPU)
    for result in results((0.25, 0.75)[mesh.rank]):
        window.add(result)
    return window.summary(step=40, scale=torch.tensor(20.0))


@pytest.mark.parametrize(("tp", "ep"), [(1, 2), (2, 1)])
def test_every_rank_counts_once_and_all_get_the_same_line(ranks2: RanksPool, tp: int, ep: int) -> None:
    own = ("time", "pairs_per_s", "seconds_per_step", "memory_bytes")
    for found in ranks2.run(two_steps_of_a_rank, tp, ep):
        # Pairs of all ranks in the seconds of one.
        assert found["pairs_per_s"] * found["seconds_per_step"] == pytest.approx(12)
        compare_line(found, without=own)


def test_memory_is_the_peak_of_the_process_or_of_the_gpu(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    # 3 KiB of this process.
    assert peak_memory(CPU) == 3072
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1000 + device.index)
    assert peak_memory(torch.device("cuda", 5)) == 1005


class Board:
    """What TensorBoard would show."""

    def __init__(self) -> None:
        self.points: list[tuple[str, float, int]] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.points.append((name, value, step))


def test_files_and_tensorboard_hold_the_numbers_of_the_line(clock: Clock, tmp_path: Path) -> None:
    log = Log(tmp_path, RUN, first_step=0, writes=True)
    log._board = board = Board()
    line = two_steps(clock)
    line["blocks"]["1"]["success_text"] = None
    log.metrics(line)
    log.evaluation({"step": 41, "zeroshot": {"top1": 0.25, "prompts": "written"}})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == line
    written = json.loads((tmp_path / "evaluations.jsonl").read_text())
    assert written == {"step": 41, "zeroshot": {"top1": 0.25, "prompts": "written"}}
    # Everything but the time, lists, texts and what is absent.
    numbers = {name: value for name, value in WANTED.items() if name != "time"}
    for index, block in BLOCKS.items():
        numbers |= {f"blocks/{index}/{name}": value for name, value in block.items() if name != "kept"}
    del numbers["blocks/1/success_text"]
    shown = {name: value for name, value, step in board.points if step == 40}
    assert shown == pytest.approx(numbers, rel=1e-12)
    assert board.points[-1] == ("evaluation/zeroshot/top1", 0.25, 41)
    assert len(board.points) == len(numbers) + 1


@pytest.mark.parametrize(
    ("rates", "lowest"),
    [([0.5, 0.75], 0.5), ([0.75, None, 0.5], 0.5), ([None, 0.25], 0.25), ([None, None], None), ([], None)],
)
def test_success_is_the_lowest_of_the_blocks_that_have_one(rates: list[float | None], lowest: float | None) -> None:
    figures = {"blocks": {str(block): {"success_text": rate, "success_image": 0.1} for block, rate in enumerate(rates)}}
    assert success(figures, "text") == lowest


def test_tensorboard_forgets_what_comes_after_the_step_that_a_run_goes_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, int]] = []
    monkeypatch.setattr(
        "torch.utils.tensorboard.SummaryWriter", lambda folder, *, purge_step: calls.append((folder, purge_step))
    )
    Log(tmp_path, RUN.model_copy(update={"log": LogSettings(tensorboard=True)}), first_step=40, writes=True)
    assert calls == [(str(tmp_path / "tensorboard"), 41)]


HOSTS = ["n1", "n1", "n2", "n3"]


def heart_of_four(out: Path, busy_s: list[float], clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Heartbeat:
    """A heartbeat on rank 0 of 4, where every rank works so many seconds a step."""

    def gathered(target: Tensor, own: Tensor, axis: Axis) -> None:
        if target.dtype == torch.uint8:
            target.copy_(torch.tensor([list(host.encode().ljust(target.shape[1], b"\0")) for host in HOSTS]))
        else:
            assert own.tolist() == [4.0]
            target.copy_(f64(*busy_s)[:, None])

    monkeypatch.setattr(heartbeat, "gather_into", gathered)
    axes = [Axis(name, 4, 0, None, Traffic()) for name in ("world", "dp", "tp", "edp", "ep")]
    return Heartbeat(
        out, mesh=Mesh(*axes), device=CPU, step=0, steps=9, straggler_factor=1.5, environ={}, clock=clock, wall=clock
    )


def test_busy_seconds_are_those_of_the_slowest_rank_and_the_lower_median(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    heart = heart_of_four(tmp_path, [0.5, 0.25, 2.0, 1.0], clock, monkeypatch)
    # Two steps of 3 s and 5 s: 4 s of work a step on this rank.
    for seconds in (3.0, 5.0):
        heart.phase("train")
        clock.now += seconds
        heart.step(1)
    # Sorted: 0.25, 0.5, 1, 2.
    assert heart.pace().figures == {"busy_s": {"median": 0.5, "max": 2.0, "rank": 2, "host": "n2"}}
    heart.phase("save")
    found = json.loads((tmp_path / "heartbeat.json").read_text())
    assert found == {
        "time": 108.0,
        "step": 1,
        "steps": 9,
        "phase": "save",
        "seconds_per_step": 4.0,
        "ranks": 4,
        "hosts": HOSTS,
        "busy_s": [0.5, 0.25, 2.0, 1.0],
        "job": None,
        "restart": 0,
    }


@pytest.mark.parametrize(
    ("busy_s", "slow"),
    [
        # 1.5 times the median is not above it.
        ([0.5, 0.5, 0.5, 0.75], False),
        ([0.5, 0.5, 0.5, 0.7501], True),
        # A step takes 4 s, and a twentieth of it is 0.2 s: 0.25 s above the median is more, 0.1875 s is less.
        ([0.125, 0.125, 0.125, 0.375], True),
        ([0.125, 0.125, 0.125, 0.3125], False),
    ],
)
def test_a_straggler_is_above_the_factor_and_a_twentieth_of_the_step(
    busy_s: list[float], slow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    heart = heart_of_four(tmp_path, busy_s, clock, monkeypatch)
    lines = []
    for step in range(3):
        heart.phase("train")
        clock.now += 4.0
        heart.step(step)
        lines.append(heart.pace().told)
    assert lines[:2] == [None, None]
    assert (lines[2] is not None) == slow
    assert not slow or f"rank 3 (host n3): up to {busy_s[3]:.3g} s a step" in (lines[2] or "")
