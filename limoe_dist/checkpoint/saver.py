"""Saving in the background: training waits for a copy into host memory, and files are written while it goes on.

    begin      wait for the former save, copy this rank's boxes into the host's memory            (training waits)
    write      every rank: its own file, to the disk                                             (a thread)
    commit     rank 0: state.json, the manifest, and the directory's name, to the disk            (a thread)
    read back  every rank: another's file, compared with its checksum                             (a thread)
    retire     rank 0: what is no longer kept goes, now that a newer checkpoint is verified       (a thread)

From one stage to the next go all ranks together, when all have ended the one before: each says in `flags` how far it
is, the largest over all ranks come back to `advance`. So a save has two small collectives of its own, one for the name
of its directory and one for the checksums, and no rank is waited for while training runs. Nothing here needs locks:
until the directory has its name, nobody looks into it, and each save has a directory of its own.
"""

from __future__ import annotations

import errno
import secrets
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from limoe_dist.checkpoint import catalog, disk
from limoe_dist.checkpoint.manifest import NAME, STATE, CheckpointManifest, Damaged, File, encode, read_manifest, verify
from limoe_dist.checkpoint.rank_file import HostCopy, file_name
from limoe_dist.checkpoint.state import State
from limoe_dist.config.errors import UserError, warn
from limoe_dist.config.schema import Checkpoint
from limoe_dist.parallel.background import PATIENCE_S, Job
from limoe_dist.parallel.collectives import gather_into, raise_together, vote
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.parallel.placement import Shard

Flags = tuple[int, int]
"""Whether a rank still works, and how badly it failed: 0, _DISK or _FATAL."""
_DISK, _FATAL = 1, 2
_OVER = object()
SEEN_S = 120.0
"""Longer than the caches of NFS keep an old listing."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is whole."""

    folder: Path
    num_bytes: int
    waited_s: float
    """What training waited for the former save and the copy."""
    wrote_s: float
    """From the begin of the copy until the checkpoint was whole."""


class Saver:
    """Saves of one run. Every rank has one and calls the same methods in the same order."""

    def __init__(
        self,
        run_dir: Path,
        shards: dict[str, Shard],
        settings: Checkpoint,
        mesh: Mesh,
        device: torch.device,
        *,
        check_owner: Callable[[], None] = lambda: None,
        stopped: Callable[[], bool] = lambda: False,
        tell: Callable[[str], None] = print,
    ) -> None:
        """Makes the host's memory for `shards`. Touches no file.

        check_owner: raises UserError where the directory has become another run's; rank 0 asks before it writes or
        removes. stopped: whether this process was told to end, so that no checkpoint is waited for that is whole.
        tell: shows a line; rank 0 alone.
        """
        self.run_dir, self.settings, self.mesh, self.device = run_dir, settings, mesh, device
        self.check_owner, self.stopped, self.tell = check_owner, stopped, tell
        self.last: Saved | None = None
        """The newest checkpoint that this saver made whole."""
        self._copy = HostCopy(shards)
        self._stages: Iterator[None] | None = None
        self._job: Job[Any] | None = None
        self.failure = ""
        """Why the last save failed; empty where it did not."""
        self.failed_by: int | None = None
        """The rank that knows why."""
        self._folder, self._whole = run_dir, False
        self._leftovers: list[Path] = []

    def begin(self, state: State, shards: dict[str, Shard], *, hurry: bool = False) -> None:
        """Starts a save of the tensors as they are now; they may change as soon as this returns. A collective.

        Waits for the former save; hurry: but not until it was read back. Raises UserError as `advance` does.
        """
        entered = time.perf_counter()
        self.finish(read_back=not hurry)
        began = time.perf_counter()
        self._copy.fill(shards)
        # The number is rank 0's: a directory that no other save has, also where another run takes this one's place.
        number = secrets.randbits(62) if self.mesh.rank == 0 else 0
        token = vote(self.mesh.world, self.device, number)[0]
        folder = self.run_dir / "checkpoints" / f".saving-{state.step:08d}-{token:016x}"
        self._stages = self._save(state, folder, began, waited_s=time.perf_counter() - entered)
        next(self._stages)

    def flags(self) -> Flags:
        """How far this rank is: for `advance`, as the largest over all ranks."""
        job = self._job
        if job is None:
            return 0, 0
        if job.is_alive():
            return 1, 0
        return 0, 0 if job.error is None else _DISK if isinstance(job.error, (OSError, Damaged)) else _FATAL

    def advance(self, working: int, failed: int) -> None:
        """Goes on to the next stage where all ranks have ended this one. A collective: its arguments are agreed.

        A full or failing disk ends the save with a warning: the last whole checkpoint stands. Raises UserError on all
        ranks for every other error.
        """
        if self._stages is None or working:
            return
        if failed:
            self._give_up(fatal=failed == _FATAL)
        elif next(self._stages, _OVER) is _OVER:
            self._stages = self._job = None

    def finish(self, *, read_back: bool = True) -> None:
        """Waits until the save that goes on is over. A collective; raises UserError as `advance` does.

        read_back: False waits for the commit alone, and so does a signal that comes meanwhile.
        """
        while self._stages is not None and (read_back or not self._whole):
            if self._job is not None:
                self._job.join(PATIENCE_S)
            working, failed, stopped = vote(self.mesh.world, self.device, *self.flags(), int(self.stopped()))
            self.advance(working, failed)
            read_back = read_back and not stopped
        self._stages = self._job = None

    def go_on(self) -> None:
        """`advance` where no vote is at hand: in a long evaluation. A collective where a save goes on."""
        if self._stages is not None:
            self.advance(*vote(self.mesh.world, self.device, *self.flags()))

    def rescue(self) -> None:
        """Makes the save that goes on whole, where training ends with an error that all ranks raise together."""
        with suppress(UserError):
            self.finish(read_back=False)

    def _save(self, state: State, folder: Path, began: float, waited_s: float) -> Iterator[None]:
        """The stages; at each `yield` all ranks wait for one another's jobs, while training goes on."""
        target = catalog.checkpoint_folder(self.run_dir, state.step)
        first = self.mesh.rank == 0
        self._folder, self._whole, self.failure = folder, False, ""

        self._job = job = Job(lambda: self._write(folder), "save")
        yield
        entries = self._gather(job.result())
        self._job = Job(lambda: self._commit(folder, target, state, entries), "save") if first else None
        yield
        self._folder, self._whole = target, True
        num_bytes = sum(file.bytes for file in entries)
        self.last = Saved(target, num_bytes, waited_s=waited_s, wrote_s=time.perf_counter() - began)
        self.tell(
            f"step {state.step}: checkpoint {target} ({_size(num_bytes)} in {self.last.wrote_s:.1f} s, "
            f"training waited {waited_s:.2f} s)"
        )
        if self.settings.read_back:
            # Where ranks are on several hosts, most files come from another one, through the file system's server.
            world = self.mesh.world.size
            mine = entries[(self.mesh.rank + world // 2) % world]
            self._job = Job(partial(_read_back, target, mine, first), "save")
            yield
        retire = partial(_retire, self.run_dir, target, self.settings, self._leftovers, self.check_owner)
        self._job = Job(retire, "save") if first else None
        yield

    def _write(self, folder: Path) -> File:
        if self.mesh.rank == 0:
            self.check_owner()
            # Listed while this run has no save there: in a hurry the next one begins before they are removed.
            self._leftovers = catalog.leftovers(self.run_dir)
        disk.make_folder(folder)
        return disk.write_file(folder / file_name(self.mesh.rank), self._copy.blocks())

    def _gather(self, mine: File) -> tuple[File, ...]:
        """The entries of all ranks. A collective."""
        digest = bytes.fromhex(mine.xxh3)
        halves = [int.from_bytes(half, signed=True) for half in (digest[:8], digest[8:])]
        numbers = torch.tensor([mine.bytes, *halves], device=self.device)
        rows_n3 = torch.empty(self.mesh.world.size, 3, dtype=torch.int64, device=self.device)
        gather_into(rows_n3, numbers, self.mesh.world)
        entries = []
        for rank, (size, *parts) in enumerate(rows_n3.tolist()):
            checksum = b"".join(part.to_bytes(8, signed=True) for part in parts).hex()
            entries.append(File(name=file_name(rank), bytes=size, xxh3=checksum))
        return tuple(entries)

    def _commit(self, folder: Path, target: Path, state: State, entries: tuple[File, ...]) -> None:
        self.check_owner()
        _wait_until_seen(folder, entries)
        commit(folder, target, state, entries)

    def _give_up(self, *, fatal: bool) -> None:
        """Ends a save that failed on some rank. Raises UserError on all ranks where training should not go on."""
        job, folder, whole = self._job, self._folder, self._whole
        self._stages = self._job = None
        problems = [] if job is None or job.error is None else [_told(job.error, folder)]
        if self.mesh.rank == 0 and not whole:
            # It takes room that the next save needs, and so does what killed ones left. Nobody waits: what stays, the
            # next save that works removes. Where another run has come, what lies there may be a save of its own.
            doomed = [folder] if fatal else [folder, *self._leftovers]
            Job(lambda: disk.remove(*doomed), "save")
        try:
            raise_together(problems, self.mesh.world, self.device)
        except UserError as error:
            self.failure = f"a checkpoint {'was not verified' if whole else 'could not be saved'}: {error}"
            self.failed_by = error.told_by
            if fatal:
                raise UserError(self.failure, told_by=error.told_by) from None
            if self.mesh.rank == error.told_by:
                warn(f"{self.failure}; training goes on, and the next save will be tried")


# A run that is told to stop does not wait for the next two: their threads hold nothing of the mesh. The last to hold a
# process group would end it while the interpreter ends, and the process with "terminate called".


def _read_back(target: Path, mine: File, first: bool) -> None:
    state = [file for file in read_manifest(target).files if file.name == STATE] if first else []
    if problems := verify(target, [mine, *state]):
        raise Damaged(f"read back, {problems[0]}")


def _retire(
    run_dir: Path, target: Path, settings: Checkpoint, leftovers: list[Path], check_owner: Callable[[], None]
) -> None:
    check_owner()
    if settings.read_back:
        catalog.note_verified(target)
    try:
        catalog.retire(run_dir, keep=settings.keep, keep_every=settings.keep_every, leftovers=leftovers)
    except OSError as error:  # the new checkpoint is whole all the same
        warn(f"old checkpoints stay: {_told(error, target.parent)}")


def commit(folder: Path, target: Path, state: State, entries: tuple[File, ...]) -> None:
    """Makes a checkpoint of files that are on the disk: state.json, the manifest, and last the directory's name.

    target: RUN/checkpoints/step-NNNNNNNN. Raises OSError.
    """
    kept = disk.write_file(folder / STATE, [memoryview((state.model_dump_json(indent=1) + "\n").encode())])
    manifest = CheckpointManifest(step=state.step, files=(*entries, kept))
    disk.write_file(folder / NAME, [memoryview(encode(manifest))])
    disk.sync_folder(folder)
    replaced = catalog.make_way(target) if target.exists() else None
    disk.rename(folder, target)
    disk.sync_folder(target.parent)
    disk.sync_folder(target.parent.parent)
    if replaced is not None:
        disk.remove(replaced)


def _told(error: BaseException, folder: Path) -> str:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        room = "; make room there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        return f"{error.filename or folder}: {error.strerror or error}{room}"
    traceback.print_exception(error)
    return f"{folder}: {type(error).__name__}: {error}"


def _wait_until_seen(folder: Path, entries: tuple[File, ...]) -> None:
    """Shared file systems may show this host another's files late. Raises UserError where they never come."""
    deadline = time.monotonic() + SEEN_S
    for file in entries:
        path = folder / file.name
        while not (path.is_file() and path.stat().st_size == file.bytes):
            if time.monotonic() > deadline:
                raise UserError(
                    f"{path} was written by another rank, and this host does not see it: the directory of a run must "
                    "be on a file system that all hosts share"
                )
            time.sleep(0.1)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
