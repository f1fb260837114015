"""The numbers of a line of metrics.jsonl over some steps, but for clocks and memory."""

from __future__ import annotations

import numpy as np

AUX_LOSSES = ("importance", "load", "z", "local_image", "local_text", "global_image", "global_text")
ALL_LOSSES = (*AUX_LOSSES, "mutual_information")


def log_line(run, results, weights):
    pairs = run.train.batch_pairs

    def mean(values):
        return sum(values) / len(results)

    line = {
        "step": len(results),
        "loss": mean(result.contrastive + result.aux for result in results),
        "contrastive": mean(result.contrastive for result in results),
        "aux": mean(result.aux for result in results),
        "accuracy_image_to_text": mean(result.correct_2[0] for result in results) / pairs,
        "accuracy_text_to_image": mean(result.correct_2[1] for result in results) / pairs,
        "grad_norm": mean(result.grad_norm for result in results),
        "lr": results[-1].rate,
        "temperature": float(np.exp(-weights["log_scale"])),
    }
    groups = pairs // run.moe.group_pairs
    blocks = {
        str(block): block_figures([result.forward.blocks[block] for result in results], groups)
        for block in run.moe.blocks
    }
    for name in ALL_LOSSES if blocks else ():
        line[f"aux_{name}"] = sum(block[name] for block in blocks.values()) / len(blocks)
    return line | {"blocks": blocks}


def block_figures(records, groups: int):
    """One MoE block over some steps."""
    figures = {
        name: sum(record.losses.get(name, 0) for record in records) / len(records) / groups for name in ALL_LOSSES
    }
    routed_E2, kept_E2 = sum(record.routed_E2 for record in records), sum(record.kept_E2 for record in records)
    entropy_2, tokens_2 = sum(record.entropy_2 for record in records), sum(record.tokens_2 for record in records)
    experts = len(routed_E2)
    for modality, name in enumerate(("image", "text")):
        asked = routed_E2[:, modality].sum()
        figures[f"success_{name}"] = kept_E2[:, modality].sum() / asked if asked else None
        figures[f"entropy_{name}"] = entropy_2[modality] / tokens_2[modality] if asked else None
        # An expert is in use where it gets at least half of an even share of the modality's tokens.
        figures[f"experts_{name}"] = int(np.sum(routed_E2[:, modality] >= asked / experts / 2)) if asked else 0
    return figures | {"kept": (kept_E2 / len(records)).tolist()}
