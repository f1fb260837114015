"""The whole of fetch-demo on packages made here: seven sets of three icons, and their names."""

from __future__ import annotations

import io
import json
import tarfile

import pytest
from rich.console import Console

from data_prep.demo_data import demo, demo_sets
from data_prep.sources.folder import License, read_folder
from limoe_dist.config.errors import UserError
from tests.data_prep.pictures_of import decoded

NAMES = {"1f34e": "red apple", "1f408": "cat", "1f600": "grinning face"}
CATEGORIES = {"Food & Drink": ["red-apple"], "Animals & Nature": ["cat"], "Smileys & Emotion": ["grinning-face"]}


def write_package(folder, package, files):
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / package.tarball, "w:gz") as archive:
        for name, value in files.items():
            content = json.dumps(value).encode()
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def icon(seed):
    """A picture of its own: three bars whose places come from the seed."""
    bars = [(seed * k * k + 7 * k) % 12 for k in (1, 2, 3)]
    return {
        "body": "".join(f'<path fill="#{30 * i:02x}6020" d="M{4 * i} {bar}h4v4h-4z"/>' for i, bar in enumerate(bars))
    }


def write_set(folder, package, seed, *, spdx="MIT", same_as=None):
    icons = {
        name: icon(31 * (seed if same_as is None else same_as) + n) for n, name in enumerate(sorted(NAMES.values()))
    }
    files = {
        "icons.json": {"width": 12, "height": 16, "icons": {name.replace(" ", "-"): i for name, i in icons.items()}},
        "info.json": {"license": {"spdx": spdx}, "author": {"name": "Somebody", "url": "some place"}},
        "package.json": {"license": spdx},
        "chars.json": {points: name.replace(" ", "-") for points, name in NAMES.items()},
        "metadata.json": {"categories": CATEGORIES},
    }
    write_package(folder, package, files)


@pytest.fixture(name="out")
def _out(tmp_path, monkeypatch):
    """A folder whose downloads are complete; npm must not be called."""
    for seed, (_, package) in enumerate(demo_sets.EMOJI_SETS):
        write_set(tmp_path / "downloads", package, seed)
    annotations = {chr(int(p, 16)): {"default": ["word", name], "tts": [name]} for p, name in NAMES.items()}
    files = {
        "package.json": {"license": "Unicode-3.0"},
        "annotations/en/annotations.json": {"annotations": {"annotations": annotations}},
    }
    write_package(tmp_path / "downloads", demo_sets.NAMES, files)
    monkeypatch.setattr("data_prep.demo_data.npm.find_npm", lambda: pytest.fail("npm was called"))
    monkeypatch.setattr(demo, "BY_HAND", {})
    return tmp_path


def run(out, *, size=32, task="objects"):
    """What is printed."""
    text = io.StringIO()
    console = Console(file=text, width=120)
    demo.fetch_demo(out, photos=False, size=size, photo_size=64, task=task, console=console)
    return text.getvalue()


def test_training_and_validation_are_folder_sources_with_licences(out):
    printed = run(out)
    train, validation = read_folder(out / "train"), read_folder(out / "validation")
    assert {row.source for row in validation.rows} == {"fxemoji"}
    assert {row.source for row in train.rows} == {
        package.name[14:] for s, package in demo_sets.EMOJI_SETS if s == "train"
    }
    assert {row.concept for row in train.rows} == {"red apple", "cat"}
    apple = next(row for row in validation.rows if row.concept == "red apple")
    assert apple.captions == ("red apple", "an emoji of red apple", "red apple: word", "word")
    assert validation.licenses == {"fxemoji": License("MIT", "Somebody, some place, npm @iconify-json/fxemoji")}
    assert decoded((out / "train" / train.rows[0].image).read_bytes()).shape == (32, 32, 3)
    assert "MIT" in printed
    assert (out / "matches.csv").read_text().startswith("set,icon,how,")


def test_all_concepts_are_there_when_asked_for(out):
    run(out, task="all")
    assert {row.concept for row in read_folder(out / "train").rows} == set(NAMES.values())


def test_a_second_run_touches_nothing(out):
    first = run(out)
    state = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    second = run(out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == state
    assert second.splitlines()[:-1] == first.splitlines()[-len(second.splitlines()) : -1]


def test_a_lost_picture_is_made_again_and_no_other(out):
    run(out)
    lost, *others = sorted((out / "train").rglob("*.png"))
    before = {path: path.stat().st_mtime_ns for path in others}
    lost.unlink()
    run(out)
    assert lost.is_file()
    assert {path: path.stat().st_mtime_ns for path in others} == before


def test_another_size_replaces_the_pictures(out):
    run(out)
    run(out, size=48)
    shapes = {decoded(path.read_bytes()).shape for path in out.rglob("*.png")}
    assert shapes == {(48, 48, 3)}


def test_pictures_of_somebody_else_are_not_replaced(out):
    (out / "train/noto").mkdir(parents=True)
    (out / "train/noto/mine.png").write_bytes(b"my only copy")
    with pytest.raises(UserError, match="was not made by this command"):
        run(out)
    assert (out / "train/noto/mine.png").read_bytes() == b"my only copy"


def test_validation_art_in_a_training_set_is_dropped(out):
    _, twemoji = demo_sets.EMOJI_SETS[0]
    write_set(out / "downloads", twemoji, 0, same_as=6)
    printed = run(out)
    assert "twemoji" not in {row.source for row in read_folder(out / "train").rows}
    assert not list((out / "train/twemoji").iterdir())
    assert "twemoji/cat.png,fxemoji/cat.png,0,0.00" in printed
    assert "twemoji/red-apple.png,fxemoji/red-apple.png,0,0.00" in (out / "near_duplicates.csv").read_text()


def test_a_set_without_an_open_licence_is_named_and_left_out(out):
    write_set(out / "downloads", demo_sets.EMOJI_SETS[0][1], 0, spdx="CC-BY-NC-4.0")
    printed = run(out)
    assert "not used: @iconify-json/twemoji 1.2.5: its licence CC-BY-NC-4.0 is not one of" in printed
    assert not (out / "train/twemoji").exists()
    assert "noto" in {row.source for row in read_folder(out / "train").rows}


def test_without_a_validation_set_nothing_is_made(out):
    write_set(out / "downloads", demo_sets.EMOJI_SETS[-1][1], 6, spdx=None)
    with pytest.raises(UserError, match=r"no validation set is left: .*fxemoji.*names no licence"):
        run(out)
    assert not (out / "train").exists()


def test_names_under_another_licence_are_not_used(out):
    write_package(out / "downloads", demo_sets.NAMES, {"package.json": {"license": "UNLICENSED"}})
    with pytest.raises(UserError, match=r"licence is UNLICENSED, not Unicode-3\.0"):
        run(out)


@pytest.mark.parametrize("size", [0, 15, 1025])
def test_a_size_outside_the_range_is_an_error(out, size):
    with pytest.raises(UserError, match=f"--size={size}: a picture's side must be 16 to 1024"):
        run(out, size=size)
