from __future__ import annotations

import io
import shutil
import subprocess
import tarfile

import pytest
from PIL import Image
from rich.console import Console

from data_prep.demo_data import demo, demo_sets, stamps
from data_prep.sources.folder import License, read_folder
from limoe_dist.config.errors import UserError
from tests.data_prep.pictures_of import decoded, encoded

SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="20pt" height="10pt"><path fill="#00f" d="M0 0h99v99H0z"/></svg>'
COPYRIGHT = "License: GPL-2\n either version 2 of the License, or\n (at your option) any later version.\n"
needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb builds the package of this test")


def package(tmp_path, copyright_text=COPYRIGHT):
    root = tmp_path / "root"
    files = {
        f"{stamps.STAMPS}animals/owl.png": encoded(Image.new("RGBA", (600, 300))),
        f"{stamps.STAMPS}animals/owl.txt": b"An owl.\nfr.utf8=Une chouette.\n",
        f"{stamps.STAMPS}animals/owl.svg": SVG,
        f"{stamps.STAMPS}animals/owl_desc.ogg": b"sound",
        f"{stamps.STAMPS}sea.svg": SVG,
        f"{stamps.STAMPS}sea.txt": "Blue — the sea.".encode(),
        f"{stamps.STAMPS}silent.png": encoded(Image.new("RGB", (4, 4))),
        f"{stamps.STAMPS}broken.png": b"no picture",
        f"{stamps.STAMPS}broken.txt": b"Broken.",
        stamps.COPYRIGHT: copyright_text.encode(),
        "DEBIAN/control": f"Package: {stamps.PACKAGE}\nVersion: 1\nArchitecture: all\n"
        "Maintainer: x <x@example.org>\nDescription: x\n".encode(),
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    (tmp_path / "downloads").mkdir()
    deb = tmp_path / "downloads" / f"{stamps.PACKAGE}_1_all.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "-b", str(root), str(deb)], check=True, capture_output=True)
    shutil.rmtree(root)
    return deb


@needs_dpkg
def test_captioned_pictures_are_read_from_the_package(tmp_path):
    found = stamps.read_package(package(tmp_path))
    assert [(one.name, one.caption, one.kind) for one in found.stamps] == [
        ("animals/owl", "An owl.", ".png"),
        ("broken", "Broken.", ".png"),
        ("sea", "Blue — the sea.", ".svg"),
    ]
    assert (found.version, found.license) == ("1", "GPL-2.0-or-later")


@needs_dpkg
def test_photos_become_a_folder_source_and_a_broken_one_is_named(tmp_path, monkeypatch):
    package(tmp_path)
    monkeypatch.setattr(demo, "_make_emoji", lambda *_, **__: demo.Made((), ()))
    text = io.StringIO()
    console = Console(file=text, width=120)
    demo.fetch_demo(tmp_path, photos=True, size=96, photo_size=64, task="objects", console=console)
    source = read_folder(tmp_path / "photos")
    assert {row.image: row.captions for row in source.rows} == {
        "stamps/animals/owl.png": ("An owl.",),
        "stamps/sea.png": ("Blue — the sea.",),
    }
    assert source.licenses["stamps"].license == "GPL-2.0-or-later"
    assert isinstance(source.licenses["stamps"], License)
    owl = decoded((tmp_path / "photos/stamps/animals/owl.png").read_bytes())
    assert owl.shape == (32, 64, 3)
    assert (owl == 255).all()
    assert "not used: broken: " in text.getvalue()


@needs_dpkg
def test_a_package_that_is_cut_off_is_an_error(tmp_path):
    deb = package(tmp_path)
    deb.write_bytes(deb.read_bytes()[:400])
    with pytest.raises(UserError, match="delete it and run again"):
        stamps.read_package(deb)


@needs_dpkg
def test_a_package_under_another_licence_is_not_used(tmp_path):
    with pytest.raises(UserError, match="no longer says GPL-2"):
        stamps.read_package(package(tmp_path, "License: proprietary\n"))


def test_without_the_words_any_later_version_it_is_version_2_only():
    assert stamps.gpl_of("License: GPL-2\n") == "GPL-2.0-only"


def test_points_are_a_size():
    one = stamps.Stamp("sea", "The sea.", SVG, ".svg")
    pixels = decoded(stamps.render_stamp(one, size=32))
    assert pixels.shape == (16, 32, 3)
    assert pixels[8, 16].tolist() == [0, 0, 255]


def test_a_machine_without_apt_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="this machine has no apt-get: leave --photos out"):
        stamps.fetch_package(tmp_path / "downloads")


def test_the_words_of_apt_are_passed_on(tmp_path, monkeypatch):
    for name, script in (("apt-get", "echo 'E: Unable to locate package' >&2; exit 100"), ("dpkg-deb", "")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"Unable to locate package.*apt-get update"):
        stamps.fetch_package(tmp_path / "downloads")


def test_alpha_of_an_icon_and_of_a_photo_is_laid_on_the_same_white():
    assert (decoded(demo_sets.flat_png(Image.new("RGBA", (2, 2)))) == 255).all()


@needs_dpkg
def test_a_name_that_becomes_absolute_stays_inside(tmp_path, monkeypatch):
    escaped = f"{stamps.STAMPS}/{tmp_path}/escaped.png"
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        info = tarfile.TarInfo(escaped)
        info.size = 4
        tar.addfile(info, io.BytesIO(b"abcd"))

    class Unpacked:
        stdout, returncode = io.BytesIO(archive.getvalue()), 0

        def __init__(self, *arguments, **options): ...
        def __enter__(self):
            return self

        def __exit__(self, *error): ...

    monkeypatch.setattr(stamps.subprocess, "Popen", Unpacked)
    ((name, _),) = stamps._members(tmp_path / "x.deb")
    assert not name.removeprefix(stamps.STAMPS).startswith("/")
