"""Tiny pictures and folder sources for the tests of this room."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def noisy(seed: int, *, size: tuple[int, int] = (16, 12)) -> Image.Image:
    """An RGB picture that does not compress to nothing."""
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image)


def folder_source(folder: Path, rows: list[dict[str, Any]], pictures: dict[str, bytes]) -> Path:
    for name, content in pictures.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def simple_source(folder: Path, count: int = 6) -> Path:
    """`count` pictures p0.png, p1.png, ... with one caption each."""
    rows = [{"image": f"p{n}.png", "caption": f"picture number {n}", "concept": f"c{n}"} for n in range(count)]
    return folder_source(folder, rows, {f"p{n}.png": encoded(noisy(n)) for n in range(count)})
