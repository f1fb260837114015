"""A checkpoint gives back what was saved, in another layout too; what is damaged or foreign is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

from limoe_dist.checkpoint.manifest import read_manifest
from limoe_dist.checkpoint.storage import State, checkpoints, latest_checkpoint, load, load_weights, read_state, save
from limoe_dist.config.errors import UserError
from limoe_dist.config.schema import Run
from limoe_dist.model.tower import Limoe
from limoe_dist.optim.native import NativeEngine
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.parallel.placement import placement_of
from tests.support.cases import perturbed_model, small_run
from tests.support.ranks import RanksPool

SMALL = small_run()
# Without clipping: the norm's last bit is the layout's, and these tests ask for equal bits.
RUN = SMALL.model_copy(update={"optim": SMALL.optim.model_copy(update={"clip_norm": 1e9})})
STATE = State(step=3, position=48, settings={}, data="d", tokenizer="t")


def trained(run: Run, mesh: Mesh) -> tuple[Limoe, NativeEngine]:
    """A model whose weights and moments all differ: the gradient of each parameter is the parameter itself."""
    model = perturbed_model(run, mesh)
    engine = NativeEngine(model, run, mesh)
    shares = [p.square().sum() / (2 * placement_of(p).replicas(mesh).size) for p in model.parameters()]
    engine.backward(torch.stack(shares).sum(), last=True)
    engine.step(0.1)
    return model, engine


def fresh(run: Run, mesh: Mesh) -> tuple[Limoe, NativeEngine]:
    model = perturbed_model(run, mesh)
    return model, NativeEngine(model, run, mesh)


def assert_restored(checkpoint: Path, mesh: Mesh) -> None:
    """Weights, moments and the model's parameters are those of `trained`, bit for bit."""
    model, engine = fresh(RUN, mesh)
    shards = engine.shards()
    load(checkpoint, shards, mesh)
    engine.adopt(shards)
    want_model, want_engine = trained(RUN, mesh)
    for name, shard in want_engine.shards().items():
        assert torch.equal(engine.shards()[name].tensor, shard.tensor), name
    for (name, parameter), want in zip(model.named_parameters(), want_model.parameters(), strict=True):
        assert torch.equal(parameter, want), name


def written(out: Path, step: int = 3, keep: int = 2) -> Path:
    mesh = Mesh.single()
    state = STATE.model_copy(update={"step": step})
    return save(out, state, trained(RUN, mesh)[1].shards(), mesh, keep=keep)


def test_what_was_saved_comes_back_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = written(tmp_path)
    monkeypatch.setattr(pickle, "load", None)
    monkeypatch.setattr(pickle, "loads", None)
    monkeypatch.setattr(pickle, "Unpickler", None)
    assert_restored(checkpoint, Mesh.single())
    assert read_state(latest_checkpoint(tmp_path)) == STATE


def save_on_ranks(out: str, tp: int, ep: int) -> None:
    mesh = Mesh.build(tp=tp, ep=ep)
    save(Path(out), STATE, trained(RUN, mesh)[1].shards(), mesh, keep=2)


def restore_on_ranks(checkpoint: str, tp: int, ep: int) -> None:
    assert_restored(Path(checkpoint), Mesh.build(tp=tp, ep=ep))


@pytest.mark.parametrize(("tp", "ep"), [(1, 2), (2, 1), (2, 2)])
def test_two_ranks_save_what_one_process_reads(ranks2: RanksPool, tmp_path: Path, tp: int, ep: int) -> None:
    ranks2.run(save_on_ranks, str(tmp_path), tp, ep)
    assert_restored(latest_checkpoint(tmp_path), Mesh.single())


def test_one_process_saves_what_two_ranks_read(ranks2: RanksPool, tmp_path: Path) -> None:
    checkpoint = written(tmp_path)
    ranks2.run(restore_on_ranks, str(checkpoint), 2, 2)


def test_a_directory_without_a_manifest_does_not_exist(tmp_path: Path) -> None:
    whole = written(tmp_path, step=3)
    (written(tmp_path, step=4) / "manifest.json").unlink()
    assert checkpoints(tmp_path) == [whole]
    assert latest_checkpoint(tmp_path) == whole
    with pytest.raises(UserError, match=r"no checkpoint of step 4 \(steps there: 3\)"):
        latest_checkpoint(tmp_path, 4)
    with pytest.raises(UserError, match="no whole checkpoint"):
        latest_checkpoint(tmp_path / "elsewhere")


def test_a_save_replaces_what_a_killed_save_left(tmp_path: Path) -> None:
    left = tmp_path / "checkpoints" / "step-00000003"
    left.mkdir(parents=True)
    (left / "rank-00007.safetensors").write_bytes(b"half")
    checkpoint = written(tmp_path)
    assert not (checkpoint / "rank-00007.safetensors").exists()


def test_only_the_last_whole_ones_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        written(tmp_path, step=step, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_what_killed_saves_left_behind_goes_with_the_next_save(tmp_path: Path) -> None:
    (written(tmp_path, step=1) / "manifest.json").unlink()
    written(tmp_path, step=2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def test_a_checkpoint_of_the_same_step_is_replaced_whole(tmp_path: Path) -> None:
    checkpoint = written(tmp_path)
    (checkpoint / "stray").write_text("x")
    assert written(tmp_path) == checkpoint
    assert not (checkpoint / "stray").exists()
    load_weights(checkpoint, perturbed_model(small_run(), Mesh.single()), Mesh.single())


def test_tensors_without_a_checksum_are_not_read(tmp_path: Path) -> None:
    checkpoint = written(tmp_path)
    content = json.loads((checkpoint / "manifest.json").read_text())
    content["files"] = [file for file in content["files"] if not file["name"].endswith(".safetensors")]
    (checkpoint / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="is not in the manifest, so its checksum is not known"):
        load_weights(checkpoint, perturbed_model(small_run(), Mesh.single()), Mesh.single())


def test_a_directory_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the directory should be")
    with pytest.raises(UserError, match=r"checkpoints.*: (Not a directory|File exists)"):
        written(tmp_path)


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "rank-00000.json", "state.json"])
@pytest.mark.parametrize("fault", ["flipped", "cut", "gone"])
def test_a_file_that_changed_is_named_before_anything_is_filled(tmp_path: Path, name: str, fault: str) -> None:
    checkpoint = written(tmp_path)
    content = bytearray((checkpoint / name).read_bytes())
    if fault == "flipped":
        content[len(content) // 2] ^= 1
        (checkpoint / name).write_bytes(content)
    elif fault == "cut":
        (checkpoint / name).write_bytes(content[:-1])
    else:
        (checkpoint / name).unlink()
    model = perturbed_model(small_run(), Mesh.single())
    before = model.norm.weight.detach().clone()
    with pytest.raises(UserError, match=name):
        load_weights(checkpoint, model, Mesh.single())
    assert torch.equal(model.norm.weight, before)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    checkpoint = written(tmp_path)
    run = small_run()
    wider = run.model_copy(update={"model": run.model.model_copy(update={"mlp_dim": 128})})
    with pytest.raises(UserError, match=r"belongs to another model: it tensor .* \(and \d+ more differences\)"):
        load_weights(checkpoint, perturbed_model(wider, Mesh.single()), Mesh.single())


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    checkpoint = written(tmp_path)
    content = json.loads((checkpoint / "manifest.json").read_text()) | {"format_version": 2}
    (checkpoint / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="format_version=2, but this version reads 1"):
        read_manifest(checkpoint)


def test_a_name_that_leaves_the_checkpoint_is_refused(tmp_path: Path) -> None:
    checkpoint = written(tmp_path)
    content = json.loads((checkpoint / "manifest.json").read_text())
    content["files"][0]["name"] = "../run.json"
    (checkpoint / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="plain file name"):
        read_manifest(checkpoint)
