"""Where commands print for people."""

from __future__ import annotations

from typing import Any


def console() -> Any:
    from rich.console import Console

    return Console()


def say(lines: list[str]) -> None:
    """Lines as they are: paths neither wrapped nor coloured."""
    for line in lines:
        console().print(line, highlight=False, markup=False, soft_wrap=True)
