"""The `limoe` command: a table of commands, each in a module of its own that is imported when it is asked for."""

from __future__ import annotations

import importlib
import os
import sys
from importlib.metadata import version

from limoe_dist.config.errors import UserError, nearest

COMMANDS = {
    "train": ("launch.train", "train a preset on Arrow shards, or go on with --resume RUN"),
    "ended": ("launch.ended", "how the last start of a run ended, as an exit status for scripts"),
    "eval": ("launch.evaluate", "zero-shot, few-shot, retrieval and contrastive accuracy of a trained run"),
    "analyze": ("launch.analyze", "which expert serves what: routing of a trained run, for the report"),
    "report": ("launch.report", "write one HTML page about a run"),
    "average": ("launch.average", "the mean of several checkpoints' weights, as a run of its own"),
    "prune": ("launch.prune", "keep the experts that one modality uses"),
    "reproduce": ("launch.reproduce", "one of the paper's comparisons, in miniature, on the demo data"),
    "checkpoint": ("launch.checkpoint", "list, show, verify and remove the checkpoints of a run"),
    "plan": ("launch.plan", "parameters, memory and layout of a preset, without training"),
    "verify": ("launch.verify", "prove that a layout computes what one process computes"),
    "submit": ("launch.submit", "a training run as a job of Slurm, checked before it waits"),
    "submit-prep": ("launch.submit_prep", "preparation of data as an array of Slurm jobs"),
    "status": ("launch.status", "how a run is: its jobs, step, ETA, faults; from its files and from Slurm"),
    "job": ("launch.job", "what a job script asks before and after training"),
    "prep": ("data_prep.cli", "from public data to Arrow shards and a vocabulary"),
    "doctor": ("launch.doctor", "what of this machine limoe-dist can use"),
}

RANK_VARIABLES = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")

USAGE = """\
limoe trains LIMoE, one transformer tower for images and text with a sparse mixture of experts.

usage: limoe COMMAND [options]      (limoe COMMAND --help tells more)

{commands}

First steps:
  limoe doctor
  limoe prep fetch-demo --out demo
  limoe prep pack --source demo/train --out shards/train
  limoe prep tokenizer --data shards/train/manifest.json --vocab-size 2000
  limoe train tiny --data shards/train/manifest.json --out runs/first --ranks 2 --parallel.ep 2

exit status: 0 done, 1 failed, 2 a setting or file that you can mend, 130 interrupted"""


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit status. What a user can mend is printed as lines, without a traceback."""
    argv = sys.argv[1:] if argv is None else argv
    # Before torch is imported: where a rank dies, its warnings are pages of C++ frames around our own lines.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        if not argv or argv[0] in ("-h", "--help", "help"):
            width = max(len(name) for name in COMMANDS)
            about = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
            print(USAGE.format(commands=about), flush=True)
            return 0 if argv else 2
        if argv[0] == "--version":
            print(f"limoe {version('limoe-dist')}")
            return 0
        if argv[0] not in COMMANDS:
            raise UserError(f'unknown command "{argv[0]}"{nearest(argv[0], COMMANDS)} (see limoe --help)')
        return int(importlib.import_module(COMMANDS[argv[0]][0]).main(argv[1:]))
    except UserError as error:
        rank = next((os.environ[name] for name in RANK_VARIABLES if name in os.environ), "0")
        # What all ranks raise together is told once.
        if error.told_by is None or str(error.told_by) == rank:
            for line in str(error).splitlines():
                print(f"limoe: error: {'' if rank == '0' else f'rank {rank}: '}{line}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output went away (`limoe plan h14 | head`): nothing is left to say, and nowhere to say it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
