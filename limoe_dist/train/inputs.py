"""The data of a run, opened and checked before the first step."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from limoe_dist.config.schema import Run
from limoe_dist.data.arrow import ShardSet
from limoe_dist.data.manifest import sha256_of, verify_shards
from limoe_dist.data.tokenizer import Tokenizer, normalised, open_tokenizer
from limoe_dist.eval.classes import ClassNames, classes_of_run, concepts_of
from limoe_dist.parallel.collectives import all_or_none
from limoe_dist.parallel.mesh import Mesh


@dataclass(frozen=True)
class Inputs:
    train: ShardSet
    validation: ShardSet | None
    classes: list[ClassNames] | None
    """What zero-shot on the validation rows chooses between; None where none of them has a concept."""
    tokenizer: Tokenizer
    data_hash: str
    """Of the training shards' checksums: a resumed run must read the same rows."""
    tokenizer_hash: str


def open_inputs(run: Run, mesh: Mesh, device: torch.device) -> Inputs:
    """Opens shards and vocabulary; the ranks share the work of checking every shard's checksum. A collective.

    Raises UserError on all ranks where a manifest, a shard or the vocabulary is not what it should be.
    """
    with all_or_none(mesh.world, device):
        return _open(run, mesh)


def _open(run: Run, mesh: Mesh) -> Inputs:
    train = ShardSet(run.data.manifest)
    validation = ShardSet(run.data.validation) if run.data.validation else None
    for shards in (train, validation):
        if shards is not None:
            verify_shards(shards.manifest, shards.folder, rank=mesh.rank, world=mesh.world.size)
            shards.open_all()
    tokenizer = open_tokenizer(run, train.manifest, train.path.parent)
    checksums = "".join(shard.sha256 for shard in train.manifest.shards)
    return Inputs(
        train=train,
        validation=validation,
        classes=None if validation is None else _classes(run, train, validation),
        tokenizer=tokenizer,
        data_hash=hashlib.sha256(checksums.encode()).hexdigest(),
        tokenizer_hash=sha256_of(tokenizer.path),
    )


def _classes(run: Run, train: ShardSet, validation: ShardSet) -> list[ClassNames] | None:
    if not any(normalised(concept) for concept in concepts_of(validation)):
        return None
    return classes_of_run(run, train, validation)
