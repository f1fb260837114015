"""The options of `limoe prep pack`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from limoe_dist.config.errors import UserError


@dataclass(frozen=True)
class Settings:
    """Pack pictures and captions into Arrow shards with a manifest: refuse, filter, resize, shuffle, write.

    Sources are folders with captions.jsonl or captions.csv, tars (WebDataset, img2dataset, `limoe prep download`),
    parquet with pictures in it, COCO captions, class folders, and shards that were packed before; paths or URLs of a
    store (s3://, gs://, https://). A row is a pair, a picture alone or a text alone: evaluation takes all three,
    training needs pairs, and `limoe train --data.mixture` joins several manifests by weights.

    Rows of all sources are mixed: their blocks in the order of the seed, then the rows of each group of blocks. The
    same inputs give the same bytes, whoever does the work: --workers processes; ranks, under `mpirun -n 4`; tasks of
    a Slurm array, `sbatch --array=0-7`; or --unit 0/2 and --unit 1/2 by hand. Stopped or killed, the same command goes
    on behind the groups that are done.

    Exit status: 0 done (of a unit: its share), 2 a setting, file or disk that you can mend, 130 interrupted.
    """

    source: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SOURCE [SOURCE ...]")]
    """Folders, files, patterns or URLs; KIND:PLACE where the kind cannot be told, with the kinds folder, webdataset,
    parquet, coco, classes and shards; PLACE,name=NAME names a source, coco:FILE.json,images=FOLDER its pictures,
    classes:FOLDER,names=FILE its classes."""
    out: Path
    """Folder for shards and manifest.json."""
    name: str = ""
    """Name of the data set in the manifest; empty: the name of the folder."""

    size: int = 0
    """Shorter side of the stored pictures, in pixels; smaller ones are not enlarged. 0: keep their size."""
    encode: Literal["keep", "jpeg", "webp"] = "keep"
    """keep: bytes stay as they are where they may; a JPEG made smaller is a JPEG, all else written anew a PNG. jpeg,
    webp: all are of it."""
    quality: int = 90
    """Of JPEG and WebP, 1 to 100."""

    min_side: int = 0
    """Pictures with a shorter side below this many pixels are rejected."""
    max_aspect: float = 0.0
    """Pictures with a longer side of more than this many shorter ones are rejected; 0: none is."""
    min_caption_chars: int = 0
    """Captions of fewer characters are left out; a row that loses all of them is rejected."""
    max_caption_chars: int = 0
    """Captions of more characters are left out; 0: none is."""
    score: Annotated[tuple[str, ...], tyro.conf.arg(metavar="LIMIT [LIMIT ...]")] = ()
    """Rows that miss a limit are rejected: 'similarity>=0.28' 'punsafe<=0.5' (quoted for the shell); so are rows that
    lack the column, unless a ? follows, 'punsafe<=0.5?'."""
    drop: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE [FILE ...]")] = ()
    """Lists of keys to leave out, as `limoe prep dedup` writes them."""

    image_column: str = ""
    """Column of a parquet source that holds the pictures; empty: a usual name."""
    caption_column: str = ""
    """Column, or field of the JSON in a tar, that holds the captions; empty: a usual name."""
    key_column: str = ""
    """Column of a parquet source that names the rows; empty: file and number."""
    concept_column: str = ""
    """Column or field with the name of what is seen; empty: "concept"."""

    shard_mb: float = 64.0
    """Shards have at most about this many megabytes; more than a group has they never have."""
    group_rows: int = 4096
    """Rows that are shuffled and written together, and done whole or again; about so many are lost by a kill."""
    seed: int = 0
    """Seed of the order in which rows of all sources are mixed."""
    max_image_mb: float = 20.0
    """Larger encoded pictures are rejected."""
    max_megapixels: float = 32.0
    """Pictures with more million pixels are rejected before they are decoded; training reads up to 33."""

    workers: int = 0
    """Processes at work; 0: one for each core, under mpirun one for each rank."""
    unit: str = ""
    """I/N: do the I-th of N shares (0/8 to 7/8), in any order or at once; empty: all, or this rank's or task's."""
    overwrite: bool = False
    """Replace shards that were packed from other inputs or settings."""


def run(settings: Settings) -> int:
    from data_prep import units
    from data_prep.console import console, say
    from data_prep.packing import pack as packing

    _check(settings)
    pack_settings = _pack_settings(settings)
    meeting = units.find_meeting()
    unit = units.find_unit(settings.unit, meeting)
    workers = settings.workers or (packing.cores() if meeting.size == 1 else 1)
    if unit.how:
        say([f"{settings.out}: {unit}"])
    packed = packing.pack(
        lambda: _open(settings),
        settings.out,
        pack_settings,
        # One rank that cannot read the list must not leave the others waiting for it.
        drop=meeting.all_or_none(lambda: _drop_list(settings.drop)),
        unit=unit,
        meeting=meeting,
        workers=workers,
        overwrite=settings.overwrite,
        console=console(),
    )
    if meeting.rank == 0:
        say(packing.summary(packed, settings.out, unit))
    return 0


def _check(settings: Settings) -> None:
    from data_prep.writing import refuse_url

    refuse_url(settings.out)
    if not settings.source:
        raise UserError("--source: name at least one folder, file or URL of pictures and captions")
    for name, value in (
        ("shard-mb", settings.shard_mb),
        ("max-image-mb", settings.max_image_mb),
        ("max-megapixels", settings.max_megapixels),
        ("group-rows", settings.group_rows),
    ):
        if not 0 < value < 1e9:
            raise UserError(f"--{name}={value:g}: must be above 0, and below 1e9")
    if settings.workers < 0:
        raise UserError(f"--workers={settings.workers}: must be a number of processes, or 0 for one for each core")
    if not 0 <= settings.seed < 1 << 64:
        raise UserError(f"--seed={settings.seed}: must be in 0 to 2**64 - 1")


def _pack_settings(settings: Settings) -> Any:
    from data_prep.imaging.pictures import Caps
    from data_prep.imaging.transform import Transform
    from data_prep.packing.pack import PackSettings

    caps = Caps(max_bytes=int(settings.max_image_mb * 1e6), max_pixels=int(settings.max_megapixels * 1e6))
    return PackSettings(
        name=settings.name or settings.out.resolve().name,
        shard_bytes=max(1, int(settings.shard_mb * 1e6)),
        group_rows=settings.group_rows,
        seed=settings.seed,
        transform=Transform(
            caps=caps,
            size=settings.size,
            encode=settings.encode,
            quality=settings.quality,
            min_side=settings.min_side,
            max_aspect=settings.max_aspect,
        ),
        filters=_filters(settings),
    )


def _filters(settings: Settings) -> Any:
    from data_prep.imaging.filters import Filters, parse_limits

    return Filters(settings.min_caption_chars, settings.max_caption_chars, parse_limits(settings.score))


def _open(settings: Settings) -> Any:
    from data_prep.packing.pack_folder import INDEX
    from data_prep.sources.opening import Columns, open_sources

    columns = Columns(
        image=settings.image_column,
        caption=settings.caption_column,
        key=settings.key_column,
        concept=settings.concept_column,
        scores=_filters(settings).columns,
    )
    return open_sources(settings.source, columns, index=settings.out / INDEX)


def _drop_list(files: tuple[str, ...]) -> Any:
    from data_prep.dedup.drop_list import DropList

    return DropList.open(files) if files else None
