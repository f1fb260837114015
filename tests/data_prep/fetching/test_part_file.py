from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.fetching import ledger
from data_prep.fetching.ledger import Entry
from data_prep.fetching.part_file import Landed, PartFile, member_header
from limoe_dist.config.errors import UserError
from tests.support.hostile_server import picture_kinds

PNG = picture_kinds()["png"]


def landed(number: int, error: str = "ok") -> Landed:
    picture = PNG + bytes([number])
    entry = Entry(
        key=f"{number:05d}", row=number, url=f"http://example.com/{number}", error=error, caption=f"é {number}"
    )
    if error == "ok":
        entry.bytes, entry.sha256, entry.format = len(picture), hashlib.sha256(picture).hexdigest(), "png"
        entry.carried = json.dumps({"clip": number / 4, "sha256": "of the list"})
    return Landed(entry, picture if error == "ok" else b"")


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_part_is_a_tar_of_pictures_captions_and_json_and_a_table_of_all_rows(tmp_path):
    part = PartFile(tmp_path, "part-00000")
    part.write([landed(1), landed(0, "timeout")])
    part.write([landed(2)])
    assert files(tmp_path) == {"part-00000.tar.partial", "part-00000.jsonl", "part-00000.lock"}
    part.finish()
    assert files(tmp_path) == {"part-00000.tar", "part-00000.parquet"}
    with tarfile.open(tmp_path / "part-00000.tar") as tar:
        names = tar.getnames()
        content = {name: tar.extractfile(name).read() for name in names}
    assert names == [f"0000{number}.{suffix}" for number in (1, 2) for suffix in ("png", "txt", "json")]
    assert content["00002.png"] == PNG + b"\2"
    assert content["00002.txt"].decode() == "é 2"
    told = json.loads(content["00002.json"])
    assert (told["clip"], told["list_sha256"]) == (0.5, "of the list")
    assert told["sha256"] == hashlib.sha256(content["00002.png"]).hexdigest()
    rows = ledger.latest(tmp_path, "part-00000")
    assert {key: row["error"] for key, row in rows.items()} == {"00000": "timeout", "00001": "ok", "00002": "ok"}
    assert ledger.totals(tmp_path).rows == {"ok": 2, "timeout": 1}


def test_a_part_without_a_picture_leaves_no_tar(tmp_path):
    part = PartFile(tmp_path, "part-00000")
    part.write([landed(0, "dns")])
    part.finish()
    assert files(tmp_path) == {"part-00000.parquet"}


def test_a_header_is_what_tarfile_writes_for_a_plain_file():
    info = tarfile.TarInfo("0000012.webp")
    info.size = 123_456
    whole = io.BytesIO(member_header("0000012.webp", 123_456) + bytes(124_416))
    with tarfile.open(fileobj=whole) as tar:
        (read,) = tar.getmembers()
    assert read.get_info() == info.get_info() | {"chksum": read.chksum}


@settings(max_examples=20, deadline=None)
@given(cut_tar=st.integers(0, 10_000), cut_lines=st.integers(0, 3_000), zeros=st.booleans())
def test_whatever_of_a_part_is_lost_at_its_end_the_rest_goes_on_to_the_same_rows(
    tmp_path_factory, cut_tar, cut_lines, zeros
):
    """Both files lose any length, as in a power cut; or the tar keeps its length and holds zeros there."""
    out = tmp_path_factory.mktemp("cut")
    part = PartFile(out, "part-00000")
    part.write([landed(number, "ok" if number % 3 else "http_4xx") for number in range(6)])
    part.close()
    for name, cut in (("part-00000.tar.partial", cut_tar), ("part-00000.jsonl", cut_lines)):
        content = (out / name).read_bytes()
        kept = content[: max(0, len(content) - cut)]
        if zeros and name.endswith(".partial"):
            kept = kept.ljust(len(content), b"\0")
        (out / name).write_bytes(kept)
    part = PartFile(out, "part-00000")
    part.write(
        [one for one in (landed(n, "ok" if n % 3 else "http_4xx") for n in range(6)) if one.entry.key not in part.done]
    )
    part.finish()
    with tarfile.open(out / "part-00000.tar") as tar:
        pictures = {name: tar.extractfile(name).read() for name in tar.getnames() if name.endswith(".png")}
    assert pictures == {f"{number:05d}.png": PNG + bytes([number]) for number in (1, 2, 4, 5)}
    assert ledger.totals(out).rows == {"ok": 4, "http_4xx": 2}


@pytest.mark.parametrize("moment", ["tar renamed", "table written"])
def test_a_part_that_was_killed_while_it_closed_is_closed_by_the_next(tmp_path, moment, monkeypatch):
    part = PartFile(tmp_path, "part-00000")
    part.write([landed(1)])
    cut = {"tar renamed": (ledger, "write_table"), "table written": (PartFile, "_remove_lines")}[moment]
    with monkeypatch.context() as patched:
        patched.setattr(*cut, lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            part.finish()
    part.close()
    part = PartFile(tmp_path, "part-00000")
    assert part.whole == (moment == "table written")
    if not part.whole:
        assert part.done == {"00001"}
        part.finish()
    part.close()
    assert files(tmp_path) == {"part-00000.tar", "part-00000.parquet"}
    with tarfile.open(tmp_path / "part-00000.tar") as tar:
        assert len(tar.getnames()) == 3


def test_a_part_is_one_process_alone(tmp_path):
    part = PartFile(tmp_path, "part-00007")
    with pytest.raises(UserError, match=r"part-00007 of .* is being written by process"):
        PartFile(tmp_path, "part-00007")
    part.close()
    PartFile(tmp_path, "part-00007").close()
