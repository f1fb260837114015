"""`limoe plan PRESET`: what a run consists of and who holds what, without training; modules are built on `meta`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from limoe_dist.config.errors import UserError
from limoe_dist.config.parse import preset_named
from limoe_dist.config.presets import names
from limoe_dist.config.rules import check
from limoe_dist.config.schema import Parallel, Run

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class PlanCommand:
    """Count the parameters of a run and lay it out on ranks, without training and without memory.

    Parameters are counted from the real modules. Per token: all but the experts that a token does not visit.
    Bytes per rank are a closed formula: parameters of the rank x (4 weight + 4 gradient + 8 AdamW moments), twice
    that with --train.dtype fp64. Activations, decoded pictures and the framework's own memory come on top.
    All-to-all per step and rank, also a formula: 4 exchanges (to the experts and back, forward and backward)
    x MoE blocks x experts x routing groups of the rank x capacity x width x bytes of a number; (ep - 1) / ep of it
    leaves the rank. Exit status 2, with every broken rule, where the run cannot be laid out on --ranks.
    """

    run: Annotated[Run, tyro.conf.arg(name="")]
    ranks: int | None = None
    """Ranks to lay the run out on: one a GPU, or one a few CPU cores."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object instead of tables."""


@dataclass(frozen=True)
class Parameters:
    total: int
    per_token: int
    """Total without the experts that a token does not visit."""
    router: int
    experts: int


@dataclass(frozen=True)
class Shape:
    """What does not depend on the number of ranks."""

    tokens_per_pair: int
    image_tokens: int
    text_tokens: int
    moe_blocks: tuple[int, ...]
    num_experts: int
    group_tokens: int
    """Tokens of a routing group; 0 for a dense model, like the next two."""
    capacity: int
    """Slots of each expert in a routing group."""
    groups: int
    """Routing groups of the global batch."""


@dataclass(frozen=True)
class Layout:
    world: int
    axes: dict[str, list[list[int]]]
    """For dp, tp, edp and ep: the groups of ranks that work together."""
    experts_per_rank: int
    pairs_per_rank: int
    groups_per_rank: int
    parameters_per_rank: int
    bytes_per_rank: dict[str, int]
    all_to_all_bytes: dict[str, int]
    """Per step and rank, for each type that the blocks may compute in; 0 where experts are not shared."""


@dataclass(frozen=True)
class Plan:
    preset: str
    parameters: Parameters
    shape: Shape
    layout: Layout | None


def main(argv: list[str]) -> int:
    """Runs `limoe plan`; returns its exit status. Lets UserError pass."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0].startswith("-"):
        raise UserError(f"the preset comes first: limoe plan PRESET {argv[0]} ... (presets: {', '.join(names())})")
    start = PlanCommand(run=preset_named(argv[0]))
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
        _show(found, command.run)
    return 0


def _usage() -> str:
    width = max(map(len, names()))
    presets = "\n".join(f"  {name:<{width}}  {about}" for name, about in names().items())
    return (
        "usage: limoe plan PRESET [--ranks N] [--json] [any setting, e.g. --parallel.ep 8]\n\n"
        f"presets:\n{presets}\n\nlimoe plan PRESET --help lists every setting and says how bytes are counted."
    )


def plan(run: Run, *, world: int | None) -> Plan:
    """Counts the run, and lays it out where `world` is given. Raises ConfigError with every broken rule."""
    # Without ranks, only the model and the cut of the batch into routing groups are judged: one rank, tp = ep = 1.
    check(run if world else run.model_copy(update={"parallel": Parallel()}), world=world or 1)
    return Plan(run.preset, count_parameters(run), shape_of(run), layout_of(run, world) if world else None)


def count_parameters(run: Run) -> Parameters:
    counts = _numels(run, tp=1, ep=1)
    total = sum(counts.values())
    experts = sum(count for name, count in counts.items() if ".experts." in name)
    router = sum(count for name, count in counts.items() if name.endswith(".router"))
    unvisited = experts // run.moe.num_experts * (run.moe.num_experts - run.moe.top_k)
    return Parameters(total=total, per_token=total - unvisited, router=router, experts=experts)


def _numels(run: Run, *, tp: int, ep: int) -> dict[str, int]:
    """Elements of each parameter that one rank holds; shards are equal, so rank 0 speaks for all."""
    import torch

    from limoe_dist.model.tower import build_model
    from limoe_dist.parallel.mesh import Axis, Mesh

    one = {name: Axis(name, 1, 0, None) for name in ("world", "dp", "edp")}
    mesh = Mesh(**one, tp=Axis("tp", tp, 0, None), ep=Axis("ep", ep, 0, None))
    model = build_model(run, mesh=mesh, device=torch.device("meta"))
    return {name: parameter.numel() for name, parameter in model.named_parameters()}


def shape_of(run: Run) -> Shape:
    from limoe_dist.equations.routing import capacity

    moe = run.moe
    tokens = run.image_tokens + run.text.length
    group_tokens = moe.group_pairs * tokens if moe.blocks else 0
    slots = capacity(
        group_tokens,
        num_experts=moe.num_experts,
        k=moe.top_k,
        factor=moe.capacity_factor,
        multiple=moe.capacity_multiple,
    )
    return Shape(
        tokens_per_pair=tokens,
        image_tokens=run.image_tokens,
        text_tokens=run.text.length,
        moe_blocks=moe.blocks,
        num_experts=moe.num_experts if moe.blocks else 0,
        group_tokens=group_tokens,
        capacity=slots if moe.blocks else 0,
        groups=run.train.batch_pairs // moe.group_pairs if moe.blocks else 0,
    )


def layout_of(run: Run, world: int) -> Layout:
    """The run on `world` ranks; its rules have been checked."""
    shape, ep = shape_of(run), run.parallel.ep
    groups = shape.groups // world
    parameters = sum(_numels(run, tp=run.parallel.tp, ep=ep).values())
    word = 8 if run.train.dtype == "fp64" else 4
    numbers = 4 * len(shape.moe_blocks) * shape.num_experts * groups * shape.capacity * run.model.width
    return Layout(
        world=world,
        axes=axes_of(world, tp=run.parallel.tp, ep=ep),
        experts_per_rank=shape.num_experts // ep,
        pairs_per_rank=run.train.batch_pairs // world,
        groups_per_rank=groups,
        parameters_per_rank=parameters,
        bytes_per_rank={
            "weights": word * parameters,
            "gradients": word * parameters,
            "adamw_moments": 2 * word * parameters,
            "sum": 4 * word * parameters,
        },
        all_to_all_bytes={name: size * numbers if ep > 1 else 0 for name, size in _sizes(run).items()},
    )


def _sizes(run: Run) -> dict[str, int]:
    """Bytes of a number in the experts' buffers, for each type that train.dtype may mean."""
    sizes = {"bf16": 2, "fp32": 4, "fp64": 8}
    wanted = ("bf16", "fp32") if run.train.dtype == "auto" else (run.train.dtype,)
    return {name: sizes[name] for name in wanted}


def axes_of(world: int, *, tp: int, ep: int) -> dict[str, list[list[int]]]:
    """The groups of each axis, as limoe_dist.parallel.mesh cuts them: tp and ep take neighbours."""
    axes = {}
    for inner, outer, size in (("tp", "dp", tp), ("ep", "edp", ep)):
        axes[outer] = [list(range(place, world, size)) for place in range(size)]
        axes[inner] = [list(range(first, first + size)) for first in range(0, world, size)]
    return axes


def _show(found: Plan, run: Run) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.print(_model_table(found))
    if found.layout is not None:
        console.print(_layout_table(found.layout, run))


def _table(title: str, rows: Sequence[tuple[str, str]]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _model_table(found: Plan) -> Table:
    count, shape = found.parameters, found.shape
    rows = [
        ("parameters", f"{count.total:,} ({count.total / 1e6:,.1f} M)"),
        ("parameters per token", f"{count.per_token:,} ({count.per_token / 1e6:,.1f} M)"),
        ("router parameters", f"{count.router:,}"),
        ("tokens per pair", f"{shape.tokens_per_pair} ({shape.image_tokens} image + {shape.text_tokens} text)"),
    ]
    if shape.moe_blocks:
        rows += [
            ("MoE blocks", f"{len(shape.moe_blocks)}: {', '.join(map(str, shape.moe_blocks))} (numbered from 0)"),
            ("experts per MoE block", f"{shape.num_experts}"),
            ("routing groups per step", f"{shape.groups:,} of {shape.group_tokens:,} tokens"),
            ("capacity", f"{shape.capacity} slots of each expert in each group"),
        ]
    else:
        rows.append(("MoE blocks", "none: a dense model"))
    return _table(found.preset, rows)


def _layout_table(layout: Layout, run: Run) -> Table:
    sizes = {name: len(groups[0]) for name, groups in layout.axes.items()}
    memory = layout.bytes_per_rank
    rows = [
        (
            "world",
            f"{layout.world} ranks = dp {sizes['dp']} x tp {sizes['tp']} = edp {sizes['edp']} x ep {sizes['ep']}",
        ),
        ("tp: share dense weights", _groups(layout.axes["tp"])),
        ("dp: same dense weights", _groups(layout.axes["dp"])),
    ]
    if run.moe.blocks:
        each = layout.experts_per_rank
        held = [list(range(first, first + each)) for first in range(0, run.moe.num_experts, each)]
        rows += [
            ("ep: share the experts", _groups(layout.axes["ep"])),
            ("edp: same experts", _groups(layout.axes["edp"])),
            ("experts, by place in ep", _groups(held)),
            ("routing groups per rank", f"{layout.groups_per_rank:,}"),
        ]
    rows += [
        ("pairs per rank", f"{layout.pairs_per_rank:,}"),
        ("parameters per rank", f"{layout.parameters_per_rank:,}"),
        (
            "bytes per rank (formula)",
            f"{_gb(memory['sum'])} = weights {_gb(memory['weights'])} + gradients {_gb(memory['gradients'])} "
            f"+ AdamW moments {_gb(memory['adamw_moments'])}; activations come on top",
        ),
    ]
    if sizes["ep"] > 1:
        exchanged = " or ".join(f"{_gb(size)} in {name}" for name, size in layout.all_to_all_bytes.items())
        rows.append(("all-to-all per step, rank", f"{exchanged} (formula); {_leaves(sizes['ep'])} leaves the rank"))
    return _table(f"on {layout.world} ranks", rows)


def _leaves(ep: int) -> str:
    return f"{ep - 1}/{ep}"


def _gb(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.2f} MB"


def _groups(groups: list[list[int]]) -> str:
    """`0-7 | 8-15 | ... | 56-63`: at most the first two groups and the last."""
    texts = [_ranks(group) for group in (groups if len(groups) <= 4 else [*groups[:2], groups[-1]])]
    if len(groups) > 4:
        texts.insert(2, "...")
    return " | ".join(texts)


def _ranks(ranks: list[int]) -> str:
    """`5`, `0-7`, `0,4,8` or `0,8,...,56`; ranks are evenly spaced."""
    if len(ranks) > 1 and ranks[1] == ranks[0] + 1:
        return f"{ranks[0]}-{ranks[-1]}"
    if len(ranks) > 4:
        return f"{ranks[0]},{ranks[1]},...,{ranks[-1]}"
    return ",".join(map(str, ranks))
