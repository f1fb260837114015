from __future__ import annotations

from typing import Any

from limoe_dist.config.schema import Run


def changed(run: Run, change: dict[str, Any]) -> Run:
    """The run with some dotted settings changed, validated as if it were read from a file."""
    content = run.model_dump()
    for name, value in change.items():
        *sections, last = name.split(".")
        section = content
        for key in sections:
            section = section[key]
        assert last in section
        section[last] = value
    return Run.model_validate(content)
