"""Opt-outs in the header X-Robots-Tag."""

from __future__ import annotations

from collections.abc import Iterable

OPT_OUTS = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})
WITH_VALUE = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})
"""Directives that hold a colon themselves: what stands before it is no user agent."""


def opt_out(values: Iterable[str], agent: str) -> str | None:
    """The first directive that asks us not to take the picture, or None.

    values: one for each header line. `agent: directive, ...` counts for that user agent, ours being the product name
    without a version; without a name, or with *, it counts for all.
    """
    for value in values:
        ours = True
        for part in value.lower().split(","):
            head, colon, rest = part.partition(":")
            directive = head.strip()
            # With a blank it is no agent, but the rest of a date: "unavailable_after: Fri, 25 Jun 2010 15:00:00 GMT".
            if colon and directive not in WITH_VALUE and " " not in directive:
                ours = directive in ("*", agent.lower())
                directive = rest.strip()
            if ours and directive in OPT_OUTS:
                return directive
    return None
