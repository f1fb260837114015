"""The command of mutation testing; see docs/mutants.md."""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shlex
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tests.mutants.modules import MODULES
from tests.mutants.operators import Mutant, changes_bytecode, mutants_of, signatures
from tests.mutants.running import ROOT, Outcome, Tree, digest, preload

EXAMPLES = """
Every mutant is the project with one small change in one module: `<` for `<=`, `-` for `+`, 2 for 1, an argument
less. The tests of that module (tests/mutants/modules.py) run on it until one fails: the mutant is killed. A mutant
that survives is a defect that no test would notice, or a change that has no effect.

  python -m tests.mutants --list --modules schedule          the mutants of limoe_dist/optim/schedule.py
  python -m tests.mutants --modules schedule adamw           all mutants of two modules
  python -m tests.mutants --sample 200 --seed 3              200 mutants of all modules
  python -m tests.mutants --budget-s 170 --floor 0.9         what fits into 170 s; fails when under 90 % are killed
  python -m tests.mutants --judged judged.jsonl              go on where an earlier run with this file stopped

The working tree is never changed: workers test copies of it in the system's folder for temporary files.
"""
ACCEPTED = Path(__file__).with_name("accepted.json")


@dataclass(frozen=True)
class Result:
    mutant: Mutant
    outcome: Outcome
    diff: str

    @property
    def key(self) -> str:
        return key_of(self.diff)


def key_of(diff: str) -> str:
    """A name of the mutant that does not depend on line numbers."""
    return re.sub(r":\d+ ", " ", diff, count=1)


class Judged:
    """A file with one JSON line for each mutant that was tested already.

    A mutant stays killed until its module changes; one that survived is tested again when a test has changed.
    """

    def __init__(self, path: Path | None, modules: Sequence[str]) -> None:
        self.path = path
        self._lines: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            self._lines = {line["key"]: line for line in map(json.loads, path.read_text().splitlines())}
        # As they are now, when the workers copy them.
        self._of_tests = {module: _digest_of_tests(module) for module in modules}

    def find(self, mutant: Mutant, source: bytes) -> Outcome | None:
        line = self._lines.get(self._key(mutant, source))
        if line is None or (line["status"] == "survived" and line["of_tests"] != self._of_tests[mutant.module]):
            return None
        return Outcome(line["status"], line["by"], line["seconds"], line["tests"])

    def add(self, mutant: Mutant, source: bytes, outcome: Outcome) -> None:
        if self.path is not None:
            line = {"key": self._key(mutant, source), "of_tests": self._of_tests[mutant.module], **vars(outcome)}
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    @staticmethod
    def _key(mutant: Mutant, source: bytes) -> str:
        return digest(mutant.module.encode(), mutant.apply(source))


def tests_of(module: str) -> tuple[str, ...]:
    return tuple(test for test in MODULES[module] if (ROOT / test.split("::")[0]).exists())


def _digest_of_tests(module: str) -> str:
    paths = [ROOT / test.split("::")[0] for test in tests_of(module)]
    files = [file for path in paths for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    return digest(*(file.read_bytes() for file in files))


def chosen_modules(names: Sequence[str]) -> list[str]:
    """Modules by path, or by any part of it. Exits for a name that fits none."""
    for name in names:
        if not any(name in module for module in MODULES):
            sys.exit(f"--modules {name}: no such module; known: {' '.join(MODULES)}")
    return [module for module in MODULES if not names or any(name in module for name in names)]


def all_mutants(modules: Sequence[str]) -> list[Mutant]:
    known = signatures(path.read_bytes() for path in sorted((ROOT / "limoe_dist").rglob("*.py")))
    return [mutant for module in modules for mutant in mutants_of(module, (ROOT / module).read_bytes(), known)]


_tree: Tree | None = None


@contextmanager
def _workers(jobs: int, folder: str) -> Iterator[ProcessPoolExecutor]:
    """Processes that test mutants. They end with the block, at once, and so does what they started."""
    with ProcessPoolExecutor(jobs, get_context("fork"), _start_worker, (folder,)) as pool:
        try:
            yield pool
        finally:
            for pid in list(pool._processes):
                os.kill(pid, signal.SIGTERM)


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def _start_worker(folder: str) -> None:
    global _tree
    preload()
    _tree = Tree(Path(folder) / f"worker-{os.getpid()}")
    signal.signal(signal.SIGTERM, _end_worker)


def _end_worker(*_: object) -> None:
    if _tree is not None:
        _tree.end_child()
    os._exit(1)


def _work(module: str, mutant: Mutant | None, limit_s: float) -> Outcome:
    """In a worker."""
    assert _tree is not None
    outcome = _tree.run(tests_of(module), mutant, limit_s=limit_s)
    if mutant is None and outcome.status != "survived":
        print(_tree.log.read_text()[-4000:], file=sys.stderr)
    return outcome


def _unchanged(pool: ProcessPoolExecutor, modules: Sequence[str], *, limit_s: float) -> dict[str, float]:
    """Seconds that each module's tests take on the unchanged project. Exits where they fail or take too long."""
    different = {tests_of(module): module for module in modules}
    futures = {tests: pool.submit(_work, module, None, 2 * limit_s) for tests, module in different.items()}
    seconds = {}
    for tests, future in futures.items():
        outcome = future.result()
        names = " ".join(module for module in modules if tests_of(module) == tests)
        print(f"unchanged: {outcome.seconds:5.1f} s, {outcome.tests} tests of {names}", flush=True)
        if outcome.status != "survived" or outcome.seconds > limit_s:
            sys.exit(f"tests of {names} on the unchanged project: {outcome}; all must pass within {limit_s:.0f} s")
        seconds[names] = outcome.seconds
    return seconds


def _outcomes(
    pool: ProcessPoolExecutor,
    mutants: Sequence[Mutant],
    judged: Judged,
    *,
    accepted: Container[str],
    jobs: int,
    until: float,
    limit_s: float,
) -> Iterator[Result]:
    """In the order in which they come; those that are not finished at the time `until` are left."""
    sources = {mutant.module: (ROOT / mutant.module).read_bytes() for mutant in mutants}
    running: dict[Future[Outcome], Mutant] = {}
    waiting = iter(mutants)
    more = True
    while more or running:
        while more and len(running) < jobs:
            mutant = next(waiting, None)
            if mutant is None:
                more = False
                break
            source = sources[mutant.module]
            if not changes_bytecode(mutant, source):
                continue
            diff = mutant.diff(source)
            known = Outcome("accepted", "", 0.0, 0) if key_of(diff) in accepted else judged.find(mutant, source)
            if known is not None:
                yield Result(mutant, known, diff)
            else:
                running[pool.submit(_work, mutant.module, mutant, limit_s)] = mutant
        left_s = until - time.monotonic()
        if left_s <= 0:
            return
        for future in wait(running, timeout=min(left_s, 3600), return_when=FIRST_COMPLETED).done if running else ():
            mutant = running.pop(future)
            outcome, source = future.result(), sources[mutant.module]
            judged.add(mutant, source, outcome)
            yield Result(mutant, outcome, mutant.diff(source))


def _table(results: Sequence[Result], made: Counter[str]) -> list[dict[str, Any]]:
    rows = []
    for module in made:
        counts = Counter(result.outcome.status for result in results if result.mutant.module == module)
        if counts:
            figures = {name: counts[name] for name in ("killed", "timed out", "survived", "accepted")}
            rows.append({"module": module, "made": made[module], "run": sum(counts.values()), **figures})
    return rows


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    columns = ["made", "run", "killed", "timed out", "survived", "accepted"]
    total = {"module": "all", **{column: sum(row[column] for row in rows) for column in columns}}
    print(f"\n{'module':40}" + "".join(f"{column:>11}" for column in columns))
    for row in [*rows, total]:
        print(f"{row['module']:40}" + "".join(f"{row[column]:11d}" for column in columns))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m tests.mutants",
        description="Mutation testing of the numeric core: does a test fail for every small change of it?",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--modules", nargs="+", default=[], metavar="NAME", help="modules by a part of their path")
    parser.add_argument("--sample", type=int, metavar="N", help="that many mutants, drawn with --seed")
    parser.add_argument("--seed", type=int, default=0, help="of the sample and of the order (default 0)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="workers (default: one for each core)")
    parser.add_argument("--budget-s", type=float, metavar="S", help="stop after that many seconds")
    parser.add_argument(
        "--limit-s",
        type=float,
        default=60.0,
        metavar="S",
        help="time limit of a mutant, and of a module's tests on the unchanged project (default 60)",
    )
    parser.add_argument("--floor", type=float, default=0.0, help="exit 1 when a smaller share is killed (0.9)")
    parser.add_argument("--no-check", action="store_true", help="do not run the tests on the unchanged project first")
    parser.add_argument("--judged", type=Path, metavar="FILE", help="JSON lines of results to use and to add to")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all results as JSON")
    parser.add_argument("--list", action="store_true", help="print the mutants, and run nothing")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else list(arguments)
    args = _parser().parse_args(given)
    began = time.monotonic()
    mutants = all_mutants(chosen_modules(args.modules))
    made = Counter(mutant.module for mutant in mutants)
    if args.list:
        for mutant in mutants:
            print(mutant.diff((ROOT / mutant.module).read_bytes()))
        return 0
    random.Random(args.seed).shuffle(mutants)
    mutants = mutants[: args.sample]
    until = began + (args.budget_s or float("inf"))
    accepted: dict[str, str] = json.loads(ACCEPTED.read_text()) if ACCEPTED.exists() else {}
    results: list[Result] = []
    signal.signal(signal.SIGTERM, _stop)
    modules = sorted({mutant.module for mutant in mutants})
    judged = Judged(args.judged, modules)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, _workers(args.jobs, folder) as pool:
        seconds = {} if args.no_check else _unchanged(pool, modules, limit_s=args.limit_s)
        limits = {"jobs": args.jobs, "until": until, "limit_s": args.limit_s}
        for result in _outcomes(pool, mutants, judged, accepted=accepted, **limits):
            results.append(result)
            print(
                f"{len(results):5d} {result.outcome.status:9} {result.outcome.seconds:5.1f} s {result.diff}", flush=True
            )
    return _report(results, made, accepted, seconds, args, given, time.monotonic() - began)


def _report(
    results: Sequence[Result],
    made: Counter[str],
    accepted: dict[str, str],
    seconds: dict[str, float],
    args: argparse.Namespace,
    given: Sequence[str],
    took_s: float,
) -> int:
    """Prints the summary, writes --out; the exit code. The last line reads as pytest's: `N passed, M failed`."""
    results = sorted(results, key=lambda result: (result.mutant.module, result.mutant.start, result.mutant.new))
    rows = _table(results, made)
    survivors = [result for result in results if result.outcome.status == "survived"]
    slow = [result for result in results if result.outcome.status == "timed out"]
    _print_table(rows)
    for title, found in (("survived", survivors), ("timed out", slow)):
        if found:
            print(f"\n{title}:", *(f"  {result.diff}" for result in found), sep="\n")
    killed = sum(row["killed"] + row["timed out"] for row in rows)
    share = killed / max(1, killed + len(survivors))
    if args.out is not None:
        record = {
            "command": shlex.join(["python", "-m", "tests.mutants", *given]),
            "seconds": round(took_s),
            "seconds_of_tests": round(sum(result.outcome.seconds for result in results)),
            "killed_share": round(share, 4),
            "modules": rows,
            "tests_on_the_unchanged_project_s": seconds,
            "survived": [result.diff for result in survivors],
            "timed_out": [result.diff for result in slow],
            "accepted": {r.diff: accepted[r.key] for r in results if r.outcome.status == "accepted"},
            "killed_by": Counter(r.outcome.by.split("[")[0] for r in results if r.outcome.status == "killed"),
        }
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nmutants: {share:.1%} killed in {took_s:.0f} s")
    enough = bool(results) and share >= args.floor
    failed = 0 if enough else max(1, len(survivors))
    print(f"{killed if results else 0} passed, {failed} failed")
    return 0 if enough else 1


if __name__ == "__main__":
    sys.exit(main())
