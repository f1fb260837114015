"""The options of `limoe prep dedup`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from limoe_dist.config.errors import UserError


@dataclass(frozen=True)
class Settings:
    """Find pictures that are there twice, or that an evaluation set holds, as a list for `limoe prep pack --drop`.

    Exact duplicates have the same pixels (sha256 of the decoded picture). Near ones have 64-bit perceptual hashes that
    differ in at most --radius bits: the same picture in another size, format or quality, or slightly cropped. Of each
    group the picture with most pixels stays, then the one with most captions. Any row that is dropped is within the
    radius of one that stays: likenesses do not add up along a chain.

    Every picture is decoded once, into OUT/fingerprints. Stopped or killed, the same command goes on there, and another
    --radius, --against or --source uses what is there. OUT gets drop.parquet (key, reason, kept, bits) and dedup.json.

    Exit status: 0 the list is written, also where it is empty; 2 a setting, file or disk that you can mend;
    130 interrupted.
    """

    source: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SOURCE [SOURCE ...]")]
    """The same texts as for `limoe prep pack`: keys in the list begin with the names of these sources."""
    out: Path
    """Folder for the list and the fingerprints (about 90 bytes a picture)."""
    against: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SOURCE [SOURCE ...]")] = ()
    """Evaluation sets: pictures in --source that one of them holds, exactly or nearly, are dropped; theirs stay."""
    radius: int = 4
    """How many of the 64 bits may differ, 0 to 12. 4 finds about 19 of 20 copies that were resized, cropped by 2 % or
    saved at quality 50; 8 finds nearly all, and more drawings and logos that are not the same. Colour does not count: a
    blue and a green book of one drawing are alike."""
    exact_only: bool = False
    """Only the same pixels; --radius does not count."""

    image_column: str = ""
    """Column of a parquet source that holds the pictures; empty: a usual name."""
    caption_column: str = ""
    """Column, or field of the JSON in a tar, that holds the captions; empty: a usual name."""
    key_column: str = ""
    """Column of a parquet source that names the rows; empty: file and number. Give `pack` the same."""
    max_image_mb: float = 20.0
    """Larger encoded pictures are not read; `pack` rejects them too."""
    max_megapixels: float = 32.0
    """Nor are pictures with more million pixels."""
    workers: int = 0
    """Processes that decode; 0: one for each core."""


def run(settings: Settings) -> int:
    _check(settings)
    import os

    from data_prep.console import console, say
    from data_prep.dedup import dedup
    from data_prep.imaging.pictures import Caps
    from data_prep.sources.columns import Columns
    from data_prep.sources.opening import open_sources

    columns = Columns(image=settings.image_column, caption=settings.caption_column, key=settings.key_column)
    dedup.check_out(settings.out)
    index = settings.out / dedup.FINGERPRINTS / "index"
    sources = open_sources(settings.source, columns, index=index)
    against = open_sources(settings.against, columns, index=index, option="--against")
    result = dedup.dedup(
        sources,
        against,
        settings.out,
        radius=None if settings.exact_only else settings.radius,
        caps=Caps(max_bytes=int(settings.max_image_mb * 1e6), max_pixels=int(settings.max_megapixels * 1e6)),
        workers=settings.workers or len(os.sched_getaffinity(0)),
    )
    console().print(dedup.table(result))
    say(dedup.summary(result, settings.out))
    return 0


def _check(settings: Settings) -> None:
    from data_prep.writing import refuse_url

    refuse_url(settings.out)
    if not settings.source:
        raise UserError("--source: name at least one folder, file or URL with pictures")
    if not 0 <= settings.radius <= 12:
        raise UserError(
            f"--radius={settings.radius}: must be 0 to 12 bits of 64: above, different pictures are alike by chance"
        )
    for name, value in (("max-image-mb", settings.max_image_mb), ("max-megapixels", settings.max_megapixels)):
        if not 0 < value < 1e9:
            raise UserError(f"--{name}={value:g}: must be above 0, and below 1e9")
    if settings.workers < 0:
        raise UserError(f"--workers={settings.workers}: must be 0 (one for each core) or more")
