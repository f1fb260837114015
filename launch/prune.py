"""`limoe prune`: a run that keeps only the experts that one modality uses, measured against the whole one."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from launch.new_run import check_out, copy_history, made, open_run, run_tokenizer_path, same_settings, write_run
from limoe_dist.config.errors import UserError, warn
from limoe_dist.config.parse import write_atomically
from limoe_dist.config.schema import Run
from limoe_dist.data.manifest import load_manifest

if TYPE_CHECKING:
    import torch

    from launch.prune_measure import Measured
    from limoe_dist.analysis.prune import Kept, Usage
    from limoe_dist.analysis.pruned import Modality
    from limoe_dist.checkpoint.reader import Reader
    from limoe_dist.data.arrow import ShardSet
    from limoe_dist.data.tokenizer import Tokenizer
    from limoe_dist.eval.embed import Progress
    from limoe_dist.model.tower import Limoe


@dataclass(frozen=True)
class Options:
    """Keep the experts that one modality uses, and measure what that saves and costs (LIMoE, appendix E.4).

    limoe prune runs/first --modality image --out runs/first-image

    Every token of the modality is routed without a capacity limit; in each MoE block the fewest experts stay that serve
    --coverage of them. The router is not changed: a token whose expert is gone takes the best that is left. Accuracy of
    pictures is measured against texts of the whole run, and accuracy of texts against its pictures. The result runs in
    one process, for its own modality. Exit status 2 where a setting or file has to be mended.
    """

    run: tyro.conf.Positional[str]
    """Directory of a trained run with MoE blocks."""
    modality: Annotated[str, tyro.conf.arg(metavar="{image,text}")] = ""
    """The modality that the pruned run serves."""
    out: str = ""
    """Directory for the result: a run with one checkpoint, and pruned.json, which holds all figures."""
    data: str = ""
    """manifest.json of the shards on which the use of the experts is counted; empty: the run's training data."""
    rows: int = 4096
    """Rows of those shards to look at, evenly spread; 0: all."""
    validation: str = ""
    """manifest.json of the shards on which accuracy is measured; empty: the run's data.validation. Where they are the
    shards of --data, the accuracy flatters."""
    coverage: float | None = None
    """Share of the modality's tokens that must find their own expert in each block, above 0 to 1; by default 0.999. 1
    takes out only experts that no token chose."""
    min_share: float | None = None
    """In place of --coverage: keep the experts that serve this share of the modality's tokens or more, 0 to 1."""
    checkpoint: int | None = None
    """Step of the checkpoint; by default the newest whole one."""
    tokenizer: str = ""
    """The run's SentencePiece model, where it is no longer beside the run or its training manifest."""


def main(argv: list[str]) -> int:
    """Runs `limoe prune`; returns its exit status. Lets UserError pass."""
    try:
        options = tyro.cli(Options, args=argv or ["--help"], prog="limoe prune")
    except SystemExit as stop:
        return 2 if not argv else stop.code if isinstance(stop.code, int) else 2
    _prune(options, _check(options))
    return 0


@dataclass(frozen=True)
class Inputs:
    """What can be checked before torch is imported, and was."""

    run: Run
    out: Path
    modality: Modality
    counted: tuple[str, ...]
    """The manifests on which use is counted."""
    validation: str
    """The manifest on which accuracy is measured; empty: none."""


def _check(options: Options) -> Inputs:
    """Raises UserError with all that the options alone have wrong."""
    from limoe_dist.config.errors import nearest

    if options.modality not in ("image", "text"):
        given = f"--modality={options.modality}" if options.modality else "--modality is missing"
        raise UserError(f"{given}: must be image or text{nearest(options.modality, ('image', 'text'))}")
    modality: Modality = "image" if options.modality == "image" else "text"
    if options.coverage is not None and options.min_share is not None:
        raise UserError(f"--coverage={options.coverage} and --min-share={options.min_share} both choose: give one")
    if options.coverage is not None and not 0 < options.coverage <= 1:
        raise UserError(f"--coverage={options.coverage}: must be above 0, and 1 at most: a share of the tokens")
    if options.min_share is not None and not 0 <= options.min_share <= 1:
        raise UserError(f"--min-share={options.min_share}: must be 0 to 1: a share of the tokens")
    if options.rows < 0:
        raise UserError(f"--rows={options.rows}: must be 0 or more")
    run_dir = Path(options.run)
    run = open_run(run_dir)
    if why := _no_experts(run):
        raise UserError(f"{run_dir}: {why}")
    out = check_out(options.out)
    counted = (options.data,) if options.data else _training_data(run)
    if not counted:
        raise UserError(
            f"--data is missing, and {run.data.manifest or 'data.manifest'} is not there: give the manifest.json of "
            "shards with what the pruned run shall serve"
        )
    validation = options.validation or (run.data.validation if _is_there(run.data.validation) else "")
    for path in (*counted, *filter(None, (validation,))):
        load_manifest(path)
    return Inputs(run, out, modality, counted, validation)


def _no_experts(run: Run) -> str:
    if run.model.towers == "two":
        return "model.towers=two: a two-tower model has no experts, and each of its towers serves one modality already"
    if not run.moe.blocks:
        return "moe.blocks is empty: a dense model has no experts to take out"
    if run.moe.kept_experts:
        return "moe.kept_experts is set: this run was pruned already; prune the run that it was made from"
    return ""


def _training_data(run: Run) -> tuple[str, ...]:
    """The manifests that the run was trained on, or the one of its validation data; none where they are gone."""
    from limoe_dist.data.mixture import entries_of

    paths = tuple(entry.path for entry in entries_of(run.data))
    if all(map(_is_there, paths)):
        return paths
    return (run.data.validation,) if _is_there(run.data.validation) else ()


def _is_there(manifest: str) -> bool:
    from limoe_dist.data.mixture import manifest_file
    from limoe_dist.data.places import exists

    return bool(manifest) and exists(manifest_file(manifest))


def _prune(options: Options, inputs: Inputs) -> None:
    import torch

    from launch.progress import progress_bars
    from launch.prune_measure import Pair, measure
    from limoe_dist.analysis import prune
    from limoe_dist.analysis.pruned import RECORD
    from limoe_dist.checkpoint.average import describe
    from limoe_dist.checkpoint.reader import open_checkpoint
    from limoe_dist.data.tokenizer import Tokenizer
    from limoe_dist.parallel.mesh import Mesh

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run_dir, modality = Path(options.run), inputs.modality
    reader = open_checkpoint(run_dir, Mesh.single(), device, options.checkpoint)
    same_settings(inputs.run, reader.state.settings, reader.checkpoint, run_dir)
    vocabulary = run_tokenizer_path(inputs.run, run_dir, reader.checkpoint, options.tokenizer)
    run = prune.unlimited(inputs.run)
    tokenizer = Tokenizer(vocabulary, length=run.text.length, vocab_limit=run.text.vocab_size)
    whole = _loaded(run, reader, device)
    with progress_bars(True) as progress:
        counted = _rows(inputs.counted, options.rows)
        usage = _usage(whole, run, counted, tokenizer, modality, device, progress)
        if options.min_share is not None:
            kept = prune.sharing(usage, options.min_share, at_least=run.moe.top_k)
        else:
            kept = prune.covering(usage, _coverage(options), at_least=run.moe.top_k)
        with made(inputs.out) as folder:
            pruned_run = prune.pruned_run(inputs.run, kept)
            written = prune.write_pruned(reader, pruned_run, kept, folder, progress=progress)
            smaller = _loaded(pruned_run, open_checkpoint(folder, Mesh.single(), device), device)
            shards = _rows((inputs.validation,), 0) if inputs.validation else counted
            found = measure(
                Pair(whole, run, smaller, pruned_run),
                modality,
                shards,
                tokenizer,
                accuracy=bool(inputs.validation),
                device=device,
                progress=progress,
            )
            found = replace(found, notes=(*found.notes, *_remarks(inputs)))
            source = describe(reader.checkpoint)
            record = {
                "task": "prune",
                "modality": modality,
                "run": options.run,
                "preset": run.preset,
                "step": source.step,
                "source": source.to_json(),
                "checkpoint": str(inputs.out / written.relative_to(folder)),
                "rule": {"min_share": options.min_share}
                if options.min_share is not None
                else {"coverage": _coverage(options)},
                "usage": _usage_json(usage, counted),
                "kept": [_kept_json(each, run) for each in kept],
            } | found.to_json()
            copy_history(run_dir, folder, step=source.step)
            write_run(pruned_run, vocabulary, folder, out=inputs.out)
            write_atomically(folder / RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    for note in found.notes:
        warn(note)
    _show(options, inputs, usage, kept, found)


def _remarks(inputs: Inputs) -> list[str]:
    from limoe_dist.data.mixture import manifest_file

    notes = []
    files = {manifest_file(path) for path in inputs.counted}
    if inputs.validation and manifest_file(inputs.validation) in files:
        notes.append(
            f"accuracy is measured on {inputs.validation}, on which the experts were chosen: it flatters; give other "
            "shards with --data or --validation"
        )
    if inputs.run.moe.eval_capacity != "full":
        notes.append(
            f"moe.eval_capacity={inputs.run.moe.eval_capacity} became full in the pruned run, and accuracy is that "
            "without a limit before and after: one modality alone would overflow its few experts"
        )
    return notes


def _coverage(options: Options) -> float:
    from limoe_dist.analysis.prune import COVERAGE

    return COVERAGE if options.coverage is None else options.coverage


def _loaded(run: Run, reader: Reader, device: torch.device) -> Limoe:
    from limoe_dist.checkpoint.reader import load_weights
    from limoe_dist.model.tower import build_model
    from limoe_dist.parallel.mesh import Mesh

    model = build_model(run, mesh=Mesh.single(), device=device)
    load_weights(reader, model, Mesh.single())
    return model.eval()


def _rows(manifests: Sequence[str], most: int) -> ShardSet:
    """The shards of some manifests; `most` rows of them, evenly spread, where there are more (0: all)."""
    from limoe_dist.data.arrow import Row, ShardSet
    from limoe_dist.data.manifest import verify_shards

    class Spread(ShardSet):
        def __len__(self) -> int:
            return min(most, super().__len__()) if most else super().__len__()

        def row(self, number: int) -> Row:
            if not 0 <= number < len(self):
                raise IndexError(f"row {number} of {len(self)}")
            there = number * super().__len__() // len(self)
            shard = int((self._first_rows <= there).sum()) - 1
            return self._shard(shard).row(there - int(self._first_rows[shard]), number=number, shard=shard)

    shards = Spread(*manifests)
    for part in shards.parts:
        verify_shards(part.manifest, part.folder, rank=0, world=1)
    return shards


def _usage(
    model: Limoe,
    run: Run,
    shards: ShardSet,
    tokenizer: Tokenizer,
    modality: Modality,
    device: torch.device,
    progress: Progress,
) -> Usage:
    from limoe_dist.analysis.prune import captions_of, usage_of_pictures, usage_of_texts

    if modality == "image":
        return usage_of_pictures(model, run, shards, device=device, progress=progress)
    texts = captions_of(shards, run.eval.templates)
    if not texts:
        raise UserError(
            f"--data {shards.path}: no row has a caption or a concept, so there is no text whose experts could be "
            "counted: give --data MANIFEST"
        )
    return usage_of_texts(model, run, tokenizer, texts, device=device, progress=progress)


def _usage_json(usage: Usage, shards: ShardSet) -> dict[str, Any]:
    counts = {str(block): list(count_E) for block, count_E in usage.count_E.items()}
    return {
        "data": [part.path for part in shards.parts],
        "rows": len(shards),
        "inputs": usage.inputs,
        "choices_by_block": counts,
    }


def _kept_json(kept: Kept, run: Run) -> dict[str, Any]:
    return {
        "block": kept.block,
        "experts": list(kept.experts),
        "of": run.moe.num_experts,
        "coverage": kept.coverage,
        "needed_for": {f"{share:g}": number for share, number in kept.needed_for.items()},
    }


def _show(options: Options, inputs: Inputs, usage: Usage, kept: Sequence[Kept], found: Measured) -> None:
    from rich.console import Console

    from launch.prune_tables import figures_table, kept_table
    from limoe_dist.analysis.pruned import RECORD

    console = Console(highlight=False)
    console.print(kept_table(usage, kept, num_experts=inputs.run.moe.num_experts))
    console.print(figures_table(found, inputs.modality))
    out = Path(options.out)
    print(f"written: {out}, weights alone, for {inputs.modality}s in one process; all figures: {out / RECORD}")
    print(f"next: limoe checkpoint show {shlex.quote(str(out))}")
