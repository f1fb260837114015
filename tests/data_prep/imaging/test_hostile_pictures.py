"""Whatever bytes come, the answer is a picture or a ValueError; all ways to its pixels agree on which."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from data_prep.imaging.pictures import Caps, check_picture, rgb_pixels
from data_prep.imaging.transform import Transform, transformed
from tests.data_prep.made_pictures import GREY_TIFF, animation, photo, tiff
from tests.data_prep.pictures_of import decoded, encoded

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:PIL"),
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
]
CAPS = Caps(max_bytes=1_000_000, max_pixels=100_000)
SMALL = photo(40, 30)
EXIF = Image.Exif()
EXIF[0x0112] = 6
SEEDS = {
    "jpeg": encoded(SMALL, "JPEG", exif=EXIF),
    "progressive": encoded(SMALL, "JPEG", progressive=True),
    "cmyk": encoded(SMALL.convert("CMYK"), "JPEG"),
    "mpo": animation("MPO"),
    "png": encoded(SMALL, exif=EXIF),
    "palette": encoded(SMALL.quantize(16), transparency=3),
    "apng": animation("PNG"),
    "gif": animation("GIF"),
    "webp": encoded(SMALL, "WEBP", exif=EXIF),
    "animated webp": animation("WEBP"),
    "bmp": encoded(SMALL, "BMP"),
    "tiff": encoded(SMALL, "TIFF", compression="tiff_lzw"),
    "raw tiff": tiff(GREY_TIFF, bytes(100)),
}


def mutants(content: bytes, seed: int, count: int) -> Iterator[bytes]:
    """Bits flipped, bytes replaced by telling ones, pieces cut out, doubled or moved; half of it near the header."""
    choose = random.Random(seed)
    for _ in range(count):
        changed = bytearray(content)
        for _ in range(choose.choice((1, 1, 2, 5))):
            place = choose.randrange(min(len(changed), choose.choice((100, len(changed)))))
            match choose.randrange(5):
                case 0:
                    changed[place] ^= 1 << choose.randrange(8)
                case 1:
                    changed[place] = choose.choice((0, 1, 0x7F, 0x80, 0xFF))
                case 2:
                    del changed[place : place + choose.randrange(1, 40)]
                case 3:
                    changed[place:place] = changed[place : place + choose.randrange(1, 40)]
                case _:
                    changed[place : place + 4] = choose.choice((b"\xff" * 4, b"\x7f" + b"\xff" * 3, bytes(4)))
            if not changed:
                break
        yield bytes(changed)


def outcome(read, content: bytes):
    try:
        return read(content)
    except ValueError:
        return None


def judge(content: bytes) -> bool:
    """Whether it is taken. Fails where the ways to its pixels do not agree, or another exception passes."""
    picture = outcome(lambda given: check_picture(given, CAPS), content)
    pixels = outcome(lambda given: rgb_pixels(given, CAPS), content)
    smaller = outcome(lambda given: transformed(given, Transform(CAPS, size=9)), content)
    assert (picture is None) == (pixels is None) == (smaller is None)
    if picture is None:
        return False
    assert (picture.height, picture.width, 3) == pixels.shape
    kept = decoded(picture.encoded)
    assert np.array_equal(kept if kept.ndim == 3 else np.repeat(kept[..., None], 3, axis=2), pixels)
    again = check_picture(picture.encoded, CAPS)
    assert (again.encoded, again.converted) == (picture.encoded, False)
    return True


@pytest.mark.parametrize("name", SEEDS)
def test_a_changed_picture_is_taken_whole_or_refused(name):
    assert judge(SEEDS[name])
    verdicts = [judge(content) for content in mutants(SEEDS[name], seed=0, count=60)]
    assert not all(verdicts)
