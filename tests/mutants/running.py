"""Runs tests against mutants: each in a forked process that imports a copy of the project with one change.

Importing torch costs seconds, so a worker imports what is not the project's (PRELOADED) once. For each mutant it forks
a child, which puts the copy first in sys.path and calls pytest. Tests start ranks with multiprocessing's "spawn";
in the child those come from a fork server with the same imports, which is started before any of the project's modules
is imported, so that every rank imports the mutated module from the copy.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import json
import multiprocessing.context
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection, forkserver, resource_tracker
from pathlib import Path
from typing import Any

import pytest

from tests.mutants.operators import Mutant

ROOT = Path(__file__).resolve().parents[2]
PRELOADED = (
    *("numpy", "torch", "torch.distributed", "torch.nn.functional", "torch.utils.checkpoint", "torch.utils.data"),
    *("hypothesis", "_hypothesis_pytestplugin", "xdist.plugin", "PIL.Image", "tqdm", "pyarrow", "pyarrow.parquet"),
    *("nvidia.dali", "nvidia.dali.fn"),
)
PROJECT = ("limoe_dist", "launch", "data_prep", "slurm", "tests")
NOT_COPIED = (".git", ".venv", ".venv-*", "quickstart", "runs", "demo", "shards", ".*_cache", ".hypothesis")
PASSED, FAILED, NO_TESTS = 0, 1, 5
"""Exit codes of pytest."""


@dataclass(frozen=True)
class Outcome:
    status: str
    """killed, timed out, survived."""
    by: str
    """The first test that failed."""
    seconds: float
    tests: int
    """Tests that ran."""


class Tree:
    """A copy of the project in which one module at a time is mutated."""

    def __init__(self, root: Path, *, source: Path = ROOT) -> None:
        self.root, self.source = root, source
        self.log = root.with_suffix(".log")
        shutil.copytree(source, root, ignore=shutil.ignore_patterns(*NOT_COPIED), symlinks=True)
        self._writes = 0
        self._child: int | None = None

    @contextmanager
    def mutated(self, mutant: Mutant | None) -> Iterator[None]:
        if mutant is None:
            yield
            return
        path = self.root / mutant.module
        original, stat = path.read_bytes(), path.stat()
        self._writes += 1
        try:
            path.write_bytes(mutant.apply(original))
            # A time that no bytecode cache was made for.
            os.utime(path, (stat.st_atime, stat.st_mtime - self._writes))
            yield
        finally:
            path.write_bytes(original)
            os.utime(path, (stat.st_atime, stat.st_mtime))

    def run(self, tests: Sequence[str], mutant: Mutant | None = None, *, limit_s: float = 60.0) -> Outcome:
        """Runs the tests in their order up to the first failure. Raises RuntimeError where pytest ran none."""
        with self.mutated(mutant):
            began = time.monotonic()
            code, report = self._in_child(tests, limit_s=limit_s, keep_bytecode=mutant is None)
        seconds = time.monotonic() - began
        if code == NO_TESTS:
            raise RuntimeError(f"pytest found no tests in {' '.join(tests)}: {self.log}")
        status = {PASSED: "survived", None: "timed out"}.get(code, "killed")
        return Outcome(status, report.get("by", ""), round(seconds, 2), report.get("tests", 0))

    def _in_child(
        self, tests: Sequence[str], *, limit_s: float, keep_bytecode: bool
    ) -> tuple[int | None, dict[str, Any]]:
        """The exit code, None after the limit; whatever the child has started is ended with it."""
        report, temporary = self.root.with_suffix(".json"), self.root.with_suffix(".tmp")
        report.unlink(missing_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        self._child = pid = os.fork()
        if pid == 0:
            code = 70
            try:
                os.setsid()
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                code = _run_pytest(self.root, tests, self.log, report, keep_bytecode=keep_bytecode)
            finally:
                os._exit(code)
        try:
            code = _wait(pid, limit_s)
        finally:
            self.end_child()
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)
            self._child = None
        with suppress(OSError, ValueError):
            return code, json.loads(report.read_text())
        return code, {}

    def end_child(self) -> None:
        """Ends the process that runs tests, and all that it started."""
        if self._child is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._child, signal.SIGKILL)


def _wait(pid: int, limit_s: float) -> int | None:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    return None


def preload() -> None:
    """Imports all that a child would import anyway, but for the project's own modules."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    for name in PRELOADED:
        with suppress(ImportError):
            importlib.import_module(name)
    # One tracker for all children; without it each would start its own.
    resource_tracker.ensure_running()
    gc.collect()
    gc.freeze()


def _run_pytest(root: Path, tests: Sequence[str], log: Path, report: Path, *, keep_bytecode: bool) -> int:
    """In the child: pytest.main on the copy."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.chdir(root)
    _use_copy(root)
    # What ends by a signal leaves its temporary files: here they go with the copy.
    tempfile.tempdir = os.environ["TMPDIR"] = str(root.with_suffix(".tmp"))
    sys.dont_write_bytecode = not keep_bytecode
    os.environ["PYTHONDONTWRITEBYTECODE"] = "" if keep_bytecode else "1"
    _serve_spawns_by_fork()
    watcher = Watcher(tests, report)
    # xdist is loaded, but unused: the project's conftest needs its marker.
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--tb=short", *tests], plugins=[watcher])
    sys.stdout.flush()
    return int(code)


def _use_copy(root: Path) -> None:
    """Makes this process, and those that it starts, import the project from the copy."""
    for name in [name for name in sys.modules if name.split(".")[0] in PROJECT]:
        del sys.modules[name]
    # Processes that multiprocessing starts import the main module again: it must not be this program.
    sys.modules["__main__"] = types.ModuleType("__main__")
    here = {"", str(Path.cwd()), str(ROOT), str(root)}
    sys.path[:] = [str(root), *(entry for entry in sys.path if entry not in here)]
    os.environ["PYTHONPATH"] = str(root)


def _serve_spawns_by_fork() -> None:
    """Forks a server of multiprocessing's "forkserver" method from here and makes it what "spawn" means."""
    listener = socket.socket(socket.AF_UNIX)
    address = connection.arbitrary_address("AF_UNIX")
    listener.bind(address)
    listener.listen()
    alive_r, alive_w = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(alive_w)
            forkserver.main(listener.detach(), alive_r, [])
        finally:
            os._exit(0)
    listener.close()
    os.close(alive_r)
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    server._forkserver_address, server._forkserver_alive_fd, server._forkserver_pid = address, alive_w, pid
    contexts: Any = multiprocessing.context._concrete_contexts  # type: ignore[attr-defined]
    contexts["spawn"] = contexts["forkserver"]


class Watcher:
    """A pytest plugin: keeps the order of the listed files, and reports the first test that failed."""

    def __init__(self, tests: Sequence[str], report: Path) -> None:
        self.order = {test: number for number, test in enumerate(tests)}
        self.report, self.ran, self.failed = report, 0, ""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items.sort(key=lambda item: self._place(item.nodeid))

    def _place(self, nodeid: str) -> int:
        return next((n for test, n in self.order.items() if nodeid.startswith(test)), len(self.order))

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.ran += report.when == "call"
        if report.failed and not self.failed:
            self.failed = report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self.failed:
            self.failed = f"import of {report.nodeid}"

    def pytest_sessionfinish(self) -> None:
        self.report.write_text(json.dumps({"by": self.failed, "tests": self.ran}))


def digest(*texts: bytes) -> str:
    total = hashlib.sha256()
    for text in texts:
        total.update(hashlib.sha256(text).digest())
    return total.hexdigest()[:16]
