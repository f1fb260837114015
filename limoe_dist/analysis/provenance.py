"""Where a run comes from: its settings beside those of its preset, and the sources of its data with their licences."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from limoe_dist.config.errors import UserError
from limoe_dist.config.presets import names, preset
from limoe_dist.config.schema import Run
from limoe_dist.data.manifest import Source, load_manifest

_DEFAULT = "(none)"


@dataclass(frozen=True)
class Setting:
    name: str
    value: str
    preset: str | None
    """What the preset has, where that is something else."""


@dataclass(frozen=True)
class DataSet:
    role: str
    path: str
    name: str
    rows: int
    sources: tuple[Source, ...]
    problem: str
    """Why the manifest cannot be read; then the rest is empty."""


def settings_by_section(run: Run) -> dict[str, tuple[Setting, ...]]:
    """Everything that run.json holds, but the preset's name."""
    before = preset(run.preset).model_dump(mode="json") if run.preset in names() else None
    return {
        section: tuple(_setting(name, value, before[section] if before else None) for name, value in values.items())
        for section, values in run.model_dump(mode="json", exclude={"preset"}).items()
    }


def changed(settings: dict[str, tuple[Setting, ...]]) -> list[Setting]:
    """What differs from the preset, by dotted name; paths of data always do, and are left out."""
    return [
        Setting(f"{section}.{setting.name}", setting.value, setting.preset)
        for section, all_of_it in settings.items()
        if section != "data"
        for setting in all_of_it
        if setting.preset is not None
    ]


def data_sets(run: Run, *, shown: str | None) -> list[DataSet]:
    """The manifests of the run, and the one of the example retrievals where it is another; each once."""
    found: dict[str, DataSet] = {}
    for role, path in (("training", run.data.manifest), ("validation", run.data.validation), ("examples", shown or "")):
        if path and path not in found:
            found[path] = _data_set(role, path)
    return list(found.values())


def _setting(name: str, value: Any, before: dict[str, Any] | None) -> Setting:
    same = before is None or before.get(name) == value
    return Setting(name, _text(value), None if same or before is None else _text(before.get(name)))


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value or _DEFAULT
    return json.dumps(value, ensure_ascii=False) if value != [] else _DEFAULT


def _data_set(role: str, path: str) -> DataSet:
    try:
        manifest = load_manifest(path)
    except UserError as error:
        return DataSet(role, path, "", 0, (), str(error))
    return DataSet(role, path, manifest.name, manifest.rows, manifest.sources, "")
