"""Members of a tar by their headers alone: nothing is extracted, no name is opened, and a lie ends the reading.

Reads ustar, GNU (long names, base-256 sizes) and pax archives. It is stricter than tar itself, for what two programs
read differently is how something is smuggled past one of them: a link with contents, a pax header that renames all
members, a missing end mark or data behind it make the whole file broken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

BLOCK = 512
"""Bytes of a header; contents are padded to it."""
LARGEST_EXTENSION = 1 << 20
"""Bytes of a long name or a pax header."""
TAIL = 1 << 16
"""So many bytes behind the end mark must be zero; tar pads an archive to 10,240."""
AHEAD = 4096
"""Bytes read with a header: small members and the next header come with it."""
_FILE = (b"0", b"\0", b"7")
_EMPTY = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a FIFO"}
_SQUEEZED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class BrokenTarError(ValueError):
    """Why this is no tar, or no whole one; the text goes behind the file's name."""


@dataclass(frozen=True, slots=True)
class Member:
    name: bytes
    start: int
    """Byte where its first header begins, long names and pax headers included."""
    content: int
    """Byte where its contents begin."""
    size: int
    """Bytes of the contents."""
    kind: str
    """Empty: a plain file. Otherwise what it is: "a directory", "a symbolic link", ..."""


class Bytes:
    """Bytes of a file at any offset, with a little read ahead.

    base: the offset of the first byte of `file` in the tar; size: of the whole tar, in bytes.
    """

    def __init__(self, file: IO[bytes], *, size: int, base: int = 0) -> None:
        self.size = size
        self._file, self._base = file, base
        self._first, self._window = 0, b""

    def at(self, offset: int, length: int) -> bytes:
        """`length` bytes. Raises BrokenTarError where the file ends before."""
        inside = offset - self._first
        if inside < 0 or inside + length > len(self._window):
            self._file.seek(offset - self._base)
            self._window, self._first, inside = self._file.read(max(length, AHEAD)), offset, 0
        if inside + length > len(self._window):
            raise BrokenTarError(f"ends within byte {offset} and {offset + length}: it was cut off; fetch it again")
        return self._window[inside : inside + length]

    def content(self, member: Member) -> bytes:
        return self.at(member.content, member.size)


def members(tar: Bytes, start: int = 0, end: int | None = None) -> Iterator[Member]:
    """All members from the one at byte `start` on, up to the one at byte `end`, or up to the archive's end mark.

    Raises BrokenTarError where a header is none, contents reach beyond the file, or the end mark is missing.
    """
    position = start
    while end is None or position < end:
        if position + BLOCK > tar.size:
            raise BrokenTarError(_unfinished(position))
        if _is_end(tar, position):
            return
        member, position = _member(tar, position)
        if member is not None:
            yield member


def _unfinished(position: int) -> str:
    if position == 0:
        return "is empty"
    return (
        f"ends at byte {position} without the empty block that closes a tar: it was cut off, or is still being "
        "written; fetch it again"
    )


def _is_end(tar: Bytes, position: int) -> bool:
    """Whether an end mark is here. Raises BrokenTarError where more than padding follows it."""
    if any(tar.at(position, BLOCK)):
        return False
    rest = tar.at(position, min(tar.size - position, TAIL))
    if any(rest):
        raise BrokenTarError(
            f"holds data behind its end at byte {position}, as tars do that were joined by cat: write it anew"
        )
    return True


def _member(tar: Bytes, start: int) -> tuple[Member | None, int]:
    """(the member whose headers begin at `start`, or None for a header of the whole archive; where the next begins)."""
    name, size, sparse, position = b"", -1, False, start
    while True:
        if position + BLOCK > tar.size:
            raise BrokenTarError(f"ends at byte {position} within a header: it was cut off; fetch it again")
        header = tar.at(position, BLOCK)
        _check(header, position)
        kind, stored = header[156:157], _number(header[124:136], position)
        content = position + BLOCK
        # Of a member with a pax header the size is there; that of the plain header may be cut.
        length = size if size >= 0 and kind not in (b"x", b"X", b"g", b"L", b"K") else stored
        position = _behind(content, length, tar)
        if kind == b"L":
            name = _one_name(name, _extension(tar, content, length).rstrip(b"\0"), start)
        elif kind in (b"x", b"X"):
            path, size, sparse = _pax(_extension(tar, content, length), start)
            name = _one_name(name, path, start)
        elif kind == b"g":
            fields = _extension(tar, content, length)
            if any(_records(fields, start).get(key) for key in (b"path", b"size")):
                raise BrokenTarError(f"byte {start}: a global header gives all members one name or size")
            if content - BLOCK == start:
                return None, position
        elif kind != b"K":
            what = "sparse" if sparse or kind == b"S" else _kind(header, length, start)
            if kind == b"S":
                content, position = _behind_map(tar, header, content, length)
            return Member(name or _name(header), start, content, length, what), position


def _one_name(before: bytes, now: bytes, start: int) -> bytes:
    if before and now:
        raise BrokenTarError(f"byte {start}: a member with two long names, which programs read differently")
    return before or now


def _check(header: bytes, position: int) -> None:
    for magic, how in _SQUEEZED.items():
        if position == 0 and header.startswith(magic):
            raise BrokenTarError(
                f"is packed with {how}, which cannot be read from the middle: unpack it to a plain .tar"
            )
    # Summed as if the checksum's own eight bytes were blanks.
    total = sum(header) - sum(header[148:156]) + 8 * 32
    if _octal(header[148:156]) != total:
        raise BrokenTarError(f"byte {position}: here is no header of a tar; fetch it again")


def _octal(field: bytes) -> int | None:
    digits = field.strip(b" \0")
    try:
        return int(digits, 8) if digits.isdigit() else None
    except ValueError:
        return None


def _number(field: bytes, position: int) -> int:
    """A size: octal digits, or base 256 where the first bit is set."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    value = _octal(field) if field.strip(b" \0") else 0
    if value is None:
        raise BrokenTarError(f"byte {position}: a size is no number; fetch it again")
    return value


def _behind(content: int, size: int, tar: Bytes) -> int:
    if content + size > tar.size:
        raise BrokenTarError(
            f"byte {content}: a member of {size} bytes reaches beyond the file's {tar.size}: it was cut off; "
            "fetch it again"
        )
    return content + -(-size // BLOCK) * BLOCK


def _extension(tar: Bytes, content: int, size: int) -> bytes:
    if size > LARGEST_EXTENSION:
        raise BrokenTarError(f"byte {content}: a name or pax header of {size} bytes, more than {LARGEST_EXTENSION}")
    return tar.at(content, size)


def _pax(content: bytes, position: int) -> tuple[bytes, int, bool]:
    """(name, size, whether the file is sparse); an empty name and -1 where the header does not give them."""
    fields = _records(content, position)
    size = fields.get(b"size", b"")
    if size and not (size.isdigit() and len(size) <= 19):
        raise BrokenTarError(f"byte {position}: a pax header's size is no number")
    return fields.get(b"path", b""), int(size or b"-1"), any(key.startswith(b"GNU.sparse.") for key in fields)


def _records(content: bytes, position: int) -> dict[bytes, bytes]:
    """The fields of a pax header, records of "LENGTH KEY=VALUE\\n"."""
    fields, at = dict[bytes, bytes](), 0
    while at < len(content):
        length, blank, _ = content[at : at + 21].partition(b" ")
        end = at + int(length) if blank and length.isdigit() else 0
        if end <= at + len(length) or end > len(content) or content[end - 1 : end] != b"\n":
            raise BrokenTarError(f"byte {position}: a broken pax header; fetch it again")
        key, equals, value = content[at + len(length) + 1 : end - 1].partition(b"=")
        if not equals:
            raise BrokenTarError(f"byte {position}: a broken pax header; fetch it again")
        fields[key], at = value, end
    return fields


def _kind(header: bytes, size: int, start: int) -> str:
    kind = header[156:157]
    if kind == b"5" or (kind == b"\0" and _name(header).endswith(b"/")):
        what = "a directory"
    elif kind in _FILE:
        return ""
    elif kind in _EMPTY:
        what = _EMPTY[kind]
    else:
        return f"of tar's type {kind!r}"
    if size:
        raise BrokenTarError(f"byte {start}: {what} with {size} bytes of contents, which programs read differently")
    return what


def _behind_map(tar: Bytes, header: bytes, content: int, size: int) -> tuple[int, int]:
    """(where contents begin, where the next member begins) of a sparse file of GNU tar, whose map may go on."""
    more = header[482]
    while more:
        if content + BLOCK > tar.size:
            raise BrokenTarError(f"ends at byte {content} within a sparse file's map: it was cut off; fetch it again")
        more, content = tar.at(content, BLOCK)[504], content + BLOCK
    return content, _behind(content, size, tar)


def _name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name
