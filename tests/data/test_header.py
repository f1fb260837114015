from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from limoe_dist.data import header
from limoe_dist.data.arrow import ShardSet
from limoe_dist.data.header import declared_size, picture_refusal, refusal
from tests.support.shards import picture, write_shards


def view(content: bytes) -> np.ndarray:
    return np.frombuffer(content, dtype=np.uint8)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_header_of_each_format_tells_the_size(format: str, mode: str) -> None:
    assert declared_size(view(picture(1, size=30, format=format, mode=mode))) == (30, 30)


def test_width_and_height_are_not_swapped() -> None:
    import io

    from PIL import Image

    for format, options in (("PNG", {}), ("JPEG", {"progressive": True}), ("WEBP", {}), ("WEBP", {"lossless": True})):
        encoded = io.BytesIO()
        Image.new("RGB", (40, 17)).save(encoded, format, **options)
        assert declared_size(view(encoded.getvalue())) == (40, 17), format
    Image.new("RGBA", (40, 17), (1, 2, 3, 4)).save(encoded := io.BytesIO(), "WEBP", exif=b"Exif\0\0")
    assert encoded.getvalue()[12:16] == b"VP8X"
    assert declared_size(view(encoded.getvalue())) == (40, 17)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_header_cut_anywhere_is_a_reason_and_not_a_crash(format: str) -> None:
    whole = picture(1, format=format)
    for length in range(16):
        with pytest.raises(ValueError, match=r"truncated|neither|no picture|0 x 0"):
            declared_size(view(whole[:length]))


def test_a_png_that_ends_early_is_refused_before_the_decoder_sees_it() -> None:
    whole = picture(1)
    for missing in (5, 13, len(whole) // 3):
        with pytest.raises(ValueError, match="damaged or truncated"):
            declared_size(view(whole[:-missing]))
    # Bytes after the end are harmless.
    assert declared_size(view(whole + b"more")) == (24, 24)


def test_other_formats_are_refused() -> None:
    for content in (picture(1, format="GIF", mode="P"), picture(1, format="TIFF"), picture(1, format="BMP"), b"hello"):
        with pytest.raises(ValueError, match="neither PNG nor JPEG nor WebP"):
            declared_size(view(content))


def test_a_jpeg_of_endless_segments_is_given_up() -> None:
    with pytest.raises(ValueError, match="damaged or truncated"):
        declared_size(view(b"\xff\xd8\xff" + b"\xe1\x00\x02\xff" * 500_000))


def test_a_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    bomb = bytearray(picture(0))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    empty = bytearray(picture(1))
    empty[16:20] = bytes(4)
    pictures = {0: bytes(bomb), 1: bytes(empty), 2: b""}
    shards = ShardSet(write_shards(tmp_path, rows=4, shards=1, pictures=pictures))
    assert refusal(shards.row(0)) == "3600000000 pixels, more than 33554432"
    assert refusal(shards.row(1)) == "a picture of 0 x 24 pixels"
    assert refusal(shards.row(2)) == "no picture"
    assert refusal(shards.row(3)) is None


def test_the_packed_size_and_the_encoded_bytes_have_caps_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = ShardSet(write_shards(tmp_path, rows=1, shards=1, size=6000, pictures={0: picture(0)})).row(0)
    assert refusal(large) == "36000000 pixels, more than 33554432"
    monkeypatch.setattr(header, "MAX_ENCODED_BYTES", 100)
    assert refusal(large) == f"{len(large.image)} encoded bytes, more than 100"


def test_a_row_without_a_caption_is_refused_for_pairs_but_not_for_pictures(tmp_path: Path) -> None:
    row = ShardSet(write_shards(tmp_path, rows=1, shards=1, captions={0: [" "]})).row(0)
    assert refusal(row) == "no caption, or only blank ones"
    assert picture_refusal(row) is None
