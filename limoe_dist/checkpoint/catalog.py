"""Which checkpoints a run has, which of them are known to be whole, and which of them may go. Needs no torch.

RUN/checkpoints/step-00000900/            a checkpoint, where it holds manifest.json
RUN/checkpoints/step-00000900/verified    its files were read back, and were what was written
RUN/checkpoints/.saving-00001000-HEX/     a save that goes on, or that was killed; .removing-: on its way out
RUN/checkpoints/damaged-00001000-HEX/     what a run that went on from an older one put aside
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from limoe_dist.checkpoint import disk
from limoe_dist.checkpoint.manifest import NAME, STATE, Damaged, folder_name, read_manifest, verify
from limoe_dist.config.errors import UserError

VERIFIED = "verified"
_STEP = re.compile(r"step-(\d{8,})")
_ASIDE = re.compile(r"damaged-(\d{8,})-[0-9a-f]+")


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / folder_name(step)


def step_of(folder: Path) -> int:
    """Raises ValueError for the name of another kind of folder."""
    match = _STEP.fullmatch(folder.name)
    if match is None:
        raise ValueError(f"{folder} is not named as a checkpoint")
    return int(match[1])


def _folders(run_dir: Path) -> list[Path]:
    """step-NNNNNNNN with or without a manifest, by step."""
    found = [path for path in (run_dir / "checkpoints").glob("step-*") if _STEP.fullmatch(path.name)]
    return sorted(found, key=step_of)


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first: directories that have a manifest."""
    return [path for path in _folders(run_dir) if (path / NAME).is_file()]


def without_manifest(run_dir: Path) -> list[Path]:
    """Directories that somebody took the manifest out of: a save names its directory when it is whole."""
    return [path for path in _folders(run_dir) if not (path / NAME).is_file()]


def leftovers(run_dir: Path) -> list[Path]:
    """What saves and removals that were killed left behind; and a save that goes on at this moment."""
    return sorted(path for kind in ("saving", "removing") for path in (run_dir / "checkpoints").glob(f".{kind}-*"))


def put_aside(run_dir: Path) -> list[Path]:
    """Damaged checkpoints that a run went on without."""
    return sorted(path for path in (run_dir / "checkpoints").glob("damaged-*") if _ASIDE.fullmatch(path.name))


def latest_checkpoint(run_dir: Path, step: int | None = None) -> Path:
    """The newest checkpoint that looks whole, or the one of a step.

    Raises UserError where there is none, or it is of another version's format.

    Looks: the manifest, the sizes of all files and the checksum of state.json; `Reader` verifies the tensors.
    """
    have = checkpoints(run_dir)
    if step is not None:
        have = [path for path in have if path == checkpoint_folder(run_dir, step)]
    if found := next((path for path in reversed(have) if step is not None or looks_whole(path)), None):
        read_manifest(found)
        return found
    raise no_checkpoint(run_dir, step)


def no_checkpoint(run_dir: Path, step: int | None) -> UserError:
    steps = ", ".join(str(step_of(path)) for path in checkpoints(run_dir)) or "none"
    which = "no whole checkpoint" if step is None else f"no checkpoint of step {step}"
    return UserError(f"{run_dir}: {which} (steps there: {steps})", told_by=0)


def looks_whole(folder: Path) -> bool:
    try:
        files = read_manifest(folder).files
        sizes = all((folder / file.name).stat().st_size == file.bytes for file in files)
    except (Damaged, OSError):
        return False
    except UserError:  # another version's: whoever reads it tells that
        return True
    return sizes and not verify(folder, [file for file in files if file.name == STATE], threads=1)


def note_verified(folder: Path) -> None:
    """Where the folder cannot be written, as in somebody else's run, nothing is noted."""
    with suppress(OSError):
        disk.close(disk.create(folder / VERIFIED))


def forget_verified(folder: Path) -> None:
    """It was found damaged since."""
    with suppress(OSError):
        (folder / VERIFIED).unlink(missing_ok=True)


def is_verified(folder: Path) -> bool:
    """Whether its checksums were compared once after it was written, by a save, a load or `limoe checkpoint verify`."""
    return (folder / VERIFIED).is_file()


def set_aside(folder: Path) -> Path:
    """Takes a damaged checkpoint out of the way of the run that goes on from an older one."""
    target = folder.with_name(f"damaged-{step_of(folder):08d}-{secrets.token_hex(4)}")
    disk.rename(folder, target)
    return target


def retire(run_dir: Path, *, keep: int, keep_every: int, leftovers: Iterable[Path] = ()) -> None:
    """Removes checkpoints but for the last `keep`, those of each `keep_every` steps (0: none), and the last verified.

    And `leftovers`, and damaged ones that the run has passed.
    """
    have = checkpoints(run_dir)
    verified = [path for path in have if is_verified(path)]
    kept = {*have[-keep:], *verified[-1:], *(path for path in have if keep_every and step_of(path) % keep_every == 0)}
    for folder in have:
        if folder not in kept:
            remove(folder)
    disk.remove(*leftovers)
    for folder in put_aside(run_dir):
        if verified and int(folder.name.split("-")[1]) < step_of(verified[-1]):
            disk.remove(folder)


def remove(folder: Path) -> None:
    """Under another name it is no checkpoint any more, should we be killed between its files. Raises OSError.

    Nothing happens where it is gone already: a person may clear up while the run trains.
    """
    with suppress(FileNotFoundError):
        disk.remove(make_way(folder))


def make_way(folder: Path) -> Path:
    """Gives a checkpoint the name of what is on its way out; returns that. Raises OSError."""
    doomed = folder.with_name(f".removing-{step_of(folder):08d}-{secrets.token_hex(4)}")
    disk.rename(folder, doomed)
    return doomed
