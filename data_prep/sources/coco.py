"""COCO's captions: one JSON with `images` and `annotations`, and a folder of pictures.

All captions of an image are one row, in the order of the annotations; an image without any is a picture alone.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_prep.sources import files as source_files
from data_prep.sources.columns import captions_of, joined, key_problem
from data_prep.sources.picture_folder import PictureFolder
from data_prep.sources.source import BLOCK_ROWS, Block, License, Sample
from limoe_dist.config.errors import UserError
from limoe_dist.data import places

LARGEST_JSON = 1 << 30
"""Bytes; COCO's own captions of 2017 have 92 million."""


@dataclass(frozen=True)
class Coco:
    """COCO captions as a Source; its rows are in memory, without their pictures."""

    name: str
    file: str
    images: str
    identity: str
    keys: tuple[str, ...] = field(repr=False)
    """Of each image; empty where it can have none, or an earlier one took it."""
    names: tuple[str, ...] = field(repr=False)
    """Of each image, its file's name below `images`."""
    captions: tuple[tuple[str, ...], ...] = field(repr=False)
    blocks: tuple[Block, ...] = field(repr=False)
    licenses: Mapping[str, License]

    def fingerprint(self) -> str:
        return source_files.fingerprint_of(["coco", self.identity, *PictureFolder(self.images).marks(self.names)])

    def read(self, block: Block) -> Iterator[Sample]:
        pictures = PictureFolder(self.images)
        for number in range(block.first, block.first + block.rows):
            name, key, captions = self.names[number], self.keys[number], self.captions[number]
            image, problem = b"", "" if key else _key_problem(name)
            if captions == ("",):
                problem = problem or "has an empty caption"
            if not problem:
                try:
                    image = pictures.read(name)
                except ValueError as reason:
                    problem = str(reason)
            # No key of a whole row begins with a slash.
            yield Sample(key or f"/{number}", image, captions, problem=problem, place=f"{self.file}, {name}")


def _key_problem(name: str) -> str:
    return key_problem(name) or "its file_name is that of an earlier image"


def open_coco(place: str, *, images: str, name: str) -> Coco:
    """place: the captions JSON; images: the folder of its pictures; either may be a URL.

    Raises UserError where the JSON is none of COCO's captions, or there is no such folder.
    """
    if not images:
        raise UserError(f"--source coco:{place}: needs the folder of the pictures: add ,images=FOLDER")
    # A web server has no folders that could be asked for: what is missing there shows row by row.
    if not images.startswith(("http://", "https://")) and not places.is_folder(images):
        raise UserError(f"--source coco:{place}: images={images}: there is no such folder")
    identity = places.identity(place)
    content = places.read_small(place, limit=LARGEST_JSON)
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: is not JSON: {error}") from None
    listed = _listed(document, "images", place)
    names = tuple(_name(image, f"{place}: images[{number}]") for number, image in enumerate(listed))
    captions = _captions(document, listed, place)
    if not names:
        raise UserError(f"{place}: has no rows: its list of images is empty")
    licenses = source_files.licenses_beside(places.parent(place))
    blocks = tuple(Block(*run) for run in source_files.block_runs([len(names)], BLOCK_ROWS))
    return Coco(name, place, images, identity, _keys(names), names, captions, blocks, licenses)


def _listed(document: Any, key: str, place: str) -> list[dict[str, Any]]:
    found = document.get(key) if isinstance(document, dict) else None
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise UserError(f'{place}: "{key}" must be a list of objects, as in COCO\'s captions_train2017.json')
    return found


def _name(image: dict[str, Any], where: str) -> str:
    name = image.get("file_name")
    if not isinstance(name, str) or not name or not isinstance(image.get("id"), int | str):
        raise UserError(f'{where}: must have "id" and "file_name"')
    return name


def _captions(document: Any, images: list[dict[str, Any]], place: str) -> tuple[tuple[str, ...], ...]:
    of_image: dict[int | str, list[str]] = {image["id"]: [] for image in images}
    if len(of_image) < len(images):
        raise UserError(f"{place}: {len(images) - len(of_image)} ids of images are there twice: make them unique")
    for number, annotation in enumerate(_listed(document, "annotations", place)):
        where = f"{place}: annotations[{number}]"
        image, caption = annotation.get("image_id"), annotation.get("caption")
        if not isinstance(caption, str):
            raise UserError(f'{where}: has no "caption": are these the boxes? The file is named captions_*.json')
        if not isinstance(image, int | str) or image not in of_image:
            raise UserError(f"{where}: image_id={image!r} is none of the images: leave out what belongs to no image")
        of_image[image].append(caption)
    try:
        return tuple(joined(text for one in texts for text in captions_of(one)) for texts in of_image.values())
    except ValueError as reason:  # half a surrogate pair is pack's to refuse: this is of no other kind
        raise UserError(f"{place}: {reason}") from None


def _keys(names: Sequence[str]) -> tuple[str, ...]:
    """The file's name without its suffix; with it where that is taken; empty where both are, or it cannot be one."""
    taken: set[str] = set()
    keys = []
    for name in names:
        path = posixpath.normpath(name)
        wanted = (posixpath.splitext(path)[0], path)
        keys.append("" if key_problem(name) else next((key for key in wanted if key not in taken), ""))
        taken.add(keys[-1])
    return tuple(keys)
