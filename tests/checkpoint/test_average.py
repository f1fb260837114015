"""The mean of checkpoints is the mean of their weights, whatever wrote them; other models and doubles are refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from limoe_dist.checkpoint import weights
from limoe_dist.checkpoint.average import average, describe
from limoe_dist.checkpoint.catalog import checkpoint_folder, is_verified
from limoe_dist.checkpoint.manifest import Damaged, read_manifest, verify
from limoe_dist.checkpoint.reader import Reader, load, load_weights
from limoe_dist.checkpoint.state import read_state
from limoe_dist.config.errors import UserError
from limoe_dist.optim.native import NativeEngine
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.parallel.placement import Shard
from tests.checkpoint.planted import RANK_0, RANK_1, box, plant, whole
from tests.support.cases import perturbed_model, small_run
from tests.support.checkpoints import CPU, a_state, save
from tests.support.ranks import RanksPool

ALONE = Mesh.single()


def shards(*values: float, name: str = "model/w") -> dict[str, Shard]:
    """A weight of these values, a scalar, and a moment that no mean may take up."""
    kept = torch.tensor(values)
    moment = torch.full_like(kept, 99.0)
    return {name: whole(kept), "model/scale": whole(kept[0].clone()), f"adamw/exp_avg/{name}": whole(moment)}


def saved(out: Path, step: int, content: dict[str, Shard], **state: Any) -> Path:
    return save(out, a_state(step, **state), content, ALONE, keep=9)


def read(folder: Path) -> dict[str, Tensor]:
    reader = Reader(folder, ALONE, CPU)
    return {name: reader.whole(name) for name in reader.names}


def test_the_mean_of_three_by_hand(tmp_path: Path) -> None:
    # (1 + 2 + 6) / 3 = 3 and (-3 + 0 + 0) / 3 = -1
    contents = [(2, (1.0, -3.0)), (4, (2.0, 0.0)), (8, (6.0, 0.0))]
    paths = [saved(tmp_path / "run", step, shards(*values)) for step, values in contents]
    found = average(paths, tmp_path / "mean")
    assert found.checkpoint == checkpoint_folder(tmp_path / "mean", 8)
    content = read(found.checkpoint)
    assert set(content) == {"model/w", "model/scale"}
    assert content["model/w"].tolist() == [3.0, -1.0]
    assert content["model/scale"].item() == 3.0
    assert (found.step, found.tensors, found.parameters, found.warnings) == (8, 2, 3, ())
    assert [source.step for source in found.sources] == [2, 4, 8]


def test_the_result_is_a_whole_checkpoint_with_the_newest_state(tmp_path: Path) -> None:
    paths = [saved(tmp_path / "run", step, shards(1.0, float(step))) for step in (9, 5)]
    found = average(paths, tmp_path / "mean")
    manifest, state = read_manifest(found.checkpoint), read_state(found.checkpoint)
    assert verify(found.checkpoint, manifest.files) == []
    assert is_verified(found.checkpoint)
    assert found.num_bytes == manifest.num_bytes
    assert (state.step, state.position) == (9, 144)
    assert (state.layout.engine, state.layout.optimizer) == ("average", "weights alone")
    assert state.written > 0
    assert list((tmp_path / "mean" / "checkpoints").iterdir()) == [found.checkpoint]


def test_sums_are_not_rounded_to_the_type_that_is_stored(tmp_path: Path) -> None:
    # In float32, 2**24 + 1 is 2**24: a mean that is summed there would be 8388608 / 1.5.
    paths = [saved(tmp_path / "run", step, shards(value)) for step, value in ((1, 2.0**24), (2, 1.0), (3, 1.0))]
    mean = read(average(paths, tmp_path / "mean").checkpoint)["model/w"]
    assert mean.dtype == torch.float32
    assert mean.item() == torch.tensor((2.0**24 + 2) / 3, dtype=torch.float64).float().item()


def test_the_widest_type_of_the_sources_is_written(tmp_path: Path) -> None:
    narrow, wide = torch.tensor([1.5], dtype=torch.bfloat16), torch.tensor([0.25], dtype=torch.float64)
    paths = [
        saved(tmp_path / "run", step, {"model/w": whole(each)}) for step, each in ((1, narrow), (2, wide), (3, narrow))
    ]
    mean = read(average(paths, tmp_path / "mean").checkpoint)["model/w"]
    assert (mean.dtype, mean.item()) == (torch.float64, 3.25 / 3)


def test_rows_that_do_not_fit_into_memory_together_pass_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "AT_ONCE", 8)
    tables = [torch.arange(35.0).view(7, 5) * factor for factor in (1, 3)]
    paths = [saved(tmp_path / "run", step, {"model/w": whole(table)}) for step, table in enumerate(tables)]
    assert torch.equal(read(average(paths, tmp_path / "mean").checkpoint)["model/w"], 2 * tables[0])


def test_boxes_of_several_ranks_are_put_together(tmp_path: Path) -> None:
    two = {RANK_0: box([1.0, 2.0], of=[3], start=[0]), RANK_1: box([3.0], of=[3], start=[2])}
    one = {RANK_0: box([3.0, 4.0, 9.0], of=[3], start=[0])}
    paths = [plant(tmp_path / "run", two, step=1), plant(tmp_path / "run", one, step=2)]
    assert read(average(paths, tmp_path / "mean").checkpoint)["model/w"].tolist() == [2.0, 3.0, 6.0]


def _write_on_two_ranks(out: Path) -> None:
    run, mesh = small_run("fp32"), Mesh.build(tp=1, ep=2)
    model = perturbed_model(run, mesh)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    save(out, a_state(4), NativeEngine(model, run, mesh).shards(), mesh)


def test_a_checkpoint_of_two_ranks_and_one_of_one_have_a_mean(tmp_path: Path, ranks2: RanksPool) -> None:
    run = small_run("fp32")
    model = perturbed_model(run, ALONE)
    one = save(tmp_path / "one", a_state(3), NativeEngine(model, run, ALONE).shards(), ALONE)
    ranks2.run(_write_on_two_ranks, tmp_path / "two")
    found = average([one, checkpoint_folder(tmp_path / "two", 4)], tmp_path / "mean")
    mean = perturbed_model(run, ALONE)
    load_weights(Reader(found.checkpoint, ALONE, CPU), mean, ALONE)
    for (name, got), weight in zip(mean.named_parameters(), model.parameters(), strict=True):
        # (w + 3 w) / 2 = 2 w: 3 w was rounded once, to float32.
        torch.testing.assert_close(got, 2 * weight, rtol=1e-7, atol=0, msg=name)


def test_training_does_not_go_on_from_weights_alone(tmp_path: Path) -> None:
    run = small_run("fp32")
    contents = [NativeEngine(perturbed_model(run, ALONE), run, ALONE).shards() for _ in range(2)]
    paths = [saved(tmp_path / "run", step, content) for step, content in enumerate(contents)]
    reader = Reader(average(paths, tmp_path / "mean").checkpoint, ALONE, CPU)
    with pytest.raises(UserError, match=r"weights alone, without the optimizer's state.*--init-from"):
        load(reader, contents[0], ALONE)


BASE = {"model.width": 8, "text.length": 16, "train.seed": 0}


@pytest.mark.parametrize(
    ("content", "state", "told"),
    [
        (shards(1.0, 2.0), {"settings": BASE | {"model.width": 16}}, r"different models: model.width=16 there, 8 here"),
        (shards(1.0, 2.0), {"settings": BASE | {"moe.top_k": 2}}, r"different models: moe.top_k=2 there, 1 here"),
        (shards(1.0, 2.0), {"tokenizer": "other"}, r"the vocabulary has sha256 other.*, t\.\.\. here"),
        (shards(1.0, 2.0, 3.0), {}, r"w is \(3,\) there, \(2,\) here"),
        (shards(1.0, 2.0, name="model/v"), {}, r"v is in the first only"),
    ],
    ids=["setting", "setting that one lacks", "vocabulary", "shape", "name"],
)
def test_checkpoints_of_different_models_are_refused(
    tmp_path: Path, content: dict[str, Shard], state: dict[str, Any], told: str
) -> None:
    first = saved(tmp_path / "run", 1, shards(1.0, 2.0), settings=BASE)
    other = saved(tmp_path / "other", 2, content, **({"settings": BASE} | state))
    with pytest.raises(UserError, match=told):
        average([first, other], tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


def test_other_data_and_other_training_are_told_and_averaged(tmp_path: Path) -> None:
    first = saved(tmp_path / "run", 1, shards(1.0), settings=BASE)
    other = saved(tmp_path / "other", 2, shards(3.0), settings=BASE | {"train.seed": 1}, data="other")
    found = average([first, other], tmp_path / "mean")
    assert [text.split(": ", 1)[1][:20] for text in found.warnings] == ["train.seed=1 there, ", "a mean of runs apart"]


def test_a_checkpoint_counts_once(tmp_path: Path) -> None:
    path = saved(tmp_path / "run", 1, shards(1.0))
    with pytest.raises(UserError, match="given twice, and would count twice"):
        average([path, tmp_path / "run" / "." / "checkpoints" / path.name], tmp_path / "mean")
    copy = tmp_path / "copy" / "checkpoints" / path.name
    shutil.copytree(path, copy)
    with pytest.raises(UserError, match=r"is a copy of .*, and would count twice"):
        average([path, copy], tmp_path / "mean")


def test_one_checkpoint_has_no_mean(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two checkpoints or more: 1 given"):
        average([saved(tmp_path / "run", 1, shards(1.0))], tmp_path / "mean")


def test_a_damaged_source_is_named(tmp_path: Path) -> None:
    paths = [saved(tmp_path / "run", step, shards(1.0, float(step))) for step in (1, 2)]
    file = paths[1] / RANK_0
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(Damaged, match=r"step-00000002.*its checksum differs: leave the checkpoint of step 2 out"):
        average(paths, tmp_path / "mean")


def test_a_diverged_source_is_named(tmp_path: Path) -> None:
    paths = [saved(tmp_path / "run", step, shards(value)) for step, value in ((1, 1.0), (2, float("nan")))]
    with pytest.raises(UserError, match=r"step-00000002: (scale|w) has values that are not finite"):
        average(paths, tmp_path / "mean")


def test_a_source_is_described_by_the_checksum_of_its_manifest(tmp_path: Path) -> None:
    path = saved(tmp_path / "run", 7, shards(1.0))
    source = describe(path)
    assert (source.step, source.num_bytes) == (7, read_manifest(path).num_bytes)
    assert f'"xxh3": "{source.xxh3}"' in (path / "manifest.json").read_text()
