"""`limoe report RUN`: one self-contained HTML page about a run, with example retrievals of its newest checkpoint."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from limoe_dist.analysis.pruned import refuse_other_modality
from limoe_dist.config.errors import UserError
from limoe_dist.config.parse import load_run, write_atomically
from limoe_dist.config.schema import Parallel, Run
from limoe_dist.data.manifest import load_manifest

if TYPE_CHECKING:
    import torch

    from limoe_dist.analysis.examples import Examples
    from limoe_dist.analysis.routing_section import Section
    from limoe_dist.analysis.summary import Facts
    from limoe_dist.checkpoint.reader import Reader
    from limoe_dist.data.arrow import ShardSet
    from limoe_dist.eval.retrieval import Retrieval

MOST_ROWS = 5000
"""Pictures that a report searches, on one process: a validation set as large as COCO's is searched whole."""
MOST_EXAMPLES = 24


@dataclass(frozen=True)
class Options:
    """Write one self-contained HTML page: curves, routing by modality, evaluations, and retrievals with their pictures.

    The newest checkpoint searches the pictures of --data, in this process. The section "Routing" shows the newest
    RUN/analysis-<step>.json, which limoe analyze makes. What a run does not have is not an error: the page says how to
    get it. Exit status 2 where a setting or file has to be mended.
    """

    run: tyro.conf.Positional[str]
    """Directory of a run, finished or not."""
    data: str = ""
    """manifest.json of the pictures to search; empty: the run's data.validation, else its data.manifest."""
    out: str = ""
    """File for the page; empty: RUN/report.html."""
    examples: int = 12
    """Example retrievals, up to 24; 0 loads no checkpoint."""
    tokenizer: str = ""
    """The run's SentencePiece model, where it is no longer beside the run's training manifest."""


def main(argv: list[str]) -> int:
    """Runs `limoe report`; returns its exit status. Lets UserError pass."""
    try:
        options = tyro.cli(Options, args=argv or ["--help"], prog="limoe report")
    except SystemExit as stop:
        return 2 if not argv else stop.code if isinstance(stop.code, int) else 2
    write_report(options)
    return 0


def write_report(options: Options) -> Path:
    """Writes the page and says where; returns its path. Raises UserError for what the user can mend."""
    folder = Path(options.run)
    if not (folder / "run.json").is_file():
        raise UserError(f"{folder}: there is no run.json: this is not the directory of a run")
    if not 0 <= options.examples <= MOST_EXAMPLES:
        raise UserError(f"--examples={options.examples}: must be 0 to {MOST_EXAMPLES}")
    run = load_run(folder / "run.json")
    if options.data:
        load_manifest(options.data)

    from limoe_dist.analysis.evaluated import results
    from limoe_dist.analysis.history import read_evaluations, read_metrics
    from limoe_dist.analysis.incidents import read_incidents
    from limoe_dist.analysis.report import page

    history = read_metrics(folder / "metrics.jsonl")
    evaluations = read_evaluations(folder / "evaluations.jsonl")
    examples = _examples_or_why_not(options, run, folder)
    found = results(folder, evaluations, validation=run.data.validation)
    routed = routed_or_why_not(run, folder)
    incidents = read_incidents(folder)
    text = page(run, history, evaluations, found, _facts(run, folder), examples, routed, incidents)
    path = Path(options.out) if options.out else folder / "report.html"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written: {error}") from None
    if isinstance(examples, str):
        print(f"without example retrievals: {examples}")
    else:
        print(f"example retrievals: {examples.rows:,} pictures of {examples.data}, {examples.role}")
    if isinstance(routed, str):
        print(f"without routing: {routed}")
    else:
        print(f"routing: {routed.of.rows:,} rows of {routed.of.data} at step {routed.of.step}")
    print(f"written: {path} ({path.stat().st_size / 2**20:.2f} MiB)")
    return path


def routed_or_why_not(run: Run, folder: Path) -> Section | str:
    """The newest analysis, or a sentence about how to make one."""
    from limoe_dist.analysis.routing_record import newest_analysis
    from limoe_dist.analysis.routing_section import section

    if not run.moe.blocks:
        return "the run is dense: there is no router"
    passed_over: list[str] = []
    newest = newest_analysis(folder, warn=passed_over.append)
    if newest is not None:
        return section(*newest)
    problem = f"{passed_over[0]}. " if passed_over else "Not analysed yet. "
    return (
        f"{problem}limoe analyze {shlex.quote(str(folder))} sends validation pairs through the newest checkpoint; "
        f"then run limoe report {shlex.quote(str(folder))} again."
    )


def _facts(run: Run, folder: Path) -> Facts:
    from launch.counting import count_parameters
    from limoe_dist.analysis.summary import Facts

    count = count_parameters(run)
    return Facts(str(folder), parameters=count.total, per_token=count.per_token, world=_ranks(folder))


def _ranks(folder: Path) -> int | None:
    """Ranks that trained, by the newest checkpoint. None without a whole one."""
    from limoe_dist.checkpoint.catalog import checkpoints, latest_checkpoint
    from limoe_dist.checkpoint.state import read_state

    try:
        return read_state(latest_checkpoint(folder)).layout.ranks if checkpoints(folder) else None
    except UserError:
        return None


def _examples_or_why_not(options: Options, run: Run, folder: Path) -> Examples | str:
    """The examples, or a sentence about what is missing and what to run.

    Raises UserError only for what --data or --tokenizer have wrong: the page is worth having without examples.
    """
    from limoe_dist.checkpoint.catalog import checkpoints

    command = f"limoe report {shlex.quote(str(folder))}"
    if options.examples == 0:
        return f"They were left out by --examples 0: {command} --examples 12 shows them."
    if not checkpoints(folder):
        return (
            "The run has no whole checkpoint yet; the first comes after checkpoint.every_steps="
            f"{run.checkpoint.every_steps} steps, or at its end: then run {command} again."
        )
    data, role = _searched(options, run)
    if not data:
        return f"The run names no data: {command} --data MANIFEST shows them."
    try:
        refuse_other_modality(folder, run, "retrieval")
        return _examples(options, run, folder, data, role)
    except UserError as error:
        if options.data or options.tokenizer:
            raise
        return f"{error}. {command} --data MANIFEST searches other shards."


def _searched(options: Options, run: Run) -> tuple[str, str]:
    """The manifest whose pictures are searched, and what it is to the run."""
    data = options.data or run.data.validation or run.data.manifest
    if data == run.data.validation:
        return data, "the run's validation data"
    return data, _TRAINED_ON if data == run.data.manifest else "given with --data"


_TRAINED_ON = "the run's own training data: results on pictures that it has not seen are lower"


def _examples(options: Options, run: Run, folder: Path, data: str, role: str) -> Examples:
    from launch.progress import progress_bars
    from launch.run_tokenizer import open_run_tokenizer
    from limoe_dist.analysis.evaluated import retrieval_figures
    from limoe_dist.analysis.examples import Examples, Query, example_of, spread
    from limoe_dist.checkpoint.reader import open_checkpoint
    from limoe_dist.parallel.mesh import Mesh

    checkpoint = open_checkpoint(folder, Mesh.single(), _device())
    alone = _with_parallel(run, options.tokenizer)
    tokenizer = open_run_tokenizer(alone, checkpoint.checkpoint)
    shards = _first_rows(data)
    with progress_bars(True) as progress:
        found = _retrieval(alone, checkpoint, shards, tokenizer, progress)
    queries = [Query(each.row, each.text, each.texts, each.rows) for each in found.examples]
    return Examples(
        step=checkpoint.state.step,
        data=data,
        role=role,
        rows=found.rows,
        rows_read=len(shards),
        rows_of=shards.manifest.rows,
        texts=found.texts,
        figures=retrieval_figures({"retrieval": found.to_json()}),
        shown=tuple(example_of(query, shards) for query in spread(queries, options.examples)),
    )


def _device() -> torch.device:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _retrieval(run: Run, checkpoint: Reader, shards: ShardSet, tokenizer: Any, progress: Any) -> Retrieval:
    from limoe_dist.checkpoint.reader import load_weights
    from limoe_dist.eval.retrieval import retrieval
    from limoe_dist.model.tower import build_model
    from limoe_dist.parallel.mesh import Mesh

    device, mesh = _device(), Mesh.single()
    model = build_model(run, mesh=mesh, device=device)
    load_weights(checkpoint, model, mesh)
    return retrieval(model, run, shards, tokenizer, mesh=mesh, device=device, progress=progress)


def _with_parallel(run: Run, tokenizer: str) -> Run:
    """The run on one rank."""
    changes: dict[str, Any] = {"parallel": Parallel(threads=run.parallel.threads)}
    if tokenizer:
        changes["data"] = run.data.model_copy(update={"tokenizer": tokenizer})
    return run.model_copy(update=changes)


def _first_rows(data: str) -> ShardSet:
    """The shards of a manifest, of which only the first MOST_ROWS rows are seen."""
    from limoe_dist.data.arrow import ShardSet

    class FirstRows(ShardSet):
        def __len__(self) -> int:
            return min(MOST_ROWS, super().__len__())

    return FirstRows(data)
