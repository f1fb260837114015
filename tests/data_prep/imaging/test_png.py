from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data_prep.imaging import png
from tests.data_prep import made_pictures
from tests.data_prep.pictures_of import encoded, noisy

ROWS = (b"\0" + bytes(30)) * 10  # of 10 x 10 RGB: a filter byte and 30 samples each
WHOLE = made_pictures.png(10, 10, zlib.compress(ROWS))


def check(content: bytes) -> None:
    png.check_data(content, png.layout(content))


def test_a_layout_tells_size_depth_data_and_end():
    found = png.layout(WHOLE + b"PK\x03\x04 an archive")
    assert (found.width, found.height, found.bits, found.animated) == (10, 10, 8, False)
    assert (found.pixel_bytes, len(found.data), found.end) == (310, 1, len(WHOLE))
    assert png.layout(made_pictures.animation("PNG")).animated


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "I;16"])
@pytest.mark.parametrize("size", [(1, 1), (3, 2), (9, 5), (17, 16)])
def test_the_pixels_of_every_mode_have_as_many_bytes_as_declared(mode, size):
    pixels = np.zeros(size[::-1], np.uint16)
    check(encoded(Image.fromarray(pixels) if mode == "I;16" else noisy(1, size=size).convert(mode)))


def test_an_interlaced_picture_has_as_many_bytes_as_its_passes():
    # 5 x 3 grey of 8 bits: passes of 1x1, 1x1, none, 1... by the table of the format, a filter byte a row:
    # pass 1: 1 row of 1; 2: 1 row of 1 (column 4); 3: none (row 4); 4: 1 row of 1 (column 2; column 6 is outside);
    # 5: 1 row of 3 (row 2; columns 0, 2, 4); 6: 2 rows of 2 (columns 1, 3); 7: 1 row of 5.
    expected = 2 + 2 + 0 + 2 + 4 + 6 + 6
    content = made_pictures.png(5, 3, zlib.compress(bytes(expected)), colour=0, interlaced=1)
    assert png.layout(content).pixel_bytes == expected
    check(content)


@pytest.mark.parametrize("rows", [0, 1, 9])
def test_a_picture_whose_data_stops_early_is_refused(rows):
    with pytest.raises(ValueError, match="does not hold all of its pixels"):
        check(made_pictures.png(10, 10, zlib.compress(ROWS[: 31 * rows])))


def test_data_without_its_checksum_or_with_more_than_its_pixels_is_refused():
    with pytest.raises(ValueError, match="does not hold all"):
        check(made_pictures.png(10, 10, zlib.compress(ROWS)[:-4]))
    with pytest.raises(ValueError, match="more than its pixels"):
        check(made_pictures.png(10, 10, zlib.compress(ROWS + b"x")))


def test_no_truncated_png_is_whole():
    content = encoded(noisy(2))
    for end in range(8, len(content)):
        with pytest.raises(ValueError, match="cut off"):
            png.layout(content[:end])


def test_any_changed_byte_is_seen():
    content = encoded(noisy(3, size=(5, 4)))
    for position in range(8, len(content)):
        changed = bytearray(content)
        changed[position] ^= 0x20
        with pytest.raises(ValueError, match=r"checksum|cut off|first chunk"):
            png.layout(bytes(changed))


def test_a_million_chunks_are_refused():
    chunks = made_pictures.png_chunk(b"abCd", b"") * 20_000
    with pytest.raises(ValueError, match="more than 10000 chunks"):
        png.layout(made_pictures.png(10, 10, zlib.compress(ROWS), before=chunks))


def test_a_gif_with_a_megabyte_of_comments_is_refused():
    content = encoded(Image.new("P", (10, 10)), "GIF")
    png.check_gif(content)
    frame = content.index(b"\x2c")
    comment = b"\x21\xfe\x01a\0"
    png.check_gif(content[:frame] + comment * 1000 + content[frame:])
    with pytest.raises(ValueError, match="bytes of extensions"):
        png.check_gif(content[:frame] + comment * 300_000 + content[frame:])


def test_a_gif_without_a_frame_is_refused():
    header = b"GIF89a" + struct.pack("<HHBBB", 10, 10, 0, 0, 0)
    for content in (header, header + b";", header + b"\x21\xfe\x05ab", header[:9]):
        with pytest.raises(ValueError, match=r"no frame|cut off"):
            png.check_gif(content)
