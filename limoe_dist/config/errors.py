"""The one exception for what a user can cause and mend: a command shows its text as a line and exits with 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Names the setting or file, its value, the rule and the fix; shown without a traceback.

    shared: all ranks raise it together, so one of them is enough to show it.
    """

    def __init__(self, text: str, *, shared: bool = False) -> None:
        super().__init__(text)
        self.shared = shared


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a mistyped name: `; did you mean "x"?`, or the empty string where nothing is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f'; did you mean "{near[0]}"?' if near else ""
