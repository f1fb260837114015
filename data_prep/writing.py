"""What a disk refuses, as a line for a person."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from limoe_dist.config.errors import UserError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around everything that is written to `path`. Raises UserError for a full or read-only disk."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{path}: cannot be written: {reason}: make room, or name another place") from None
