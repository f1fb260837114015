"""Photographs with one-sentence captions: Debian's tuxpaint-stamps-default, fetched by apt and never installed."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from data_prep.demo_data.demo_sets import flat_png, rasterize
from limoe_dist.config.errors import UserError

PACKAGE = "tuxpaint-stamps-default"
STAMPS = "usr/share/tuxpaint/stamps/"
COPYRIGHT = f"usr/share/doc/{PACKAGE}/copyright"
LARGEST_FILE_BYTES = 20_000_000


@dataclass(frozen=True)
class Stamp:
    name: str
    """Relative path without suffix, such as "animals/birds/owl"."""
    caption: str
    picture: bytes
    kind: str
    """".png" or ".svg"."""


@dataclass(frozen=True)
class Stamps:
    version: str
    license: str
    """SPDX identifier, read from the package's copyright file."""
    attribution: str
    stamps: tuple[Stamp, ...]


def fetch_package(folder: Path, *, timeout_s: float = 1800.0) -> Path:
    """The .deb in `folder`, downloaded by `apt-get download` where it is not there yet.

    Raises UserError where the machine has no apt, or apt cannot bring the package.
    """
    if present := sorted(folder.glob(f"{PACKAGE}_*.deb")):
        return present[-1]
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise UserError(
                f"--photos takes its pictures from Debian's package {PACKAGE}, and this machine has no {tool}: "
                "leave --photos out, or run on Debian or Ubuntu"
            )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".apt-", dir=folder) as temporary:
        try:
            done = subprocess.run(
                ["apt-get", "download", "-q", PACKAGE],
                cwd=temporary,
                capture_output=True,
                text=True,
                timeout=timeout_s,
            )
        except subprocess.TimeoutExpired:
            raise UserError(f"apt-get download {PACKAGE} did not end within {timeout_s:g} s") from None
        found = sorted(Path(temporary).glob(f"{PACKAGE}_*.deb"))
        if done.returncode or not found:
            said = " ".join(done.stderr.split())[-300:]
            raise UserError(f"apt-get download {PACKAGE} failed: {said}: is `apt-get update` needed?")
        target = folder / found[0].name
        os.replace(found[0], target)
    return target


def read_package(deb: Path) -> Stamps:
    """All captioned pictures of the .deb, sorted by name, PNG rather than SVG where there are both.

    Raises UserError where the file cannot be read, or its copyright file does not say GPL-2.
    """
    contents = dict(_members(deb))
    license_id = gpl_of(contents.get(COPYRIGHT, b"").decode("utf-8", "replace"))
    stamps = []
    for name in sorted(name for name in contents if name.endswith(".txt")):
        stem = name.removesuffix(".txt")
        caption = first_line(contents[name])
        kind = next((kind for kind in (".png", ".svg") if stem + kind in contents), None)
        if caption and kind:
            stamps.append(Stamp(stem.removeprefix(STAMPS), caption, contents[stem + kind], kind))
    version = deb.name.split("_")[1]
    return Stamps(
        version, license_id, f"Bill Kendrick and contributors, Tux Paint stamps, Debian {PACKAGE}", tuple(stamps)
    )


def first_line(text: bytes) -> str:
    """The English caption; the lines after it are translations."""
    lines = text.decode("utf-8", "replace").splitlines()
    return lines[0].strip() if lines else ""


def gpl_of(copyright_text: str) -> str:
    """The SPDX identifier in the package's copyright file. Raises UserError for anything but GPL-2."""
    if "License: GPL-2" not in copyright_text:
        raise UserError(f"{PACKAGE}: its copyright file no longer says GPL-2, so its pictures are not used")
    later = "any later version" in " ".join(copyright_text.split())
    return "GPL-2.0-or-later" if later else "GPL-2.0-only"


def _members(deb: Path) -> Iterator[tuple[str, bytes]]:
    """Captions, pictures and the copyright file; names are checked and nothing is written."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                for info in archive:
                    # Normalised, so that what follows the prefix cannot begin with "/" and leave the folder.
                    name = str(PurePosixPath(info.name))
                    wanted = name.startswith(STAMPS) and name.endswith((".txt", ".png", ".svg"))
                    plain = info.isfile() and info.size <= LARGEST_FILE_BYTES and ".." not in PurePosixPath(name).parts
                    if plain and (wanted or name == COPYRIGHT):
                        file = archive.extractfile(info)
                        assert file is not None
                        yield name, file.read()
        except tarfile.TarError as error:
            raise UserError(f"{deb}: cannot be read: {error}: delete it and run again") from None
    if process.returncode:
        raise UserError(f"{deb}: dpkg-deb cannot read it: delete it and run again")


def render_stamp(stamp: Stamp, *, size: int) -> bytes:
    """An RGB PNG on white whose longer side is at most `size` pixels. Raises ValueError or OSError for a broken one."""
    from PIL import Image

    if stamp.kind == ".svg":
        rgba = rasterize(stamp.picture.decode("utf-8"), width=size)
    else:
        with Image.open(io.BytesIO(stamp.picture), formats=("PNG",)) as image:
            rgba = image.convert("RGBA")
    rgba.thumbnail((size, size))
    return flat_png(rgba)
