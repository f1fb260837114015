"""The closed formula of `limoe submit` against the modules themselves."""

from __future__ import annotations

import pytest

from launch.counting import count_parameters, first_of_mesh, meta_model
from launch.formula import estimate, weights_of
from launch.memory import memory_of
from limoe_dist.config.presets import names, preset
from limoe_dist.config.rules import check
from limoe_dist.config.schema import Run
from limoe_dist.optim.engine import wide_dtype
from limoe_dist.parallel.pieces import make_buckets

# Ranks, tp, ep; 6 and 12 ranks do not divide most widths.
LAYOUTS = ((1, 1, 1), (4, 2, 1), (8, 1, 8), (16, 2, 4), (6, 1, 2), (12, 2, 1))


def laid_out(run: Run, world: int, tp: int, ep: int, **optim: object) -> Run:
    """The run on so many ranks, with a batch that they can share; ep is 1 for a dense one."""
    ep = ep if run.moe.blocks else 1
    run = run.model_copy(
        update={
            "parallel": run.parallel.model_copy(update={"tp": tp, "ep": ep}),
            "train": run.train.model_copy(update={"batch_pairs": 96 * world}),
            "optim": run.optim.model_copy(update=optim),
        }
    )
    check(run, world=world)
    return run


@pytest.mark.parametrize("name", names())
def test_the_table_has_every_parameter_of_the_modules(name):
    run = preset(name)
    assert sum(weight.count * weight.size for weight in weights_of(run)) == count_parameters(run).total


def compare(run: Run, world: int, dtype: str) -> None:
    run = run.model_copy(update={"train": run.train.model_copy(update={"dtype": dtype})})
    mesh = first_of_mesh(world, tp=run.parallel.tp, ep=run.parallel.ep)
    numbers = run.parallel.bucket_mb * 1e6 / wide_dtype(run).itemsize
    buckets = make_buckets(meta_model(run, mesh).named_parameters(), mesh, numbers=numbers)
    memory, formula = memory_of(buckets, run), estimate(run, world=world, dtype=dtype)
    assert formula.weights == memory.weights
    assert formula.gradients == memory.gradients
    assert formula.masters == memory.masters + memory.summed_pieces
    assert formula.optimizer - formula.scratch == memory.saved - memory.masters
    # The scratch is at most a bucket; a bucket is overfull by at most the tensor that closed it.
    assert memory.sum <= formula.sum <= memory.sum + formula.scratch


@pytest.mark.parametrize(("world", "tp", "ep"), LAYOUTS)
@pytest.mark.parametrize("name", ["tiny", "b16-two-tower", "h14"])
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_rank_holds_what_its_modules_do(name, world, tp, ep, optimizer):
    run = laid_out(preset(name), world, tp, ep, name=optimizer)
    compare(run, world, "bf16")


@pytest.mark.parametrize("name", names())
def test_every_preset_is_counted_with_its_own_optimizer(name):
    run = preset(name)
    compare(laid_out(run, 16, 2, 4, name=run.optim.name), 16, "bf16")


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_other_types_are_counted_too(dtype):
    run = laid_out(preset("small"), 6, 2, 2, name="adafactor")
    run = run.model_copy(update={"moe": run.moe.model_copy(update={"routers": "per_modality"})})
    compare(run, 6, dtype)


def test_a_checkpoint_of_adamw_is_three_numbers_for_each_parameter():
    run = preset("tiny")
    assert estimate(run, world=1, dtype="fp32").checkpoint == 3 * 4 * count_parameters(run).total
