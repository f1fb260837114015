from __future__ import annotations

import io
import subprocess
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.sources.tar import BrokenTarError, Bytes, members
from tests.data_prep.tars_of import END, member, tar_bytes


def read(content):
    """(name, contents, kind) of all members."""
    tar = Bytes(io.BytesIO(content), size=len(content))
    return [(one.name, tar.content(one), one.kind) for one in members(tar)]


def with_size(content, size, at=0):
    """The header at byte `at` says another size, with a checksum that fits."""
    header = bytearray(content[at : at + 512])
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return content[:at] + bytes(header) + content[at + 512 :]


@given(
    st.lists(st.tuples(st.text("aé/.", min_size=1, max_size=300), st.binary(max_size=1500)), max_size=5),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_members_are_those_that_pythons_tarfile_reads(wanted, kind):
    wanted = [(name.strip("/") or "a", content) for name, content in wanted]
    content = tar_bytes(*(member(name, content) for name, content in wanted), kind=kind) + END
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        theirs = [(one.name, tar.extractfile(one).read()) for one in tar.getmembers()]
    assert [(name.decode(), inside) for name, inside, _ in read(content)] == theirs


@pytest.mark.parametrize("kind", ["gnu", "pax", "ustar", "v7", "oldgnu"])
def test_what_tar_itself_writes_is_read(tmp_path, kind):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a.txt").write_bytes(b"x" * 700)
    (tmp_path / "link.txt").symlink_to("sub/a.txt")
    subprocess.run(
        ["tar", f"--format={kind}", "--sort=name", "-cf", "t.tar", "sub", "link.txt"], cwd=tmp_path, check=True
    )
    assert read((tmp_path / "t.tar").read_bytes()) == [
        (b"sub/", b"", "a directory"),
        (b"sub/a.txt", b"x" * 700, ""),
        (b"link.txt", b"", "a symbolic link"),
    ]


def test_a_size_in_base_256_is_read():
    content = with_size(tar_bytes(member("a.txt", b"hello")), b"\x80" + (5).to_bytes(11, "big"))
    assert read(content + END) == [(b"a.txt", b"hello", "")]


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (tarfile.SYMTYPE, "a symbolic link"),
        (tarfile.LNKTYPE, "a hard link"),
        (tarfile.CHRTYPE, "a device"),
        (tarfile.BLKTYPE, "a device"),
        (tarfile.FIFOTYPE, "a FIFO"),
        (tarfile.DIRTYPE, "a directory"),
        (b"Z", "of tar's type b'Z'"),
    ],
)
def test_what_is_no_plain_file_is_told(kind, what):
    content = tar_bytes(member("a.jpg", type=kind, linkname="/etc/passwd"), member("b.jpg", b"b"))
    assert read(content + END) == [(b"a.jpg" + b"/" * (kind == tarfile.DIRTYPE), b"", what), (b"b.jpg", b"b", "")]


@pytest.mark.parametrize("headers", [{"GNU.sparse.major": "1"}, {"GNU.sparse.realsize": "1000000000000"}])
def test_a_sparse_file_is_told_and_not_blown_up(headers):
    content = tar_bytes(member("a.jpg", b"abc", pax_headers=headers), member("b.jpg", b"b"), kind=tarfile.PAX_FORMAT)
    assert read(content + END) == [(b"a.jpg", b"abc", "sparse"), (b"b.jpg", b"b", "")]


def test_the_map_of_a_sparse_file_is_passed_over(tmp_path):
    with (tmp_path / "holes").open("wb") as file:
        for hole in range(40):
            file.seek(hole * 100_000)
            file.write(b"x")
    (tmp_path / "next.txt").write_bytes(b"next")
    subprocess.run(["tar", "--format=gnu", "--sparse", "-cf", "t.tar", "holes", "next.txt"], cwd=tmp_path, check=True)
    found = read((tmp_path / "t.tar").read_bytes())
    assert [(name, kind) for name, _, kind in found] == [(b"holes", "sparse"), (b"next.txt", "")]
    assert found[1][1] == b"next"


WHOLE = tar_bytes(member("a.txt", b"hello"), member("b.txt", b"world"))
LONG = tar_bytes(member("n" * 300, b"x"), kind=tarfile.GNU_FORMAT)
HARD_LINK = tar_bytes(member("a", type=tarfile.LNKTYPE))
PAX = tar_bytes(member("n" * 300, b"x"), kind=tarfile.PAX_FORMAT)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (WHOLE, "without the empty block that closes a tar"),
        (WHOLE[:700], "without the empty block"),
        (WHOLE[:513], "a member of 5 bytes reaches beyond the file's 513"),
        (WHOLE[:1500], "without the empty block"),
        (with_size(WHOLE, b"00000100000\0") + END, "reaches beyond the file's"),
        (with_size(WHOLE, b"\x80" + b"\xff" * 11) + END, "reaches beyond the file's"),
        (with_size(WHOLE, b"\xff" * 12) + END, "a size is no number"),
        (with_size(WHOLE, b"-0000000005\0") + END, "a size is no number"),
        (WHOLE[:512] + WHOLE[700:] + END, "here is no header of a tar"),
        (b"x" * 2048, "byte 0: here is no header of a tar"),
        (b"\x1f\x8b" + b"x" * 2048, "is packed with gzip"),
        (b"\x28\xb5\x2f\xfd" + b"x" * 2048, "is packed with zstd"),
        (WHOLE + END + WHOLE + END, "holds data behind its end"),
        (with_size(LONG, b"00010000000\0") + b"\0" * (1 << 22), "name or pax header of 2097152 bytes"),
        (LONG[:1024] + END, "no header of a tar"),
        (LONG[:1024], "within a header"),
        (PAX[:512] + b"99999999" + PAX[520:] + END, "a broken pax header"),
        (PAX[:512] + PAX[512:1024].replace(b" path=", b"  path=") + PAX[1024:] + END, "a broken pax header"),
        (tar_bytes(member("a", b"x", pax_headers={"size": "-5"}), kind=tarfile.PAX_FORMAT) + END, "size is no number"),
        (LONG[:1024] + PAX + END, "a member with two long names"),
        (LONG[:1024] + LONG + END, "a member with two long names"),
        (with_size(HARD_LINK, b"00000001000\0") + b"x" * 512 + END, "hard link with 512 bytes"),
        (tarfile.TarInfo.create_pax_global_header({"path": "all.jpg"}) + WHOLE + END, "gives all members one name"),
    ],
)
def test_a_tar_that_lies_is_broken(content, reason):
    with pytest.raises(BrokenTarError, match=reason):
        read(content)


def test_a_long_name_outlives_a_pax_header_without_one():
    pax = tar_bytes(member("a", b"x", pax_headers={"comment": "no path"}), kind=tarfile.PAX_FORMAT)
    assert read(LONG[:1024] + pax + END) == [(b"n" * 300, b"x", "")]


def test_a_global_header_of_another_kind_is_passed_over():
    content = tarfile.TarInfo.create_pax_global_header({"comment": "by git archive"}) + WHOLE + END
    assert [name for name, _, _ in read(content)] == [b"a.txt", b"b.txt"]


@given(st.integers(0, len(WHOLE + END) - 1), st.integers(0, 255))
def test_a_changed_byte_gives_members_or_an_error_but_never_another_exception(at, value):
    content = bytearray(WHOLE + END)
    content[at] = value
    try:
        found = read(bytes(content))
    except BrokenTarError:
        return
    assert len(found) <= 2
