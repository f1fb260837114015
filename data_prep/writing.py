"""Where commands write: local folders alone; what a disk refuses, as a line for a person."""

from __future__ import annotations

import re
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


def refuse_url(path: Path | None, option: str = "--out") -> None:
    """Raises UserError for the URL of a store: as a path it would be a local folder "s3:" that nobody looks into."""
    if path is not None and (found := re.match(r"([a-z][a-z0-9+.-]+):/", str(path))):
        raise UserError(
            f"{option} {path}: is a URL of {found[1]}, and what is written goes to a local disk: name a folder there, "
            "and copy it to the store when it is done"
        )
