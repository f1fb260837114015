"""CPU time a picture: the whole `limoe prep pack` on one core against the bare loop of its resize, and img2dataset's.

    python -m tests.benchmarks.pack --out docs/measured/pack.json [--peer PYTHON] [--pictures 4000] [--rounds 5]

Pictures are JPEGs of 512 to 800 pixels, made smaller to a shorter side of 256 and written as JPEG of quality 90.
Each line is a process of its own, interleaved with the others over all rounds; CPU time is user and system of the
process and its children, the start with its imports included; medians.

pack         the command, from a tar of pictures and captions to shards and manifest, with --workers 1
bare         a loop over the same files with nothing but simplejpeg's decoding, Pillow's resize, simplejpeg's encoding
transform    a loop over the same files with data_prep's transform: checks of strangers' bytes, checksum
img2dataset  a loop over the same files with its resizer (keep_ratio, 256, its defaults), where PYTHON has it
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.benchmarks.machine import origin
from tests.data_prep.made_pictures import photo
from tests.data_prep.pictures_of import encoded

MODULE = "tests.benchmarks.pack"
SIZE, QUALITY = 256, 90
ALLOWED = 1.15
GRAIN = 4.0
"""Standard deviation, in 255."""
BARE = """
import sys
from pathlib import Path
import numpy as np, simplejpeg
from PIL import Image
for file in sorted(Path(sys.argv[1]).glob("*.jpg")):
    encoded = file.read_bytes()
    height, width, _, _ = simplejpeg.decode_jpeg_header(encoded)
    scale = 256 / min(width, height)
    target = round(width * scale), round(height * scale)
    part = next(part for part in (8, 4, 2, 1) if part == 1 or min(width, height) >= part * 256)
    least = {"min_height": -(-height // part), "min_width": -(-width // part)}
    small = simplejpeg.decode_jpeg(encoded, "RGB", **least, min_factor=1)
    pixels = np.ascontiguousarray(Image.fromarray(small).resize(target, Image.Resampling.BICUBIC, reducing_gap=3.0))
    simplejpeg.encode_jpeg(pixels, 90, "RGB", "420", fastdct=False)
"""
TRANSFORM = """
import sys
from pathlib import Path
from data_prep.imaging.pictures import Caps
from data_prep.imaging.transform import Transform, transformed
settings = Transform(Caps(20_000_000, 32_000_000), size=256, encode="jpeg")
for file in sorted(Path(sys.argv[1]).glob("*.jpg")):
    transformed(file.read_bytes(), settings)
"""
PEER = """
import io, sys
from pathlib import Path
from img2dataset.resizer import Resizer
import cv2
cv2.setNumThreads(1)
resizer = Resizer(256, "keep_ratio", True)
for file in sorted(Path(sys.argv[1]).glob("*.jpg")):
    assert resizer(io.BytesIO(file.read_bytes()))[-1] is None
"""


def make_pictures(folder: Path, count: int) -> None:
    """folder/pictures/*.jpg, and the same with captions in folder/tar/pictures.tar."""
    (folder / "pictures").mkdir()
    (folder / "tar").mkdir()
    random = np.random.default_rng(0)
    with tarfile.open(folder / "tar" / "pictures.tar", "w") as tar:
        for number in range(count):
            width, height = (int(side) for side in random.integers(512, 801, 2))
            # With the grain of a camera: about 1.5 to 2.5 bits a pixel, as photographs on the web have.
            pixels = np.asarray(photo(width, height, seed=number)) + random.normal(0, GRAIN, (height, width, 1))
            picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            content = encoded(picture, "JPEG", quality=int(random.integers(85, 96)))
            (folder / "pictures" / f"{number:06d}.jpg").write_bytes(content)
            (folder / "caption.txt").write_text(f"picture number {number}")
            tar.add(folder / "pictures" / f"{number:06d}.jpg", f"{number:06d}.jpg")
            tar.add(folder / "caption.txt", f"{number:06d}.txt")


def commands(folder: Path, peer: str) -> dict[str, list[str]]:
    """What is run for each line; the shards go to folder/out."""
    pictures = str(folder / "pictures")
    pack = ["prep", "pack", "--source", str(folder / "tar" / "pictures.tar"), "--out", str(folder / "out")]
    pack += ["--size", str(SIZE), "--encode", "jpeg", "--quality", str(QUALITY), "--workers", "1"]
    found = {
        "pack": [sys.executable, "-m", "limoe_dist", *pack],
        "bare": [sys.executable, "-c", BARE, pictures],
        "transform": [sys.executable, "-c", TRANSFORM, pictures],
    }
    return found | ({"img2dataset": [peer, "-c", PEER, pictures]} if peer else {})


def measure(folder: Path, *, pictures: int, rounds: int, peer: str) -> dict[str, Any]:
    make_pictures(folder, pictures)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "NO_ALBUMENTATIONS_UPDATE": "1"}
    cpu: dict[str, list[float]] = {}
    wall: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, words in commands(folder, peer).items():
            shutil.rmtree(folder / "out", ignore_errors=True)
            before, began = _cpu_s(), time.monotonic()
            subprocess.run(words, env=environment, check=True, stdout=subprocess.DEVNULL)
            cpu.setdefault(name, []).append((_cpu_s() - before) / pictures * 1e3)
            wall.setdefault(name, []).append((time.monotonic() - began) / pictures * 1e3)
            if name == "pack":
                assert json.loads((folder / "out" / "manifest.json").read_text())["rows"] == pictures
    medians = {name: statistics.median(values) for name, values in cpu.items()}
    stored = sum(file.stat().st_size for file in (folder / "pictures").iterdir()) / pictures
    return {
        "pictures": pictures,
        "bytes_a_picture": round(stored),
        "rounds": rounds,
        "cpu_ms_a_picture": {name: round(value, 3) for name, value in medians.items()},
        "wall_ms_a_picture": {name: round(statistics.median(values), 3) for name, values in wall.items()},
        "all_cpu_ms": {name: [round(value, 3) for value in values] for name, values in cpu.items()},
        "pack_over_bare": round(medians["pack"] / medians["bare"], 3),
        "allowed": ALLOWED,
    }


def _cpu_s() -> float:
    """Of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--peer", default="", help="the Python of an environment with img2dataset")
    parser.add_argument("--pictures", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), pictures=given.pictures, rounds=given.rounds, peer=given.peer)
    given.out.write_text(json.dumps({**origin(MODULE), **figures}, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
