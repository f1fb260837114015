"""The options of `limoe prep fetch-demo`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Settings:
    """Fetch open emoji art and captions (and photographs) through npm and apt, as folders for `limoe prep pack`."""

    out: Path
    """Folder for train/, validation/, photos/ and downloads/; what is there already is kept."""
    photos: bool = False
    """Also fetch about 950 captioned photographs and cut-outs from Debian's tuxpaint-stamps-default (161 MB)."""
    size: int = 96
    """Side of an emoji picture, in pixels; larger than the model's, so that crops stay sharp."""
    photo_size: int = 256
    """Longer side of a photograph, in pixels."""
    task: Literal["objects", "all"] = "objects"
    """objects: animals and nature, food, activities, travel and objects. all: also people, smileys, symbols, flags."""


def run(settings: Settings) -> int:
    from data_prep.console import console
    from data_prep.demo_data import demo

    demo.fetch_demo(
        settings.out,
        photos=settings.photos,
        size=settings.size,
        photo_size=settings.photo_size,
        task=settings.task,
        console=console(),
    )
    return 0
