"""Runs a job script on this machine alone, with stand-ins for limoe and Slurm that note what they are called with."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

FAKE_SRUN = '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n'
FAKE_LIMOE = """#!/bin/bash
printf '%s\\n' "$*" >>"$SEEN"
case "$1 $2" in
    "job begin") (($(grep -c "^job begin" "$SEEN") > 1)) && exit 0; exit "${BEGIN:-0}" ;;
    "job end") exit "${END:-0}" ;;
esac
[[ -v TERM_PARENT ]] && kill -TERM "$PARENT"
exit "${TRAIN:-0}"
"""


# Refuses with $REFUSED the first $TIMES calls, or all.
FAKE_SLURM = """#!/bin/bash
if [[ $1 == show ]]; then
    [[ " $GONE " == *" $3 "* ]] && { echo "Node $3 not found"; exit 1; }
    exit 0
fi
name=${0##*/}
echo "$name $*" >>"$SEEN"
[[ -v TERM_IN_SLURM ]] && kill -TERM "$PARENT"
refused=${name^^}_REFUSED
if [[ -v $refused ]] && (($(grep -c "^$name" "$SEEN") <= ${TIMES:-1000})); then
    echo "$name: error: ${!refused}" >&2
    exit 1
fi
[[ $name == sbatch ]] && { echo "sbatch: a word of the site" >&2; env >"$SEEN.sbatch"; echo 78; }
exit 0
"""


def carried_out(tmp_path: Path, text: str, **environ: str) -> tuple[int, list[str]]:
    """Runs a script with stand-ins for limoe and Slurm; its status, and what they were called with, in order."""
    tools = tmp_path / "bin"
    tools.mkdir()
    seen = tmp_path / "seen"
    fakes = {"srun": FAKE_SRUN, "limoe": FAKE_LIMOE, "sbatch": FAKE_SLURM, "scontrol": FAKE_SLURM}
    fakes["sleep"] = '#!/bin/bash\necho "sleep $*" >>"$SEEN"\n'
    for name, content in fakes.items():
        (tools / name).write_text(content)
        (tools / name).chmod(0o755)
    lines = [f"limoe=({tools / 'limoe'})" if line.startswith("limoe=(") else line for line in text.splitlines()]
    given = {"PATH": f"{tools}:{os.environ['PATH']}", "SEEN": str(seen), "SLURM_JOB_ID": "77", "GONE": ""} | environ
    spooled = tmp_path / "slurm_script"
    spooled.write_text("export PARENT=$$\n" + "\n".join(lines))
    done = subprocess.run(["bash", str(spooled)], text=True, capture_output=True, env=given)
    assert "unbound variable" not in done.stderr
    assert "command not found" not in done.stderr
    return done.returncode, seen.read_text().splitlines()
