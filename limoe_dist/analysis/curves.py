"""Which curves a report shows: the losses and rates of training, and what each MoE block does with each modality."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from limoe_dist.analysis.history import Column, History
from limoe_dist.analysis.incidents import ACTIONS, MOST_MARKS, Incidents
from limoe_dist.analysis.plots import Line, Marks, Panel, Reference, Tone
from limoe_dist.config.schema import Run

MODALITIES: tuple[Tone, Tone] = ("image", "text")
# As in metrics.jsonl and in the settings of moe, with a title, and when each is small.
AUX_LOSSES = {
    "importance": ("Importance", "experts get equal sums of gates"),
    "load": ("Load", "experts get equally many tokens"),
    "z": ("Router z-loss", "router logits stay small"),
    "local_image": ("Local entropy, image", "each image token is sure of its expert"),
    "local_text": ("Local entropy, text", "each text token is sure of its expert"),
    "global_image": ("Global entropy, image", "image tokens spread over at least {:g} experts"),
    "global_text": ("Global entropy, text", "text tokens spread over at least {:g} experts"),
    "mutual_information": ("Minus mutual information", "the modalities use different experts"),
}


@dataclass(frozen=True)
class Note:
    """A panel and a line of text below it."""

    panel: Panel
    text: str = ""


def training_panels(history: History, run: Run, incidents: Incidents | None = None) -> list[Note]:
    """Loss with what the guard did, accuracy in the batch, learning rate, gradient norm, temperature and speed."""
    batch = run.train.batch_pairs
    accuracy = Panel(
        "Accuracy in the batch",
        "%",
        (
            Line("image to text", history.steps, history.column("accuracy_image_to_text"), "image"),
            Line("text to image", history.steps, history.column("accuracy_text_to_image"), "text"),
        ),
        (Reference(1 / batch, "chance"),),
        low=0,
    )
    return [
        _loss(history, run, incidents),
        *(
            [Note(_single(history, "Auxiliary loss", "weighted sum", "aux"), "Added to the contrastive loss.")]
            if run.moe.blocks
            else []
        ),
        Note(accuracy, f"A pair is right where it is the nearest of the {batch:,} in its batch."),
        Note(_single(history, "Learning rate", "", "lr", low=0)),
        _gradient_norm(history, run),
        Note(
            _single(history, "Temperature", "T", "temperature"),
            "Logits are cosine / T: the smaller, the sharper.",
        ),
        Note(_single(history, "Throughput", "pairs/s", "pairs_per_s", low=0), "Over all ranks."),
    ]


def _loss(history: History, run: Run, incidents: Incidents | None) -> Note:
    batch = run.train.batch_pairs
    panel = _single(history, "Contrastive loss", "nats", "contrastive", Reference(math.log(batch), "chance"))
    text = f"Chance is ln {batch:,} = {math.log(batch):.3g}: all pairs of the batch look alike."
    # Behind the last line there may be steps that are not logged yet. What lies further on is of before the run went
    # back, and would press the curve to the side.
    until = history.steps[-1] + run.log.every_steps
    marks = _guard_marks(incidents, until=until) if incidents else ()
    if not marks:
        return Note(panel, text)
    most = f" (of each action the newest {MOST_MARKS})" if any(len(each.steps) == MOST_MARKS for each in marks) else ""
    return Note(replace(panel, marks=marks), f"{text} Upright lines: what the guard did{most}, see below.")


def _guard_marks(incidents: Incidents, *, until: float) -> tuple[Marks, ...]:
    looks: dict[str, tuple[Tone | None, Literal["solid", "dashed", "dashdot", "dotted"]]] = {
        "note": (None, "dotted"),
        "skip": ("two", "dashed"),
        "rollback": ("three", "dashdot"),
        "stop": ("text", "solid"),
    }
    found = ((action, incidents.steps(action, until=until)) for action in looks)
    return tuple(Marks(tuple(steps), ACTIONS[action], *looks[action]) for action, steps in found if steps)


def _gradient_norm(history: History, run: Run) -> Note:
    column = history.column("grad_norm")
    good = column[np.isfinite(column)]
    # One step that exploded would press all others to the floor.
    spiky = bool(len(good) >= 20 and good.min() > 0 and good.max() > 10 * np.median(good))
    reference = Reference(run.optim.clip_norm, "clipped above")
    panel = _single(history, "Gradient norm", "", "grad_norm", reference, low=None if spiky else 0)
    if spiky:
        return Note(replace(panel, scale="log"), "Before clipping; log scale.")
    return Note(panel, "Before clipping.")


def success_panels(history: History) -> list[Note]:
    """The share of each modality's tokens that got a slot in an expert, block by block, on one scale."""
    columns = [history.column(f"blocks.{block}.success_{name}") for block in history.blocks for name in MODALITIES]
    finite = np.concatenate([column[np.isfinite(column)] for column in columns] or [np.empty(0)])
    lowest = float(finite.min()) if len(finite) else 0.0
    low = max(0.0, math.floor(lowest * 20 - 0.5) / 20)
    return [
        Note(Panel(f"Block {block}", "%", _by_modality(history, block, "success"), low=low, high=1.0))
        for block in history.blocks
    ]


def entropy_panels(history: History, run: Run) -> list[Note]:
    """How undecided the router is, per token."""
    even = math.log(run.moe.num_experts)
    return [
        Note(
            Panel(
                f"Block {block}",
                "nats",
                _by_modality(history, block, "entropy"),
                (Reference(even, f"undecided (ln {run.moe.num_experts})"),),
                low=0,
                high=even * 1.06 or 1,
            )
        )
        for block in history.blocks
    ]


def experts_panels(history: History, run: Run) -> list[Note]:
    """How many experts a modality uses."""
    return [
        Note(
            Panel(
                f"Block {block}",
                "experts",
                _by_modality(history, block, "experts"),
                low=0,
                high=run.moe.num_experts,
            )
        )
        for block in history.blocks
    ]


def aux_panels(history: History, run: Run) -> list[Note]:
    """Each auxiliary loss without its weight, as the mean over the MoE blocks."""
    notes = []
    for name, (title, purpose) in AUX_LOSSES.items():
        weight = getattr(run.moe, name)
        if not weight and not np.isfinite(history.column(f"aux_{name}")).any():
            continue  # neither trained with nor, by an earlier version, watched
        tone: Tone = "image" if name.endswith("image") else "text" if name.endswith("text") else "one"
        unit = "nats" if name.startswith(("local", "global", "mutual")) else ""
        line = Line(title.lower(), history.steps, history.column(f"aux_{name}"), tone)
        wanted = purpose.format(getattr(run.moe, f"min_{tone}_experts")) if name.startswith("global") else purpose
        state = f"Weight {weight:g}" if weight else "Weight 0, only watched"
        panel = Panel(title, unit, (line,), low=None if name in ("z", "mutual_information") else 0)
        notes.append(Note(panel, f"{state}; small where {wanted}."))
    return notes


def evaluation_panels(evaluations: History) -> list[Note]:
    """Zero-shot, retrieval and contrastive accuracy on the validation shards, with what guessing gives."""
    notes = [
        _shares(evaluations, "Zero-shot classification", "zeroshot.", ("top1", "top5"), ("top-1", "top-5"), "chance_"),
    ]
    for way in ("image_to_text", "text_to_image"):
        names = tuple(f"{way}.recall_at_{count}" for count in (1, 5, 10))
        notes.append(
            _shares(
                evaluations,
                f"Retrieval, {way.replace('_', ' ')}",
                "retrieval.",
                names,
                ("R@1", "R@5", "R@10"),
                "chance_",
            )
        )
    pairs = Line("accuracy", evaluations.steps, evaluations.column("contrastive.accuracy"), "one")
    chance = evaluations.latest("contrastive.chance")
    text = "" if chance is None else f"Chance: {100 * chance:.2f} %."
    notes.append(Note(Panel("Contrastive accuracy in minibatches", "%", (pairs,), low=0), text))
    return [note for note in notes if any(np.isfinite(line.values).any() for line in note.panel.lines)]


def _shares(
    of: History, title: str, prefix: str, names: Sequence[str], shown: Sequence[str], chance_prefix: str
) -> Note:
    tones: tuple[Tone, ...] = ("one", "two", "three")
    lines, references = [], []
    for name, label, tone in zip(names, shown, tones, strict=False):
        lines.append(Line(label, of.steps, of.column(prefix + name), tone))
        chance = of.latest(prefix + chance_prefix + name)
        if chance is not None:
            references.append(f"{label} {100 * chance:.2f} %")
    text = f"Chance: {', '.join(references)}." if references else ""
    return Note(Panel(title, "%", tuple(lines), low=0), text)


def _single(
    history: History, title: str, unit: str, name: str, *references: Reference, low: float | None = None
) -> Panel:
    return Panel(title, unit, (Line(title.lower(), history.steps, history.column(name)),), references, low=low)


def _by_modality(history: History, block: int, name: str) -> tuple[Line, ...]:
    return tuple(
        Line(modality, history.steps, _column(history, block, f"{name}_{modality}"), modality)
        for modality in MODALITIES
    )


def _column(history: History, block: int, name: str) -> Column:
    return history.column(f"blocks.{block}.{name}")
