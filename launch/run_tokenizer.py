"""The vocabulary that a checkpoint was trained with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from limoe_dist.config.errors import UserError
from limoe_dist.config.schema import Run
from limoe_dist.data.manifest import load_manifest, manifest_place
from limoe_dist.data.places import exists, parent

if TYPE_CHECKING:
    from limoe_dist.data.tokenizer import Tokenizer


def open_run_tokenizer(run: Run, checkpoint: Path) -> Tokenizer:
    """The vocabulary that the checkpoint was trained with. Raises UserError for another one."""
    from limoe_dist.checkpoint.state import read_state
    from limoe_dist.data.manifest import sha256_of
    from limoe_dist.data.tokenizer import Tokenizer, open_tokenizer, vocabulary_file

    if run.data.tokenizer:
        file = vocabulary_file(run.data.tokenizer, run.data)
        tokenizer = Tokenizer(file, length=run.text.length, vocab_limit=run.text.vocab_size)
    else:
        place = manifest_place(run.data.manifest)
        if not exists(place):
            raise UserError(
                f"the run's tokenizer is beside its training manifest, and {place} is not there: "
                "give --tokenizer FILE, the SentencePiece model that the run was trained with",
                told_by=0,
            )
        tokenizer = open_tokenizer(run, load_manifest(place), parent(place))
    found, expected = sha256_of(tokenizer.path), read_state(checkpoint).tokenizer
    if found != expected:
        raise UserError(
            f"tokenizer {tokenizer.path}: sha256 is {found[:12]}..., but {checkpoint} was trained with "
            f"{expected[:12]}...: the same text would be other tokens; give --tokenizer FILE, the run's own",
            told_by=0,
        )
    return tokenizer
