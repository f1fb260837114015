"""The options of `limoe prep pack`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from limoe_dist.config.errors import UserError


@dataclass(frozen=True)
class Settings:
    """Pack folders of pictures and captions into Arrow shards with a manifest.

    A line of captions.jsonl is a pair, {"image": "a.png", "captions": ["a red apple"], "concept": "apple"}; a picture
    alone, {"image": "a.png", "concept": "apple"}; or a text alone, {"caption": "a red apple"}. Evaluation takes all
    three, training needs pairs: `limoe train --data.mixture` joins several manifests by weights.
    """

    source: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FOLDER [FOLDER ...]")]
    """Folders that hold captions.jsonl or captions.csv beside their pictures, or such captions files."""
    out: Path
    """Folder for shards and manifest.json."""
    name: str = ""
    """Name of the data set in the manifest; empty: the name of the folder."""
    shard_mb: float = 64.0
    """A shard closes when its pictures reach this many megabytes."""
    seed: int = 0
    """Seed of the order in which rows of all sources are mixed."""
    max_image_mb: float = 20.0
    """Larger encoded pictures are rejected."""
    max_megapixels: float = 32.0
    """Pictures with more million pixels are rejected before they are decoded; training reads up to 33."""
    threads: int = 2
    """Pictures decoded at a time; the shards do not depend on it."""
    overwrite: bool = False
    """Replace shards that were packed from other inputs or settings."""


def run(settings: Settings) -> int:
    from data_prep import pack as packing
    from data_prep.console import console, say
    from data_prep.pictures import Caps

    if not settings.source:
        raise UserError("--source: name at least one folder of pictures and captions")
    for name, value in (
        ("shard-mb", settings.shard_mb),
        ("max-image-mb", settings.max_image_mb),
        ("max-megapixels", settings.max_megapixels),
        ("threads", settings.threads),
    ):
        if not value > 0:
            raise UserError(f"--{name}={value:g}: must be above 0")
    packing_settings = packing.PackSettings(
        name=settings.name or settings.out.resolve().name,
        shard_bytes=int(settings.shard_mb * 1e6),
        seed=settings.seed,
        caps=Caps(max_bytes=int(settings.max_image_mb * 1e6), max_pixels=int(settings.max_megapixels * 1e6)),
    )
    packed = packing.pack(
        settings.source,
        settings.out,
        packing_settings,
        threads=settings.threads,
        overwrite=settings.overwrite,
        console=console(),
    )
    say(packing.summary(packed, settings.out))
    return 0
