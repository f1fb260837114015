"""How `limoe verify` follows the reference: decisions that rounding explains are forced one at a time, in order.

Trials are scripted: what the layout decides in each block of each step stands here, and so do the reference's gates.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from limoe_dist.config.schema import Run
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.train.parity import along
from limoe_dist.train.parity.along import Followed, Stage, follow_reference
from limoe_dist.train.parity.case import Case
from limoe_dist.train.parity.routes import UNEXPLAINED, Decision, Flips
from tests.support.cases import small_run
from tests.support.ranks import RanksPool

RUN = small_run("fp64")
BLOCKS = (1, 3)
GROUPS = RUN.train.batch_pairs // RUN.moe.group_pairs
TOKENS = RUN.moe.group_pairs * (RUN.image_tokens + RUN.text.length)
SHAPE = (GROUPS, TOKENS, RUN.moe.top_k)
LIMIT = 1e-6
Spot = tuple[int, int]


def decision(*, moved: Sequence[tuple[int, int]] = (), lost: Sequence[tuple[int, int]] = ()) -> Decision:
    """Every token chooses expert 0 and is kept, but for each (group, token) that moved to expert 1 or lost its slot."""
    expert_GSK, kept_GSK = torch.zeros(SHAPE, dtype=torch.int64), torch.ones(SHAPE, dtype=torch.bool)
    expert_GSK[..., 1:] = 2
    for group, token in moved:
        expert_GSK[group, token, 0] = 1
    for group, token in lost:
        kept_GSK[group, token, 0] = False
    return Decision(expert_GSK, kept_GSK)


def gates(gap: float) -> Tensor:
    """Experts 0 and 1 are `gap` apart for every token."""
    gates_GSE = torch.full((*SHAPE[:2], RUN.moe.num_experts), 0.01, dtype=torch.float64)
    gates_GSE[..., 0], gates_GSE[..., 1] = 0.4, 0.4 - gap
    return gates_GSE


class Script:
    """What each run of the trial decides, and what was forced on it."""

    def __init__(self, wanted: dict[Spot, Decision], own: dict[Spot, Decision], gaps: dict[Spot, float]) -> None:
        self.wanted, self.own, self.gaps = wanted, own, gaps
        self.forced: list[set[Spot]] = []
        self.planted = 0

    def passes(self, decisions: dict[Spot, Decision], gaps: dict[Spot, float]) -> Any:
        steps = sorted({number for number, _ in decisions})
        return [
            SimpleNamespace(
                decisions={block: decisions[number, block] for block in BLOCKS},
                gates={block: gates(gaps[number, block]) for block in BLOCKS},
            )
            for number in steps
        ]

    def run_trial(self, case: Case, batches: Any, *, forced: Any, **_: Any) -> Any:
        self.forced.append({(n, block) for n, one in enumerate(forced) for block in one})
        for n, one in enumerate(forced):
            assert all(decision.equals(self.wanted[n, block]) for block, decision in one.items())
        made = {spot: forced[spot[0]].get(spot[1], self.own[spot]) for spot in self.own}
        # The layout's own gates are not what margins are taken from.
        return SimpleNamespace(passes=self.passes(made, dict.fromkeys(made, 0.3)))

    def plant(self) -> AbstractContextManager[None]:
        self.planted += 1
        return nullcontext()

    def follow(self, monkeypatch: pytest.MonkeyPatch, *, run: Run = RUN, limit: float = LIMIT) -> Followed:
        monkeypatch.setattr(along, "run_trial", self.run_trial)
        wanted: Any = SimpleNamespace(passes=self.passes(self.wanted, self.gaps))
        stage = Stage(Case(run), ("pairs", "pairs"), wanted, Mesh.single(), torch.device("cpu"))
        return follow_reference(stage, self.plant, limit=limit)


def script(own: dict[Spot, Decision], gaps: dict[Spot, float]) -> Script:
    spots = [(number, block) for number in (0, 1) for block in BLOCKS]
    plain = {spot: decision() for spot in spots}
    return Script(plain, plain | own, dict.fromkeys(spots, 0.2) | gaps)


def test_equal_decisions_need_one_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    found = script({}, {})
    assert found.follow(monkeypatch).flips == {}
    assert found.forced == [set()]
    assert found.planted == 1


def test_decisions_that_rounding_explains_are_forced_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {(0, 3): decision(moved=[(0, 2), (1, 0)]), (1, 1): decision(moved=[(2, 1)])}
    found = script(own, {(0, 3): 1e-8, (1, 1): 5e-7})
    followed = found.follow(monkeypatch)
    assert found.forced == [set(), {(0, 3)}, {(0, 3), (1, 1)}]
    assert found.planted == 3
    assert list(followed.flips) == [(0, 3), (1, 1)]
    assert (followed.flips[0, 3].choices, followed.flips[0, 3].slots) == (2, 0)
    assert followed.flips[0, 3].margin == pytest.approx(1e-8, rel=1e-6)
    assert followed.flips[1, 1].choices == 1
    assert followed.flips[1, 1].margin == pytest.approx(5e-7, rel=1e-6)
    last = followed.trial.passes
    assert all(last[n].decisions[block].equals(found.wanted[n, block]) for n, block in found.wanted)


def flips_on_a_rank() -> dict[Spot, Flips]:
    """On one of 2 ranks: those of its groups and of the other's. A token moved on rank 0, and two on rank 1."""
    mesh, half = Mesh.build(tp=1, ep=1), GROUPS // 2
    mine = slice(mesh.rank * half, (mesh.rank + 1) * half)
    moved = decision(moved=[(0, 2), (half, 0), (half, 1)])
    own = Decision(moved.expert_GSK[mine], moved.kept_GSK[mine])

    def run_trial(*_: Any, forced: Any, **__: Any) -> Any:
        decided = SimpleNamespace(decisions={1: forced[0].get(1, own)}, gates={1: gates(0.3)[mine]})
        return SimpleNamespace(passes=[decided])

    of_all = torch.cat([gates(1e-8)[:half], gates(5e-7)[half:]])
    wanted: Any = SimpleNamespace(passes=[SimpleNamespace(decisions={1: decision()}, gates={1: of_all})])
    stage = Stage(Case(RUN), ("pairs",), wanted if mesh.rank == 0 else None, mesh, torch.device("cpu"))
    with mock.patch.object(along, "run_trial", run_trial):
        return follow_reference(stage, nullcontext, limit=LIMIT).flips


def test_flips_of_all_ranks_count_and_the_widest_margin_of_any(ranks2: RanksPool) -> None:
    for flips in ranks2.run(flips_on_a_rank):
        assert list(flips) == [(0, 1)]
        assert (flips[0, 1].choices, flips[0, 1].slots) == (3, 0)
        assert flips[0, 1].margin == pytest.approx(5e-7, rel=1e-6)


def test_the_tokens_that_count_are_those_of_the_batch_of_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    examples = Case.examples

    def watched(self: Case, given: Any, *, step: int, **rest: Any) -> Any:
        asked.append((given, step))
        return examples(self, given, step=step, **rest)

    monkeypatch.setattr(Case, "examples", watched)
    script({(1, 3): decision(moved=[(0, 0)])}, {}).follow(monkeypatch)
    # The case begins after the warm-up, of 2 steps here.
    assert asked == [("pairs", 3)]


def test_after_a_defect_all_decisions_of_its_step_are_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {spot: decision(moved=[(0, 0)]) for spot in [(0, 1), (0, 3), (1, 3)]}
    found = script(own, {(1, 3): 1e-8})
    followed = found.follow(monkeypatch)
    # Gaps of 0.2: step 1 is a defect at its first block, so that its second says nothing.
    assert found.forced == [set(), {(0, 1), (0, 3)}, {(0, 1), (0, 3), (1, 3)}]
    assert list(followed.flips) == [(0, 1), (1, 3)]
    assert followed.flips[0, 1].margin == pytest.approx(0.2)


def test_a_margin_that_equals_the_limit_is_a_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {(0, 1): decision(moved=[(0, 0)]), (0, 3): decision(moved=[(0, 0)])}
    found = script(own, {(0, 1): LIMIT})
    assert list(found.follow(monkeypatch, limit=0.4 - (0.4 - LIMIT)).flips) == [(0, 1)]


@pytest.mark.parametrize(
    ("order", "margin"), [("priority", 0.0), ("images_first", UNEXPLAINED), ("random", UNEXPLAINED)]
)
def test_a_lost_slot_is_explained_by_priorities_alone(
    order: str, margin: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The reference kept the token and dropped its equal; the layout dropped both.
    run = RUN.model_copy(update={"moe": RUN.moe.model_copy(update={"order": order})})
    wanted, own = decision(lost=[(1, 0)]), decision(lost=[(1, 0), (1, 1)])
    plain = {(number, block): decision() for number in (0, 1) for block in BLOCKS}
    found = Script(plain | {(1, 3): wanted}, plain | {(1, 3): own}, dict.fromkeys(plain, 0.2))
    assert found.follow(monkeypatch, run=run).flips == {(1, 3): Flips(choices=0, slots=1, margin=margin)}


def test_a_dense_model_has_no_decisions_to_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def run_trial(*_: Any, **given: Any) -> Any:
        calls.append(given["forced"])
        return SimpleNamespace(passes=[SimpleNamespace(decisions={})])

    monkeypatch.setattr(along, "run_trial", run_trial)
    none: Any = None
    stage = Stage(Case(RUN), ("pairs",), none, Mesh.single(), torch.device("cpu"))
    assert follow_reference(stage, nullcontext, limit=LIMIT).flips == {}
    assert calls == [[{}]]


def test_steps_are_named_from_one_with_what_their_batch_holds() -> None:
    none: Any = None
    stage = Stage(Case(RUN), ("pairs", "texts"), none, Mesh.single(), torch.device("cpu"))
    assert [stage.label(0), stage.label(1)] == ["step 1: pairs", "step 2: texts"]
