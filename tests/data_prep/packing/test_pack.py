from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pyarrow as pa
import pytest
from PIL import Image
from rich.console import Console

from data_prep.cli import main
from data_prep.imaging.filters import Filters, parse_limits
from data_prep.imaging.pictures import Caps
from data_prep.imaging.transform import Transform
from data_prep.packing.pack import PackSettings, pack, summary
from data_prep.sources.opening import Columns, open_sources
from limoe_dist.config.errors import UserError
from limoe_dist.data import manifest as manifests
from tests.data_prep.pictures_of import decoded, encoded, folder_source, noisy, simple_source

SETTINGS = PackSettings("test", Transform(Caps(1_000_000, 100_000)), shard_bytes=1_000_000)


def run(sources, out, *, settings=SETTINGS, workers=1, overwrite=False):
    console = Console(file=io.StringIO())
    return pack(lambda: open_sources(sources), out, settings, workers=workers, overwrite=overwrite, console=console)


def shard_files(out):
    return sorted(file.name for file in out.glob("shard-*.arrow"))


def rows_of(out):
    manifest = manifests.load_manifest(out / "manifest.json")
    tables = [pa.ipc.open_file(pa.memory_map(str(out / shard.file))).read_all() for shard in manifest.shards]
    return [row for table in tables for row in table.to_pylist()]


def rejected(out):
    lines = (out / "rejected.jsonl").read_text().splitlines()
    # A place ends with the picture's path, or the line of a text alone.
    return {one["place"].rpartition(", ")[2]: one["reason"] for one in map(json.loads, lines)}


def test_what_goes_in_comes_out(tmp_path):
    content = encoded(noisy(1))
    source = folder_source(
        tmp_path / "src",
        [{"image": "sub/a.png", "captions": ["an owl", "a bird"], "concept": "owl", "source": "birds"}],
        {"sub/a.png": content},
    )
    (source / "sources.json").write_text('[{"name": "birds", "license": "MIT", "attribution": "somebody"}]')
    packed = run([source], tmp_path / "out")
    (row,) = rows_of(tmp_path / "out")
    assert list(row) == list(manifests.COLUMNS)
    assert row == {
        "key": "src/sub/a",
        "image": content,
        "captions": ["an owl", "a bird"],
        "concept": "owl",
        "width": 16,
        "height": 12,
        "sha256": row["sha256"],
        "source": "birds",
    }
    assert len(row["sha256"]) == 64
    assert packed.manifest.sources == (manifests.Source(name="birds", rows=1, license="MIT", attribution="somebody"),)


def test_the_manifest_proves_the_shards(tmp_path):
    run([simple_source(tmp_path / "src")], tmp_path / "out")
    manifest = manifests.load_manifest(tmp_path / "out/manifest.json")
    manifests.verify_shards(manifest, tmp_path / "out")
    assert (manifest.rows, manifest.name, manifest.tokenizer) == (6, "test", None)
    assert [(one.name, one.rows, one.license) for one in manifest.sources] == [("src", 6, "unknown")]
    assert not list((tmp_path / "out").glob(".*"))


def test_bad_rows_are_named_with_their_reason_and_do_not_stop_the_run(tmp_path):
    whole = encoded(noisy(1, size=(64, 64)))
    (tmp_path / "outside.png").write_bytes(whole)
    pictures = {
        "good.png": whole,
        "cut.png": whole[: len(whole) // 2],
        "text.png": b"hello",
        "blank.png": whole,
        "half.png": whole,
        "bomb.png": encoded(Image.new("1", (2000, 1000))),
    }
    rows = [{"image": name, "caption": "fine"} for name in pictures if name not in ("blank.png", "half.png")]
    rows += [{"caption": "half a pair \ud800"}, {"image": "blank.png", "captions": ["fine", " \t"]}]
    rows += [{"image": "half.png", "caption": "half a pair \ud800"}, {"image": "absent.png", "caption": "fine"}]
    rows += [{"image": "../outside.png", "caption": "fine"}, {"image": "/", "caption": "fine"}]
    packed = run([folder_source(tmp_path / "src", rows, pictures)], tmp_path / "out")
    assert [row["key"] for row in rows_of(tmp_path / "out")] == ["src/good"]
    reasons = rejected(tmp_path / "out")
    assert packed.rejected == len(reasons) == 9
    assert reasons["cut.png"].startswith("cannot be decoded")
    assert reasons["text.png"].startswith("is no picture")
    assert "surrogate" in reasons["line 5"]
    assert reasons["blank.png"] == "has an empty caption"
    assert "surrogate" in reasons["half.png"]
    assert "pixels" in reasons["bomb.png"]
    assert reasons["absent.png"] == "there is no such file"
    assert "leaves the source folder" in reasons["../outside.png"]
    assert "leaves the source folder" in reasons["/"]


def test_pictures_alone_and_texts_alone_are_packed_counted_and_told(tmp_path):
    rows = [{"image": "x.png", "concept": "owl"}, {"caption": "a text"}, {"caption": "a text"}]
    rows += [{"image": "y.png", "caption": "a pair"}]
    pictures = {"x.png": encoded(noisy(1)), "y.png": encoded(noisy(2))}
    packed = run([folder_source(tmp_path / "src", rows, pictures)], tmp_path / "out")
    found = {row["key"]: row for row in rows_of(tmp_path / "out")}
    assert sorted(found) == ["src/line-2", "src/line-3", "src/x", "src/y"]
    assert (found["src/x"]["captions"], found["src/x"]["concept"]) == ([], "owl")
    text = found["src/line-2"]
    assert (text["image"], text["captions"], text["width"], text["height"], text["sha256"]) == (
        b"",
        ["a text"],
        0,
        0,
        "",
    )
    manifest = manifests.load_manifest(tmp_path / "out")
    assert (manifest.rows, manifest.without_caption, manifest.without_picture, manifest.pairs) == (4, 1, 2, 1)
    told = summary(packed, tmp_path / "out")
    assert "  1 rows without a caption: pictures alone, for evaluation; training needs pairs" in told
    assert "  2 rows without a picture: texts alone, for evaluation; training needs pairs" in told
    assert run([tmp_path / "src"], tmp_path / "out").skipped


def test_pairs_alone_are_told_as_before(tmp_path):
    packed = run([simple_source(tmp_path / "src")], tmp_path / "out")
    assert packed.manifest.pairs == 6
    assert not [line for line in summary(packed, tmp_path / "out") if "training needs pairs" in line]


def test_a_manifest_from_before_rows_were_counted_tells_nothing(tmp_path):
    run([simple_source(tmp_path / "src")], tmp_path / "out")
    file = tmp_path / "out/manifest.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in content.items() if not key.startswith("without")}))
    assert manifests.load_manifest(file).pairs is None
    file.write_text(json.dumps(content | {"without_caption": 5, "without_picture": 2}))
    with pytest.raises(UserError, match=r"without_caption=5 and without_picture=2 are together more than rows=6"):
        manifests.load_manifest(file)


def test_a_group_is_cut_into_as_few_shards_of_equal_rows_as_have_the_size(tmp_path):
    source = folder_source(tmp_path / "src", [{"caption": "x" * 1000} for _ in range(10)], {})
    # Ten rows of 1,020 bytes with key, text and source: in shards of 3,400 bytes that is three, of 3 or 4 rows.
    manifest = run([source], tmp_path / "out", settings=replace(SETTINGS, shard_bytes=3_450)).manifest
    assert [shard.rows for shard in manifest.shards] == [3, 3, 4]
    assert shard_files(tmp_path / "out") == [f"shard-000000-0{n}.arrow" for n in range(3)]
    assert len({row["key"] for row in rows_of(tmp_path / "out")}) == 10


def test_a_row_that_is_larger_than_a_shard_has_one_for_itself(tmp_path):
    manifest = run([simple_source(tmp_path / "src", 3)], tmp_path / "out", settings=replace(SETTINGS, shard_bytes=1))
    assert [shard.rows for shard in manifest.manifest.shards] == [1, 1, 1]


def test_texts_of_two_folders_on_one_line_of_one_source_keep_apart(tmp_path):
    sources = [
        folder_source(tmp_path / name, [{"caption": f"text of {name}", "source": "s"}], {}) for name in ("a", "b")
    ]
    run(sources, tmp_path / "out")
    assert {row["key"]: row["captions"] for row in rows_of(tmp_path / "out")} == {
        "a/line-1": ["text of a"],
        "b/line-1": ["text of b"],
    }


def test_a_source_cannot_move_the_cursor_of_a_terminal(tmp_path, capsys):
    rows = [{"image": "a.png", "caption": "a", "source": "\x1b[2Jname"}]
    folder = folder_source(tmp_path / "s", rows, {"a.png": encoded(noisy(1))})
    assert main(["pack", "--source", str(folder), "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "\\x1b[2Jname: 1 rows" in printed


def test_a_run_without_a_good_row_is_an_error_and_leaves_no_manifest(tmp_path):
    source = folder_source(tmp_path / "src", [{"image": "x.png", "caption": "fine"}], {"x.png": b"hello"})
    with pytest.raises(UserError, match=r"all 1 rows were rejected, the first because src/x .* is no picture"):
        run([source], tmp_path / "out")
    assert not (tmp_path / "out/manifest.json").exists()


def test_alpha_reaches_the_shard_on_white(tmp_path):
    source = folder_source(
        tmp_path / "src", [{"image": "x.png", "caption": "fine"}], {"x.png": encoded(Image.new("RGBA", (2, 2)))}
    )
    packed = run([source], tmp_path / "out")
    assert packed.converted == 1
    assert decoded(rows_of(tmp_path / "out")[0]["image"]).tolist() == [[[255, 255, 255]] * 2] * 2


def test_another_seed_gives_another_order_of_the_same_rows(tmp_path):
    source = simple_source(tmp_path / "src", 40)
    first = run([source], tmp_path / "a").manifest
    other = run([source], tmp_path / "c", settings=replace(SETTINGS, seed=1)).manifest
    assert other.shards[0].sha256 != first.shards[0].sha256
    keys = [[row["key"] for row in rows_of(tmp_path / name)] for name in ("a", "c")]
    assert sorted(keys[0]) == sorted(keys[1])
    assert keys[0] != keys[1]


def test_rows_of_all_sources_are_mixed_and_their_place_does_not_depend_on_the_order_of_the_sources(tmp_path):
    sources = [simple_source(tmp_path / "one", 20), simple_source(tmp_path / "two", 20)]
    run(sources, tmp_path / "a")
    run(sources[::-1], tmp_path / "b")
    order = [row["source"] for row in rows_of(tmp_path / "a")]
    assert {*order[:20]} == {"one", "two"}
    assert [row["key"] for row in rows_of(tmp_path / "a")] == [row["key"] for row in rows_of(tmp_path / "b")]


def test_batches_hold_at_most_256_rows(tmp_path):
    rows = [{"image": f"{n}.png", "caption": str(n)} for n in range(300)]
    content = encoded(noisy(1, size=(2, 2)))
    run([folder_source(tmp_path / "src", rows, {row["image"]: content for row in rows})], tmp_path / "out")
    with pa.memory_map(str(tmp_path / "out/shard-000000-00.arrow")) as file, pa.ipc.open_file(file) as reader:
        assert [reader.get_batch(i).num_rows for i in range(reader.num_record_batches)] == [256, 44]


def test_the_same_inputs_are_packed_once(tmp_path):
    source = simple_source(tmp_path / "src")
    first = run([source], tmp_path / "out")
    state = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    second = run([source], tmp_path / "out")
    assert (first.skipped, second.skipped) == (False, True)
    assert second.manifest == first.manifest
    assert {path: path.stat().st_mtime_ns for path in state} == state


def change_caption(source):
    (source / "captions.jsonl").write_text('{"image": "p0.png", "caption": "another"}\n')


def change_picture(source):
    (source / "p0.png").write_bytes(encoded(noisy(99)))


def change_license(source):
    (source / "sources.json").write_text('[{"name": "src", "license": "MIT"}]')


@pytest.mark.parametrize("change", [change_caption, change_picture, change_license])
def test_other_inputs_are_refused_unless_overwritten(tmp_path, change):
    source, out = simple_source(tmp_path / "src"), tmp_path / "out"
    old = run([source], out).manifest
    change(source)
    with pytest.raises(UserError, match=r"packed from other inputs or settings.*--overwrite"):
        run([source], out)
    assert manifests.load_manifest(out) == old
    assert run([source], out, overwrite=True).manifest != old
    assert run([source], out).skipped


def test_other_settings_are_refused(tmp_path):
    source = simple_source(tmp_path / "src")
    run([source], tmp_path / "out")
    with pytest.raises(UserError, match="other inputs or settings"):
        run([source], tmp_path / "out", settings=replace(SETTINGS, seed=1))


def test_overwriting_with_less_leaves_nothing_of_the_old_set(tmp_path):
    source, out = simple_source(tmp_path / "src"), tmp_path / "out"
    run([source], out, settings=replace(SETTINGS, shard_bytes=1))
    (out / "tokenizer.model").write_bytes(b"old vocabulary")
    (out / "notes.txt").write_text("mine")
    run([source], out, overwrite=True)
    names = sorted(path.name for path in out.iterdir())
    assert names == ["groups", "manifest.json", "notes.txt", "pack.json", "rejected.jsonl", "shard-000000-00.arrow"]


def test_an_interrupted_run_is_no_data_set_and_is_gone_on_with(tmp_path, monkeypatch):
    source, out = simple_source(tmp_path / "src"), tmp_path / "out"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(manifests, "save_manifest", killed)
        with pytest.raises(KeyboardInterrupt):
            run([source], out)
    (shard,) = out.glob("shard-*.arrow")
    written = shard.stat().st_mtime_ns
    assert not (out / "manifest.json").exists()
    assert not run([source], out).skipped
    assert len(rows_of(out)) == 6
    assert shard.stat().st_mtime_ns == written


def test_an_interrupted_overwrite_leaves_no_manifest_of_shards_that_are_gone(tmp_path, monkeypatch):
    source, out = simple_source(tmp_path / "src"), tmp_path / "out"
    run([source], out)
    change_caption(source)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("data_prep.packing.group.write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        run([source], out, overwrite=True)
    assert not (out / "manifest.json").exists()
    assert not shard_files(out)


def test_half_a_pack_of_other_settings_is_not_thrown_away_unasked(tmp_path, monkeypatch):
    source, out = simple_source(tmp_path / "src"), tmp_path / "out"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(manifests, "save_manifest", killed)
        with pytest.raises(KeyboardInterrupt):
            run([source], out)
    with pytest.raises(UserError, match="1 groups of other inputs or settings are done there: go on with those"):
        run([source], out, settings=replace(SETTINGS, seed=1))
    assert run([source], out, settings=replace(SETTINGS, seed=1), overwrite=True).manifest.rows == 6


def test_what_was_begun_with_other_versions_is_not_gone_on_with(tmp_path, monkeypatch):
    source, out = simple_source(tmp_path / "src"), tmp_path / "out"
    run([source], out)
    monkeypatch.setattr("data_prep.packing.pack.versions", lambda: {"jpeg": "9z"})
    assert run([source], out).skipped  # what is whole stays whole
    (out / "shard-000000-00.arrow").unlink()
    with pytest.raises(UserError, match=r"was begun with .*, and this is jpeg 9z, pyarrow .*--overwrite"):
        run([source], out)
    assert run([source], out, overwrite=True).manifest.made_with["jpeg"] == "9z"


def test_of_a_lost_shard_only_its_group_is_packed_again(tmp_path):
    sources, out = [simple_source(tmp_path / name, 20) for name in ("one", "two")], tmp_path / "out"
    first = run(sources, out, settings=replace(SETTINGS, group_rows=20)).manifest
    lost, kept = [out / shard.file for shard in first.shards]
    before = kept.stat().st_mtime_ns
    lost.write_bytes(b"cut off")
    again = run(sources, out, settings=replace(SETTINGS, group_rows=20))
    assert not again.skipped
    assert again.manifest == first
    manifests.verify_shards(again.manifest, out)
    assert kept.stat().st_mtime_ns == before


def test_the_manifest_says_what_the_rows_went_through_and_with_which_versions(tmp_path):
    manifest = run([simple_source(tmp_path / "src")], tmp_path / "out").manifest
    assert manifest.settings["seed"] == 0
    assert manifest.settings["transform"]["caps"] == {"max_bytes": 1_000_000, "max_pixels": 100_000}
    assert manifest.made_with["pyarrow"] == pa.__version__
    assert manifests.load_manifest(tmp_path / "out") == manifest
    assert str(tmp_path) not in (tmp_path / "out/manifest.json").read_text()


def test_rows_of_a_drop_list_are_left_out_and_told(tmp_path):
    listed = SimpleNamespace(sha256="1" * 64, reason=lambda key: "is a duplicate" if key == "src/p1" else None)
    out, source = tmp_path / "out", simple_source(tmp_path / "src", 3)
    console = Console(file=io.StringIO())
    packed = pack(lambda: open_sources([source]), out, SETTINGS, drop=listed, console=console)
    assert sorted(row["key"] for row in rows_of(out)) == ["src/p0", "src/p2"]
    assert rejected(out) == {"p1.png": "is a duplicate"}
    assert packed.kinds == {"is a duplicate": 1}
    with pytest.raises(UserError, match="other inputs or settings"):
        run([source], out)


def test_filters_leave_rows_and_captions_out_and_pictures_become_smaller(tmp_path):
    rows = [{"image": "a.png", "captions": ["an owl in a tree", "owl"], "similarity": 0.3}]
    rows += [{"image": "b.png", "captions": ["a fox in a wood"], "similarity": 0.1}]
    rows += [{"image": "c.png", "captions": ["fox"], "similarity": 0.4}]
    pictures = {name: encoded(noisy(1, size=(64, 48))) for name in ("a.png", "b.png", "c.png")}
    source, out = folder_source(tmp_path / "src", rows, pictures), tmp_path / "out"
    filters = Filters(min_caption_chars=5, scores=parse_limits(["similarity>=0.28"]))
    settings = replace(SETTINGS, transform=replace(SETTINGS.transform, size=24, encode="jpeg"), filters=filters)
    columns = Columns(scores=filters.columns)
    packed = pack(lambda: open_sources([source], columns), out, settings, console=Console(file=io.StringIO()))
    (row,) = rows_of(out)
    assert (row["captions"], row["width"], row["height"]) == (["an owl in a tree"], 32, 24)
    with Image.open(io.BytesIO(row["image"])) as image:
        assert (image.format, image.size) == ("JPEG", (32, 24))
    assert packed.kinds == {"has no caption of at least N characters": 1, "has similarity N, less than N": 1}
    written = json.loads((out / "manifest.json").read_text())["settings"]
    assert written["filters"]["scores"] == [
        {"column": "similarity", "least": 0.28, "most": None, "missing_passes": False}
    ]
    assert manifests.load_manifest(out) == packed.manifest


def test_shards_of_somebody_else_are_refused(tmp_path):
    source, out = simple_source(tmp_path / "src"), tmp_path / "out"
    run([source], out)
    shutil.copytree(out, tmp_path / "foreign")
    for name in ("pack.json", "manifest.json"):
        (tmp_path / "foreign" / name).unlink()
    with pytest.raises(UserError, match="not shards of ours"):
        run([source], tmp_path / "foreign")


def test_two_pictures_never_share_a_key(tmp_path):
    rows = [{"image": name, "caption": name} for name in ("a.png", "a.jpg", "./a.png", "src/b.png", "b.png")]
    pictures = {"a.png": encoded(noisy(1)), "a.jpg": encoded(noisy(2), "JPEG"), "src/b.png": encoded(noisy(3))}
    pictures["b.png"] = encoded(noisy(4))
    run([folder_source(tmp_path / "src", rows, pictures)], tmp_path / "out")
    keys = {row["key"]: row["captions"] for row in rows_of(tmp_path / "out")}
    assert keys == {
        "src/a": ["a.png"],
        "src/a.jpg": ["a.jpg"],
        "src/a.png": ["./a.png"],
        "src/src/b": ["src/b.png"],
        "src/b": ["b.png"],
    }


def test_two_sources_of_one_name_are_refused_and_nothing_is_lost(tmp_path):
    sources = [simple_source(tmp_path / name / "src", 1) for name in ("x", "y")]
    with pytest.raises(UserError, match='two sources are named "src"'):
        run(sources, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "rejected.jsonl"])
def test_a_file_of_the_user_is_not_removed(tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(UserError, match="give a new folder"):
        run([simple_source(tmp_path / "src")], tmp_path / "out")
    assert (tmp_path / "out" / name).read_text() == "mine"
