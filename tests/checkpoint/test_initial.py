"""Weights of another run: by name, with positions of another length, listed where names differ; in any layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from limoe_dist.checkpoint import initial
from limoe_dist.checkpoint.initial import IMAGE, TEXT, Taken, take_weights
from limoe_dist.config.errors import UserError
from limoe_dist.config.schema import Run
from limoe_dist.optim.engine import make_engine
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.parallel.placement import Shard
from tests.support.cases import perturbed_model, small_run
from tests.support.checkpoints import CPU, a_state, save
from tests.support.ranks import RanksPool


def changed(**sections: dict[str, object]) -> Run:
    """small_run with other settings in some sections; another seed, so that first values differ."""
    run = small_run()
    sections = {"train": {"seed": 11}} | sections
    return run.model_copy(update={name: getattr(run, name).model_copy(update=part) for name, part in sections.items()})


def weights(run: Run, mesh: Mesh) -> dict[str, Shard]:
    engine = make_engine(perturbed_model(run, mesh), run, mesh)
    return {name: shard for name, shard in engine.shards().items() if name.startswith("model/")}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint of the small model: 16 patches of 4 x 4, texts of 5 pieces."""
    folder = tmp_path_factory.mktemp("source")
    run, mesh = small_run(), Mesh.single()
    engine = make_engine(perturbed_model(run, mesh), run, mesh)
    save(folder, a_state(9), engine.shards(), mesh)
    return folder


def take(source: Path, run: Run, mesh: Mesh | None = None) -> tuple[Taken, dict[str, Shard]]:
    mesh = mesh or Mesh.single()
    mine = weights(run, mesh)
    return take_weights(source, mine, mesh, CPU), mine


def test_the_same_model_takes_every_weight_and_no_moment(source: Path) -> None:
    taken, mine = take(source, changed())
    for name, shard in weights(small_run(), Mesh.single()).items():
        assert torch.equal(mine[name].tensor, shard.tensor), name
    assert len(taken.names) == len(mine)
    assert (taken.missing, taken.unknown, taken.resized) == ((), (), ())
    assert taken.checkpoint == source / "checkpoints" / "step-00000009"
    assert "beginning with" in taken.text("t")
    assert "another vocabulary" in taken.text("other")


def test_a_checkpoint_may_be_named_itself(source: Path) -> None:
    taken, _ = take(source / "checkpoints" / "step-00000009", changed())
    assert not taken.missing


def test_positions_of_a_finer_grid_are_between_those_of_the_coarse_one(source: Path) -> None:
    before = weights(small_run(), Mesh.single())[IMAGE].tensor
    taken, mine = take(source, changed(image={"size": 32}))
    assert taken.resized == ("image_embed.position",)
    coarse, fine = before.view(4, 4, -1), mine[IMAGE].tensor.view(8, 8, -1)
    # Centres of fine cells 1 and 2 lie a quarter on either side of the edge between coarse cells 0 and 1.
    along = 0.75 * coarse[:, 0] + 0.25 * coarse[:, 1]
    torch.testing.assert_close(fine[1, 1], 0.75 * along[0] + 0.25 * along[1])
    torch.testing.assert_close(fine[0, 0], coarse[0, 0])
    torch.testing.assert_close(fine[7, 7], coarse[3, 3])


def test_positions_of_another_text_length_keep_their_ends(source: Path) -> None:
    before = weights(small_run(), Mesh.single())[TEXT].tensor
    taken, mine = take(source, changed(text={"length": 10}))
    assert taken.resized == ("text_embed.position",)
    longer = mine[TEXT].tensor
    torch.testing.assert_close(longer[0], before[0])
    torch.testing.assert_close(longer[9], before[4])
    torch.testing.assert_close(longer[3], 0.75 * before[1] + 0.25 * before[2])


def test_a_coarser_grid_averages_what_a_linear_ramp_makes_exact(tmp_path: Path) -> None:
    run, mesh = changed(image={"size": 32}), Mesh.single()
    fine = weights(run, mesh)
    ramp = torch.arange(8, dtype=torch.float64)
    fine[IMAGE].tensor.copy_((ramp[:, None] + 10 * ramp).reshape(64, 1).expand(64, 32))
    save(tmp_path, a_state(1), fine, mesh)
    _, mine = take(tmp_path, changed())
    coarse = mine[IMAGE].tensor.view(4, 4, -1)
    # In the middle, a ramp stays a ramp: coarse cell i is between fine cells 2 i and 2 i + 1.
    torch.testing.assert_close(coarse[1, 2, 0], torch.tensor(2.5 + 10 * 4.5, dtype=torch.float64))


@pytest.mark.parametrize(
    ("name", "before", "after", "wanted"),
    [
        # A cell of the coarse grid weighs those of the fine one by a tent of twice its width: 3, 3, 1 of 7.
        (TEXT, [7.0, 14.0, 28.0, 70.0], 2, [(21 + 42 + 28) / 7, (14 + 84 + 210) / 7]),
        # Small grids are grids: rows and columns of 2 to 3.
        (IMAGE, [0.0, 2.0, 4.0, 6.0], 9, [0.0, 1.0, 2.0, 2.0, 3.0, 4.0, 4.0, 5.0, 6.0]),
        (IMAGE, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], 1, [4.0]),
    ],
)
def test_positions_are_resized_by_tents(name: str, before: list[float], after: int, wanted: list[float]) -> None:
    position_ND = torch.tensor(before, dtype=torch.float64)[:, None]
    found = initial._resized(name, position_ND, after)
    torch.testing.assert_close(found[:, 0], torch.tensor(wanted, dtype=torch.float64))


def test_names_that_differ_are_listed_and_the_rest_is_taken(source: Path) -> None:
    deeper = changed(model={"depth": 5}, moe={"blocks": (1,)})
    first_values = weights(deeper, Mesh.single())
    taken, mine = take(source, deeper)
    assert "blocks.4.norm1.weight" in taken.missing
    assert "blocks.3.moe.experts.up_weight" in taken.unknown
    for name in taken.missing:
        assert torch.equal(mine[f"model/{name}"].tensor, first_values[f"model/{name}"].tensor), name
    text = taken.text("t")
    assert "not there, and left at their first values" in text
    assert "blocks.4.norm1.weight" in text
    assert "unknown here, and left out" in text
    assert "blocks.3.moe.experts.up_weight" in text


def test_other_widths_are_refused_before_anything_is_filled(source: Path) -> None:
    wider = changed(model={"mlp_dim": 128})
    mine = weights(wider, Mesh.single())
    before = {name: shard.tensor.clone() for name, shard in mine.items()}
    with pytest.raises(UserError, match=r"shape \(\d+.*\) there and \(.*\) here: begin from a run of the same widths"):
        take_weights(source, mine, Mesh.single(), CPU)
    assert all(torch.equal(before[name], shard.tensor) for name, shard in mine.items())


def test_another_vocabulary_size_is_refused(source: Path) -> None:
    with pytest.raises(UserError, match=r"text_embed\.table has shape \(50, 32\) there and \(60, 32\) here"):
        take(source, changed(text={"vocab_size": 60}))


def test_a_checkpoint_without_a_common_name_is_refused(tmp_path: Path) -> None:
    foreign = Shard(torch.zeros(3), shape=(3,), start=(0,), writes=True)
    save(tmp_path, a_state(1), {"model/backbone.stem": foreign}, Mesh.single())
    with pytest.raises(UserError, match="none of its parameters has the name of one of this model"):
        take(tmp_path, changed())


def taken_on_ranks(source: str, tp: int, ep: int) -> None:
    mesh, run = Mesh.build(tp=tp, ep=ep), changed(image={"size": 32})
    _, mine = take(Path(source), run, mesh)
    _, alone = take(Path(source), run)
    for name, shard in mine.items():
        if shard.tensor.numel():
            window = tuple(slice(a, a + n) for a, n in zip(shard.start, shard.tensor.shape, strict=True))
            assert torch.equal(shard.tensor, alone[name].tensor[window]), name


def test_ranks_take_what_one_process_takes(ranks2: RanksPool, source: Path) -> None:
    ranks2.run(taken_on_ranks, str(source), 2, 2)
