"""A checkpoint gives back what was saved, in another layout too; what is damaged or foreign is refused, loudly."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch

from limoe_dist.checkpoint import catalog
from limoe_dist.checkpoint.initial import take_weights
from limoe_dist.checkpoint.manifest import Damaged
from limoe_dist.checkpoint.reader import Reader, load, load_weights, open_checkpoint
from limoe_dist.checkpoint.state import read_state
from limoe_dist.config.errors import UserError
from limoe_dist.config.schema import Run
from limoe_dist.model.tower import Limoe
from limoe_dist.optim.native import NativeEngine
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.parallel.placement import Shard, placement_of
from tests.checkpoint.planted import NAME, RANK_0, RANK_1, box, content, entry, mixed, parts, plant, seal, signed, whole
from tests.support.cases import perturbed_model, small_run
from tests.support.checkpoints import CPU, a_state, save
from tests.support.ranks import RanksPool

SMALL = small_run()
# Without clipping: the norm's last bit is the layout's, and these tests ask for equal bits.
RUN = SMALL.model_copy(update={"optim": SMALL.optim.model_copy(update={"clip_norm": 1e9})})
ALONE = Mesh.single()


def trained(run: Run, mesh: Mesh) -> tuple[Limoe, NativeEngine]:
    """A model whose weights and moments all differ: the gradient of each parameter is the parameter itself."""
    model = perturbed_model(run, mesh)
    engine = NativeEngine(model, run, mesh)
    shares = [p.square().sum() / (2 * placement_of(p).replicas(mesh).size) for p in model.parameters()]
    engine.backward(torch.stack(shares).sum(), last=True)
    engine.step(0.1)
    return model, engine


def assert_restored(reader: Reader, mesh: Mesh) -> None:
    """Weights, moments and the model's parameters are those of `trained`, bit for bit."""
    model = perturbed_model(RUN, mesh)
    engine = NativeEngine(model, RUN, mesh)
    shards = engine.shards()
    load(reader, shards, mesh)
    engine.adopt(shards)
    want_model, want_engine = trained(RUN, mesh)
    for name, shard in want_engine.shards().items():
        assert torch.equal(engine.shards()[name].tensor, shard.tensor), name
    for (name, parameter), want in zip(model.named_parameters(), want_model.parameters(), strict=True):
        assert torch.equal(parameter, want), name


def written(out: Path, mesh: Mesh = ALONE) -> Path:
    return save(out, a_state(3), trained(RUN, mesh)[1].shards(), mesh)


def two(run_dir: Path) -> list[Path]:
    """Two whole checkpoints of `mixed` tensors, of steps 1 and 2."""
    return [save(run_dir, a_state(step), mixed(step), ALONE) for step in (1, 2)]


def flip(file: Path, place: int = -1) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def test_what_was_saved_comes_back_bit_for_bit_and_nothing_is_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = written(tmp_path)

    def refused(*given: object, **more: object) -> Any:
        raise AssertionError("a checkpoint was unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refused)
    reader = open_checkpoint(tmp_path, ALONE, CPU)
    assert reader.checkpoint == checkpoint
    assert reader.state == read_state(checkpoint) == a_state(3)
    assert_restored(reader, ALONE)
    # For evaluation, and for a run that begins with these weights.
    model, want = perturbed_model(RUN, ALONE), dict(trained(RUN, ALONE)[0].named_parameters())
    load_weights(reader, model, ALONE)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, want[name]), name
        parameter.data.zero_()
    weights = {f"model/{name}": Shard(p.data, p.shape, (0,) * p.dim(), True) for name, p in model.named_parameters()}
    take_weights(tmp_path, weights, ALONE, CPU)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, want[name]), name


def test_every_type_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    reader = Reader(save(tmp_path, a_state(3), mixed(), ALONE), ALONE, CPU)
    assert reader.names == set(mixed())
    for name, shard in mixed().items():
        assert reader.shape(name) == shard.shape
        assert reader.whole(name).dtype == shard.tensor.dtype
        assert torch.equal(reader.whole(name), shard.tensor)


def test_any_box_is_put_together_from_the_boxes_that_were_written(tmp_path: Path) -> None:
    values = torch.arange(24.0).view(4, 6)
    # Rows 0-1 are cut after 2 columns, rows 2-3 after 5; a box without numbers holds nothing.
    boxes = {RANK_0: [(0, 2, 0, 2), (2, 4, 0, 5)], RANK_1: [(0, 2, 2, 6), (2, 4, 5, 6), (4, 4, 0, 6)]}
    numbers = iter(range(9))
    files = {}
    for file, places in boxes.items():
        # One name has one box in a file: each has a file of its own.
        for a, b, c, d in places:
            data = values[a:b, c:d].contiguous().numpy().tobytes()
            header = parts({NAME: [[4, 6], [a, c]]}) | {NAME: entry([b - a, d - c], 0, len(data))}
            files[file.replace("0000", f"000{next(numbers)}")] = content(header, data)
    reader = Reader(plant(tmp_path, files), ALONE, CPU)
    assert torch.equal(reader.whole(NAME), values)
    for a, b, c, d in [(0, 4, 0, 6), (1, 3, 1, 6), (0, 1, 0, 1), (3, 4, 5, 6), (2, 2, 0, 6)]:
        out = torch.full((b - a, d - c), -1.0)
        reader.fill(NAME, out, (a, c))
        assert torch.equal(out, values[a:b, c:d])


def save_on_ranks(out: str, tp: int, ep: int) -> None:
    written(Path(out), Mesh.build(tp=tp, ep=ep))


def restore_on_ranks(run_dir: str, tp: int, ep: int) -> None:
    mesh = Mesh.build(tp=tp, ep=ep)
    assert_restored(open_checkpoint(Path(run_dir), mesh, CPU), mesh)


@pytest.mark.parametrize(("tp", "ep"), [(1, 2), (2, 1), (2, 2)])
def test_two_ranks_save_what_one_process_reads(ranks2: RanksPool, tmp_path: Path, tp: int, ep: int) -> None:
    ranks2.run(save_on_ranks, str(tmp_path), tp, ep)
    assert_restored(open_checkpoint(tmp_path, ALONE, CPU), ALONE)


def test_one_process_saves_what_two_ranks_read(ranks2: RanksPool, tmp_path: Path) -> None:
    written(tmp_path)
    ranks2.run(restore_on_ranks, str(tmp_path), 2, 2)


@pytest.mark.parametrize("fault", [flip, Path.unlink, lambda file: file.write_bytes(b"")])
@pytest.mark.parametrize("name", [RANK_0, "state.json", "manifest.json"])
def test_behind_a_damaged_checkpoint_the_one_before_is_taken_loudly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, fault: Callable[[Path], object]
) -> None:
    before, newest = two(tmp_path)
    fault(newest / name)
    reader = open_checkpoint(tmp_path, ALONE, CPU)
    assert reader.checkpoint == before
    assert torch.equal(reader.whole("model/fp32"), mixed(1)["model/fp32"].tensor)
    said = capsys.readouterr().err
    if fault is Path.unlink and name == "manifest.json":
        assert said == (
            f"limoe: warning: {newest} has no manifest.json, so it is no checkpoint: "
            "a save gives a directory its name at the end\n"
        )
    else:
        damaged, back = said.splitlines()
        assert damaged.startswith(f"limoe: warning: the checkpoint of step 2 is damaged: {newest / name}")
        assert back == "limoe: warning: going back to the checkpoint of step 1"
        # What was verified when it was written is not any more: a save that retires others may not count on it.
        assert not catalog.is_verified(newest)
    assert catalog.is_verified(before)


def test_a_whole_checkpoint_is_taken_without_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two(tmp_path)
    assert open_checkpoint(tmp_path, ALONE, CPU).state.step == 2
    assert open_checkpoint(tmp_path, ALONE, CPU, step=1).state.step == 1
    assert capsys.readouterr().err == ""


def test_where_all_are_damaged_one_line_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in two(tmp_path):
        flip(folder / RANK_0)
    with pytest.raises(UserError) as raised:
        open_checkpoint(tmp_path, ALONE, CPU)
    assert str(raised.value) == (
        f"{tmp_path}: no checkpoint is whole (2 damaged): limoe checkpoint verify {tmp_path} tells more"
    )
    assert [line.split(" is damaged")[0] for line in capsys.readouterr().err.splitlines()] == [
        "limoe: warning: the checkpoint of step 2",
        "limoe: warning: going back to the checkpoint of step 1",
        "limoe: warning: the checkpoint of step 1",
    ]


def test_a_checkpoint_that_was_asked_for_is_that_one_or_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, newest = two(tmp_path)
    flip(newest / RANK_0)
    with pytest.raises(Damaged, match=rf"{RANK_0} was changed after it was written: its checksum differs"):
        open_checkpoint(tmp_path, ALONE, CPU, step=2)
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match=r"no checkpoint of step 3 \(steps there: 1, 2\)"):
        open_checkpoint(tmp_path, ALONE, CPU, step=3)
    with pytest.raises(UserError, match=r"no whole checkpoint \(steps there: none\)"):
        open_checkpoint(tmp_path / "nowhere", ALONE, CPU)


@pytest.mark.parametrize("version", [1, 3])
def test_behind_another_version_the_one_before_is_not_taken(tmp_path: Path, version: int) -> None:
    _, newest = two(tmp_path)
    (newest / "manifest.json").write_bytes(signed({"format": "limoe-checkpoint", "format_version": version}))
    with pytest.raises(UserError, match=f"format_version={version}, but this version reads 2") as raised:
        open_checkpoint(tmp_path, ALONE, CPU)
    assert not isinstance(raised.value, Damaged)


def opened(run_dir: str, step: int | None = None) -> tuple[str, float, str, int | None]:
    """On a rank: the checkpoint that was taken, a number of it, what the rank said; or the error, and who tells it."""
    mesh, said = Mesh.build(tp=1, ep=1), io.StringIO()
    with redirect_stderr(said):
        try:
            reader = open_checkpoint(Path(run_dir), mesh, CPU, step)
        except UserError as error:
            return f"{type(error).__name__}: {error}", 0.0, said.getvalue(), error.told_by
    return reader.checkpoint.name, reader.whole("model/scalar").item(), said.getvalue(), None


def save_both(run_dir: str) -> None:
    mesh = Mesh.build(tp=1, ep=1)
    for step in (1, 2):
        # Rank 0 writes some tensors, rank 1 the others.
        shards = {
            name: Shard(shard.tensor, shard.shape, shard.start, writes=number % 2 == mesh.rank)
            for number, (name, shard) in enumerate(mixed(step).items())
        }
        save(Path(run_dir), a_state(step), shards, mesh)


def test_two_ranks_go_back_together_and_who_found_the_fault_says_so(ranks2: RanksPool, tmp_path: Path) -> None:
    ranks2.run(save_both, str(tmp_path))
    newest = tmp_path / "checkpoints" / "step-00000002"
    scalar = mixed(2)["model/scalar"].tensor.item(), mixed(1)["model/scalar"].tensor.item()
    assert ranks2.run(opened, str(tmp_path)) == [("step-00000002", scalar[0], "", None)] * 2
    flip(newest / RANK_1)
    damaged = f"{newest / RANK_1} was changed after it was written: its checksum differs"
    told = f"limoe: warning: the checkpoint of step 2 is damaged: {damaged}\n"
    back = "limoe: warning: going back to the checkpoint of step 1\n"
    assert ranks2.run(opened, str(tmp_path)) == [
        ("step-00000001", scalar[1], back, None),
        ("step-00000001", scalar[1], told, None),
    ]
    # Asked for by its step it is refused by both, and by the one that knows why in full.
    assert ranks2.run(opened, str(tmp_path), 2) == [
        ("Damaged: rank 1 found a fault", 0.0, "", 1),
        (f"Damaged: {damaged}", 0.0, "", 1),
    ]
    # Another version's counts for more than damage that another rank finds.
    (newest / "manifest.json").write_bytes(signed({"format": "limoe-checkpoint", "format_version": 3}))
    flip(tmp_path / "checkpoints" / "step-00000001" / RANK_0)
    for answer in ranks2.run(opened, str(tmp_path)):
        assert answer[0].startswith("UserError: ")
        assert "format_version=3" in answer[0]
    (newest / "manifest.json").unlink()
    no_manifest, all_damaged = ranks2.run(opened, str(tmp_path))
    assert "step-00000002 has no manifest.json" in no_manifest[2]
    assert no_manifest[0] == all_damaged[0]
    assert "no checkpoint is whole (1 damaged)" in no_manifest[0]
    assert (no_manifest[3], all_damaged[2]) == (0, "")


def test_the_note_that_it_was_verified_is_no_part_of_a_checkpoint(tmp_path: Path) -> None:
    _, newest = two(tmp_path)
    assert "verified" not in (newest / "manifest.json").read_text()
    (newest / "verified").unlink()
    assert open_checkpoint(tmp_path, ALONE, CPU).checkpoint == newest
    # Reading compared its checksums: that is noted again. What the note holds, nobody asks.
    (newest / "verified").write_bytes(b"anything")
    assert open_checkpoint(tmp_path, ALONE, CPU).checkpoint == newest
    assert (newest / "verified").read_bytes() == b"anything"


def test_a_damaged_checkpoint_is_not_noted_as_verified(tmp_path: Path) -> None:
    _, newest = two(tmp_path)
    (newest / "verified").unlink()
    flip(newest / RANK_0)
    with pytest.raises(Damaged):
        Reader(newest, ALONE, CPU)
    assert not (newest / "verified").exists()


HALVES = box([0.0, 1.0, 2.0], of=[6], start=[0]), box([3.0, 4.0, 5.0], of=[6], start=[3])
HOSTILE = {
    "a box outside its shape": ({RANK_0: box([0.0] * 4, of=[6], start=[3])}, "does not fit into its shape"),
    "a start with too many dims": ({RANK_0: box([0.0] * 6, of=[6], start=[0, 0])}, "does not fit into its shape"),
    "a shape with too many dims": ({RANK_0: box([0.0] * 6, of=[6, 1], start=[0, 0])}, "does not fit into its shape"),
    "two shapes of one tensor": (
        {RANK_0: HALVES[0], RANK_1: box([3.0, 4.0, 5.0], of=[7], start=[3])},
        "model/w is of shape (7,), but of (6,) in rank-00000.safetensors",
    ),
    "a hole": ({RANK_0: HALVES[0]}, "rank-00000.safetensors do not hold every number of model/w exactly once"),
    "a box twice": ({RANK_0: HALVES[0], RANK_1: HALVES[1], "rank-00002.safetensors": HALVES[1]}, "exactly once"),
    "an overlap, and a hole elsewhere": (
        {RANK_0: HALVES[0], RANK_1: box([1.0, 2.0, 3.0], of=[6], start=[1])},
        "exactly once",
    ),
    "three boxes on each other, and a hole": (
        {
            RANK_0: box([0.0, 1.0], of=[6], start=[0]),
            RANK_1: box([0.0, 1.0], of=[6], start=[0]),
            "rank-00002.safetensors": box([0.0, 1.0], of=[6], start=[0]),
        },
        "exactly once",
    ),
    "all of it three times": (
        {f"rank-0000{rank}.safetensors": box([0.0] * 6, of=[6], start=[0]) for rank in range(3)},
        "exactly once",
    ),
    "a tensor of which there is next to nothing": ({RANK_0: box([0.0], of=[1 << 60], start=[9])}, "exactly once"),
    "a scalar twice": (
        {name: content(parts({NAME: [[], []]}) | {NAME: entry([], 0, 4)}, b"1234") for name in (RANK_0, RANK_1)},
        "exactly once",
    ),
    "a hostile header": ({RANK_0: b"\xff" * 8}, "header too large"),
    "a state of another step": (
        {RANK_0: HALVES[0], RANK_1: HALVES[1], "state.json": a_state(7).model_dump_json().encode()},
        "is of step 7, its manifest of 3",
    ),
    "a state that is none": ({RANK_0: HALVES[0], RANK_1: HALVES[1], "state.json": b"{}"}, "state.json: step="),
    "a state that is too deep": (
        {RANK_0: HALVES[0], RANK_1: HALVES[1], "state.json": b"[" * 100_000},
        "recursion limit",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_hostile_under_right_checksums_is_refused_before_anything_is_filled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    files, told = HOSTILE[name]
    plant(tmp_path, {RANK_0: HALVES[0], RANK_1: HALVES[1]}, step=2)
    hostile = plant(tmp_path, files)
    with pytest.raises(Damaged) as raised:
        Reader(hostile, ALONE, CPU)
    assert told in str(raised.value)
    assert str(raised.value).startswith(str(hostile))
    assert "\n" not in str(raised.value)
    reader = open_checkpoint(tmp_path, ALONE, CPU)
    assert reader.state.step == 2
    assert reader.whole(NAME).tolist() == [0, 1, 2, 3, 4, 5]
    assert f"warning: the checkpoint of step 3 is damaged: {raised.value}\n" in capsys.readouterr().err


def test_a_matrix_of_which_one_half_is_there_twice_is_refused(tmp_path: Path) -> None:
    # Columns 0-1, then 0, then 1: the volumes are those of (2, 4), and no box is there twice.
    files = {}
    for number, (start, size) in enumerate([((0, 0), (2, 2)), ((0, 0), (2, 1)), ((0, 1), (2, 1))]):
        data = bytes(4 * size[0] * size[1])
        header = parts({NAME: [(2, 4), start]}) | {NAME: entry(size, 0, len(data))}
        files[f"rank-0000{number}.safetensors"] = content(header, data)
    with pytest.raises(Damaged, match="exactly once"):
        Reader(plant(tmp_path, files), ALONE, CPU)


def test_one_process_verifies_the_files_of_all_ranks(tmp_path: Path) -> None:
    names = [f"rank-{rank:05d}.safetensors" for rank in range(5)]
    folder = plant(tmp_path, {name: box([1.0], of=[5], start=[rank]) for rank, name in enumerate(names)})
    assert Reader(folder, ALONE, CPU).whole(NAME).tolist() == [1.0] * 5
    for name in names:
        flip(folder / name)
        with pytest.raises(Damaged, match=f"{name} was changed after it was written: its checksum differs$"):
            Reader(folder, ALONE, CPU)
        flip(folder / name)
    for name in names[2:]:
        flip(folder / name)
    with pytest.raises(Damaged, match=rf"{names[2]} was changed .* differs \(and 2 more files\)$"):
        Reader(folder, ALONE, CPU)


def put_a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def put_a_device(file: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


def put_a_link_to_nothing(file: Path) -> None:
    file.unlink()
    file.symlink_to("nowhere")


@pytest.mark.parametrize("fault", [put_a_pipe, put_a_device, put_a_link_to_nothing])
@pytest.mark.parametrize("name", [RANK_0, "state.json", "manifest.json"])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, name: str, fault: Callable[[Path], None]) -> None:
    before, newest = two(tmp_path)
    fault(newest / name)
    assert open_checkpoint(tmp_path, ALONE, CPU).checkpoint == before


def test_a_link_to_what_was_written_is_as_good_as_a_file(tmp_path: Path) -> None:
    _, newest = two(tmp_path)
    (newest / RANK_0).rename(tmp_path / "elsewhere")
    (newest / RANK_0).symlink_to(tmp_path / "elsewhere")
    assert open_checkpoint(tmp_path, ALONE, CPU).checkpoint == newest


def test_a_file_without_a_checksum_is_not_read(tmp_path: Path) -> None:
    folder = plant(tmp_path, {RANK_0: HALVES[0]})
    (folder / RANK_1).write_bytes(HALVES[1])
    with pytest.raises(Damaged, match="exactly once"):
        Reader(folder, ALONE, CPU)
    (folder / "manifest.json").unlink()
    seal(folder, 3)
    assert Reader(folder, ALONE, CPU).whole(NAME).tolist() == [0, 1, 2, 3, 4, 5]


def test_a_checkpoint_of_another_model_is_refused_before_anything_is_filled(tmp_path: Path) -> None:
    reader = Reader(written(tmp_path), ALONE, CPU)
    wider = RUN.model_copy(update={"model": RUN.model.model_copy(update={"mlp_dim": 128})})
    model = perturbed_model(wider, ALONE)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(UserError, match=r"belongs to another model: it has tensor .* \(and \d+ more differences\)"):
        load_weights(reader, model, ALONE)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_codes_in_the_name_of_a_tensor_are_shown_not_sent(tmp_path: Path) -> None:
    files = {RANK_0: box([1.0], of=[1], start=[0]), RANK_1: box([1.0], of=[1], start=[0], name="model/\x1b[2Jw")}
    with pytest.raises(UserError, match=r"it has a tensor model/\\x1b\[2Jw that this model lacks"):
        load(Reader(plant(tmp_path, files), ALONE, CPU), {NAME: whole(torch.zeros(1))}, ALONE)


def test_names_that_differ_are_told(tmp_path: Path) -> None:
    reader = Reader(save(tmp_path, a_state(3), mixed(), ALONE), ALONE, CPU)
    shards = mixed()
    shards["model/new"] = shards.pop("model/scalar")
    with pytest.raises(UserError, match=r"it has no tensor model/new \(and 1 more differences\)"):
        load(reader, shards, ALONE)
    del shards["model/new"]
    with pytest.raises(UserError, match=r"it has a tensor model/scalar that this model lacks"):
        load(reader, shards, ALONE)
    # The moments are not asked for in evaluation.
    load(reader, {name: shard for name, shard in mixed().items() if name.startswith("model/")}, ALONE)
