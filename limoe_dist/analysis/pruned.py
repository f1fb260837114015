"""For which modality a run was pruned, and what that run is not for. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from limoe_dist.config.errors import UserError
from limoe_dist.config.schema import Run

Modality = Literal["image", "text"]
MODALITIES: tuple[str, ...] = get_args(Modality)
RECORD = "pruned.json"
"""Beside run.json, by `limoe prune`: for which modality, from what, and at what price."""


def pruned_for(run_dir: Path, run: Run) -> Modality | None:
    """The modality that a run was pruned for; None for one that was not. Raises UserError where nothing says which."""
    if not run.moe.kept_experts:
        return None
    path = run_dir / RECORD
    try:
        modality = json.loads(path.read_text(encoding="utf-8"))["modality"]
    except (OSError, ValueError, KeyError, TypeError):
        modality = None
    if modality not in MODALITIES:
        raise UserError(
            f"{run_dir} has moe.kept_experts, and {path} does not say for which modality: put back what limoe prune "
            "wrote there"
        )
    return "image" if modality == "image" else "text"


def refuse_other_modality(run_dir: Path, run: Run, what: str, needs: Sequence[Modality] = ("image", "text")) -> None:
    """Raises UserError where a task needs a modality whose experts were taken out: its figures would mean nothing."""
    kept = pruned_for(run_dir, run)
    if kept and (other := next((modality for modality in needs if modality != kept), None)):
        raise UserError(
            f"{run_dir} keeps the experts of {kept}s alone, and {what} needs {other}s too, whose experts are gone: "
            f"evaluate the run that it was made from; {run_dir / RECORD} holds the accuracy of its {kept}s beside the "
            f"{other}s of that run"
        )
