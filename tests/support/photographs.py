"""Made photographs: pictures with a camera's bytes a pixel, for benchmarks that need many and may not ship any."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

SIDES = (512, 800)


def photograph(seed: int) -> bytes:
    """A JPEG of 512 to 800 pixels a side, quality 85 to 95: clouds of many sizes, discs with edges, camera noise."""
    random_ = np.random.default_rng(seed)
    width, height = (int(side) for side in random_.integers(SIDES[0], SIDES[1] + 1, 2))
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    pixels = np.full((height, width, 3), 128, np.float32)
    for scale in (4, 16, 64, 128):
        for channel in range(3):
            coarse = random_.standard_normal((height // scale + 2, width // scale + 2)).astype(np.float32)
            cloud = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
            pixels[..., channel] += np.asarray(cloud) * 1.5 * scale**0.7
    for _ in range(25):
        left, top, radius = random_.uniform(0, width), random_.uniform(0, height), random_.uniform(5, 90)
        disc = (x - left) ** 2 + (y - top) ** 2 * random_.uniform(0.3, 3) < radius**2
        pixels[disc] += random_.uniform(-70, 70, 3)
    pixels += random_.normal(0, 3, (height, width, 1)) + random_.normal(0, 1.5, (height, width, 3))
    file = io.BytesIO()
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    image.save(file, "JPEG", quality=int(random_.integers(85, 96)))
    return file.getvalue()
