"""`limoe plan PRESET`: what a run consists of, what a pair costs, who holds what and what crosses ranks."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from launch.counting import Cost as ModelCost
from launch.counting import Parameters, Shape, first_of_mesh, meta_model, shape_of, with_twins
from launch.named import listing, run_named
from limoe_dist.config.errors import UserError
from limoe_dist.config.rules import check
from limoe_dist.config.schema import Parallel, Run

if TYPE_CHECKING:
    from launch.memory import Memory
    from launch.traffic import Exchange

USAGE = """\
usage: limoe plan PRESET|RECIPE|FILE.json [--ranks N] [--json] [any setting, e.g. --parallel.ep 8]

Counts the parameters of the run and of its dense twins, and the FLOPs of a pair; with --ranks also lays it out.

{listing}

limoe plan PRESET --help lists every setting, and says how FLOPs and bytes are counted.

exit status: 0 done, 2 a setting that you can mend"""

DType = Literal["fp32", "fp64", "bf16"]


@dataclass(frozen=True)
class PlanCommand:
    """Count the parameters and FLOPs of a run and lay it out on ranks, without training and without memory.

    Parameters are counted from the real modules. Per token: all but what a token does not visit, which are the other
    experts and, with two routers or two towers, those of the other modality.

    FLOPs of a pair: a forward pass of a picture and a caption, 2 for each multiply-add of a matrix product. With width
    D, hidden width F, E experts, K choices, n tokens of the picture or of the caption, and embedding width P:
    - patches: 2 x image tokens x 3 x patch x patch x D
    - attention in each block: 8 n D D for query, key, value and output; 4 n n D for scores and values
    - MLP in each dense block: 4 n D F; in each MoE block K x 4 n D F, and 2 n D E for the router
    - projection: 2 D P for the picture and for the caption
    - with buffers: in MoE blocks experts x slots / moe.group_pairs x 4 D F, not K x 4 n D F; empty slots are computed
    - not counted: softmax, norms, GELU, gates, the look-up of pieces, and the 2 x batch x P of the contrastive logits

    So LIMoE with K = 1 and its dense twins of one tower and of two differ by the router, and in training by the slots.

    Bytes are closed formulas of the native engine; optim.engine=deepspeed cuts the same tensors in its own way.
    With train.dtype=auto they are given for both of its meanings: bf16 on a GPU, fp32 on a CPU.

    Bytes of a number:
    - s in the blocks: 2 in bf16, 4 in fp32, 8 in fp64
    - w where it stays wide: 4, in fp64 8
    - r where it is summed over ranks: 4, with parallel.reduce_dtype or train.dtype fp64 8

    Memory of a rank; pieces are its share of what it holds, 1 / replicas, with the padding of uneven cuts:
    - weights: s for each parameter of the rank, w for those of norms, router and temperature
    - gradients: r for each parameter of the rank
    - sums of gradients: r for its pieces, none without replicas
    - masters: r for its pieces
    - AdamW: 2 r for its pieces; Adafactor: r for its pieces and for one bucket, with rows and columns
    - on top: activations, weights of a bucket on their way, decoded pictures, the framework's own memory

    Collectives of a step, in bytes of whole buffers, of an all-gather its output; T is the tokens of a rank:
    - ep: for each MoE block 2 all-to-all of experts x routing groups of the rank x capacity x width x s
    - tp: for each attention and dense MLP an all-gather of tp x T x width x s before it
    - tp: after each of them a reduce-scatter of tp x T x width x s
    - tp: with text.pad=masked for each block an all-gather of tp x text tokens of the rank, a byte each
    - backward: all of these turned round, but for the masks
    - train.microbatch_pairs: one forward pass more; train.recompute: one more, less what follows a dense MLP
    - loss: all-gather of 2 x batch x embed_dim x w, and a reduce-scatter of as much
    - update: over the replicas (world, dp or edp) a reduce-scatter of gradients and an all-gather of weights
    - update: all-reduce of the norm's 8 bytes, and of Adafactor's rows and columns that ranks share
    - of a buffer (n - 1) / n leaves a rank of n, of an all-reduce twice that
    - not counted: votes, metrics, evaluation and checkpoints

    Exit status 2, with every broken rule, where the run cannot be laid out on --ranks.
    """

    run: Annotated[Run, tyro.conf.arg(name="")]
    ranks: int | None = None
    """Ranks to lay the run out on: one a GPU, or one a few CPU cores."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object instead of tables."""


@dataclass(frozen=True)
class Compute:
    """Forward passes' worth of arithmetic in a step: a backward pass counts 2."""

    forward: int
    backward: int
    embedding_pass: int
    """Of train.microbatch_pairs: every pair is embedded once before."""
    recompute: int
    factor: float
    """Of a step with neither."""


@dataclass(frozen=True)
class Cost:
    """Of one rank, where the blocks compute in one type."""

    memory: Memory
    exchanges: tuple[Exchange, ...]
    """In one step; those within a rank are left out."""


@dataclass(frozen=True)
class Layout:
    world: int
    axes: dict[str, list[list[int]]]
    """For dp, tp, edp and ep: the groups of ranks that work together."""
    experts_per_rank: int
    pairs_per_rank: int
    groups_per_rank: int
    parameters_per_rank: int
    microbatches: int
    compute: Compute
    costs_of_engine: Literal["native"]
    """Whose formulas the costs are, whatever optim.engine is."""
    costs: dict[DType, Cost]
    """For each type that the blocks may compute in."""


@dataclass(frozen=True)
class Plan:
    preset: str
    parameters: Parameters
    models: dict[str, ModelCost]
    """The run itself and its dense twins, of one tower and of two."""
    shape: Shape
    layout: Layout | None


def main(argv: list[str]) -> int:
    """Runs `limoe plan`; returns its exit status. Lets UserError pass."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE.format(listing=listing()), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0].startswith("-"):
        raise UserError(f"the preset comes first: limoe plan PRESET {argv[0]} ... (`limoe plan` lists the presets)")
    start = PlanCommand(run=run_named(argv[0]))
    try:
        command = tyro.cli(PlanCommand, args=argv[1:], prog=f"limoe plan {argv[0]}", default=start)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    if command.ranks is not None and command.ranks < 1:
        raise UserError(f"--ranks={command.ranks}: must be 1 or more")
    found = plan(command.run, world=command.ranks)
    if command.json:
        print(json.dumps(asdict(found), indent=2))
    else:
        from launch.plan_tables import show

        show(found, command.run)
    return 0


def plan(run: Run, *, world: int | None) -> Plan:
    """Counts the run, and lays it out where `world` is given. Raises ConfigError with every broken rule."""
    # Without ranks, only the model and the cut of the batch into routing groups are judged: one rank, tp = ep = 1.
    check(run if world else run.model_copy(update={"parallel": Parallel()}), world=world or 1)
    models = with_twins(run)
    return Plan(
        run.preset, models["itself"].parameters, models, shape_of(run), layout_of(run, world) if world else None
    )


def layout_of(run: Run, world: int) -> Layout:
    """The run on `world` ranks; its rules have been checked."""
    from launch.traffic import num_microbatches

    shape, mesh = shape_of(run), first_of_mesh(world, tp=run.parallel.tp, ep=run.parallel.ep)
    return Layout(
        world=world,
        axes=axes_of(world, tp=run.parallel.tp, ep=run.parallel.ep),
        experts_per_rank=shape.num_experts // run.parallel.ep,
        pairs_per_rank=run.train.batch_pairs // world,
        groups_per_rank=shape.groups // world,
        parameters_per_rank=sum(parameter.numel() for parameter in meta_model(run, mesh).parameters()),
        microbatches=num_microbatches(run, world),
        compute=_compute(run, world),
        costs_of_engine="native",
        costs={dtype: cost_of(run, world, dtype) for dtype in _dtypes(run)},
    )


def _compute(run: Run, world: int) -> Compute:
    from launch.traffic import extra_passes

    extra = extra_passes(run, world)
    embedding, recompute = int("embedding pass" in extra), int("recompute" in extra)
    return Compute(1, 2, embedding, recompute, factor=(3 + embedding + recompute) / 3)


def cost_of(run: Run, world: int, dtype: DType) -> Cost:
    """Memory and exchanges of rank 0, whose pieces are the largest, in place of train.dtype with this type."""
    from launch.memory import memory_of
    from launch.traffic import step_exchanges
    from limoe_dist.optim.engine import wide_dtype
    from limoe_dist.parallel.pieces import make_buckets

    run = run.model_copy(update={"train": run.train.model_copy(update={"dtype": dtype})})
    mesh = first_of_mesh(world, tp=run.parallel.tp, ep=run.parallel.ep)
    numbers = run.parallel.bucket_mb * 1e6 / wide_dtype(run).itemsize
    buckets = make_buckets(meta_model(run, mesh).named_parameters(), mesh, numbers=numbers)
    return Cost(memory_of(buckets, run), tuple(step_exchanges(run, shape_of(run), mesh, buckets)))


def _dtypes(run: Run) -> tuple[DType, ...]:
    return ("bf16", "fp32") if run.train.dtype == "auto" else (run.train.dtype,)


def axes_of(world: int, *, tp: int, ep: int) -> dict[str, list[list[int]]]:
    """The groups of each axis, as limoe_dist.parallel.mesh cuts them: tp and ep take neighbours."""
    axes = {}
    for inner, outer, size in (("tp", "dp", tp), ("ep", "edp", ep)):
        axes[outer] = [list(range(place, world, size)) for place in range(size)]
        axes[inner] = [list(range(first, first + size)) for first in range(0, world, size)]
    return axes
