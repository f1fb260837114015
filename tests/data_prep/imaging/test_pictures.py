from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data_prep.imaging import pictures
from data_prep.imaging.pictures import Caps, check_picture
from data_prep.imaging.transform import Transform, transformed
from limoe_dist.data import header
from tests.data_prep.pictures_of import decoded, encoded, noisy

CAPS = Caps(max_bytes=1_000_000, max_pixels=10_000)


def test_what_training_would_refuse_is_not_stored_whatever_the_caps(monkeypatch):
    assert (pictures.LARGEST_KEPT_BYTES, pictures.LARGEST_KEPT_PIXELS) == (header.MAX_ENCODED_BYTES, header.MAX_PIXELS)
    content = encoded(noisy(1), "JPEG")  # 16 x 12
    monkeypatch.setattr(pictures, "LARGEST_KEPT_PIXELS", 191)
    with pytest.raises(ValueError, match="is stored with 16 x 12 pixels, more than the 191 that training reads"):
        check_picture(content, CAPS)
    assert transformed(content, Transform(CAPS, size=9)).width == 12
    monkeypatch.setattr(pictures, "LARGEST_KEPT_BYTES", len(content) - 1)
    with pytest.raises(ValueError, match=r"is stored with \d+ bytes, more than"):
        check_picture(content, CAPS)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_plain_pictures_are_kept_byte_by_byte(kind, mode):
    content = encoded(noisy(1).convert(mode), kind)
    picture = check_picture(content, CAPS)
    assert picture.encoded == content
    assert (picture.width, picture.height, picture.converted) == (16, 12, False)


def test_alpha_is_laid_on_white():
    image = Image.new("RGBA", (2, 1))
    image.putpixel((0, 0), (200, 0, 0, 0))  # quite transparent: white
    image.putpixel((1, 0), (255, 0, 0, 128))  # half of red, half of white: 255 * 127 / 255 = 127
    picture = check_picture(encoded(image), CAPS)
    assert picture.converted
    assert decoded(picture.encoded).tolist() == [[[255, 255, 255], [255, 127, 127]]]


def test_a_palette_becomes_rgb_and_its_transparent_colour_white():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    assert decoded(check_picture(encoded(image), CAPS).encoded).tolist() == [[[10, 20, 30], [40, 50, 60]]]
    transparent = check_picture(encoded(image, transparency=0), CAPS)
    assert decoded(transparent.encoded).tolist() == [[[255, 255, 255], [40, 50, 60]]]


def test_the_transparent_colour_of_an_rgb_png_becomes_white():
    image = Image.new("RGB", (2, 1), (9, 9, 9))
    image.putpixel((1, 0), (1, 2, 3))
    picture = check_picture(encoded(image, transparency=(9, 9, 9)), CAPS)
    assert decoded(picture.encoded).tolist() == [[[255, 255, 255], [1, 2, 3]]]


def test_cmyk_becomes_rgb():
    picture = check_picture(encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG"), CAPS)
    assert picture.converted
    assert decoded(picture.encoded).tolist() == np.full((8, 8, 3), 255).tolist()


def test_grey_of_16_bits_keeps_its_shades():
    values = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    picture = check_picture(encoded(Image.fromarray(values)), CAPS)
    assert decoded(picture.encoded)[0, :, 0].tolist() == [0, 100, 255]


def test_a_png_of_16_bits_a_colour_becomes_one_of_8():
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    pixels = b"\0" + struct.pack(">3H", 65535, 32896, 0)
    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    content = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)
    picture = check_picture(content, CAPS)
    assert picture.converted
    assert picture.encoded[24] == 8
    assert decoded(picture.encoded).tolist() == [[[255, 128, 0]]]


def test_a_rotated_photograph_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    picture = check_picture(encoded(noisy(2, size=(16, 12)), "JPEG", exif=exif), CAPS)
    assert (picture.width, picture.height, picture.converted) == (12, 16, True)
    with Image.open(io.BytesIO(picture.encoded)) as image:
        assert image.getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize("kind", ["WEBP", "GIF", "BMP", "TIFF"])
def test_other_formats_become_png(kind):
    picture = check_picture(encoded(noisy(3), kind), CAPS)
    assert picture.encoded.startswith(b"\x89PNG")
    assert (picture.width, picture.height) == (16, 12)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP"])
def test_a_truncated_picture_fails(kind):
    content = encoded(noisy(4, size=(64, 64)), kind)
    check_picture(content, CAPS)
    with pytest.raises(ValueError, match="cannot be decoded"):
        check_picture(content[: len(content) * 2 // 3], CAPS)


def test_a_png_with_a_wrong_checksum_fails():
    content = bytearray(encoded(noisy(5)))
    content[content.index(b"IDAT") + 20] ^= 1
    with pytest.raises(ValueError, match="cannot be decoded"):
        check_picture(bytes(content), CAPS)


@pytest.mark.parametrize("content", [b"", b"no picture at all", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_what_is_no_picture_fails(content):
    with pytest.raises(ValueError, match="is no picture"):
        check_picture(content, CAPS)


def test_a_decompression_bomb_fails_by_its_header_alone(monkeypatch):
    bomb = encoded(Image.new("1", (9000, 9000)))
    assert len(bomb) < 100_000

    def never(*_: object) -> None:
        raise AssertionError("a bomb was decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", never)
    with pytest.raises(ValueError, match="more than 10000"):
        check_picture(bomb, CAPS)


def test_the_cap_on_pixels_is_exact():
    content = encoded(noisy(6, size=(10, 10)))
    assert check_picture(content, Caps(1_000_000, 100)).width == 10
    with pytest.raises(ValueError, match="10 x 10 pixels, more than 99"):
        check_picture(content, Caps(1_000_000, 99))


def test_the_cap_on_bytes_is_exact():
    content = encoded(noisy(7))
    assert check_picture(content, Caps(len(content), 1000)).encoded == content
    with pytest.raises(ValueError, match=f"larger than {len(content) - 1} bytes"):
        check_picture(content, Caps(len(content) - 1, 1000))
