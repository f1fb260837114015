"""`limoe` commands as forks of one process that has imported torch and DALI: 4 seconds of CPU less for each.

Each has a process, a stdout, a stderr and an exit status of its own. What belongs to the start of an interpreter
(imports, environment, `-m limoe_dist`) is not tested that way: some tests start `limoe` as a shell does.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

from tests.support.signalled import BEFORE

LIMIT_S = 240.0


def limoe(*words: str) -> subprocess.CompletedProcess[str]:
    """Runs `limoe WORDS` to its end, in the working directory and the environment that the first call had."""
    return _parent().submit(_run, words).result()


@cache
def _parent() -> ProcessPoolExecutor:
    """One process for all tests of a session. It starts no threads, so that forks of it are safe."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_prepare)


def _prepare() -> None:
    # Variables of another launcher, should the tests themselves run under one.
    for name in [name for name in os.environ if name.startswith(BEFORE)]:
        del os.environ[name]
    # torch imports torch._dynamo itself, with the first optimizer.
    for name in ("launch.train", "limoe_dist.train.loop", "sentencepiece", "torch._dynamo"):
        importlib.import_module(name)
    # A collection in a fork would copy every page that it touches.
    gc.freeze()


def _run(words: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        printed = [Path(folder, name) for name in ("stdout", "stderr")]
        process = multiprocessing.get_context("fork").Process(target=_main, args=(list(words), printed))
        process.start()
        process.join(LIMIT_S)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(list(words), LIMIT_S)
        return subprocess.CompletedProcess(words, process.exitcode, *(path.read_text() for path in printed))


def _main(words: list[str], printed: list[Path]) -> None:
    from launch.cli import main

    for number, path in enumerate(printed, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.exit(main(words))
