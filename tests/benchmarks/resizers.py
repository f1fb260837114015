"""The ways to make a JPEG smaller that tests/benchmarks/resize.py compares, and their measurement in one process.

python -m tests.benchmarks.resizers PICTURES ROUNDS    prints JSON

It runs in the Python that has the candidates' packages (requirements-peers.txt) and needs neither torch nor DALI.
"""

from __future__ import annotations

import io
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import distribution, version
from typing import Any

os.environ["VIPS_CONCURRENCY"] = "1"  # before libvips starts

import cv2
import numpy as np
import pyvips
import simplejpeg
from PIL import Image

from data_prep.imaging.pictures import Caps
from data_prep.imaging.transform import Transform, smaller_size, transformed
from tests.support.photographs import photograph

SIZE, QUALITY = 256, 90
CAPS = Caps(max_bytes=20_000_000, max_pixels=32_000_000)
OURS = Transform(CAPS, size=SIZE, quality=QUALITY)
DAMAGED = 8
"""Of so many pictures, each cut off and closed again at DAMAGES places, and with DAMAGES single bits flipped."""
DAMAGES = 25
Size = tuple[int, int]


@dataclass(frozen=True)
class Way:
    """shrink: (encoded, width and height wanted) to an image; encode: that image to JPEG; pixels: it as (H, W, 3)."""

    packages: tuple[str, ...]
    shrink: Callable[[bytes, Size], Any]
    encode: Callable[[Any], bytes]
    pixels: Callable[[Any], Any] = np.asarray


def _turbo(encoded: bytes, wanted: Size, *, part: int) -> Any:
    """Pixels of a libjpeg-turbo decode at 1/part, where that is large enough, else at the next larger of 1/2 and 1."""
    height, width = simplejpeg.decode_jpeg_header(encoded)[:2]
    while part > 1 and (width < part * wanted[0] or height < part * wanted[1]):
        part //= 2
    least = {"min_height": -(-height // part), "min_width": -(-width // part)}
    return simplejpeg.decode_jpeg(encoded, "RGB", min_factor=1, strict=True, **least)


def _turbo_then_pillow(filter_: Image.Resampling, part: int = 8) -> Callable[[bytes, Size], Any]:
    return lambda encoded, wanted: np.asarray(
        Image.fromarray(_turbo(encoded, wanted, part=part)).resize(wanted, filter_)
    )


def _turbo_eighths(encoded: bytes, wanted: Size) -> Any:
    pixels = simplejpeg.decode_jpeg(encoded, "RGB", min_width=wanted[0], min_height=wanted[1], min_factor=1)
    return np.asarray(Image.fromarray(pixels).resize(wanted, Image.Resampling.BICUBIC))


def _turbo_then_opencv(encoded: bytes, wanted: Size) -> Any:
    return cv2.resize(_turbo(encoded, wanted, part=8), wanted, interpolation=cv2.INTER_AREA)


def _turbo_then_vips(encoded: bytes, wanted: Size) -> Any:
    image = pyvips.Image.new_from_array(_turbo(encoded, wanted, part=8))
    return image.resize(wanted[0] / image.width, vscale=wanted[1] / image.height, kernel="cubic")


def _turbo_encode(pixels: Any) -> bytes:
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), QUALITY, "RGB", "420", fastdct=False)


def _pillow(filter_: Image.Resampling, *, draft: bool) -> Callable[[bytes, Size], Any]:
    def shrink(encoded: bytes, wanted: Size) -> Any:
        image = Image.open(io.BytesIO(encoded), formats=("JPEG",))
        if draft:
            image.draft("RGB", wanted)
        return image.resize(wanted, filter_)

    return shrink


def _pillow_encode(optimize: bool) -> Callable[[Any], bytes]:
    def encode(image: Any) -> bytes:
        file = io.BytesIO()
        (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(
            file, "JPEG", quality=QUALITY, subsampling="4:2:0", optimize=optimize
        )
        return file.getvalue()

    return encode


def _opencv(encoded: bytes, wanted: Size) -> Any:
    height, width = simplejpeg.decode_jpeg_header(encoded)[:2]
    half = width >= 2 * wanted[0] and height >= 2 * wanted[1]
    flag = cv2.IMREAD_REDUCED_COLOR_2 if half else cv2.IMREAD_COLOR
    image = cv2.imdecode(np.frombuffer(encoded, np.uint8), flag)
    if image is None:
        raise ValueError("cannot be decoded")
    return cv2.resize(image, wanted, interpolation=cv2.INTER_AREA)


def _opencv_encode(image: Any) -> bytes:
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()


def _vips(encoded: bytes, wanted: Size) -> Any:
    # As an argument of its own, fail_on does not reach the loader (libvips 8.18).
    options = {"height": wanted[1], "size": "force", "no_rotate": True, "option_string": "fail_on=warning"}
    # Without the copy the encoder would pull pixels through the decoder, and damage would be found there.
    return pyvips.Image.thumbnail_buffer(encoded, wanted[0], **options).copy_memory()


def _vips_encode(image: Any) -> bytes:
    return image.jpegsave_buffer(Q=QUALITY, subsample_mode="on")


def _ours(encoded: bytes, _: Size) -> Any:
    return transformed(encoded, OURS).encoded


WAYS = {
    "imaging.transform": Way(("simplejpeg", "pillow"), _ours, bytes, lambda content: simplejpeg.decode_jpeg(content)),
    "simplejpeg + Pillow bicubic": Way(
        ("simplejpeg", "pillow"), _turbo_then_pillow(Image.Resampling.BICUBIC), _turbo_encode
    ),
    "simplejpeg + Pillow Lanczos": Way(
        ("simplejpeg", "pillow"), _turbo_then_pillow(Image.Resampling.LANCZOS), _turbo_encode
    ),
    "simplejpeg + Pillow box": Way(("simplejpeg", "pillow"), _turbo_then_pillow(Image.Resampling.BOX), _turbo_encode),
    "simplejpeg, any n/8 + Pillow bicubic": Way(("simplejpeg", "pillow"), _turbo_eighths, _turbo_encode),
    "simplejpeg, all pixels + Pillow bicubic": Way(
        ("simplejpeg", "pillow"), _turbo_then_pillow(Image.Resampling.BICUBIC, part=1), _turbo_encode
    ),
    "simplejpeg + Pillow bicubic, optimised tables": Way(
        ("simplejpeg", "pillow"), _turbo_then_pillow(Image.Resampling.BICUBIC), _pillow_encode(optimize=True)
    ),
    "simplejpeg + OpenCV area": Way(("simplejpeg", "opencv-python-headless"), _turbo_then_opencv, _turbo_encode),
    "simplejpeg + pyvips cubic": Way(
        ("simplejpeg", "pyvips", "pyvips-binary"), _turbo_then_vips, _vips_encode, lambda image: image.numpy()
    ),
    "Pillow bicubic, draft": Way(
        ("pillow",), _pillow(Image.Resampling.BICUBIC, draft=True), _pillow_encode(optimize=False)
    ),
    "Pillow Lanczos, all pixels": Way(
        ("pillow",), _pillow(Image.Resampling.LANCZOS, draft=False), _pillow_encode(optimize=False)
    ),
    "OpenCV reduced + area": Way(("opencv-python-headless",), _opencv, _opencv_encode, lambda image: image[..., ::-1]),
    "pyvips thumbnail": Way(("pyvips", "pyvips-binary"), _vips, _vips_encode, lambda image: image.numpy()),
}


def exact(encoded: bytes, wanted: Size) -> Any:
    """All pixels through an antialiased Lanczos filter of three lobes in float64, both axes; (H, W, 3)."""

    def weights(source: int, target: int) -> Any:
        scale = source / target
        centres = (np.arange(target) + 0.5) * scale - 0.5
        x = (np.arange(source)[None] - centres[:, None]) / scale
        values = np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)
        return values / values.sum(axis=1, keepdims=True)

    pixels = simplejpeg.decode_jpeg(encoded, "RGB").astype(np.float64)
    rows = np.tensordot(weights(pixels.shape[0], wanted[1]), pixels, axes=(1, 0))
    return np.tensordot(weights(pixels.shape[1], wanted[0]), rows, axes=(1, 1)).transpose(1, 0, 2).clip(0, 255)


def damaged(pictures: Sequence[bytes]) -> dict[str, list[bytes]]:
    choose = random.Random(0)
    found: dict[str, list[bytes]] = {"cut off": [], "bit flipped": []}
    for content in pictures[:DAMAGED]:
        first = content.index(b"\xff\xda") + 14
        for _ in range(DAMAGES):
            place = choose.randrange(first, len(content) - 64)
            found["cut off"].append(content[:place] + b"\xff\xd9")
            flipped = bytearray(content)
            flipped[place] ^= 1 << choose.randrange(8)
            found["bit flipped"].append(bytes(flipped))
    return found


def passed(way: Way, contents: Sequence[bytes], sizes: Sequence[Size]) -> str:
    """How many of the damaged pictures come out as if they were whole; DAMAGES of them have each of the sizes."""
    count = 0
    for index, content in enumerate(contents):
        with suppress(Exception):  # each library has exceptions of its own
            way.encode(way.shrink(content, sizes[index // DAMAGES]))
            count += 1
    return f"{count} of {len(contents)}"


def wanted_size(encoded: bytes) -> Size:
    height, width = simplejpeg.decode_jpeg_header(encoded)[:2]
    found = smaller_size(width, height, SIZE)
    assert found
    return found


def measure(pictures: Sequence[bytes], rounds: int) -> dict[str, Any]:
    """Of every way: CPU milliseconds and bytes a picture, its difference from `exact`, the damage it lets pass."""
    sizes = [wanted_size(content) for content in pictures]
    spent: dict[str, list[float]] = {name: [] for name in WAYS}
    written: dict[str, float] = {}
    for _ in range(1 + rounds):  # the first round warms up
        for name, way in WAYS.items():
            start = time.process_time()
            outputs = [way.encode(way.shrink(*both)) for both in zip(pictures, sizes, strict=True)]
            spent[name].append((time.process_time() - start) / len(pictures) * 1e3)
            written[name] = statistics.mean(map(len, outputs))
    references = [exact(*both) for both in zip(pictures, sizes, strict=True)]
    bad = damaged(pictures)
    return {
        name: {
            "cpu_ms": round(statistics.median(spent[name][1:]), 3),
            "cpu_ms_range": [round(bound, 3) for bound in (min(spent[name][1:]), max(spent[name][1:]))],
            "encoded_bytes": round(written[name]),
            **difference(way, pictures, sizes, references),
            "damage_that_passes": {kind: passed(way, contents, sizes) for kind, contents in bad.items()},
            "installed_mb": round(sum(installed_mb(package) for package in way.packages), 1),
        }
        for name, way in WAYS.items()
    }


def difference(way: Way, pictures: Sequence[bytes], sizes: Sequence[Size], references: Sequence[Any]) -> dict[str, Any]:
    """Before the encoder (but for our own transform, which is only seen behind it)."""
    found, largest = [], []
    for content, size, reference in zip(pictures, sizes, references, strict=True):
        error = way.pixels(way.shrink(content, size)).astype(np.float64) - reference
        found.append(float(10 * np.log10(255**2 / np.mean(error**2))))
        largest.append(float(np.abs(error).max()))
    return {"psnr_db": round(statistics.median(found), 2), "largest_difference": round(statistics.median(largest), 1)}


def installed_mb(package: str) -> float:
    files = distribution(package).files or []
    return sum((file.size or 0) for file in files) / 1e6


def main() -> None:
    count, rounds = (int(text) for text in sys.argv[1:])
    cv2.setNumThreads(1)
    pyvips.cache_set_max(0)
    # Damage is the point: its warnings would fill the terminal.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    pictures = [photograph(seed) for seed in range(count)]
    pixels = sum(height * width for height, width in (simplejpeg.decode_jpeg_header(c)[:2] for c in pictures))
    packages = sorted({package for way in WAYS.values() for package in way.packages} | {"numpy"})
    answer = {
        "pictures": count,
        "rounds": rounds,
        "encoded_bytes": round(statistics.mean(map(len, pictures))),
        "bytes_a_pixel": round(sum(map(len, pictures)) / pixels, 3),
        "packages": {package: version(package) for package in packages},
        "libvips": ".".join(str(pyvips.version(part)) for part in range(3)),
        "ways": measure(pictures, rounds),
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
