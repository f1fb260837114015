"""The search for duplicates among ten million fingerprints, and what the hash makes of copies and of other pictures.

python -m tests.benchmarks.dedup --out docs/measured/dedup.json [--rows N] [--pictures FOLDER ...] [--peer PYTHON]

search    fingerprints of N rows on disk, with planted exact and near copies, hashes that share bands, plain pictures; a
          process of its own reads them, searches and writes the list: seconds, microseconds a row, peak memory. Then:
          is a planted pair left whole, is a dropped row far from its kept one, does brute force agree?
hash      bits that differ after a change, against bits between different pictures, for both hashes of phash.py
--peer    a Python with faiss (pip install faiss-cpu): IndexBinaryMultiHash asked for the same radius
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageEnhance

from data_prep.dedup import drop_file, near
from data_prep.dedup.dedup import RADIUS
from data_prep.dedup.duplicates import find_duplicates
from data_prep.dedup.fingerprints import SCHEMA, Tally, read_prints, read_tally, write_unit
from data_prep.imaging import phash
from limoe_dist.config.parse import write_atomically

MODULE = "tests.benchmarks.dedup"
FILE_ROWS = 1 << 16
BRUTE_ROWS = 20_000
RADII = (2, 4, 6, 8, 12)


def planted(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(hash, sha, information, pairs): 5 % exact copies, 5 % near ones, 1 % that share 22 bits, 1 % plain pictures."""
    chance = np.random.default_rng(seed)
    hashes = chance.integers(0, 2**64, rows, dtype=np.uint64)
    sha = chance.integers(0, 2**64, rows, dtype=np.uint64)
    information = np.full(rows, 60, dtype=np.uint8)
    place = chance.permutation(rows)
    exact, close, hot, plain, rest = np.split(place, np.cumsum([rows // 20, rows // 20, rows // 100, rows // 100]))
    hashes[hot] &= np.uint64((1 << 42) - 1)
    hashes[plain], information[plain] = np.uint64(1 << 63), 0
    of_exact, of_close = (chance.choice(rest, len(some)) for some in (exact, close))
    hashes[exact], sha[exact] = hashes[of_exact], sha[of_exact]
    flipped = np.zeros(len(close), dtype=np.uint64)
    for _ in range(RADIUS):
        flipped |= np.uint64(1) << chance.integers(0, 64, len(close), dtype=np.uint64)
    hashes[close] = hashes[of_close] ^ flipped
    pairs = np.stack([np.concatenate([exact, close]), np.concatenate([of_exact, of_close])], axis=1)
    return hashes, sha, information, pairs


def write_files(folder: Path, hashes: np.ndarray, sha: np.ndarray, information: np.ndarray) -> None:
    """As `limoe prep dedup` leaves fingerprints; keys of 37 characters."""
    for number, start in enumerate(range(0, len(hashes), FILE_ROWS)):
        part = slice(start, start + FILE_ROWS)
        count = len(hashes[part])
        digests = np.zeros((count, 4), dtype=np.uint64)
        digests[:, 0] = sha[part]
        digests[:, 1] = sha[part] * np.uint64(0x9E3779B97F4A7C15)
        columns = [
            pa.array([f"source/part-{number:05d}.tar/row-{row:010d}" for row in range(start, start + count)]),
            pa.array(np.arange(start, start + count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)),
            pa.Array.from_buffers(pa.binary(32), count, [None, pa.py_buffer(digests.tobytes())]),
            pa.array(hashes[part]),
            pa.array(information[part]),
            *(pa.array(np.full(count, side, dtype=np.int32)) for side in (512, 384)),
            pa.array(np.ones(count, dtype=np.uint16)),
        ]
        batch = pa.RecordBatch.from_arrays(columns, schema=SCHEMA)
        write_unit(folder / f"{number:06d}.arrow", batch, Tally(count, 0, 0))


def peak_kb() -> int:
    """Of this program: getrusage tells the parent's peak too, from before exec."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def search(folder: Path, radius: int) -> dict[str, Any]:
    """What the second half of the command does, timed; in a process of its own, so that the peak is of this alone."""
    before = peak_kb()
    began, began_cpu = time.perf_counter(), time.process_time()
    files = sorted(folder.glob("*.arrow"))
    counts = [read_tally(file).pictures for file in files]
    prints = read_prints(files, counts)
    read_s = time.perf_counter() - began
    drops = find_duplicates(prints, 0, radius)
    found_s = time.perf_counter() - began - read_s
    del prints
    drop_file.write(drops, files, counts, folder / "drop.parquet")
    seconds, cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
    peak = peak_kb()
    np.savez(folder / "drops.npz", row=drops.row_D, kept=drops.kept_D, bits=drops.bits_D, reason=drops.reason_D)
    rows = sum(counts)
    return {
        "rows": rows,
        "radius": radius,
        "dropped": len(drops.row_D),
        "seconds": seconds,
        "seconds_read": read_s,
        "seconds_search": found_s,
        "seconds_write": seconds - read_s - found_s,
        "cpu_seconds": cpu_s,
        "us_a_row": seconds / rows * 1e6,
        "peak_rss_mb": peak * 1024 / 1e6,
        "rss_mb_before": before * 1024 / 1e6,
        "bytes_a_row": (peak - before) * 1024 / rows,
    }


def searched(rows: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        hashes, sha, information, pairs = planted(rows)
        write_files(folder, hashes, sha, information)
        words = [sys.executable, "-m", MODULE, "--search", str(folder)]
        figures = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
        drops = np.load(folder / "drops.npz")
        keys = pq.read_table(folder / "drop.parquet").column("key").to_pylist()
    stays = np.ones(rows, dtype=bool)
    stays[drops["row"]] = False
    whole = stays[pairs].all(axis=1)
    distance = np.bitwise_count(hashes[drops["row"]] ^ hashes[drops["kept"]])
    return figures | {
        "planted_pairs": len(pairs),
        "recall": 1 - float(whole.mean()),
        "dropped_beyond_the_radius": int((distance > RADIUS).sum()),
        "kept_rows_that_are_dropped_too": int((~stays[drops["kept"]]).sum()),
        "keys_right": keys == [f"source/part-{r >> 16:05d}.tar/row-{r:010d}" for r in drops["row"].tolist()],
    }


def brute_force(rows: int) -> dict[str, Any]:
    """The rule by its definition on some hashes, and what comparing each with each would take for `rows`."""
    hashes = planted(BRUTE_ROWS, seed=1)[0]
    hashes = hashes[np.sort(np.unique(hashes, return_index=True)[1])]
    began = time.process_time()
    first = np.full(len(hashes), -1)
    for row in range(len(hashes)):
        if first[row] < 0:
            later = np.flatnonzero(np.bitwise_count(hashes[row + 1 :] ^ hashes[row]) <= RADIUS) + row + 1
            later = later[first[later] < 0]
            first[later] = row
    brute_s = time.process_time() - began
    agrees = bool((near.keep_greedily(hashes, RADIUS).first == first).all())
    us = brute_s / len(hashes) * 1e6
    return {"rows": len(hashes), "agrees": agrees, "us_a_row": us, "us_a_row_at_full_size": us * rows / len(hashes)}


_FAISS = """
import sys, json, time, numpy as np, faiss
faiss.omp_set_num_threads(1)
hashes = np.load(sys.argv[1]); radius = int(sys.argv[2])
codes = hashes.view(np.uint8).reshape(-1, 8)
began = time.perf_counter()
index = faiss.IndexBinaryMultiHash(64, 4, 16); index.nflip = radius // 4
index.add(codes)
limits, _, places = index.range_search(codes, radius + 1)  # below, not up to
print(json.dumps({"faiss": faiss.__version__, "rows": len(hashes), "pairs": (len(places) - len(hashes)) // 2,
                  "us_a_row": (time.perf_counter() - began) / len(hashes) * 1e6}))
"""


def peer(python: str, rows: int) -> dict[str, Any]:
    """faiss and ours find the same pairs of the same hashes, one core each."""
    hashes = np.unique(planted(rows, seed=2)[0])
    pairs = 0

    def found(one: Any, other: Any) -> None:
        nonlocal pairs
        pairs += len(one)

    began = time.perf_counter()
    near.pairs_within(hashes, RADIUS, found)
    ours = {"rows": len(hashes), "pairs": pairs, "us_a_row": (time.perf_counter() - began) / len(hashes) * 1e6}
    with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        np.save(file, hashes)
        file.flush()
        words = [python, "-c", _FAISS, file.name, str(RADIUS)]
        theirs = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    return {"ours": ours, "faiss": theirs}


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "half size": lambda image: image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS),
    "1.7 times the size": lambda image: image.resize((int(image.width * 1.7), int(image.height * 1.7))),
    "JPEG quality 50": lambda image: _jpeg(image, 50),
    "half size, JPEG quality 60": lambda image: _jpeg(CHANGES["half size"](image), 60),
    "2 % cropped": lambda image: _cropped(image, 0.02),
    "5 % cropped": lambda image: _cropped(image, 0.05),
    "10 % brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
}
HASHES: dict[str, Callable[[Image.Image], int]] = {
    "dct_hash": lambda image: phash.dct_hash(np.asarray(image)).bits,
    "difference_hash": phash.difference_hash,
}


def _jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def _cropped(image: Image.Image, frac: float) -> Image.Image:
    x, y = int(image.width * frac / 2), int(image.height * frac / 2)
    return image.crop((x, y, image.width - x, image.height - y))


def photo_like(count: int) -> Iterator[Image.Image]:
    """Pictures of 640 x 480 whose spectrum falls with the frequency as a photograph's does."""
    for seed in range(count):
        chance = np.random.default_rng(seed)
        frequency = np.hypot(np.fft.fftfreq(512)[:, None], np.fft.rfftfreq(512)[None])
        strength = 1 / np.maximum(frequency, 1 / 512) ** chance.uniform(1.0, 1.5)
        phases = np.exp(2j * np.pi * chance.random((4, *strength.shape)))
        fields = np.fft.irfft2(strength * phases, s=(512, 512))
        fields /= fields.std(axis=(1, 2), keepdims=True)
        rgb = (fields[:1] * 45 + fields[1:] * 20).transpose(1, 2, 0) + chance.uniform(80, 170, 3)
        yield Image.fromarray(rgb.clip(0, 255).astype(np.uint8)).resize((640, 480))


def quality(pictures: list[Image.Image]) -> dict[str, Any]:
    """Of each hash: bits changed by each change, and how many pairs of different pictures are near."""
    figures: dict[str, Any] = {"pictures": len(pictures)}
    changed = {name: [change(picture) for picture in pictures[:300]] for name, change in CHANGES.items()}
    for name, hashed in HASHES.items():
        bits = np.array([hashed(picture) for picture in pictures], dtype=np.uint64)
        between = np.bitwise_count(bits[:, None] ^ bits[None])[np.triu_indices(len(bits), 1)]
        table: dict[str, Any] = {}
        for change, copies in changed.items():
            moved = np.bitwise_count(np.array([hashed(copy) for copy in copies], dtype=np.uint64) ^ bits[: len(copies)])
            table[change] = {"median": float(np.median(moved)), "p95": float(np.quantile(moved, 0.95))}
            table[change] |= {f"within {radius}": float((moved <= radius).mean()) for radius in RADII}
        pairs = {"least": int(between.min()), "median": float(np.median(between)), "pairs": len(between)}
        pairs |= {f"within {radius}": float((between <= radius).mean()) for radius in RADII}
        figures[name] = {"bits_after": table, "between_different_pictures": pairs}
    return figures


def read_pictures(folder: Path, most: int) -> list[Image.Image]:
    files = sorted(chain(folder.rglob("*.png"), folder.rglob("*.jpg")))
    picked = np.random.default_rng(0).permutation(len(files))[:most]
    return [Image.open(files[number]).convert("RGB") for number in picked]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--peer", help="a Python with faiss")
    parser.add_argument("--peer-rows", type=int, default=500_000)
    parser.add_argument("--pictures", type=Path, nargs="*", default=[], help="folders of real pictures")
    parser.add_argument("--most-pictures", type=int, default=1000)
    parser.add_argument("--search", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.search:
        print(json.dumps(search(options.search, RADIUS)))
        return 0
    if not options.out:
        parser.error("--out is missing")
    # Not above: it loads torch, whose memory would count in the search's process.
    from tests.benchmarks.machine import origin

    figures = origin(MODULE) | {"search": searched(options.rows), "brute_force": brute_force(options.rows)}
    if options.peer:
        figures["peer"] = peer(options.peer, options.peer_rows)
    sets = {"photo_like": list(photo_like(min(300, options.most_pictures)))}
    sets |= {folder.name: read_pictures(folder, options.most_pictures) for folder in options.pictures}
    figures["hash"] = {name: quality(pictures) for name, pictures in sets.items()}
    write_atomically(options.out, json.dumps(figures, indent=1) + "\n")
    print(json.dumps({name: figures[name] for name in ("search", "brute_force")}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
