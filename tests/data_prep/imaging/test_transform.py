from __future__ import annotations

import hashlib
import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from data_prep.imaging.pictures import Caps, check_picture
from data_prep.imaging.transform import Transform, smaller_size, transformed, versions
from limoe_dist.config.errors import UserError
from tests.data_prep.made_pictures import ARITHMETIC_JPEG, photo
from tests.data_prep.pictures_of import decoded, encoded, noisy

CAPS = Caps(max_bytes=1_000_000, max_pixels=1_000_000)
KEEP = Transform(CAPS)


def shrunk_exactly(image: Image.Image, width: int, height: int) -> np.ndarray:
    """The antialiased cubic filter (a = -0.5) on all pixels in float64, both axes: slow, and without a library."""

    def weights(source: int, target: int) -> np.ndarray:
        scale = source / target
        centres = (np.arange(target) + 0.5) * scale - 0.5
        x = np.abs((np.arange(source)[None] - centres[:, None]) / scale)
        near = 1.5 * x**3 - 2.5 * x**2 + 1
        far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        values = np.where(x < 1, near, np.where(x < 2, far, 0))
        return values / values.sum(axis=1, keepdims=True)

    pixels = np.asarray(image, dtype=np.float64)
    rows = np.einsum("ih,hwc->iwc", weights(image.height, height), pixels)
    return np.einsum("jw,iwc->ijc", weights(image.width, width), rows).clip(0, 255)


def psnr(left: np.ndarray, right: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((left.astype(float) - right) ** 2)))


@pytest.mark.parametrize(
    ("given", "size", "expected"),
    [
        ((600, 400), 256, (384, 256)),
        ((400, 600), 256, (256, 384)),
        ((257, 1000), 256, (256, 996)),  # 1000 * 256 / 257 = 996.1
        ((512, 512), 256, (256, 256)),
        ((256, 900), 256, None),
        ((255, 900), 256, None),
        ((900, 900), 0, None),
        ((3, 2), 1, (2, 1)),  # 1.5 is rounded up
    ],
)
def test_the_shorter_side_becomes_the_size_and_nothing_is_enlarged(given, size, expected):
    assert smaller_size(*given, size) == expected


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_without_a_size_all_is_as_check_picture_does_it(kind):
    content = encoded(photo(40, 30), kind)
    assert transformed(content, KEEP) == check_picture(content, CAPS)


def test_a_jpeg_that_is_to_be_another_jpeg_is_never_a_png_on_the_way(monkeypatch):
    """The PNG of a large photograph is larger than training reads: it would be refused for what nobody stores."""
    monkeypatch.setattr("data_prep.imaging.pictures.png_bytes", lambda image: pytest.fail("made a PNG"))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = transformed(encoded(photo(40, 30), "JPEG", exif=exif), replace(KEEP, encode="jpeg"))
    assert (picture.width, picture.height, picture.converted) == (30, 40, True)


@pytest.mark.parametrize(("kind", "magic"), [("JPEG", b"\xff\xd8"), ("PNG", b"\x89PNG"), ("BMP", b"\x89PNG")])
def test_a_picture_made_smaller_keeps_its_kind_and_tells_what_it_was(kind, magic):
    picture = transformed(encoded(photo(200, 120), kind), replace(KEEP, size=48))
    assert picture.encoded.startswith(magic)
    assert (picture.width, picture.height, picture.original_width, picture.original_height) == (80, 48, 200, 120)
    assert decoded(picture.encoded).shape == (48, 80, 3)
    assert picture.converted == (kind == "BMP")


@pytest.mark.parametrize("size", [60, 75, 90, 100, 140])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_the_pixels_are_those_of_an_exact_resize(kind, size):
    image = photo(220, 160)
    content = encoded(image, kind, **({"quality": 95} if kind == "JPEG" else {}))
    picture = transformed(content, replace(KEEP, size=size, quality=95))
    exact = shrunk_exactly(Image.open(io.BytesIO(content)), picture.width, picture.height)
    # A PNG is rounded to whole levels, twice (about 50 dB); a JPEG passes its encoder again (40 dB at this quality).
    assert psnr(decoded(picture.encoded), exact) > (46 if kind == "PNG" else 37)


def test_fine_stripes_become_grey_and_not_a_moire():
    stripes = np.zeros((300, 300, 3), np.uint8)
    stripes[:, ::2] = 255
    for kind in ("PNG", "JPEG"):
        small = decoded(transformed(encoded(Image.fromarray(stripes), kind), replace(KEEP, size=97)).encoded)
        inside = small[5:-5, 5:-5].astype(int)
        assert np.abs(inside - 127).max() <= 12


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_turned_photograph_is_upright_after_it_was_made_smaller(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(photo(200, 120), "JPEG", exif=exif)
    picture = transformed(content, replace(KEEP, size=60))
    upright = decoded(check_picture(content, CAPS).encoded)
    assert (picture.original_height, picture.original_width) == upright.shape[:2]
    exact = shrunk_exactly(Image.fromarray(upright), picture.width, picture.height)
    assert psnr(decoded(picture.encoded), exact) > 33
    assert b"Exif" not in picture.encoded


def test_grey_stays_grey_when_made_smaller():
    for kind in ("JPEG", "PNG"):
        picture = transformed(encoded(photo(200, 120).convert("L"), kind), replace(KEEP, size=60))
        assert decoded(picture.encoded).shape == (60, 100)


def test_alpha_is_laid_on_white_before_it_is_made_smaller():
    pixels = np.zeros((64, 64, 4), np.uint8)  # black and quite transparent: white
    picture = transformed(encoded(Image.fromarray(pixels)), replace(KEEP, size=16))
    assert (decoded(picture.encoded) == 255).all()


def test_encode_says_what_is_written():
    small_jpeg, small_png = encoded(photo(40, 30), "JPEG"), encoded(photo(40, 30))
    as_jpeg, as_webp = replace(KEEP, encode="jpeg"), replace(KEEP, encode="webp")
    assert transformed(small_jpeg, as_jpeg).encoded == small_jpeg
    for content in (small_png, ARITHMETIC_JPEG, encoded(photo(40, 30).convert("CMYK"), "JPEG")):
        assert transformed(content, as_jpeg).encoded.startswith(b"\xff\xd8\xff")
    for content in (small_jpeg, small_png):
        picture = transformed(content, as_webp)
        assert picture.encoded[8:12] == b"WEBP"
        assert decoded(picture.encoded).shape == (30, 40, 3)
    assert not transformed(small_png, as_webp).converted
    assert transformed(ARITHMETIC_JPEG, as_jpeg).converted


def test_quality_decides_the_bytes():
    content = encoded(noisy(1, size=(100, 100)), "PNG")
    for encode in ("jpeg", "webp"):
        low, high = (len(transformed(content, replace(KEEP, encode=encode, quality=q)).encoded) for q in (30, 95))
        assert low < high / 1.5


def test_a_size_that_the_format_cannot_have_is_refused():
    content = encoded(Image.new("RGB", (20_000, 2)))
    with pytest.raises(ValueError, match="20000 pixels, more than the 16383 of webp"):
        transformed(content, replace(KEEP, encode="webp"))


def test_short_sides_and_long_shapes_are_refused_before_decoding(monkeypatch):
    content = encoded(photo(120, 40), "JPEG")
    transformed(content, replace(KEEP, min_side=40, max_aspect=3.0))
    monkeypatch.setattr("simplejpeg.decode_jpeg", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="shorter side of 40 pixels, less than 41"):
        transformed(content, replace(KEEP, min_side=41))
    with pytest.raises(ValueError, match=r"3.0 times as long as it is wide, more than 2.9"):
        transformed(content, replace(KEEP, max_aspect=2.9))


def test_a_damaged_picture_is_refused_at_every_size():
    content = encoded(photo(200, 120), "JPEG", quality=90)
    damaged = content[:900] + content[950:]
    for size in (0, 30, 60, 110):
        with pytest.raises(ValueError, match="cannot be decoded"):
            transformed(damaged, replace(KEEP, size=size))


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ({"size": -1}, "--size=-1"),
        ({"encode": "avif"}, "--encode=avif"),
        ({"quality": 0}, "--quality=0"),
        ({"quality": 101}, "--quality=101"),
        ({"min_side": -5}, "--min-side=-5"),
        ({"max_aspect": 0.5}, "--max-aspect=0.5"),
        ({"max_aspect": float("nan")}, "--max-aspect=nan"),
    ],
)
def test_settings_out_of_range_are_named(setting, text):
    with pytest.raises(UserError, match=text):
        Transform(CAPS, **setting)


IN_ANOTHER_PROCESS = """
import hashlib
from tests.data_prep.imaging.test_transform import everything
print(hashlib.sha256(b"".join(everything())).hexdigest())
"""


def everything() -> list[bytes]:
    contents = [encoded(photo(150 + seed, 120, seed=seed), kind) for seed in range(3) for kind in ("JPEG", "PNG")]
    settings = [replace(KEEP, size=64, encode=encode) for encode in ("keep", "jpeg", "webp")]
    with ThreadPoolExecutor(4) as pool:
        return [*pool.map(lambda both: transformed(*both).encoded, [(c, s) for c in contents for s in settings])]


def test_the_bytes_are_the_same_in_any_thread_and_process():
    done = subprocess.run([sys.executable, "-c", IN_ANOTHER_PROCESS], capture_output=True, text=True, check=True)
    contents = [encoded(photo(150 + seed, 120, seed=seed), kind) for seed in range(3) for kind in ("JPEG", "PNG")]
    alone = [
        transformed(content, replace(KEEP, size=64, encode=encode)).encoded
        for content in contents
        for encode in ("keep", "jpeg", "webp")
    ]
    assert everything() == alone
    assert done.stdout.strip() == hashlib.sha256(b"".join(alone)).hexdigest()


def test_versions_name_what_decides_the_bytes():
    found = versions()
    assert {"simplejpeg", "pillow", "libjpeg_turbo", "webp"} <= set(found)
    assert all(value and isinstance(value, str) for value in found.values())
