"""A step that is multiplied by zero leaves everything as it was, to the bit, whatever its gradient holds."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from limoe_dist.model.tower import Limoe
from limoe_dist.optim.engine import Engine, make_engine
from limoe_dist.parallel.mesh import Mesh
from tests.support.cases import perturbed_model, small_run

NO, YES = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)


def an_engine(name: str, engine: str = "native", offload: str = "") -> tuple[Limoe, Engine]:
    small = small_run("fp32")
    more = {"name": name, "engine": engine, "offload": bool(offload), "min_factored_dim": 16}
    run = small.model_copy(update={"optim": small.optim.model_copy(update=more)})
    model = perturbed_model(run, Mesh.single())
    return model, make_engine(model, run, Mesh.single())


def give(model: Limoe, engine: Engine, value: float) -> None:
    loss = torch.stack([(parameter * value).sin().sum() for parameter in model.parameters()]).sum()
    engine.backward(loss * (1.0 if value < 1e30 else float("nan")), last=True)


def state_of(model: Limoe, engine: Engine) -> dict[str, Tensor]:
    boxes = {name: shard.tensor.clone() for name, shard in engine.shards().items()}
    return boxes | {f"parameter {name}": parameter.detach().clone() for name, parameter in model.named_parameters()}


def unequal(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize("bad", [1e31, 2.0], ids=["not finite", "finite"])
@pytest.mark.parametrize(
    "kind", [("adamw",), ("adafactor",), ("adamw", "deepspeed"), ("adamw", "deepspeed", "offload")]
)
def test_a_step_that_is_left_out_might_as_well_not_have_been(kind: tuple[str, ...], bad: float) -> None:
    model, engine = an_engine(*kind)
    twin, other = an_engine(*kind)
    # The first of all steps, when there are no moments yet; and one in the middle.
    for number, value in enumerate((bad, 0.7, bad, 1.3)):
        before = state_of(model, engine)
        give(model, engine, value)
        keep = NO if value == bad else YES
        engine.step(1e-2, norm=engine.norm()[0], keep=keep)
        if value == bad:
            assert unequal(before, state_of(model, engine)) == []
            engine.steps = number // 2
            continue
        give(twin, other, value)
        other.step(1e-2)
        assert unequal(state_of(twin, other), state_of(model, engine)) == []
        assert len(unequal(before, state_of(model, engine))) > len(before) / 2
    assert engine.steps == other.steps == 2


def test_what_travels_with_the_norm_is_summed_and_spoils_nothing() -> None:
    model, engine = an_engine("adamw")
    give(model, engine, 0.7)
    plain = copy.copy(engine.norm()[0])
    norm, beside = engine.norm(torch.tensor([1.0, float("nan"), 3.0], dtype=torch.float64))
    assert norm == plain
    assert beside.tolist()[::2] == [1.0, 3.0]
    assert torch.isnan(beside[1])
