from __future__ import annotations

import base64
import io

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from limoe_dist.analysis.thumbnails import MAX_ENCODED_BYTES, SIDE, thumbnail
from tests.support.shards import damaged, picture, truncated


def as_row(content: bytes) -> npt.NDArray[np.uint8]:
    return np.frombuffer(content, dtype=np.uint8)


def opened(address: str | None) -> Image.Image:
    assert address is not None
    head, _, content = address.partition(";base64,")
    image = Image.open(io.BytesIO(base64.b64decode(content, validate=True)))
    assert head == f"data:image/{str(image.format).lower()}"
    return image


def whole(mode: str, width: int, height: int, format: str) -> bytes:
    content = io.BytesIO()
    Image.new(mode, (width, height)).save(content, format)
    return content.getvalue()


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_picture_becomes_small_and_keeps_its_shape(format: str) -> None:
    content = io.BytesIO()
    Image.new("RGB", (400, 200), (250, 20, 20)).save(content, format)
    small = opened(thumbnail(as_row(content.getvalue())))
    assert small.size == (SIDE, SIDE // 2)
    red, green, blue = small.convert("RGB").getpixel((10, 10))  # type: ignore[misc]
    assert red > 240
    assert max(green, blue) < 40


def test_what_is_transparent_lies_on_white() -> None:
    content = io.BytesIO()
    Image.new("RGBA", (10, 10), (0, 0, 0, 0)).save(content, "PNG")
    assert opened(thumbnail(as_row(content.getvalue()))).convert("RGB").getpixel((5, 5)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1"])
def test_other_kinds_of_pixels_are_shown(mode: str) -> None:
    content = picture(1, mode=mode, format="JPEG" if mode == "CMYK" else "PNG")
    assert opened(thumbnail(as_row(content))).size == (24, 24)


def test_nothing_of_the_source_is_passed_on() -> None:
    content = io.BytesIO()
    Image.new("RGB", (10, 10)).save(content, "JPEG", comment=b"<script>stranger</script>", exif=b"Exif\0\0stranger")
    address = thumbnail(as_row(content.getvalue())) or ""
    assert b"stranger" not in base64.b64decode(address.partition(";base64,")[2])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<svg onload='alert(1)'/>",
        whole("RGB", 20, 20, "GIF"),
        truncated(3),
        damaged(3),
        # A few kilobytes that are whole, and would be unpacked.
        whole("1", 8000, 5000, "PNG"),
        bytes(MAX_ENCODED_BYTES + 1),
    ],
    ids=["empty", "svg", "gif", "truncated", "damaged", "bomb", "too many bytes"],
)
def test_hostile_and_damaged_pictures_are_refused(content: bytes) -> None:
    assert thumbnail(as_row(content)) is None
