"""What the headers of files claim is believed where it can be true, and refused in one line where it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from limoe_dist.checkpoint.contents import Part, contents, misplaced, plain, read_header
from limoe_dist.checkpoint.manifest import Damaged, read_manifest
from limoe_dist.checkpoint.rank_file import file_name
from tests.checkpoint.planted import NAME, RANK_0, RANK_1, box, content, entry, parts, plant

FLOATS = torch.arange(8.0).numpy().tobytes()
"""8 numbers, 32 bytes."""
W = entry([4], 0, 16)
HOSTILE = {
    "an empty file": (b"", "header too small"),
    "a cut length": (b"1234567", "header too small"),
    "no header": (bytes(8), "invalid JSON in header"),
    "a header longer than the file": ((1 << 20).to_bytes(8, "little") + b"{}", "invalid header length"),
    "a header of 9 exabytes": ((1 << 63).to_bytes(8, "little") + b"{}", "header too large"),
    "a header of all the bytes there are": (b"\xff" * 8 + b"{}", "header too large"),
    "a header that is not JSON": (content(b"\x80\x02}q\x00."), "header"),
    "a header that is a list": (content(b"[]"), "header"),
    "a deep header": (content(b"[" * 100_000), "header"),
    "no word of where boxes belong": (content({NAME: W}, FLOATS[:16]), "does not say where its tensors belong"),
    "metadata of somebody else": (
        content({"__metadata__": {"format": "pt"}, NAME: W}, FLOATS[:16]),
        "does not say where its tensors belong",
    ),
    "metadata that is no text": (content({"__metadata__": {"limoe": {}}, NAME: W}, FLOATS[:16]), "header"),
    "deep places": (
        content({"__metadata__": {"limoe": "[" * 100_000}, NAME: W}, FLOATS[:16]),
        "does not say where its tensors belong",
    ),
    "places that are a list": (content(parts([1]) | {NAME: W}, FLOATS[:16]), "does not say where"),
    "a place without a start": (content(parts({NAME: [[4]]}) | {NAME: W}, FLOATS[:16]), "does not say where"),
    "a start below zero": (content(parts({NAME: [[4], [-1]]}) | {NAME: W}, FLOATS[:16]), "greater than or equal to 0"),
    "half a start": (content(parts({NAME: [[4], [0.5]]}) | {NAME: W}, FLOATS[:16]), "valid integer"),
    "a shape beyond 64 bits": (
        content(parts({NAME: [[1 << 64], [(1 << 64) - 4]]}) | {NAME: W}, FLOATS[:16]),
        "less than 9223372036854775808",
    ),
    "a shape of a thousand dims": (
        content(parts({NAME: [[1] * 1000, [0] * 1000]}) | {NAME: entry([1] * 1000, 0, 4)}, FLOATS[:4]),
        "at most 8 items",
    ),
    "a place of a tensor that is not there": (
        content(parts({NAME: [[4], [0]], "model/z": [[4], [0]]}) | {NAME: W}, FLOATS[:16]),
        "does not say where model/z belongs",
    ),
    "a tensor without a place": (
        content(parts({NAME: [[4], [0]]}) | {NAME: W, "model/z": entry([4], 16, 32)}, FLOATS),
        "does not say where model/z belongs",
    ),
    "offsets that overlap": (
        content(
            parts({NAME: [[4], [0]], "model/z": [[4], [0]]}) | {NAME: W, "model/z": entry([4], 8, 24)}, FLOATS[:24]
        ),
        "invalid offset",
    ),
    "the same offsets twice": (
        content(
            parts({NAME: [[4], [0]], "model/z": [[4], [0]]}) | {NAME: W, "model/z": entry([4], 0, 16)}, FLOATS[:16]
        ),
        "invalid offset",
    ),
    "offsets behind the end": (content(parts({NAME: [[4], [0]]}) | {NAME: entry([8], 0, 32)}, FLOATS[:16]), "header"),
    "offsets that go back": (content(parts({NAME: [[4], [0]]}) | {NAME: entry([4], 16, 0)}, FLOATS[:16]), "offset"),
    "offsets that are not of the shape": (
        content(parts({NAME: [[4], [0]]}) | {NAME: entry([4], 0, 12)}, FLOATS[:12]),
        "invalid shape, data type, or offset",
    ),
    "a size that overflows": (
        content(parts({NAME: [[4], [0]]}) | {NAME: entry([1 << 62, 1 << 62], 0, 16)}, FLOATS[:16]),
        "overflow",
    ),
    "bytes that belong to no tensor": (
        content(parts({NAME: [[4], [0]]}) | {NAME: W}, FLOATS),
        "file not fully covered",
    ),
    "a gap between tensors": (
        content(parts({NAME: [[4], [0]]}) | {NAME: entry([4], 16, 32)}, FLOATS),
        "invalid offset",
    ),
    "a type that nobody knows": (
        content(parts({NAME: [[4], [0]]}) | {NAME: entry([4], 0, 16, "F33")}, FLOATS[:16]),
        "header",
    ),
    "a type that is no number of a weight": (
        content(parts({NAME: [[4], [0]]}) | {NAME: entry([4], 0, 2, "F4")}, FLOATS[:2]),
        "model/w is of type F4, which no rank writes",
    ),
    "complex numbers": (
        content(parts({NAME: [[4], [0]]}) | {NAME: entry([4], 0, 32, "C64")}, FLOATS),
        "model/w is of type C64, which no rank writes",
    ),
    "a pickle": (b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00exit\x85R." * 9, "header"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_no_rank_wrote_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    hostile, told = HOSTILE[name]
    path = tmp_path / file_name(0)
    path.write_bytes(hostile)
    with pytest.raises(Damaged) as raised:
        list(read_header(path))
    assert str(raised.value).startswith(str(path))
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 1000


def test_a_header_of_more_than_100_megabytes_is_refused(tmp_path: Path) -> None:
    length = 100_000_001
    path = tmp_path / file_name(0)
    with path.open("wb") as file:
        # Sparse: it has the size that it claims, and takes no room.
        file.write(length.to_bytes(8, "little"))
        file.truncate(8 + length)
    with pytest.raises(Damaged, match="header too large"):
        list(read_header(path))


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(Damaged, match="cannot be read"):
            list(read_header(path))


@pytest.mark.parametrize("name", ["", "two\nlines", "x" * 10_000], ids=["none", "lines", "long"])
def test_a_tensor_with_a_name_that_no_parameter_has_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / file_name(0)
    path.write_bytes(content(parts({name: [[4], [0]]}) | {name: W}, FLOATS[:16]))
    with pytest.raises(Damaged) as raised:
        list(read_header(path))
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 1000


def test_the_boxes_of_all_files_are_listed_by_tensor(tmp_path: Path) -> None:
    one, two = box([1.0], of=[3], start=[0]), box([2.0, 3.0], of=[3], start=[1])
    other = box([1.0], of=[1], start=[0], name="adamw/exp_avg/w")
    folder = plant(tmp_path, {RANK_0: one, RANK_1: two, "rank-00002.safetensors": other})
    (folder / "rank-00003.safetensors").write_bytes(b"not in the manifest, and not read")
    found = contents(folder, read_manifest(folder))
    assert list(found) == ["adamw/exp_avg/w", NAME]
    assert found[NAME] == [
        Part(folder / RANK_0, (3,), (0,), (1,), "F32"),
        Part(folder / RANK_1, (3,), (1,), (2,), "F32"),
    ]
    assert misplaced(found) == []


def part(start: tuple[int, ...], size: tuple[int, ...], *, of: tuple[int, ...]) -> Part:
    return Part(Path("checkpoint/f.safetensors"), of, start, size, "F32")


@pytest.mark.parametrize(
    "boxes",
    [
        [((0, 0), (4, 6))],
        [((0, 0), (2, 2)), ((0, 2), (2, 4)), ((2, 0), (2, 5)), ((2, 5), (2, 1))],
        # Five boxes around one another, which no straight cut divides.
        [((0, 0), (1, 4)), ((0, 4), (3, 2)), ((3, 2), (1, 4)), ((1, 0), (3, 2)), ((1, 2), (2, 2))],
        # Nothing of it is in a box without numbers, wherever that is.
        [((0, 0), (4, 6)), ((4, 0), (0, 6)), ((2, 3), (0, 0))],
    ],
)
def test_boxes_that_hold_every_number_once_are_right(boxes: list[tuple[tuple[int, int], tuple[int, int]]]) -> None:
    assert misplaced({NAME: [part(start, size, of=(4, 6)) for start, size in boxes]}) == []


@pytest.mark.parametrize(
    "boxes",
    [
        [],
        [((0, 0), (4, 5))],
        [((0, 0), (4, 6)), ((3, 5), (1, 1))],
        # The volumes are those of 4 * 6.
        [((0, 0), (4, 3)), ((0, 0), (4, 3))],
        [((0, 0), (4, 3)), ((0, 2), (4, 3))],
        [((0, 0), (2, 6)), ((0, 0), (2, 3)), ((0, 3), (2, 3))],
        [((0, 0), (3, 4)), ((1, 2), (3, 4))],
        # Every corner is where it should be.
        [((0, 0), (4, 6))] * 3,
        [((0, 0), (2, 6)), ((2, 0), (2, 6)), ((1, 1), (1, 1)), ((1, 1), (1, 1))],
    ],
)
def test_holes_and_overlaps_are_seen_whatever_the_volumes_say(
    boxes: list[tuple[tuple[int, int], tuple[int, int]]],
) -> None:
    # An empty one names the tensor where there is no other.
    given = [part((0, 0), (0, 0), of=(4, 6)), *(part(start, size, of=(4, 6)) for start, size in boxes)]
    assert misplaced({NAME: given}) == ["checkpoint: f.safetensors do not hold every number of model/w exactly once"]


def test_a_scalar_is_held_once() -> None:
    assert misplaced({NAME: [part((), (), of=())]}) == []
    assert len(misplaced({NAME: [part((), (), of=())] * 2})) == 1


@pytest.mark.parametrize(
    ("start", "size", "of"),
    [((3,), (4,), (6,)), ((7,), (0,), (6,)), ((0, 0), (6,), (6,)), ((0,), (6, 1), (6,)), ((0, 0), (6,), (6, 1))],
)
def test_a_box_that_leaves_its_tensor_is_seen(
    start: tuple[int, ...], size: tuple[int, ...], of: tuple[int, ...]
) -> None:
    (problem,) = misplaced({NAME: [part(start, size, of=of)]})
    assert problem == f"checkpoint/f.safetensors: the box {start} + {size} of model/w does not fit into its shape {of}"


def test_every_tensor_that_is_wrong_is_told_once() -> None:
    whole, hole = part((0,), (6,), of=(6,)), part((0,), (5,), of=(6,))
    longer = part((0,), (7,), of=(7,))
    problems = misplaced({"a": [hole], "b": [whole], "c": [whole, longer, hole]})
    assert problems == [
        "checkpoint: f.safetensors do not hold every number of a exactly once",
        "checkpoint/f.safetensors: c is of shape (7,), but of (6,) in f.safetensors",
    ]


def test_codes_that_a_terminal_obeys_are_shown() -> None:
    assert plain("model/w (ä, 4 x 6)") == "model/w (ä, 4 x 6)"
    assert plain("a\x1b[2Jb\u202ec\0") == "a\\x1b[2Jb\\u202ec\\x00"
