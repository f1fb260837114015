"""Does training hold a picture of the validation set? What it holds is dropped by name, what comes near is counted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.demo_data.folder_writer import Picture
from data_prep.imaging import phash
from limoe_dist.config.parse import write_atomically

RADII = (0, 2, 4, 8)


def without_near_duplicates(
    out: Path, train: Sequence[Picture], validation: Sequence[Picture]
) -> tuple[list[Picture], list[Picture], list[str]]:
    """(kept, dropped, lines to print): training pictures that validation does not hold too; writes the dropped ones."""
    train_prints = [phash.fingerprint(out / "train" / picture.image) for picture in train]
    valid_prints = [phash.fingerprint(out / "validation" / picture.image) for picture in validation]
    bits_VT = phash.hamming_distances([p.hash for p in valid_prints], [p.hash for p in train_prints])
    twins: dict[int, tuple[int, float]] = {}
    for v, t in zip(*(bits_VT <= max(bits for bits, _ in phash.SAME_PICTURE)).nonzero(), strict=True):
        levels = phash.mean_difference(valid_prints[v], train_prints[t])
        if phash.is_same_picture(int(bits_VT[v, t]), levels):
            twins[int(t)] = (int(v), levels)
    rows = [
        f"{train[t].image},{validation[v].image},{bits_VT[v, t]},{levels:.2f}"
        for t, (v, levels) in sorted(twins.items())
    ]
    header = "train_image,validation_image,hash_bits,mean_levels"
    write_atomically(out / "near_duplicates.csv", "\n".join([header, *rows]) + "\n")
    kept = [picture for t, picture in enumerate(train) if t not in twins]
    dropped = [picture for t, picture in enumerate(train) if t in twins]
    keep = [t for t in range(len(train)) if t not in twins]
    lines = _closeness(bits_VT[:, keep], kept, validation)
    said = f"dropped from training: {len(dropped)} pictures that validation holds too (near_duplicates.csv)"
    return kept, dropped, [*lines, said, *(f"  {row}" for row in rows)]


def _closeness(bits_VK: Any, kept: Sequence[Picture], validation: Sequence[Picture]) -> list[str]:
    """How near the validation pictures are to the training pictures that are kept."""
    import numpy as np

    same_VK = np.array([[t.concept == v.concept for t in kept] for v in validation])
    lines = []
    for radius in RADII:
        near_VK = bits_VK <= radius
        lines.append(
            f"validation pictures within {radius} of {phash.HASH_BITS} hash bits of a training picture: "
            f"{int((near_VK & same_VK).any(axis=1).sum())} of the same concept, "
            f"{int(near_VK.any(axis=1).sum())} of any concept, of {len(validation)}"
        )
    return lines
