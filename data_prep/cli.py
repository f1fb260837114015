"""`limoe prep`: data, from public packages, lists and archives to shards with a vocabulary.

Each command is a module of data_prep/commands with `Settings`, its options, and `run(Settings)`.
"""

from __future__ import annotations

import importlib
import sys

import tyro

from limoe_dist.config.errors import UserError, nearest

COMMANDS = {
    "fetch-demo": "fetch open emoji art (and photographs) with captions",
    "download": "fetch the pictures of a list of addresses into tars, with a ledger",
    "retry-failed": "ask again for rows of a download that failed",
    "dedup": "find pictures that are there twice or in an evaluation set, as a list for pack",
    "pack": "pack pictures and captions, from folders, tars, parquet or stores, into Arrow shards",
    "tokenizer": "train a SentencePiece vocabulary from captions, or take an existing one",
    "verify": "check shards against their manifest: checksums, rows, keys, pictures",
    "stats": "show what shards hold: a table, JSON, and one page with plots and pictures",
    "audit": "prove which rows a run has read: each once in an epoch, or why not",
}


def usage() -> str:
    lines = [f"  {name:<14}{about}" for name, about in COMMANDS.items()]
    return "\n".join(["usage: limoe prep COMMAND [OPTIONS]", "", *lines, "", "limoe prep COMMAND --help says more."])


def main(argv: list[str]) -> int:
    """Runs one command and returns its exit status: 2 for options that are wrong. Lets UserError pass."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    name = argv[0]
    if name not in COMMANDS:
        raise UserError(f'unknown command "prep {name}"{nearest(name, COMMANDS)} (commands: {", ".join(COMMANDS)})')
    _refuse_repeats(argv[1:])
    command = importlib.import_module(f"data_prep.commands.{name.replace('-', '_')}")
    try:
        settings = tyro.cli(command.Settings, args=argv[1:], prog=f"limoe prep {name}")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    return int(command.run(settings))


def _refuse_repeats(options: list[str]) -> None:
    """Of an option given twice only the last would count, and `--source A --source B` would lose A."""
    named = [option.partition("=")[0] for option in options if option.startswith("--")]
    for name in named:
        if named.count(name) > 1:
            raise UserError(f"{name} is given {named.count(name)} times: give it once, with all its values behind it")
