"""The data of a run, opened and checked before the first step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from limoe_dist.config.errors import UserError
from limoe_dist.config.schema import Run
from limoe_dist.data.arrow import ShardSet
from limoe_dist.data.manifest import Manifest, sha256_of, verify_shards
from limoe_dist.data.mixture import check_pairs, data_hash, described, entries_of, manifest_file, orders_of, with_home
from limoe_dist.data.places import is_remote
from limoe_dist.data.tokenizer import Tokenizer, normalised, open_tokenizer
from limoe_dist.eval.classes import ClassNames, classes_of_run
from limoe_dist.parallel.collectives import all_or_none
from limoe_dist.parallel.mesh import Mesh


@dataclass(frozen=True)
class Inputs:
    train: ShardSet
    """Of data.mixture all sources, in its order."""
    validation: ShardSet | None
    classes: list[ClassNames] | None
    """What zero-shot on the validation rows chooses between; None where none of them has a concept."""
    tokenizer: Tokenizer
    data_hash: str
    """Of the training shards' checksums, and of a mixture's weights: a resumed run must read the same rows."""
    tokenizer_hash: str
    told: tuple[str, ...] = ()
    """Lines about a mixture, for whoever starts the run."""

    def close(self) -> None:
        """Gives back all shards."""
        for shards in filter(None, (self.train, self.validation)):
            shards.close()


def open_inputs(run: Run, mesh: Mesh, device: torch.device) -> Inputs:
    """Opens shards and vocabulary; the ranks share the work of checking every shard's checksum. A collective.

    Raises UserError on all ranks where a manifest, a shard or the vocabulary is not what it should be.
    """
    with all_or_none(mesh.world, device):
        return _open(run, mesh)


def _open(run: Run, mesh: Mesh) -> Inputs:
    train = ShardSet(*(entry.path for entry in entries_of(run.data)), data=run.data)
    manifests = [part.manifest for part in train.parts]
    check_pairs(run.data, manifests)
    validation = ShardSet(run.data.validation, data=run.data) if run.data.validation else None
    _check_cache(run, train, validation)
    for shards in (train, validation):
        if shards is not None:
            for part in shards.parts if run.data.check == "start" else ():
                verify_shards(part.manifest, part.folder, rank=mesh.rank, world=mesh.world.size)
            shards.open_all(rank=mesh.rank, world=mesh.world.size)
    named = manifest_file(with_home(run.data).manifest)
    home = next(part for part in train.parts if manifest_file(part.path) == named)
    tokenizer = open_tokenizer(run, home.manifest, home.folder)
    return Inputs(
        train=train,
        validation=validation,
        classes=None if validation is None else _classes(run, train, validation),
        tokenizer=tokenizer,
        data_hash=data_hash(run.data, manifests),
        tokenizer_hash=sha256_of(tokenizer.path),
        told=tuple(described(run.data, manifests, samples=run.train.steps * run.train.batch_pairs)),
    )


def _check_cache(run: Run, train: ShardSet, validation: ShardSet | None) -> None:
    """Raises UserError where shards from a URL would be fetched anew all the time, or not at all."""
    needed = 0
    if validation is not None and validation.cache is not None:
        # Evaluated while the loader keeps what it reads; and two ranks may be in different shards.
        needed = _largest(validation.manifest, 2 * validation.most_open)
    orders = orders_of(run.data, [part.manifest for part in train.parts], seed=run.train.seed)
    for part, order in zip(train.parts, orders, strict=True):
        # The slowest rank may be in one window while the fastest is in the next.
        needed += _largest(part.manifest, 2 * order.shards_of_a_window) if is_remote(part.path) else 0
    if needed > run.data.cache_gb * 1e9:
        raise UserError(
            f"data.cache_gb={run.data.cache_gb:g}, but two windows of data.window_rows={run.data.window_rows} rows of "
            f"each source from a URL, and what is evaluated meanwhile, are shards of up to {needed / 1e9:.3g} GB: "
            "raise data.cache_gb to at least that, or give a smaller window (0 is none: it mixes whole sources)"
        )


def _largest(manifest: Manifest, count: int) -> int:
    """Bytes of the `count` largest shards."""
    return sum(sorted((shard.bytes for shard in manifest.shards), reverse=True)[:count])


def _classes(run: Run, train: ShardSet, validation: ShardSet) -> list[ClassNames] | None:
    rows = (validation.row(number) for number in range(len(validation)))
    if not any(normalised(row.concept) and len(row.image) for row in rows):
        return None
    return classes_of_run(run, train, validation)
