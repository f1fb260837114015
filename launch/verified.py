"""What `limoe verify` runs in place of the whole run: a layout that fits one machine, a small batch, a small model."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from limoe_dist.config.errors import UserError
from limoe_dist.config.schema import Moe, Run

MOST_RANKS = 16
"""More than these are not started on one machine."""
SHRUNK_WIDTH, SHRUNK_SIDE, SHRUNK_VOCABULARY = 64, 3, 256
"""Of --shrink: the largest width, patches on a side of the picture, and pieces of the vocabulary."""
DENSE_PAIRS = 2
"""Of each rank, where no routing group says how many."""
RANK_BYTES = 300_000_000
"""Of a process with torch."""


@dataclass(frozen=True)
class Layout:
    dp: int
    tp: int
    ep: int

    @staticmethod
    def parse(text: str) -> Layout:
        """From `dp=2,tp=2,ep=4`. Raises UserError."""
        sizes = dict(re.findall(r"(?:^|,)(dp|tp|ep)=([1-9]\d*)(?=,|$)", text))
        if len(sizes) != 3 or text.count(",") != 2:
            raise UserError(f'--layout "{text}": give all three sizes, 1 or more, as in --layout dp=2,tp=2,ep=4')
        return Layout(**{axis: int(size) for axis, size in sizes.items()})

    @property
    def ranks(self) -> int:
        return self.dp * self.tp

    def __str__(self) -> str:
        return f"dp={self.dp},tp={self.tp},ep={self.ep}"

    def to_json(self) -> dict[str, int]:
        return {"dp": self.dp, "tp": self.tp, "edp": self.ranks // self.ep, "ep": self.ep, "ranks": self.ranks}

    def cut(self) -> Layout:
        """With the smallest dp that keeps tp, ep, two ranks a dense weight and two an expert; up to 16 ranks as it is.

        Two, for nothing is summed over a single one; where the layout has only one itself, one.
        """
        if self.ranks <= MOST_RANKS:
            return self
        least = self.ep * min(2, self.ranks // self.ep)
        fitting = (
            dp for dp in range(min(2, self.dp), self.dp + 1) if dp * self.tp >= least and dp * self.tp % self.ep == 0
        )
        # None fits where ep does not divide the ranks, which the rules refuse.
        return replace(self, dp=next(fitting, self.dp))


@dataclass(frozen=True)
class Change:
    """A setting that the verification does not take from the run."""

    setting: str
    asked: Any
    used: Any
    why: str


def verified_run(run: Run, layout: Layout, *, shrink: bool) -> tuple[Run, list[Change]]:
    """The run in this layout as it is verified, and what was changed for it. clip_norm is found later.

    Raises UserError for a run whose experts were pruned.
    """
    if run.moe.kept_experts:
        raise UserError("moe.kept_experts: a run that `limoe prune` made is not for training: verify the one before it")
    wanted = _shrunk(run) if shrink else {}
    why = dict.fromkeys(wanted, "--shrink")
    unit = run.moe.group_pairs if run.moe.blocks else DENSE_PAIRS
    in_parts = run.train.microbatch_pairs > 0
    wanted["train.batch_pairs"] = layout.ranks * unit * (2 if in_parts else 1)
    why["train.batch_pairs"] = "the smallest batch with a whole microbatch, or all of a rank's pairs, on every rank"
    if in_parts:
        wanted["train.microbatch_pairs"] = unit
        why["train.microbatch_pairs"] = "two microbatches on every rank"
    if run.moe.blocks and not run.moe.noise_std:
        wanted["moe.noise_std"] = Moe().noise_std
        why["moe.noise_std"] = "router noise has to be active"
    changes = [Change(name, _get(run, name), value, why[name]) for name, value in wanted.items()]
    used = _with(run, wanted | {"parallel.tp": layout.tp, "parallel.ep": layout.ep})
    return used, [change for change in changes if change.asked != change.used]


def _shrunk(run: Run) -> dict[str, Any]:
    """Width and depth, and what only they or the pictures' details need; experts, groups and the layout stay."""
    model, heads = run.model, run.model.heads
    width = min(model.width, max(heads, SHRUNK_WIDTH // heads * heads))
    sparse = min(2, len(run.moe.blocks))
    every = 2 if len(run.moe.blocks) < model.depth else 1
    depth = min(model.depth, every * sparse or 2)
    side = min(run.image.size // run.image.patch, SHRUNK_SIDE)
    wanted: dict[str, Any] = {
        "model.width": width,
        "model.depth": depth,
        "model.mlp_dim": min(model.mlp_dim, 2 * width),
        "model.embed_dim": min(model.embed_dim, width),
        "image.size": side * run.image.patch,
        "text.vocab_size": min(run.text.vocab_size, SHRUNK_VOCABULARY),
    }
    if sparse:
        wanted["moe.blocks"] = tuple(range(every - 1, depth, every))
        # Fewer patches leave a group fewer tokens, and a tight capacity no slot for an expert.
        tokens = run.moe.group_pairs * (side * side + run.text.length)
        least = run.moe.num_experts / (tokens * run.moe.top_k)
        wanted["moe.capacity_factor"] = max(run.moe.capacity_factor, least)
    return wanted


def _get(run: Run, name: str) -> Any:
    section, field = name.split(".")
    return getattr(getattr(run, section), field)


def _with(run: Run, settings: dict[str, Any]) -> Run:
    content = run.model_dump()
    for name, value in settings.items():
        section, field = name.split(".")
        content[section][field] = value
    return Run.model_validate(content)


def needed_bytes(run: Run, layout: Layout) -> int:
    """A formula for the memory that the ranks, all on one machine, and the reference take at once.

    What a rank keeps in training, and about as much again for every step that is compared; and what it computes with:
    for every token and block some 12 numbers of width and 3 of mlp_dim, once in the reference, once over the ranks.
    """
    from launch.counting import first_of_mesh, meta_model
    from launch.memory import memory_of
    from limoe_dist.parallel.pieces import make_buckets
    from limoe_dist.train.parity.compare import BATCHES

    word = 8 if run.train.dtype == "fp64" else 4
    total = layout.ranks * RANK_BYTES
    for world, tp, ep in ((layout.ranks, layout.tp, layout.ep), (1, 1, 1)):
        mesh = first_of_mesh(world, tp=tp, ep=ep)
        buckets = make_buckets(
            meta_model(run, mesh).named_parameters(), mesh, numbers=run.parallel.bucket_mb * 1e6 / word
        )
        total += (1 + len(BATCHES)) * world * memory_of(buckets, run).sum
    tokens = run.train.batch_pairs * (run.image_tokens + run.text.length)
    numbers = tokens * run.model.depth * (12 * run.model.width + 3 * run.model.mlp_dim)
    return total + 2 * word * numbers
