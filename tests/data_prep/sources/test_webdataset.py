from __future__ import annotations

import json
import pickle
import subprocess
import sys
import tarfile
import tracemalloc

import pytest

from data_prep.sources import tar_rows, webdataset
from data_prep.sources.columns import Columns
from data_prep.sources.opening import full_key, open_sources
from limoe_dist.config.errors import UserError
from tests.data_prep.tars_of import END, member, tar_bytes, write_tar

JPG = b"\xff\xd8 picture"


def opened(place, columns=Columns(), **more):  # noqa: B008
    (source,) = open_sources([str(place)], columns, **more)
    return source


def rows(source):
    return [sample for block in source.blocks for sample in source.read(block)]


def rows_of(tmp_path, *members, columns=Columns()):  # noqa: B008
    """Rows of a tar made of these members, headers as given."""
    (tmp_path / "t.tar").write_bytes(tar_bytes(*members, kind=tarfile.PAX_FORMAT) + END)
    return rows(opened(tmp_path / "t.tar", columns))


def problems(found):
    return [row.problem for row in found]


def test_what_img2dataset_writes_comes_out(tmp_path):
    note = {"caption": "an owl", "url": "https://x.example/a", "similarity": 0.31, "punsafe": None, "pwatermark": "0.5"}
    for tar, key in (("00000", "000000000"), ("00001", "000010000")):
        write_tar(
            tmp_path / f"lake/{tar}.tar",
            [(f"{key}.jpg", JPG), (f"{key}.json", json.dumps(note).encode()), (f"{key}.txt", b"an  owl\n")],
        )
        (tmp_path / f"lake/{tar}.parquet").write_bytes(b"its table")
        (tmp_path / f"lake/{tar}_stats.json").write_text("{}")
    source = opened(tmp_path / "lake", Columns(scores=("similarity", "punsafe", "pwatermark")))
    found = rows(source)
    assert [full_key(source, row) for row in found] == ["lake/00000/000000000", "lake/00001/000010000"]
    assert [(row.image, row.captions, row.problem) for row in found] == [(JPG, ("an owl",), "")] * 2
    assert found[0].scores == {"similarity": 0.31, "pwatermark": 0.5}
    assert found[0].place == f"{tmp_path}/lake/00000.tar, 000000000"


def test_captions_are_those_of_the_text_and_of_the_fields_each_once(tmp_path):
    fields = {"caption": ["a bird", "an owl"], "text": "a bird", "better": "a barn owl", "concept": "owl"}
    members = [member("a.png", JPG), member("a.txt", b"an owl"), member("a.json", json.dumps(fields).encode())]
    (row,) = rows_of(tmp_path, *members)
    assert (row.captions, row.concept) == (("an owl", "a bird"), "owl")
    (row,) = rows_of(tmp_path, *members, columns=Columns(caption="better"))
    assert row.captions == ("a barn owl",)
    (row,) = rows_of(tmp_path, *members, columns=Columns(caption="txt"))
    assert row.captions == ("an owl",)


def test_halves_are_rows_and_other_programs_members_are_none(tmp_path):
    found = rows_of(
        tmp_path,
        member("./sub/", type=tarfile.DIRTYPE),
        member("README.md", b"about"),
        member("./sub/a.JPEG", JPG),
        member("sub/._a.jpg", b"of macOS"),
        member("b.caption", b"a text alone"),
        member("c.png", JPG),
        member("c.cls", b"7"),
        member("c.pkl", b"cos\nsystem\n"),
    )
    assert [(row.key, row.image, row.captions) for row in found] == [
        ("t/sub/a", JPG, ()),
        ("t/b", b"", ("a text alone",)),
        ("t/c", JPG, ()),
    ]


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ([member("/etc/a.jpg", JPG)], "leaves the source"),
        ([member("../a.jpg", JPG)], "leaves the source"),
        ([member("x/../../a.jpg", JPG)], "leaves the source"),
        ([member("a.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"), member("a.txt", b"x")], "is a symbolic link"),
        ([member("a.jpg", type=tarfile.LNKTYPE, linkname="b.jpg"), member("a.txt", b"x")], "is a hard link"),
        ([member("a.jpg", JPG), member("a.txt", type=tarfile.CHRTYPE)], "is a device"),
        ([member("a.jpg", type=tarfile.FIFOTYPE)], "is a FIFO"),
        ([member("a.jpg", JPG, pax_headers={"GNU.sparse.realsize": "9" * 12})], "is sparse"),
        ([member("a.jpg", JPG), member("a.jpg", JPG + b"2"), member("a.txt", b"x")], "has two members for its picture"),
        ([member("a.jpg", JPG), member("a.png", JPG), member("a.txt", b"x")], "has two members for its picture"),
        ([member("a.jpg", JPG), member("a.json", b"{}"), member("a.json", b"{}")], "has two members for its json"),
        ([member("a.v1.jpg", JPG)], "the key ends at the first dot"),
        ([member("a.avif", JPG), member("a.txt", b"x")], "but a member .avif"),
        ([member("a.jpg", b""), member("a.txt", b"x")], "its picture is empty"),
        ([member("a.jpg", JPG), member("a.txt", b" \n")], "has an empty caption"),
        ([member("a.jpg", JPG), member("a.txt", b"\xff\xfe")], "its text is not UTF-8"),
        ([member("a.jpg", JPG), member("a.json", b"{")], "its JSON is broken"),
        ([member("a.jpg", JPG), member("a.json", b"[" * 100_000)], "its JSON is broken"),
        ([member("a.jpg", JPG), member("a.json", b"9" * 5000)], "its JSON is broken"),
        ([member("a.jpg", JPG), member("a.json", b"[1]")], "its JSON is no object"),
        ([member("a.jpg", JPG), member("a.json", b'{"caption": 3}')], "neither a text nor a list"),
        ([member("a.jpg", JPG), member("a.json", json.dumps({"caption": ["x"] * 2000}).encode())], "has 2000 captions"),
        ([member("a.json", b"{}")], "has neither a picture nor a caption"),
        ([member("a" * 600 + ".jpg", JPG)], "has a name of 600 characters"),
        ([member("a\x1b[31m.jpg", JPG)], "cannot be printed"),
        ([member("a\udcff.jpg", JPG)], "is not UTF-8"),
    ],
)
def test_a_bad_row_is_refused_alone(tmp_path, members, problem):
    found = rows_of(tmp_path, member("0.jpg", JPG), member("0.txt", b"good"), *members, member("z.jpg", JPG))
    assert [row.key for row in found] == ["t/0", "t//1", "t/z"]
    assert problem in found[1].problem
    assert found[1].image == b""
    assert problems(found)[::2] == ["", ""]


def test_members_above_the_cap_are_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(webdataset, "LARGEST_PICTURE", 1000)
    monkeypatch.setattr(webdataset, "LARGEST_TEXT", 100)
    assert problems(
        rows_of(
            tmp_path,
            *(member("a.jpg", b"x" * 1001), member("b.jpg", b"x" * 1000), member("c.txt", b"x" * 101)),
            *(member("d.json", b" " * 101), member("e.txt", b"x" * 100)),
        )
    ) == [
        "its picture has 1001 bytes, more than 1000",
        "",
        "its text has 101 bytes, more than 100",
        "its JSON has 101 bytes, more than 100",
        "",
    ]


def test_rows_whose_key_is_at_several_places_are_all_refused(tmp_path):
    found = rows_of(tmp_path, *(member(f"{key}.jpg", JPG) for key in "abcdefa"), member("h.txt", b"x"))
    assert [row.key for row in found] == ["t//0", "t/b", "t/c", "t/d", "t/e", "t/f", "t//6", "t/h"]
    assert found[0].problem == found[6].problem == "its key is at several places of the tar"


def test_a_tar_sorted_by_endings_is_an_error_that_says_how_to_sort(tmp_path):
    with pytest.raises(UserError, match=r"members of a row must be neighbours.*--sort=name"):
        rows_of(tmp_path, *(member(f"{key}.{kind}", JPG) for kind in ("jpg", "txt") for key in "abc"))


def test_very_many_members_of_one_key_take_no_memory(tmp_path):
    one = tar_bytes(member("a.jpg", b"1"))
    with (tmp_path / "t.tar").open("wb") as file:
        file.write(one * 8_000 + tar_bytes(member("b.jpg", JPG)) + END)
    tracemalloc.start()
    found = rows(opened(tmp_path / "t.tar"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(row.key, row.problem) for row in found] == [("t//0", "has two members for its picture"), ("t/b", "")]
    # The block is read in one go, 8.2 MB; of 8,000 members nothing else is kept.
    assert peak < 9_500_000


def test_blocks_hold_every_row_once_and_can_be_read_in_any_order(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_rows, "BLOCK_BYTES", 20_000)
    for tar in range(2):
        write_tar(tmp_path / f"d/{tar}.tar", [(f"{n:04d}.jpg", bytes([n % 256]) * (n + 1)) for n in range(300)])
    source = opened(tmp_path / "d")
    assert [(block.file, block.first) for block in source.blocks][:2] == [(0, 0), (0, 20)]
    found = {block: [row.key for row in source.read(block)] for block in reversed(source.blocks)}
    assert [len(keys) for keys in found.values()] == [block.rows for block in reversed(source.blocks)]
    keys = [key for block in source.blocks for key in found[block]]
    assert keys == [f"{tar}/{n:04d}" for tar in range(2) for n in range(300)]
    assert next(source.read(source.blocks[1])).image == b"\x14" * 21


def test_ten_million_rows_would_stay_small(tmp_path):
    content = tar_bytes(member("k0000.jpg", b"x"))
    keys = (
        content.replace(b"k0000", b"k%04d" % n).replace(content[148:156], _checksum(content, n)) for n in range(4096)
    )
    (tmp_path / "t.tar").write_bytes(b"".join(keys) + END)
    source = opened(tmp_path / "t.tar")
    assert sum(block.rows for block in source.blocks) == 4096
    # 20 bytes a row are 200 MB for ten million.
    assert len(source.blocks) == 16
    assert len(pickle.dumps(source.blocks)) < 20 * 4096


def _checksum(content, number):
    header = bytearray(content[:512])
    header[1:5] = b"%04d" % number
    header[148:156] = b" " * 8
    return b"%06o\0 " % sum(header)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (tar_bytes(member("a.jpg", JPG)), "cut off, or is still being written"),
        (tar_bytes(member("a.jpg", JPG * 99))[:900], "reaches beyond the file"),
        (tar_bytes(member("README.md", b"x")) + END, r"members such as b'README\.md'"),
        (END, "holds no KEY.jpg"),
        (b"\x1f\x8b" + b"x" * 1024, "unpack it to a plain .tar"),
    ],
)
def test_a_broken_tar_is_an_error_before_any_row_is_read(tmp_path, content, reason):
    write_tar(tmp_path / "good.tar", [("a.jpg", JPG)])
    (tmp_path / "t.tar").write_bytes(content)
    with pytest.raises(UserError, match=reason) as caught:
        opened(f"webdataset:{tmp_path}")
    assert str(tmp_path / "t.tar") in str(caught.value)


def test_all_broken_tars_are_counted(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.tar").write_bytes(b"x" * 600)
    write_tar(tmp_path / "d.tar", [("a.jpg", JPG)])
    with pytest.raises(UserError, match=r"a\.tar: byte 0.*\(3 of 4 files are broken\)"):
        opened(tmp_path)


def test_packed_tars_are_an_error_that_says_to_unpack_them(tmp_path):
    write_tar(tmp_path / "d/a.tar.gz", [("a.jpg", JPG)])
    with pytest.raises(UserError, match=r"a\.tar\.gz: is packed.*unpack"):
        opened(tmp_path / "d")


def test_a_tar_that_changes_after_it_was_opened_is_an_error(tmp_path):
    file = write_tar(tmp_path / "t.tar", [(f"{n}.jpg", JPG) for n in range(3)])
    source = opened(file)
    write_tar(file, [("a.jpg", JPG * 200)])
    with pytest.raises(UserError, match=r"t\.tar: changed while it was read"):
        rows(source)
    file.write_bytes(b"")
    with pytest.raises(UserError, match=r"t\.tar: changed while it was read"):
        rows(source)
    file.unlink()
    with pytest.raises(UserError, match="no such file"):
        rows(source)


def test_the_fingerprint_follows_files_and_columns(tmp_path):
    file = write_tar(tmp_path / "d/t.tar", [("a.jpg", JPG)])
    before = opened(file).fingerprint()
    assert opened(file).fingerprint() == before
    assert opened(file, Columns(scores=("x",))).fingerprint() != before
    write_tar(file, [("b.jpg", JPG * 300)])
    assert opened(file).fingerprint() != before


def test_what_was_learned_is_kept_and_forgotten_when_the_tar_changes(tmp_path, monkeypatch):
    file = write_tar(tmp_path / "t.tar", [("a.jpg", JPG), ("b.jpg", JPG)])
    index = tmp_path / "index"
    first = opened(file, index=index)
    (kept,) = index.iterdir()
    monkeypatch.setattr(webdataset, "index_tar", None)  # another reading would call it
    assert opened(file, index=index) == first
    monkeypatch.undo()
    kept.write_text(kept.read_text()[:50])
    assert opened(file, index=index) == first
    write_tar(file, [("c.jpg", JPG * 999)])
    assert [row.key for row in rows(opened(file, index=index))] == ["t/c"]


def test_a_source_can_be_pickled_and_progress_is_told(tmp_path):
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", [("x.jpg", JPG)])
    told = []
    source = opened(tmp_path, progress=lambda what, done, of: told.append((done, of)))
    assert told == [(1, 2), (2, 2)]
    assert rows(pickle.loads(pickle.dumps(source))) == rows(source)


def test_a_block_larger_than_memory_may_hold_is_read_where_it_lies(tmp_path, monkeypatch):
    write_tar(tmp_path / "t.tar", [("a.jpg", JPG), ("b.jpg", b"x" * 5000), ("c.jpg", JPG)])
    whole = rows(opened(tmp_path / "t.tar"))
    monkeypatch.setattr(webdataset, "BLOCK_BYTES", 600)
    assert rows(opened(tmp_path / "t.tar")) == whole
    assert [len(row.image) for row in whole] == [len(JPG), 5000, len(JPG)]


def test_patterns_and_braces_choose_tars_and_repeated_names_get_their_folder(tmp_path):
    for folder in "xy":
        for number in range(3):
            write_tar(tmp_path / f"{folder}/{number:05d}.tar", [("a.jpg", JPG)])
    assert [row.key for row in rows(opened(tmp_path / "x/{00001..00002}.tar"))] == ["00001/a", "00002/a"]
    source = opened(tmp_path / "*/00001.tar")
    assert [row.key for row in rows(source)] == ["x+00001/a", "y+00001/a"]


def test_licences_stand_beside_the_tars(tmp_path):
    write_tar(tmp_path / "d/t.tar", [("a.jpg", JPG)])
    (tmp_path / "d/sources.json").write_text('[{"name": "d", "license": "CC-BY-4.0"}]')
    assert opened(tmp_path / "d").licenses["d"].license == "CC-BY-4.0"


def test_nothing_is_ever_written_beside_the_tar(tmp_path):
    members = [member("../out.jpg", JPG), member("x.jpg", JPG), member("l.jpg", type=tarfile.SYMTYPE, linkname="x")]
    (tmp_path / "d").mkdir()
    rows_of(tmp_path / "d", *members)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["d", "t.tar"]


def test_rows_are_those_that_webdatasets_rule_gives(tmp_path):
    """The rule as its documentation has it: a run of names with the same part before the first dot of the last part."""
    names = ["a/b.c/d.jpg", "a/b.c/d.txt", "a/b.c/e.jpg", "a/b.c/e.txt", "f.jpg"]
    write_tar(tmp_path / "t.tar", [(name, b"x") for name in names])
    assert [row.key for row in rows(opened(tmp_path / "t.tar"))] == ["t/a/b.c/d", "t/a/b.c/e", "t/f"]


def test_processes_that_open_the_same_tars_share_the_work(tmp_path):
    """Each says how many tars it read: together they read each at least once, and a later one reads none."""
    for number in range(8):
        write_tar(tmp_path / f"d/{number}.tar", [(f"{n:04d}.txt", b"x") for n in range(500)])
    code = """
import sys
from pathlib import Path
from data_prep.sources import webdataset
from data_prep.sources.opening import open_sources

inner, count = webdataset.index_tar, []
webdataset.index_tar = lambda tar: count.append(1) or inner(tar)
(source,) = open_sources([sys.argv[1]], index=Path(sys.argv[2]))
print(len(count), source.fingerprint())
"""
    command = [sys.executable, "-c", code, str(tmp_path / "d"), str(tmp_path / "index")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[0].split() for process in both]
    later = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    assert sum(int(count) for count, _ in said) >= 8
    assert later[0] == "0"
    assert {mark for _, mark in said} == {later[1]}
    assert len(list((tmp_path / "index").iterdir())) == 8
