"""`limoe submit`: a training run as a job of Slurm, checked on the login node, in a script that a person can read."""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

from launch.named import listing
from launch.submit_checks import Checked, check_all, existing, size
from launch.submit_words import Submit, bad_hosts, check_encoding, understand, without
from limoe_dist.config.errors import UserError
from limoe_dist.config.schema import Run
from limoe_dist.data.mixture import entries_of
from limoe_dist.data.places import is_remote
from slurm.options import Queue
from slurm.scheduler import submit
from slurm.script import Training, check_path, render_training
from slurm.submissions import Draft, folder, next_script, note, note_job, now
from slurm.times import written

USAGE = """\
usage: limoe submit PRESET|RECIPE|FILE.json --nodes N --time T --data MANIFEST --out RUN [options] [any of limoe train]
       limoe submit --resume RUN --nodes N --time T [options] [settings that do not decide results]

{listing}
Checks layout, data, vocabulary, memory and space here, without torch; writes RUN/slurm/001.sbatch (002, ...), shows it,
asks, and submits it.

  --requeue    the job goes on by itself: at its time limit, after a preemption, where a host or rank failed
  --chain N    N jobs, one after the other, where requeueing is not allowed
  --dry-run    the script alone, to standard output; works where there is no Slurm

`limoe submit PRESET --help` lists the options of the job, `limoe train PRESET --help` the settings of the run.
`limoe status RUN` tells how it goes.

exit status: 0 submitted, 2 a setting, file or option that you can mend, or Slurm refused"""


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE.format(listing=listing()))
        return 0 if argv else 2
    check_encoding(argv)
    try:
        asked, checked, failed = _checked(argv)
        script = next_script(asked.out)
        training = _training(asked, checked.run, script)
    except OSError as error:
        raise UserError(f"{error.filename or '--out'}: cannot be looked at: {error.strerror}") from None
    text = render_training(asked.job, training)
    if asked.job.dry_run:
        print("\n".join([*summary(asked, checked), f"log       {training.log}"]), file=sys.stderr, flush=True)
        print(text, end="", flush=True)
        return 0
    start = _start(text, failed, asked.out)
    show(text, script)
    print("\n".join([*summary(asked, checked), start]), flush=True)
    if not agreed(asked.job, f"Submit {'these jobs' if asked.job.chain else 'this job'}?"):
        return 2
    jobs = hand_in(asked, script, text)
    print("\n".join(_how_to_watch(asked, jobs)), flush=True)
    return 0


def _checked(argv: list[str]) -> tuple[Submit, Checked, str]:
    """What is asked for, what is found out about it, and the hosts that are left out since they failed twice."""
    asked = understand(argv)
    check_path(asked.out)
    failed = bad_hosts(asked.out)
    asked = replace(asked, job=without(asked.job, failed))
    # The script has standard output for itself.
    with redirect_stdout(sys.stderr if asked.job.dry_run else sys.stdout):
        return asked, check_all(asked.run, asked.out, asked.job, resume=asked.resume, words=list(asked.words)), failed


def _start(text: str, failed: str, out: Path) -> str:
    try:
        return try_out(text)
    except UserError as error:
        if not failed:
            raise
        raise UserError(
            f"{error} (without {failed}, where this run failed twice: {folder(out) / 'exclude'} names them; take out "
            "what is repaired, or is no host any more)"
        ) from None


def _training(asked: Submit, run: Run, script: Path) -> Training:
    words = _without(asked.words, "--resume" if asked.resume else "--out")
    stop = ("--stop-after", str(asked.command.stop_after)) if asked.command.stop_after else ()
    places = [asked.out.parent, Path.cwd(), *_data_folders(run)]
    return Training(
        run=asked.out,
        script=script,
        log=_log(asked),
        start=() if asked.resume else words,
        go_on=words if asked.resume else stop,
        threads=run.parallel.threads,
        cpus_per_rank=asked.job.cpus_per_rank or run.parallel.threads + run.data.threads,
        before_s=asked.job.before_s(run.train.stop_grace_s),
        wait_s=int(run.train.stop_grace_s),
        folder=Path.cwd(),
        mounts=tuple(dict.fromkeys(str(place) for place in places)),
    )


def _log(asked: Submit) -> Path:
    """Beside the scripts of the run; where a dry run leaves no such folder, in the nearest that is there."""
    place = folder(asked.out)
    if not asked.job.dry_run or place.is_dir():
        return place / "job-%j.log"
    return existing(asked.out) / f"{asked.out.name}-job-%j.log"


def _without(words: Sequence[str], option: str) -> tuple[str, ...]:
    left = []
    skip = False
    for word in words:
        if skip or word.partition("=")[0] == option:
            skip = word == option
            continue
        left.append(word)
    return tuple(left)


def _data_folders(run: Run) -> list[Path]:
    files = [entry.path for entry in entries_of(run.data)]
    files += [path for path in (run.data.validation, run.data.tokenizer) if path]
    return [Path(file) if Path(file).is_dir() else Path(file).parent for file in files if file and not is_remote(file)]


def summary(asked: Submit, checked: Checked) -> list[str]:
    job, run, rank = asked.job, checked.run, checked.rank
    before = written(job.before_s(run.train.stop_grace_s))
    then = "ends (give --requeue or --chain N for a run that goes on by itself)"
    if job.signal == "TERM":
        then = "ends: TERM is no wish to go on"
    elif job.requeue:
        then = "puts itself into the queue again"
    elif job.chain:
        then = f"leaves the rest to the next of {job.chain}"
    others = ", ".join(str(count) for count in checked.node_counts if count != job.nodes) or "no other"
    wanted = checked.checkpoints * rank.checkpoint
    return [
        f"run       {asked.out}" + (" (goes on)" if asked.resume else ""),
        f"ranks     {job.ranks}: {job.nodes} node{'s' if job.nodes > 1 else ''} with {job.per_node} each"
        + (f" on {job.gpus_per_node} GPUs" if job.gpus_per_node else " on CPUs")
        + f", {run.train.batch_pairs // job.ranks} pairs of the batch each; nodes that also divide it: {others}",
        f"memory    {size(rank.sum)} of weights and optimizer state for each rank ({checked.dtype}; by the native "
        "engine's formula); activations come on top",
        f"space     {size(wanted)} for {checked.checkpoints} checkpoints; {size(checked.free)} are free",
        f"time      {written(job.time_limit_s)}; {before} before its end the ranks save, and the job {then}",
        *([f"hosts     without {job.exclude}"] if job.exclude else []),
    ]


def try_out(text: str) -> str:
    """Slurm's word on whether and when the script could start. Raises UserError with its reason."""
    with tempfile.NamedTemporaryFile("w", suffix=".sbatch", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        return f"slurm     {submit(Path(file.name), test_only=True)}"


def show(text: str, script: Path) -> None:
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.syntax import Syntax

        Console().print(Syntax(text, "bash", background_color="default"))
    else:
        print(text)
    print(f"script    {script}")


def agreed(job: Queue, question: str) -> bool:
    """Raises UserError where nobody can be asked."""
    if job.yes:
        return True
    if not sys.stdin.isatty():
        raise UserError("nothing was submitted: this is no terminal, so nobody can be asked: give --yes, or --dry-run")
    try:
        answer = input(f"{question} [y/N] ")
    except EOFError:
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        print("nothing was submitted")
        return False
    return True


def hand_in(asked: Submit, script: Path, text: str) -> list[str]:
    """Writes the script and submits it, once or as a chain; the numbers of the jobs. Raises UserError."""
    job = asked.job
    jobs: list[str] = []
    draft = Draft(script, text)
    try:
        for _ in range(job.chain or 1):
            jobs.append(submit(script, dependency=f"afterany:{jobs[-1]}" if jobs else ""))
            if job.chain:
                note_job(script, jobs[-1])
    except UserError as error:
        if not jobs:
            draft.discard()
            raise
        raise UserError(f"{error}\nonly {len(jobs)} of {job.chain} jobs were submitted: {', '.join(jobs)}") from None
    finally:
        if jobs:
            submission = now(
                jobs,
                script,
                nodes=job.nodes,
                ranks=job.ranks,
                time_limit=written(job.time_limit_s),
                requeue=job.requeue,
                chain=job.chain,
                exclude=tuple(filter(None, [job.exclude])),
            )
            note(asked.out, submission)
    return jobs


def _how_to_watch(asked: Submit, jobs: Sequence[str]) -> list[str]:
    run, log = shlex.quote(str(asked.out)), shlex.quote(str(folder(asked.out) / f"job-{jobs[0]}.log"))
    # The next job of a chain would go on with what was stopped.
    others = f"scancel {' '.join(jobs[1:])}; " if jobs[1:] else ""
    return [
        f"submitted {'jobs' if len(jobs) > 1 else 'job'} {', '.join(jobs)}",
        f"  how it goes      limoe status {run}",
        f"  its output       tail -F {log}",
        f"  save and stop    {others}scancel --signal=TERM {jobs[0]}",
        f"  cancel           scancel {' '.join(jobs)}",
    ]
