"""A manifest is read as it was written or not at all, and finds every file that is not what it says."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from limoe_dist.checkpoint import manifest
from limoe_dist.checkpoint.manifest import (
    BLOCK,
    CheckpointManifest,
    Damaged,
    File,
    encode,
    folder_name,
    read_manifest,
    verify,
)
from limoe_dist.config.errors import UserError
from tests.checkpoint.planted import entry_of, signed

FILES = (
    File(name="rank-00000.safetensors", bytes=70, xxh3="0" * 32),
    File(name="rank-00001.safetensors", bytes=80, xxh3="a0" * 16),
    File(name="state.json", bytes=9, xxh3="5f" * 16),
)
MANIFEST = CheckpointManifest(step=3, files=FILES)
FIELDS = {
    "format": "limoe-checkpoint",
    "format_version": 2,
    "step": 3,
    "files": [file.model_dump() for file in FILES],
}


def read(folder: Path, text: bytes) -> CheckpointManifest:
    (folder / "manifest.json").write_bytes(text)
    return read_manifest(folder)


def refusal(folder: Path, text: bytes) -> str:
    """What is said of a manifest that is not as it was written: one line."""
    with pytest.raises(Damaged) as raised:
        read(folder, text)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500
    return str(raised.value)


def test_a_manifest_comes_back(tmp_path: Path) -> None:
    # A file's checksum that looks like the blank does not take its place.
    assert read(tmp_path, encode(MANIFEST)) == MANIFEST
    assert read(tmp_path, signed(FIELDS)) == MANIFEST
    assert MANIFEST.num_bytes == 159


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    text = encode(MANIFEST)
    for place in range(len(text)):
        changed = bytearray(text)
        changed[place] ^= 1 << place % 8
        refusal(tmp_path, bytes(changed))


def test_every_cut_is_found(tmp_path: Path) -> None:
    text = encode(MANIFEST)
    for length in range(len(text)):
        refusal(tmp_path, text[:length])
    refusal(tmp_path, text + b" ")


@pytest.mark.parametrize("version", [1, 3, 10])
@pytest.mark.parametrize("sign", [signed, lambda fields: signed(fields).replace(b'"xxh3"', b'"sum"', 1)])
def test_another_version_is_not_called_damaged(
    tmp_path: Path, version: int, sign: Callable[[dict[str, object]], bytes]
) -> None:
    with pytest.raises(UserError, match=rf"format_version={version}, but this version reads 2: use the") as raised:
        read(tmp_path, sign({"format": "limoe-checkpoint", "format_version": version, "pieces": {}}))
    assert not isinstance(raised.value, Damaged)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'{"name": "somebody else"}',
        b"\xff\xfe{}",
        b"[" * 100_000,
        b'{"format": ' + b"[" * 900 + b"]" * 900 + b"}",
        signed(FIELDS | {"format": "limoe-weights"}),
    ],
    ids=lambda text: text[:12],
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: bytes) -> None:
    assert "is not" in refusal(tmp_path, text)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format_version", "2"),
        ("format_version", None),
        ("format_version", [[]]),
        ("step", -1),
        ("step", 0.5),
        ("step", float("nan")),
        ("step", "x" * 10_000),
        ("files", {}),
        ("files", [1, 2, 3]),
        ("files", [{"name": "state.json", "bytes": -1, "xxh3": ""}]),
        ("other", 1),
    ],
)
def test_a_wrong_field_under_a_right_checksum_is_refused(tmp_path: Path, field: str, value: object) -> None:
    assert field in refusal(tmp_path, signed(FIELDS | {field: value}))


@pytest.mark.parametrize("depth", [150, 900])
def test_nesting_under_a_right_checksum_is_refused(tmp_path: Path, depth: int) -> None:
    refusal(tmp_path, signed(FIELDS, files="[" * depth + "]" * depth))


@pytest.mark.parametrize("claimed", [b'"' + b"\\ud800" * 32 + b'"', b'"' + "ä".encode() * 32 + b'"', b"1", b'"0"'])
def test_a_checksum_that_is_none_is_refused(tmp_path: Path, claimed: bytes) -> None:
    text = signed(FIELDS)
    refusal(tmp_path, text.replace(text[9:43], claimed, 1))


@pytest.mark.parametrize(
    "name", ["../run.json", "/etc/passwd", "a/b", "", ".", "..", "a\0b", "two\nlines", "\ud800", "ä", "x" * 300]
)
def test_a_name_that_is_not_plain_is_refused(tmp_path: Path, name: str) -> None:
    files = [{"name": name, "bytes": 1, "xxh3": "0" * 32}, *FIELDS["files"]]
    refusal(tmp_path, signed(FIELDS | {"files": files}))


def test_a_manifest_names_the_state_and_no_file_twice(tmp_path: Path) -> None:
    # What has no checksum is not read, and so it has to be there.
    for files in ((), FILES[:2], (*FILES, FILES[0])):
        given = signed(FIELDS | {"files": [file.model_dump() for file in files]})
        assert "must name state.json, and no file twice" in refusal(tmp_path, given)


def test_a_checkpoint_under_the_name_of_another_step_is_refused(tmp_path: Path) -> None:
    right, wrong = (tmp_path / folder_name(step) for step in (3, 4))
    for folder in (right, wrong):
        folder.mkdir()
    assert read(right, encode(MANIFEST)).step == 3
    assert "it was moved here from step-00000003" in refusal(wrong, encode(MANIFEST))


def test_a_gigantic_manifest_is_not_read_into_memory(tmp_path: Path) -> None:
    with (tmp_path / "manifest.json").open("wb") as file:
        # Sparse: it has this size, and takes no room.
        file.truncate(manifest.MOST_BYTES + 1)
    with pytest.raises(Damaged, match=r"manifest.json has 268435457 bytes: no checkpoint has so many there"):
        read_manifest(tmp_path)


def test_a_manifest_that_is_missing_or_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Damaged, match=r"manifest.json: cannot be read: No such file or directory"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(Damaged, match=r"manifest.json: cannot be read: Is a directory"):
        read_manifest(tmp_path)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def change(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1] + b"?")


def put_a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def put_a_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def link_to(target: str) -> Callable[[Path], None]:
    def put(file: Path) -> None:
        file.unlink()
        file.symlink_to(target)

    return put


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (Path.unlink, "is missing"),
        (cut, "has 3 bytes, not 4"),
        (change, "its checksum differs"),
        (put_a_pipe, "is missing"),
        (put_a_directory, "is missing"),
        (link_to("/dev/zero"), "is missing"),
        (link_to("b"), "(is missing|cannot be read)"),
        (link_to("nowhere"), "is missing"),
        (link_to("a"), "its checksum differs"),
    ],
)
def test_a_file_that_is_not_what_was_written_is_named(tmp_path: Path, fault: Callable[[Path], None], told: str) -> None:
    files = []
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(name.encode() * 4)
        files.append(entry_of(tmp_path / name))
    assert verify(tmp_path, files) == []
    fault(tmp_path / "b")
    (problem,) = verify(tmp_path, files)
    assert problem.startswith(str(tmp_path / "b"))
    assert re.search(told, problem)


def test_all_that_is_wrong_is_told_in_the_order_of_the_files(tmp_path: Path) -> None:
    files = [File(name=f"f{number}", bytes=1, xxh3="") for number in range(9)]
    assert verify(tmp_path, files) == [f"{tmp_path / file.name} is missing" for file in files]


def test_the_bytes_that_were_read_are_told(tmp_path: Path) -> None:
    sizes = {"empty": 0, "small": 5, "long": BLOCK + 1}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(bytes(size))
    told: list[int] = []
    assert verify(tmp_path, [entry_of(tmp_path / name) for name in sizes], progress=told.append) == []
    assert sorted(told) == [1, 5, BLOCK]
