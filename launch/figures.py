"""What a quick start measured, as one JSON object: results, seconds, and the machine they were measured on."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.probes.machine import cpu_model
from limoe_dist.config.errors import UserError
from limoe_dist.config.parse import load_run

PACKAGES = ("torch", "numpy", "nvidia-dali-cuda120", "pyarrow", "sentencepiece", "pydantic")


def measured(
    stages: Sequence[tuple[str, float, bool]], *, run: Path, zeroshot: Path, retrieval: Path
) -> dict[str, Any]:
    """The figures of a finished quick start. Raises UserError where a file of it is missing or not as expected.

    stages: name, seconds, and whether it was finished by an earlier quick start.
    """
    settings = load_run(run / "run.json")
    last = last_metrics(run / "metrics.jsonl")
    shown, found = _object(zeroshot), _object(retrieval)
    try:
        return {
            "command": "make quickstart",
            "stages": [{"name": name, "seconds": seconds, "done_before": old} for name, seconds, old in stages],
            "seconds": round(sum(seconds for _, seconds, old in stages if not old), 1),
            "preset": settings.preset,
            "step": last["step"],
            "ranks": _ranks(run),
            "tp": settings.parallel.tp,
            "ep": settings.parallel.ep,
            "zeroshot": {
                name: shown["zeroshot"][name]
                for name in ("rows", "classes", "top1", "top5", "chance_top1", "chance_top5")
            },
            "pixel_nearest_neighbour": _without_paths(shown.get("pixel_nearest_neighbour")),
            "retrieval": {
                name: found["retrieval"][name]
                for name in ("rows", "texts", "image_to_text", "text_to_image", "chance_image_to_text")
            },
            "success": {
                block: {"image": figures["success_image"], "text": figures["success_text"]}
                for block, figures in last["blocks"].items()
            },
            "seconds_per_step": last.get("seconds_per_step"),
            "machine": {"cores": len(os.sched_getaffinity(0)), "cpu": cpu_model(), "system": platform.platform()},
            "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
            "commit": commit(),
        }
    except KeyError as error:
        raise UserError(f"{run}, {zeroshot} or {retrieval}: has no figure named {error}") from None


def last_metrics(path: Path) -> dict[str, Any]:
    """The last whole line of a metrics.jsonl; a line that a crash cut off is passed over."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    for line in reversed(lines):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            return found
    raise UserError(f"{path}: holds no line of metrics")


def _without_paths(figures: dict[str, Any] | None) -> dict[str, Any] | None:
    """Without the folder of this machine: figures are kept and shown elsewhere."""
    return figures and {name: value for name, value in figures.items() if name != "training_data"}


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: is not a JSON object")
    return found


def _ranks(run: Path) -> int:
    """Ranks that wrote the newest checkpoint: each writes a file of its own."""
    newest = max(run.glob("checkpoints/step-*/manifest.json"), default=None)
    return len(list(newest.parent.glob("rank-*.safetensors"))) if newest else 0


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the source, with "+changes" where files differ from it; None outside a git checkout."""
    folder = Path(__file__).parent
    answers = []
    for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True)
        except OSError:
            return None
        if done.returncode:
            return None
        answers.append(done.stdout.strip())
    return answers[0] + ("+changes" if answers[1] else "")
