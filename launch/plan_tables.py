"""The tables that `limoe plan` prints."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from launch.counting import Cost as ModelCost
from launch.counting import Parameters, Shape
from launch.plan import Cost, DType, Layout, Plan
from launch.traffic import During, Exchange
from limoe_dist.config.schema import Run

WORDS = {
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "all_to_all": "all-to-all",
    "all_reduce": "all-reduce",
}
Moved = dict[tuple[str, str, str], list[Exchange]]
"""Exchanges by operation, axis and what they move, for a line each."""


def show(found: Plan, run: Run) -> None:
    console = Console(highlight=False)
    console.print(_model_table(found.preset, found.parameters, found.shape))
    console.print(_twins_table(found.models, run))
    if found.layout is None:
        return
    console.print(_layout_table(found.layout, run))
    if found.layout.world > 1:
        console.print(_traffic_table(found.layout, run))


def _table(title: str, rows: Sequence[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _model_table(preset: str, count: Parameters, shape: Shape) -> Table:
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
    return _table(preset, rows)


def _twins_table(models: dict[str, ModelCost], run: Run) -> Table:
    """The run beside its dense twins; ratios against the dense one-tower twin."""
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), show_edge=False, title_justify="left", caption_justify="left")
    table.title = "beside its dense twins: parameters, and FLOPs of a pair's forward pass"
    table.add_column("model")
    for name in ("total", "per token", "FLOPs", "ratio", "with buffers", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    dense = models["dense one-tower"].flops
    for name, cost in models.items():
        parameters, flops = cost.parameters, cost.flops
        table.add_row(
            f"{name}{' (LIMoE)' if name == 'itself' and run.moe.blocks else ''}",
            f"{parameters.total / 1e6:,.1f} M",
            f"{parameters.per_token / 1e6:,.1f} M",
            f"{_flops(flops.pair)}",
            f"{flops.pair / dense.pair:.3f}",
            f"{_flops(flops.pair_with_buffers)}",
            f"{flops.pair_with_buffers / dense.pair:.3f}",
        )
    table.caption = "2 FLOPs a multiply-add; with buffers: empty slots of experts too, as in training"
    return table


def _flops(count: int) -> str:
    """`123.4 M`, `12.34 G` or `1.23 T`, to four digits."""
    for unit, size in (("T", 1e12), ("G", 1e9)):
        if count >= size:
            return f"{count / size:,.4g} {unit}"
    return f"{count / 1e6:,.4g} M"


def _layout_table(layout: Layout, run: Run) -> Table:
    sizes = {name: len(groups[0]) for name, groups in layout.axes.items()}
    cut = f"dp {sizes['dp']} x tp {sizes['tp']} = edp {sizes['edp']} x ep {sizes['ep']}"
    rows = [
        ("world", f"{_ranks_of(layout)} = {cut}"),
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
        *_pass_rows(layout, run),
        ("parameters per rank", f"{layout.parameters_per_rank:,}"),
        *((f"memory per rank, {dtype}", _memory(cost, run)) for dtype, cost in layout.costs.items()),
        ("a save, per rank", _saved(layout)),
    ]
    table = _table(f"on {_ranks_of(layout)}", rows)
    auto = "; train.dtype=auto is bf16 on a GPU, fp32 on a CPU" if run.train.dtype == "auto" else ""
    table.caption = f"memory: {_formula(run)}; activations come on top{auto}"
    table.caption_justify = "left"
    return table


def _pass_rows(layout: Layout, run: Run) -> list[tuple[str, str]]:
    """Microbatches, and what they and recompute add to a step."""
    compute, rows = layout.compute, []
    if layout.microbatches > 1:
        added = _added(layout, "embedding pass")
        rows.append(("microbatches per rank", f"{layout.microbatches} of {run.train.microbatch_pairs} pairs: {added}"))
    if compute.recompute:
        rows.append(("recompute", _added(layout, "recompute")))
    if compute.embedding_pass or compute.recompute:
        terms = "forward 1 + backward 2"
        terms += " + embedding pass 1" * compute.embedding_pass + " + recompute 1" * compute.recompute
        rows.append(("compute per step", f"{terms}: {compute.factor:.2f}x of forward and backward alone"))
    return rows


def _added(layout: Layout, during: During) -> str:
    """`+1 forward: 1.33x compute, +1.20 GB exchanged in bf16, +2.40 GB in fp32`."""
    more = [
        f"+{_size(count)} {'exchanged ' * (number == 0)}in {dtype}"
        for number, (dtype, cost) in enumerate(layout.costs.items())
        if (count := sum(exchange.num_bytes for exchange in cost.exchanges if exchange.during == during))
    ]
    return ", ".join([f"+1 forward: {4 / 3:.2f}x compute", *more])


def _saved(layout: Layout) -> str:
    saved = next(iter(layout.costs.values())).memory.saved
    return f"{_size(saved)} on disk, and as much of the host's memory for good"


def _memory(cost: Cost, run: Run) -> str:
    memory = cost.memory
    state = "AdamW moments" if run.optim.name == "adamw" else "Adafactor state"
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "their summed pieces": memory.summed_pieces,
        "masters": memory.masters,
        state: memory.optimizer,
    }
    return f"{_size(memory.sum)} = " + " + ".join(f"{name} {_size(count)}" for name, count in parts.items() if count)


def _traffic_table(layout: Layout, run: Run) -> Table:
    """A line for each collective, its axis and what it moves, all passes of a step together."""
    # As narrow as it can be: 80 columns have to do.
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), show_edge=False, title_justify="left", caption_justify="left")
    table.title = f"collectives of a step on {_ranks_of(layout)}: bytes of each rank"
    for name in ("collective", "over", "moves"):
        table.add_column(name, no_wrap=name != "moves")
    for name in ("calls", *layout.costs, "leaves"):
        table.add_column(name, justify="right", no_wrap=True)
    moved = {dtype: _moved(cost) for dtype, cost in layout.costs.items()}
    for key in dict.fromkeys(key for lines in moved.values() for key in lines):
        table.add_row(*_traffic_row(key, moved))
    table.add_section()
    whole = {dtype: [each.num_bytes for each in cost.exchanges] for dtype, cost in layout.costs.items()}
    leaving = {dtype: [each.leaving_bytes for each in cost.exchanges] for dtype, cost in layout.costs.items()}
    table.add_row("in all", "", "", "", *(_size(sum(counts)) for counts in whole.values()), "")
    table.add_row("leaves the rank", "", "", "", *(_size(sum(counts)) for counts in leaving.values()), "")
    table.caption = f"{_formula(run)}; leaves: the share of whole buffers that leaves the rank"
    return table


def _formula(run: Run) -> str:
    return "formula" if run.optim.engine == "native" else "formula of optim.engine=native"


def _moved(cost: Cost) -> Moved:
    lines: Moved = {}
    for exchange in cost.exchanges:
        lines.setdefault((exchange.op, exchange.axis, exchange.moves), []).append(exchange)
    return lines


def _traffic_row(key: tuple[str, str, str], moved: dict[DType, Moved]) -> list[str]:
    op, axis, moves = key
    lines = {dtype: by_key.get(key, []) for dtype, by_key in moved.items()}
    first = next(exchanges[0] for exchanges in lines.values() if exchanges)
    # The types of weights decide how many buckets there are.
    calls = dict.fromkeys(f"{sum(each.calls for each in exchanges):,}" for exchanges in lines.values())
    share = f"{first.ranks - 1}/{first.ranks}"
    return [
        WORDS[op],
        axis,
        moves,
        " or ".join(calls),
        *(_size(sum(each.num_bytes for each in exchanges)) for exchanges in lines.values()),
        f"2x{share}" if op == "all_reduce" else share,
    ]


def _ranks_of(layout: Layout) -> str:
    return f"{layout.world} rank{'s' if layout.world > 1 else ''}"


def _size(count: int) -> str:
    """`1.23 GB`, `0.12 GB`, `45.67 MB`, `8.90 kB` or `8 B`."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size / 10:
            return f"{count / size:,.2f} {unit}"
    return f"{count} B"


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
