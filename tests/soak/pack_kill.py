"""A pack that is killed before and in the middle of each of its operations on the disk, or meets a full disk there.

python -m tests.soak.pack_kill --out docs/measured/soak_pack_kill.json

After every death the same pack is run again: its files must be those of a pack that nobody disturbed, byte for byte.
Where a death leaves a manifest, the shards beside it must be the ones that it names.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from collections import Counter
from pathlib import Path

from rich.console import Console

from data_prep.imaging.pictures import Caps
from data_prep.imaging.transform import Transform
from data_prep.packing.pack import PackSettings, pack
from data_prep.sources.opening import open_sources
from limoe_dist.data.manifest import load_manifest, verify_shards
from tests.benchmarks.machine import origin
from tests.data_prep.pictures_of import encoded, folder_source, noisy
from tests.support.pack_faults import How, with_fault

MODULE = "tests.soak.pack_kill"
FAULTS: tuple[How, ...] = ("kill before", "kill within", "ENOSPC")
SETTINGS = PackSettings("soak", Transform(Caps(1_000_000, 100_000)), shard_bytes=4_000, group_rows=12)


def _source(folder: Path, seed: int) -> Path:
    rows = [{"image": f"{n}.png", "caption": f"picture {n} of {folder.name}"} for n in range(12)]
    pictures = {f"{n}.png": encoded(noisy(100 * seed + n)) for n in range(11)}
    return folder_source(folder, rows, pictures | {"11.png": b"no picture"})


def _content(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()}


def soak(folder: Path) -> dict[str, object]:
    sources = [_source(folder / name, seed) for seed, name in enumerate(("a", "b", "c"))]

    def packed(out: Path) -> None:
        pack(lambda: open_sources(sources), out, SETTINGS, console=Console(file=io.StringIO()))

    operations = with_fault(lambda: packed(folder / "undisturbed"), -1, "ENOSPC")
    assert isinstance(operations, int)
    expected = _content(folder / "undisturbed")
    results: Counter[str] = Counter()
    for how in FAULTS:
        for at in range(operations):
            out = folder / f"{how} {at}"
            told = with_fault(lambda out=out: packed(out), at, how)
            results[f"{how}: {'killed' if told is None else 'one line' if isinstance(told, str) else 'not met'}"] += 1
            if (out / "manifest.json").exists():
                results[f"{how}: left a whole set"] += 1
                verify_shards(load_manifest(out), out)
            packed(out)
            results[
                f"{how}: {'same bytes' if _content(out) == expected else 'OTHER BYTES'} after it was begun again"
            ] += 1
    return {"operations": operations, "results": dict(sorted(results.items()))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        figures = soak(Path(folder))
    out.write_text(json.dumps({**origin(MODULE), **figures}, indent=2) + "\n")
    print(json.dumps(figures, indent=2))
    if any("OTHER" in name for name in figures["results"]):  # type: ignore[attr-defined]
        raise SystemExit(1)


if __name__ == "__main__":
    main()
