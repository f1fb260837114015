"""Zero-shot accuracy of runs on two halves of the validation concepts, so that presets are chosen on one alone.

    python -m tests.benchmarks.halves --data quickstart/shards/validation/manifest.json RUN [RUN ...] [--report FILE]

A concept belongs to the tuning half where the first bit of the SHA-256 of its name is 0. The concepts of training and
validation shards are the classes in both cases. Without --report only the tuning half is shown; with it, both halves
are written as JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

import torch

from limoe_dist.checkpoint.reader import load_weights, open_checkpoint
from limoe_dist.config.parse import decisive, load_run, preset_named
from limoe_dist.data.arrow import ShardSet
from limoe_dist.data.tokenizer import open_tokenizer
from limoe_dist.eval.classes import classes_of_concepts, concepts_of
from limoe_dist.eval.zeroshot import zeroshot
from limoe_dist.model.tower import build_model
from limoe_dist.parallel.mesh import Mesh


def in_tuning_half(concept: str) -> bool:
    return hashlib.sha256(concept.encode()).digest()[0] < 128


def halves(run_dir: Path, data: Path) -> dict[str, object]:
    """Rows, top-1 and top-5 of each half, with the steps and the last checkpoint's name."""
    run, mesh, device = load_run(run_dir / "run.json"), Mesh.single(), torch.device("cpu")
    model = build_model(run, mesh=mesh, device=device)
    checkpoint = open_checkpoint(run_dir, mesh, device)
    load_weights(checkpoint, model, mesh)
    train = ShardSet(run.data.manifest)
    shards = ShardSet(data)
    classes = classes_of_concepts(concepts_of(train) + concepts_of(shards), place=str(data))
    tokenizer = open_tokenizer(run, train.manifest, train.folder)
    result = zeroshot(model, run, shards, tokenizer, mesh=mesh, device=device, classes=classes)
    concepts = [shards.row(number).concept for number in result.row_R.tolist()]
    names = [name for (name, *_) in classes]
    preset = decisive(preset_named(run.preset))
    figures: dict[str, object] = {
        "run": run_dir.name,
        "preset": run.preset,
        "step": checkpoint.state.step,
        "differs_from_preset": {name: value for name, value in decisive(run).items() if value != preset[name]},
        "success": last_success_rates(run_dir),
    }
    for half, wanted in (("tuning", True), ("reported", False)):
        ranks = [
            [names[guess] for guess in guesses].index(concept) if concept in [names[g] for g in guesses] else 99
            for concept, guesses in zip(concepts, result.first_R5.tolist(), strict=True)
            if in_tuning_half(concept) == wanted
        ]
        figures[half] = {
            "rows": len(ranks),
            "top1": sum(rank < 1 for rank in ranks) / len(ranks),
            "top5": sum(rank < 5 for rank in ranks) / len(ranks),
        }
    return figures


def last_success_rates(run_dir: Path) -> dict[str, list[float]]:
    """Success rates of images and texts by MoE block, over the last logged steps."""
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    return {index: [block["success_image"], block["success_text"]] for index, block in last["blocks"].items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    found = [halves(run, options.data) for run in options.runs]
    for figures in found:
        print(figures["run"], figures["step"], "tuning half:", figures["tuning"])
    if options.report:
        command = "python -m tests.benchmarks.halves " + " ".join(sys.argv[1:])
        options.report.write_text(json.dumps({"command": command, "runs": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
