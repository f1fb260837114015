from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep.cli import main
from data_prep.dedup import fingerprints
from data_prep.imaging.pictures import Caps
from limoe_dist.config.errors import UserError
from tests.data_prep.imaging.test_phash import scene
from tests.data_prep.pictures_of import encoded, folder_source, noisy


def source(folder: Path, pictures: dict[str, bytes]) -> Path:
    rows = [{"image": name, "caption": f"a caption of {name}"} for name in pictures]
    return folder_source(folder, rows, pictures)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """a: scene 1 in three forms, 2 to 5, two of one colour, one broken. b: scene 2 again. e: an evaluation, scene 3."""
    folder = tmp_path_factory.mktemp("dedup")
    pictures = {
        "one.png": encoded(scene(1)),
        "same.png": encoded(scene(1), compress_level=1),
        "small.jpg": encoded(scene(1).resize((160, 120)), "JPEG", quality=60),
        **{f"other{seed}.png": encoded(scene(seed)) for seed in (2, 3, 4, 5)},
        "red.png": encoded(Image.new("RGB", (20, 20), "red")),
        "blue.png": encoded(Image.new("RGB", (20, 20), "blue")),
        "broken.png": encoded(scene(9))[:2000],
    }
    source(folder / "a", pictures)
    source(folder / "b", {"again.jpg": encoded(scene(2, (640, 480)), "JPEG")})
    source(folder / "e", {"held.jpg": encoded(scene(3), "JPEG", quality=70)})
    return folder


def listed(out: Path) -> list[tuple[str, str, str]]:
    return [(row["key"], row["reason"], row["kept"]) for row in pq.read_table(out / "drop.parquet").to_pylist()]


def run(made: Path, out: Path, *options: str) -> None:
    words = ["--source", str(made / "a"), str(made / "b"), "--against", str(made / "e"), "--out", str(out)]
    assert main(["dedup", *words, "--workers", "1", *options]) == 0


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out") / "dups"
    run(made, out)
    return out


def test_duplicates_are_listed_with_what_stays_for_them(whole):
    exact = {"a/one", "a/same"}
    rows = listed(whole)
    assert {reason: key for key, reason, _ in rows if reason == "exact"}["exact"] in exact
    assert {(key, kept) for key, reason, kept in rows if reason == "evaluation"} == {("a/other3", "e/held")}
    (kept_one,) = exact - {key for key, *_ in rows}
    assert {(key, kept) for key, reason, kept in rows if reason == "near"} == {
        ("a/small", kept_one),
        ("a/other2", "b/again"),  # the larger one stays, whatever source it is in
    }
    assert len(rows) == 4


def test_the_report_counts_every_row_once(whole):
    report = json.loads((whole / "dedup.json").read_text())
    a, b = report["sources"]
    assert (a["name"], a["rows"], a["pictures"], a["refused"], a["texts"]) == ("a", 10, 9, 1, 0)
    assert (a["dropped"], a["kept"]) == ({"exact": 1, "near": 2, "evaluation": 1}, 5)
    assert (b["kept"], report["dropped"], report["settings"]["radius"]) == (1, 4, 4)


def test_exact_only_and_another_radius_decode_nothing_again(made, whole, tmp_path, monkeypatch):
    import shutil

    out = tmp_path / "dups"
    shutil.copytree(whole, out)
    monkeypatch.setattr("data_prep.dedup.fingerprint_pool.write_fingerprints", None)
    run(made, out, "--exact-only")
    assert [reason for _, reason, _ in listed(out)] == ["exact"]
    run(made, out, "--radius", "4")
    assert (out / "drop.parquet").read_bytes() == (whole / "drop.parquet").read_bytes()


def test_fingerprints_of_other_decoders_are_not_mixed_with_these(monkeypatch):
    class Named:
        name = "a"

        def fingerprint(self):
            return "always"

    before = fingerprints.folder_of(Named(), Caps(1, 1))
    monkeypatch.setattr(fingerprints, "versions", lambda: {"simplejpeg": "99"})
    assert fingerprints.folder_of(Named(), Caps(1, 1)) != before


def test_the_list_does_not_depend_on_workers_or_the_order_of_sources(made, whole, tmp_path, monkeypatch):
    # Small units only here: the workers are told their blocks.
    monkeypatch.setattr(fingerprints, "UNIT_ROWS", 1)
    out = tmp_path / "dups"
    words = ["--source", str(made / "b"), str(made / "a"), "--against", str(made / "e"), "--out", str(out)]
    assert main(["dedup", *words, "--workers", "3"]) == 0
    assert (out / "drop.parquet").read_bytes() == (whole / "drop.parquet").read_bytes()


def test_a_source_that_changed_is_read_anew(made, tmp_path):
    folder = source(tmp_path / "s", {"x.png": encoded(scene(1)), "y.png": encoded(scene(2))})
    words = ["dedup", "--source", str(folder), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main(words) == 0
    assert listed(tmp_path / "out") == []
    (folder / "y.png").write_bytes(encoded(scene(1), compress_level=0))
    assert main(words) == 0
    assert [reason for _, reason, _ in listed(tmp_path / "out")] == ["exact"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--source", "--out", "x"], "--source: name at least one"),
        (["--source", "a", "--out", "x", "--radius", "13"], "--radius=13: must be 0 to 12"),
        (["--source", "a", "--out", "x", "--workers", "-1"], "--workers=-1: must be 0"),
        (["--source", "a", "--out", "x", "--max-image-mb", "inf"], "--max-image-mb=inf: must be above 0, and below"),
        (["--source", "absent", "--out", "x"], "--source absent: there is no such"),
        (["--source", "a", "--against", "absent", "--out", "x"], "--against absent: there is no such"),
    ],
)
def test_wrong_values_are_named(made, options, reason, monkeypatch):
    monkeypatch.chdir(made)
    with pytest.raises(UserError, match=reason):
        main(["dedup", *options])


def test_a_folder_with_other_things_is_left_alone(made, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="holds files that no `limoe prep dedup` wrote"):
        run(made, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_damaged_fingerprints_are_named(made, tmp_path):
    run(made, tmp_path / "out")
    for file in (tmp_path / "out/fingerprints").glob("*/*.arrow"):
        file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"is missing or damaged: delete .* and run again"):
        run(made, tmp_path / "out")
    assert not (tmp_path / "out/dedup.json").exists()


def test_killed_it_goes_on_behind_what_is_done(tmp_path):
    """Two units of pictures, killed when the first is there; the second run makes only the other."""
    one = encoded(noisy(1))
    for name in ("s", "t"):
        source(tmp_path / name, {f"{number:04d}.png": one for number in range(1100)})
    words = ["--source", str(tmp_path / "s"), str(tmp_path / "t"), "--out", str(tmp_path / "out"), "--workers", "1"]
    victim = subprocess.Popen([sys.executable, "-m", "limoe_dist", "prep", "dedup", *words], stderr=subprocess.DEVNULL)
    units = tmp_path / "out/fingerprints"
    limit = time.monotonic() + 30
    while not list(units.glob("*/*.arrow")) and time.monotonic() < limit:
        time.sleep(0.005)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    done = {file: file.stat().st_ino for file in units.glob("*/*.arrow")}
    assert 0 < len(done) < 4
    assert not (tmp_path / "out/dedup.json").exists()
    assert main(["dedup", *words]) == 0
    assert {file: file.stat().st_ino for file in done} == done
    rows = listed(tmp_path / "out")
    assert len(rows) == 2199
    assert len({kept for *_, kept in rows}) == 1
