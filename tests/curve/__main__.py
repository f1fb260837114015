"""python -m tests.curve compare | freeze: whether a change has moved the loss curve of `tiny`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tests.curve.curve import CURVES, FROZEN, TOLERANCES, Curve, differences, frozen, problems, trained_now

ABOUT = """Trains 30 steps of the preset tiny on generated data (1 rank; 2 ranks with ep=2; fp64 and fp32; a minute)
and compares every number of the log with the curves in tests/curve/tiny.json.

A change that must not change results leaves them within the tolerance. One that is meant to change them freezes the
curves anew and says why:

  python -m tests.curve compare
  python -m tests.curve compare --out now.json          keep what was trained
  python -m tests.curve compare --with before.json      with another file than the frozen one
  python -m tests.curve freeze --why "one generator for all random numbers"

The pictures are decoded and augmented on this machine; another kind of CPU may round a pixel differently. Where even an
unchanged checkout differs, keep its curves with --out and compare --with them.
exit status: 0 within the tolerance, 1 beyond it."""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.curve", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    compare = commands.add_parser("compare", help="train the curves and compare them with the frozen ones")
    compare.add_argument("--with", dest="wanted", type=Path, default=FROZEN, help="the file to compare with")
    compare.add_argument("--out", type=Path, help="where to write the curves that were trained")
    freeze = commands.add_parser("freeze", help="train the curves and write them to tests/curve/tiny.json")
    freeze.add_argument("--why", required=True, help="the reason for other curves, kept in the file")
    options = parser.parse_args()
    found = trained_now()
    if options.command == "freeze":
        write(FROZEN, found, why=options.why)
        return 0
    if options.out:
        write(options.out, found, why="compare")
    wanted = frozen(options.wanted)
    for curve, (_, dtype) in CURVES.items():
        worst = {name: max(errors) for name, errors in differences(found[curve], wanted[curve]).items()}
        name = max(worst, key=lambda one: worst[one])
        print(f"{curve:26} largest difference {worst[name]:.1e} ({name}), allowed {TOLERANCES[dtype]:.0e}")
    lines = problems(found, wanted)
    print("\n".join(lines) if lines else "the curves are the same")
    return int(bool(lines))


def write(path: Path, found: dict[str, Curve], *, why: str) -> None:
    """One curve's values of all steps stand in a line: a diff then shows what moved."""
    rows = {
        curve: [f"   {json.dumps(name)}: {json.dumps(values)}" for name, values in numbers.items()]
        for curve, numbers in found.items()
    }
    blocks = [f"  {json.dumps(curve)}: {{\n" + ",\n".join(lines) + "\n  }" for curve, lines in rows.items()]
    path.write_text(
        f'{{\n "why": {json.dumps(why)},\n "curves": {{\n' + ",\n".join(blocks) + "\n }\n}\n", encoding="utf-8"
    )


if __name__ == "__main__":
    sys.exit(main())
