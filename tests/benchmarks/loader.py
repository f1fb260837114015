"""Images a second into training: ours whole, bare DALI, and the pipelines that others use.

python -m venv PEERS && PEERS/bin/pip install -r tests/benchmarks/requirements-pipelines.txt
python -m tests.benchmarks.loader --peer PEERS/bin/python --out docs/measured/loader.json

JPEGs of 384 pixels, random resized crops of 224, two cores; each way in a process of its own, in turn, medians.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa

from limoe_dist.config.parse import write_atomically
from limoe_dist.data.manifest import Manifest, Shard, save_manifest
from tests.benchmarks.loader_ways import BATCH, SIZE, WAYS, WORKERS, differences
from tests.benchmarks.machine import origin
from tests.benchmarks.window import SCHEMA
from tests.support.photographs import photograph

MODULE = "tests.benchmarks.loader"
ROOT = Path(__file__).parents[2]
PEERS = ("webdataset + Pillow", "Arrow + Pillow")
SIDE = 384


def pictures(count: int) -> list[bytes]:
    """Made photographs whose shorter side is 384, JPEG of quality 90."""
    from PIL import Image

    found = []
    for seed in range(count):
        image = Image.open(io.BytesIO(photograph(seed)))
        scale = SIDE / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=90)
        found.append(file.getvalue())
    return found


def write(folder: Path, encoded: list[bytes], *, rows: int) -> None:
    """The same rows as files, as tars, and as packed shards with a vocabulary."""
    words = ["a", "photograph", "of", "hills", "and", "a", "lake", "under", "clouds", "with", "red", "houses"]
    texts = [" ".join(words[i % 7 : i % 7 + 4 + i % 9]) + f" number {i}" for i in range(rows)]
    (folder / "files" / "0").mkdir(parents=True)
    (folder / "tars").mkdir()
    for first in range(0, rows, 256):
        with tarfile.open(folder / "tars" / f"{first:06d}.tar", "w") as tar:
            for row in range(first, min(first + 256, rows)):
                picture = encoded[row % len(encoded)]
                (folder / "files" / "0" / f"{row:06d}.jpg").write_bytes(picture)
                for suffix, content in (("jpg", picture), ("txt", texts[row].encode())):
                    entry = tarfile.TarInfo(f"{row:06d}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    limoe = [sys.executable, "-m", "limoe_dist", "prep"]
    for name, more in (("shards", []), ("small", ["--size", "256", "--encode", "jpeg"])):
        shards = str(folder / name)
        for command in (
            ["pack", "--source", str(folder / "tars"), "--out", shards, *more],
            ["tokenizer", "--data", f"{shards}/manifest.json", "--vocab-size", "200"],
        ):
            subprocess.run([*limoe, *command], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    write_trials(folder, encoded)


def write_trials(folder: Path, encoded: list[bytes]) -> None:
    """A few pictures in one order as whole JPEGs, as raw pixels, and at 256: for the trials and their differences."""
    from PIL import Image

    few = encoded[:256]
    whole, raw, small = {}, {}, {}
    for row, content in enumerate(few):
        image = Image.open(io.BytesIO(content)).convert("RGB")
        whole[row], raw[row] = (content, *image.size), (image.tobytes(), *image.size)
        scale = 256 / SIDE
        less = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        less.save(file := io.BytesIO(), "JPEG", quality=90)
        small[row] = (file.getvalue(), *less.size)
    for name, rows in (("whole", whole), ("raw", raw), ("small-trial", small)):
        (folder / name).mkdir()
        columns = {
            "key": [str(row) for row in rows],
            "image": [content for content, _, _ in rows.values()],
            "captions": [["a caption"]] * len(rows),
            "concept": [""] * len(rows),
            "width": [width for _, width, _ in rows.values()],
            "height": [height for _, _, height in rows.values()],
            "sha256": [""] * len(rows),
            "source": [""] * len(rows),
        }
        file = folder / name / "shard-00000.arrow"
        arrays = [pa.array(columns[field.name], field.type) for field in SCHEMA]
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            writer.write_table(pa.Table.from_arrays(arrays, schema=SCHEMA), max_chunksize=64)
        shard = Shard(file=file.name, rows=len(rows), bytes=file.stat().st_size, sha256=name)
        save_manifest(Manifest(rows=len(rows), shards=(shard,)), folder / name / "manifest.json")


def timed(way: str, folder: Path, *, peer: str, seconds: float) -> float:
    python = peer if way in PEERS else sys.executable
    command = [python, "-m", "tests.benchmarks.loader_ways", way, str(folder), str(seconds)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--peer", default="", help="the Python that has webdataset; empty: without the peers")
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--seconds", type=float, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    ways = [way for way in WAYS if options.peer or way not in PEERS]
    speeds: dict[str, list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        encoded = pictures(options.pictures)
        write(folder, encoded, rows=options.rows)
        pictures_differ = differences(folder)
        for _ in range(options.rounds):
            for way in ways:
                speeds[way].append(timed(way, folder, peer=options.peer, seconds=options.seconds))
    rates = {way: median(found) for way, found in speeds.items()}
    best = max(rates[way] for way in ways if way.startswith("DALI"))
    figures: dict[str, Any] = {
        "pictures": {"count": len(encoded), "bytes": sum(map(len, encoded)) // len(encoded), "shorter_side": SIDE},
        "batch": BATCH,
        "workers": WORKERS,
        "size": SIZE,
        "images_per_s": {way: round(rate, 1) for way, rate in rates.items()},
        "difference_from_decoding_whole": pictures_differ,
        "rounds": {way: [round(rate, 1) for rate in found] for way, found in speeds.items()},
        "ours_over_the_faster_bare_DALI": round(rates["ours"] / best, 3),
        "ours_over": {way: round(rates["ours"] / rate, 3) for way, rate in rates.items() if way != "ours"},
    }
    write_atomically(options.out, json.dumps(origin(MODULE) | figures, indent=2) + "\n")
    for way, rate in rates.items():
        print(f"{rate:8.1f} images/s  {rates['ours'] / rate:6.3f}  {way}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
