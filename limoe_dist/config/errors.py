"""The one exception for what a user can cause and mend: a command shows its text as a line and exits with 2."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable
from contextlib import suppress

from limoe_dist.config.exit_codes import MEND


class UserError(Exception):
    """Names the setting or file, its value, the rule and the fix; shown without a traceback.

    told_by: where all ranks raise together, the rank that shows it; None: whoever raises it shows it.
    status: the exit status of the command; see exit_codes.
    """

    def __init__(self, text: str, *, told_by: int | None = None, status: int = MEND) -> None:
        super().__init__(text)
        self.told_by, self.status = told_by, status


def warn(text: str) -> None:
    """A line that a person should see, about what the program did not stop for.

    Where it cannot be written, as into a log on a full disk, it is lost.
    """
    with suppress(OSError):
        print(f"limoe: warning: {text}", file=sys.stderr, flush=True)


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a mistyped name: `; did you mean "x"?`, or the empty string where nothing is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f'; did you mean "{near[0]}"?' if near else ""
