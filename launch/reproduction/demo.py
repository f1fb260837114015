"""The demo data of a reproduction, made by the `limoe prep` commands that a user would type."""

from __future__ import annotations

import hashlib
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from launch.reproduction.runs import Data
from limoe_dist.config.errors import UserError
from limoe_dist.data.manifest import load_manifest

SPLITS = ("train", "validation")
VOCABULARY = 2000


def demo_data(folder: Path, tell: Callable[[str], None]) -> Data:
    """The packed demo data in `folder`, made where it is not there. Raises UserError where it cannot be made."""
    train, validation = (folder / split / "manifest.json" for split in SPLITS)
    demo = folder / "demo"
    for done, command in (
        ((demo / "validation" / "captions.jsonl").is_file(), ["fetch-demo", "--out", demo]),
        (train.is_file(), ["pack", "--source", demo / "train", "--out", train.parent]),
        (validation.is_file(), ["pack", "--source", demo / "validation", "--out", validation.parent]),
        (
            train.is_file() and bool(load_manifest(train).tokenizer),
            ["tokenizer", "--data", train, "--vocab-size", str(VOCABULARY)],
        ),
    ):
        words = ["prep", *map(str, command)]
        if not done and not (command[0] == "fetch-demo" and train.is_file() and validation.is_file()):
            tell(f"$ limoe {shlex.join(words)}")
            if status := subprocess.run([sys.executable, "-m", "limoe_dist", *words], check=False).returncode:
                raise UserError(f"limoe {shlex.join(words)} ended with status {status}: see above")
    checksums = [shard.sha256 for path in (train, validation) for shard in load_manifest(path).shards]
    return Data(train, validation, hashlib.sha256("".join(checksums).encode()).hexdigest())
