"""`limoe analyze RUN`: which expert serves what, counted over validation pairs: a table, JSON and drawings."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from limoe_dist.analysis.pruned import refuse_other_modality
from limoe_dist.config.errors import UserError
from limoe_dist.config.parse import load_run
from limoe_dist.config.schema import Parallel, Run
from limoe_dist.data.manifest import load_manifest

if TYPE_CHECKING:
    from rich.table import Table

    from limoe_dist.analysis.expert_matrix import Kind
    from limoe_dist.analysis.routed_pairs import Routed
    from limoe_dist.analysis.routing_record import Analysis, BlockRouting, Modality, Pictures
    from limoe_dist.data.tokenizer import Tokenizer

MOST_PICTURES = 8


@dataclass(frozen=True)
class Options:
    """Count what the routers of a run do with pictures and texts: success rates, experts by modality, patches, words.

    Pairs of --data go through one checkpoint in routing groups of moe.group_pairs, as in training: slots are limited,
    and image and text of a pair are in the same group; but without router noise and augmentation. One process does it.
    Writes RUN/analysis-<step>.json, and drawings into the directory RUN/analysis-<step>; limoe report RUN shows both.
    Shards with pictures alone or with texts alone will do: what the other modality would say is null.
    docs/analysis.md names the figure of the paper that each number belongs to.

    Exit status 2 where a setting or file has to be mended.
    """

    run: tyro.conf.Positional[str]
    """Directory of a run with experts and a checkpoint."""
    data: str = ""
    """manifest.json of the shards to route; empty: the run's data.validation."""
    checkpoint: int | None = None
    """Step of the checkpoint; by default the newest whole one."""
    rows: int = 2048
    """Rows to route, drawn from all in an order that is always the same; 0: all of them."""
    capacity_factor: float = 0.0
    """Capacity factor of the experts; 0: the run's moe.capacity_factor, that of training."""
    pictures: int = 6
    """Whole pictures to draw with their patches coloured by expert, up to 8; 0 draws none."""
    tokenizer: str = ""
    """The run's SentencePiece model, where it is no longer beside the run's training manifest."""
    out: str = ""
    """File for the result, which ends in .json; empty: RUN/analysis-<step>.json, where limoe report looks for it."""


def main(argv: list[str]) -> int:
    """Runs `limoe analyze`; returns its exit status. Lets UserError pass."""
    try:
        options = tyro.cli(Options, args=argv or ["--help"], prog="limoe analyze")
    except SystemExit as stop:
        return 2 if not argv else stop.code if isinstance(stop.code, int) else 2
    run, data = _check(options)
    analyze(options, run, data)
    return 0


def _check(options: Options) -> tuple[Run, str]:
    """The run on one rank and its data. Raises UserError for all that the options alone have wrong."""
    folder = Path(options.run)
    if not (folder / "run.json").is_file():
        raise UserError(f"{folder}: there is no run.json: this is not the directory of a run")
    run = load_run(folder / "run.json")
    refuse_other_modality(folder, run, "the routing of pairs")
    if not run.moe.blocks:
        raise UserError(
            f"{folder}: moe.blocks is empty: the run is dense, so there is no router to analyze; "
            f"limoe report {shlex.quote(str(folder))} shows what it has"
        )
    if options.rows < 0:
        raise UserError(f"--rows={options.rows}: must be 0, for all rows, or more")
    # With a factor of E every expert could serve all tokens: more would be memory for nothing.
    if not 0 <= options.capacity_factor <= run.moe.num_experts:
        raise UserError(
            f"--capacity-factor={options.capacity_factor:g}: must be 0, for that of training, or up to "
            f"moe.num_experts={run.moe.num_experts}"
        )
    if not 0 <= options.pictures <= MOST_PICTURES:
        raise UserError(f"--pictures={options.pictures}: must be 0 to {MOST_PICTURES}")
    if options.out and not options.out.endswith(".json"):
        raise UserError(
            f"--out {options.out}: must end in .json: the drawings go into a directory called as it is without"
        )
    data = options.data or run.data.validation
    if not data:
        raise UserError("--data is missing, and the run has no data.validation: give the manifest.json of some shards")
    load_manifest(data)
    changes: dict[str, Any] = {"parallel": Parallel(threads=run.parallel.threads)}
    if options.tokenizer:
        changes["data"] = run.data.model_copy(update={"tokenizer": options.tokenizer})
    return run.model_copy(update=changes), data


def analyze(options: Options, run: Run, data: str) -> Path:
    """Routes the rows, writes the result and shows the table; returns the path of the JSON. run: on one rank."""
    import torch
    from rich.console import Console

    from launch.progress import progress_bars
    from launch.run_tokenizer import open_run_tokenizer
    from limoe_dist.analysis.routed_pairs import as_in_training, drawn_rows, modalities_of, route_rows
    from limoe_dist.analysis.routing_record import pictures_folder, save_analysis
    from limoe_dist.checkpoint.reader import load_weights, open_checkpoint
    from limoe_dist.data.arrow import ShardSet
    from limoe_dist.model.tower import build_model
    from limoe_dist.parallel.mesh import Mesh

    device, mesh = torch.device("cuda" if torch.cuda.is_available() else "cpu"), Mesh.single()
    torch.set_num_threads(run.parallel.threads)
    run, shards = as_in_training(run, capacity_factor=options.capacity_factor), ShardSet(data, data=run.data)
    rows = drawn_rows(len(shards), options.rows)
    modalities = modalities_of(shards, rows)
    checkpoint = open_checkpoint(Path(options.run), mesh, device, options.checkpoint)
    tokenizer = open_run_tokenizer(run, checkpoint.checkpoint) if "text" in modalities else None
    model = build_model(run, mesh=mesh, device=device)
    load_weights(checkpoint, model, mesh)
    with progress_bars(True) as progress:
        routed = route_rows(
            model, run, shards, tokenizer, rows, modalities=modalities, device=device, progress=progress
        )
    step = checkpoint.state.step
    path = Path(options.out) if options.out else Path(options.run) / f"analysis-{step}.json"
    blocks = _blocks(run, routed, tokenizer)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pictures = _drawn(routed, blocks, pictures_folder(path), shown=options.pictures)
        analysis = _analysis(options, run, routed, blocks, pictures, step=step, data=shards.path, of=len(shards))
        save_analysis(analysis, path)
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written: {error}") from None
    Console(highlight=False).print(summary_table(analysis))
    print(_notes(analysis))
    print(f"written: {path}" + (f", drawings in {pictures_folder(path)}" if pictures else ""))
    if not options.out:
        print(f"limoe report {shlex.quote(options.run)} shows it")
    return path


def _blocks(run: Run, routed: Routed, tokenizer: Tokenizer | None) -> dict[int, BlockRouting]:
    from limoe_dist.analysis.pieces import piece_names

    name_of = piece_names(tokenizer.path) if tokenizer else str
    return {
        block: tally.result(run.moe, routed.modalities, padding_is_routed=run.text.pad == "token", name_of=name_of)
        for block, tally in routed.tallies.items()
    }


def _drawn(routed: Routed, blocks: dict[int, BlockRouting], folder: Path, *, shown: int) -> Pictures | None:
    from limoe_dist.analysis.patches import draw

    return draw(routed.looked, blocks, folder, shown=shown) if shown else None


def _analysis(
    options: Options,
    run: Run,
    routed: Routed,
    blocks: dict[int, BlockRouting],
    pictures: Pictures | None,
    *,
    step: int,
    data: str,
    of: int,
) -> Analysis:
    from limoe_dist.analysis.routing_record import Analysis
    from limoe_dist.equations.routing import capacity

    moe = run.moe
    factor = moe.eval_capacity_factor or moe.capacity_factor
    slots = capacity(
        routed.group_tokens, num_experts=moe.num_experts, k=moe.top_k, factor=factor, multiple=moe.capacity_multiple
    )
    return Analysis(
        run=_storable(options.run),
        preset=run.preset,
        step=step,
        data=_storable(data),
        modalities=routed.modalities,
        rows=routed.rows,
        rows_of=of,
        bad_rows=routed.bad_rows,
        left_over_rows=routed.left_over_rows,
        groups=routed.groups,
        group_pairs=routed.group_pairs,
        num_experts=moe.num_experts,
        top_k=moe.top_k,
        capacity=slots,
        capacity_factor=factor,
        order=moe.order,
        blocks={str(block): routing for block, routing in blocks.items()},
        pictures=pictures,
    )


def _storable(path: str) -> str:
    """A path whose bytes are no UTF-8 cannot stand in JSON as it is."""
    return path.encode("utf-8", "replace").decode("utf-8")


_RULES = """\
success: requests for a slot that got one. exp(H): as many experts, sharing
evenly, have the entropy of the modality's requests; gates: that of its average
gate, which the global loss holds above min = exp(tau). in use: asked by at least
half of an even share. place: median in the order of service, 0 first, 1 last.
experts: of one modality from 90 % of what they processed, else mixed; idle below
5 % of an even part."""


def summary_table(analysis: Analysis) -> Table:
    """Two lines for each MoE block."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    title = (
        f"step {analysis.step}: {analysis.rows} rows in {analysis.groups} groups of {analysis.group_pairs}; "
        f"{analysis.num_experts} experts, {analysis.capacity} slots each"
    )
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    columns = ("block", "", "success", "exp(H)", "gates", "min", "in use", "place", "experts")
    for name in columns:
        table.add_column(name, justify="left" if name in ("", "experts") else "right")
    for name, block in analysis.blocks.items():
        for modality in analysis.modalities:
            table.add_row(*_row(name, block, modality), end_section=modality == analysis.modalities[-1])
    return table


def _row(name: str, block: BlockRouting, modality: Modality) -> tuple[str, ...]:
    of = block.image if modality == "image" else block.text
    assert of is not None
    kinds = [each.kind for each in block.experts]
    # Two kinds in either line, so that the column stays narrow.
    told: tuple[Kind, Kind] = ("image", "mixed") if modality == "image" else ("text", "idle")
    experts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in told if kinds.count(kind))
    return (
        name,
        modality,
        "-" if of.success_rate is None else f"{100 * of.success_rate:.1f} %",
        "-" if of.effective_experts is None else f"{of.effective_experts:.2f}",
        "-" if of.effective_experts_by_gates is None else f"{of.effective_experts_by_gates:.2f}",
        f"{of.soft_minimum:g}" + ("" if of.soft_minimum_trained else " off"),
        str(of.used_experts),
        "-" if of.ranks is None else f"{of.ranks.median:.2f}",
        experts or "none",
    )


def _notes(analysis: Analysis) -> str:
    left_out = [
        f"{analysis.bad_rows} rows that cannot be used" if analysis.bad_rows else "",
        f"{analysis.left_over_rows} that do not fill a group" if analysis.left_over_rows else "",
    ]
    told = ", ".join(part for part in left_out if part)
    return _RULES + (f"\nleft out: {told}" if told else "")
