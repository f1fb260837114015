"""From names and files to a Run: presets by name, run.json by path. Every error is a sentence."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from limoe_dist.config.errors import UserError, nearest
from limoe_dist.config.presets import TWINS, base_names, names, preset
from limoe_dist.config.schema import Run

T = TypeVar("T", bound=BaseModel)


def preset_named(name: str, *, recipes: Collection[str] = ()) -> Run:
    """The preset's run. Raises UserError with the nearest name.

    recipes: names that the caller knows besides, for the error to offer, with the path of a run.json.
    """
    if name in names():
        return preset(name)
    offered = f"presets: {', '.join(base_names())}; each also with {', '.join(TWINS)}"
    if recipes:
        offered += f"; recipes: {', '.join(recipes)}; or the path of a run.json"
    raise UserError(f'unknown preset "{name}"{nearest(name, [*names(), *recipes])} ({offered})')


class _RunFile(Run):
    environment: dict[str, str] = Field(default_factory=dict)
    """Of the start that wrote it; see environment.captured."""


def load_run(path: Path) -> Run:
    """Reads a run.json. Raises UserError for a missing file, text that is not JSON, unknown keys and wrong values."""
    found = parse_model(_RunFile, path)
    return Run(**{name: getattr(found, name) for name in Run.model_fields})


def parse_model(kind: type[T], path: Path) -> T:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    return parse_text(kind, text, place=str(path))


def parse_text(kind: type[T], text: str | bytes, *, place: str) -> T:
    """A model from JSON text that was read from `place`. Raises UserError with one line for each problem."""
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise UserError("\n".join(f"{place}: {line}" for line in sentences(error, kind))) from None


def sentences(error: ValidationError, kind: type[BaseModel]) -> list[str]:
    """One sentence for each problem that pydantic found; an unknown key gets the nearest known one."""
    lines = []
    for problem in error.errors():
        place = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            lines.append(f"unknown key {place}{nearest(place, known_keys(kind))}")
        else:
            value = json.dumps(problem["input"], default=str)
            value = value if len(value) <= 60 else value[:57] + "..."
            lines.append(f"{place or 'the file'}={value}: {problem['msg']}")
    return lines


def known_keys(kind: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of all settings below a model."""
    keys = []
    for name, field in kind.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += known_keys(field.annotation, f"{prefix}{name}.")
    return keys


def write_atomically(path: Path, text: str) -> None:
    """Writes beside the path and renames, so that a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_run(run: Run, path: Path, *, environment: Mapping[str, str] | None = None) -> None:
    """Writes a run.json; with the environment of the start that writes it, where that is given."""
    content = run.model_dump(mode="json") | ({} if environment is None else {"environment": dict(environment)})
    write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


_INDIFFERENT = {
    "train": ("stop_grace_s", "microbatch_pairs", "recompute", "contrastive_chunk"),
    "optim": ("engine", "zero_stage", "offload"),
}
"""Settings of decisive sections that change memory and speed, and the gradient in its last bits only."""


def decisive(run: Run) -> dict[str, Any]:
    """The settings that decide a run's results, by dotted name: not paths, layout, logging or saving.

    Nor those of the guard: a person may change them when they are needed, and what it did is in its ledger.
    """
    content = run.model_dump(mode="json", exclude={"preset", "data", "parallel", "log", "checkpoint", "guard", "eval"})
    for section, indifferent in _INDIFFERENT.items():
        for name in indifferent:
            content[section].pop(name)
    # Of the data, its order: what is in it has a hash of its own.
    content["data"] = {name: getattr(run.data, name) for name in ("window_rows", "block_shards")}
    return {f"{section}.{name}": value for section, fields in content.items() for name, value in fields.items()}


def fingerprint(run: Run) -> str:
    """sha256 of the settings that decide results: runs that have the same compute the same."""
    return hashlib.sha256(json.dumps(decisive(run), sort_keys=True).encode()).hexdigest()


MAY_CHANGE = ("train.batch_pairs",)
"""Decisive settings that a run may go on with changed: the position in the data counts pairs, not steps."""


def changed_settings(before: dict[str, Any], run: Run, place: Path) -> list[str]:
    """One sentence for each decisive setting that differs from those in `place`, and may not.

    A setting that is unknown there came with a later version, and must have its default.
    """
    defaults = decisive(Run())
    return [
        f"{name}={value!r}, but {place} has {before.get(name, defaults[name])!r}: "
        "a resumed run keeps what decides its results"
        for name, value in decisive(run).items()
        if before.get(name, defaults[name]) != value and name not in MAY_CHANGE
    ]
