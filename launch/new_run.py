"""A run directory that is made from another run, by `limoe average` and `limoe prune`: whole, or not there at all."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from limoe_dist.config.errors import UserError
from limoe_dist.config.parse import MAY_CHANGE, decisive, load_run, save_run
from limoe_dist.config.schema import Run


def open_run(run_dir: Path) -> Run:
    """Raises UserError where there is no run."""
    if not (run_dir / "run.json").is_file():
        raise UserError(f"{run_dir}: there is no run.json: this is not the directory of a run")
    return load_run(run_dir / "run.json")


def same_settings(run: Run, settings: dict[str, object], checkpoint: Path, run_dir: Path) -> None:
    """Raises UserError where a run.json is no longer that of the checkpoint: the weights would mean something else."""
    defaults = decisive(Run())
    for name, now in decisive(run).items():
        before = settings.get(name, defaults[name])
        # The order of the data and the batch are about training: weights mean the same.
        if before != now and name not in MAY_CHANGE and not name.startswith("data."):
            raise UserError(
                f"{name}={now!r} in {run_dir / 'run.json'}, but {before!r} in {checkpoint}: "
                "that file was changed after the checkpoint was written; put it back"
            )


def check_out(out: str) -> Path:
    """The directory to make, as an absolute path. Raises UserError where one is there and is not empty."""
    if not out:
        raise UserError("--out is missing: a new directory for the result")
    path = Path(out).resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"--out {out} exists and is not empty: choose another")
    return path


@contextmanager
def made(out: Path) -> Iterator[Path]:
    """A directory beside `out` to fill; it takes the name `out` when all is there, and goes where something fails.

    Raises UserError where the disk does not let it.
    """
    folder = out.with_name(f".{out.name}-{secrets.token_hex(4)}")
    try:
        folder.mkdir(parents=True)
        yield folder
        os.rename(folder, out)
    except OSError as error:
        raise UserError(f"--out {error.filename or out}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_run(run: Run, tokenizer: Path, folder: Path, *, out: Path) -> None:
    """run.json and the run's own copy of the vocabulary, in `folder`, which is going to be `out`."""
    shutil.copyfile(tokenizer, folder / "tokenizer.model")
    data = run.data.model_copy(update={"tokenizer": str(out / "tokenizer.model")})
    save_run(run.model_copy(update={"data": data}), folder / "run.json")


def copy_history(run_dir: Path, folder: Path, *, step: int) -> None:
    """metrics.jsonl up to a step: how the weights came to be, for `limoe report`. Nothing where the run has none.

    Its evaluations stay behind: they are of other weights.
    """
    source = run_dir / "metrics.jsonl"
    if source.is_file():
        lines = source.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        (folder / source.name).write_text("".join(line for line in lines if _is_before(line, step)), encoding="utf-8")


def _is_before(line: str, step: int) -> bool:
    """False for a line that a crash cut off, too."""
    try:
        return bool(json.loads(line)["step"] <= step)
    except (ValueError, KeyError, TypeError):
        return False


def run_tokenizer_path(run: Run, run_dir: Path, checkpoint: Path, given: str = "") -> Path:
    """The vocabulary that the checkpoint was trained with: --tokenizer, else the run's copy, else the data's.

    Raises UserError where none is there, or it is another one.
    """
    from launch.run_tokenizer import open_run_tokenizer

    own = run_dir / "tokenizer.model"
    if given or own.is_file():
        run = run.model_copy(update={"data": run.data.model_copy(update={"tokenizer": given or str(own)})})
    return open_run_tokenizer(run, checkpoint).path
