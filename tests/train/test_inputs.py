"""Runs on a mixture of manifests, and the checks of data before the first step."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import fsspec
import numpy as np
import pytest

from limoe_dist.config.errors import UserError
from limoe_dist.config.parse import load_run
from limoe_dist.config.schema import Data, Run
from limoe_dist.data.manifest import load_manifest, save_manifest
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.train.inputs import Inputs, open_inputs
from limoe_dist.train.loop import train
from tests.support.shards import picture, write_shards
from tests.train.small import CPU, losses, run_on


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another source, with a vocabulary of another size."""
    folder = tmp_path_factory.mktemp("second")
    return write_shards(folder, rows=24, shards=1, vocab_size=30, pictures={i: picture(500 + i) for i in range(24)})


def with_data(run: Run, **data: object) -> Run:
    content = run.data.model_dump() | {"manifest": ""} | data
    return run.model_copy(update={"data": Data.model_validate(content)})


def opened(run: Run) -> Inputs:
    return open_inputs(run, Mesh.single(), CPU)


def trained(run: Run, out: Path, *, stop_after: int, resume: bool = False) -> list[tuple[int, float, float]]:
    train(run, out, mesh=Mesh.single(), device=CPU, resume=resume, stop_after=stop_after)
    return losses(out)


def test_one_manifest_has_the_same_hash_alone_and_as_a_mixture(data: Path) -> None:
    checksums = "".join(shard.sha256 for shard in load_manifest(data).shards)
    read = json.dumps([2, [1, hashlib.sha256(checksums.encode()).hexdigest()]])
    expected = hashlib.sha256(read.encode()).hexdigest()
    assert opened(run_on(data)).data_hash == expected
    assert opened(with_data(run_on(data), mixture=[f"{data}=7"])).data_hash == expected


def test_the_vocabulary_is_the_first_manifests_or_the_named_ones(data: Path, second: Path) -> None:
    mixture = [f"{data}=3", f"{second.parent}=1"]
    assert opened(with_data(run_on(data), mixture=mixture)).tokenizer.path.parent == data.parent
    named = opened(with_data(run_on(data), mixture=mixture, manifest=str(second)))
    assert (named.tokenizer.path.parent, named.tokenizer.vocab_size) == (second.parent, 30)
    assert [part.manifest.rows for part in named.train.parts] == [64, 24]
    assert named.told[1].startswith(f"data: 25.00% from {second.parent}: 24 samples, 1 epochs of its 24 rows")


def test_a_run_on_a_mixture_goes_on_as_if_it_had_never_stopped(
    data: Path, second: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = with_data(run_on(data, steps=4), mixture=[f"{data}=3", f"{second}=1"], validation="")
    whole = trained(run, tmp_path / "whole", stop_after=4)
    assert "data: 75.00% from" in capfd.readouterr().out
    trained(run, tmp_path / "parts", stop_after=2)
    kept = load_run(tmp_path / "parts" / "run.json")
    assert (kept.data.manifest, kept.data.mixture) == (str(data), run.data.mixture)
    assert trained(kept, tmp_path / "parts", stop_after=4, resume=True) == whole


def test_weights_decide_results_and_stay(data: Path, second: Path, tmp_path: Path) -> None:
    run = with_data(run_on(data), mixture=[f"{data}=3", f"{second}=1"], validation="")
    trained(run, tmp_path, stop_after=1)
    for changed in ([f"{data}=1", f"{second}=1"], [f"{second}=1", f"{data}=3"]):
        with pytest.raises(UserError, match=r"was made with other training shards, weights of data\.mixture or"):
            trained(with_data(run, mixture=changed), tmp_path, stop_after=2, resume=True)
    same = with_data(run, mixture=[f"{data}=0.75", f"{second}=1/4"])
    assert [step for step, *_ in trained(same, tmp_path, stop_after=2, resume=True)] == [1, 2]


def test_a_changed_shard_of_any_source_is_named(data: Path, tmp_path: Path) -> None:
    other = write_shards(tmp_path, rows=24, shards=1)
    file = tmp_path / "shard-00000.arrow"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(UserError, match=rf"{file}: its checksum is not the one in the manifest"):
        opened(with_data(run_on(data), mixture=[f"{data}=3", f"{other}=1"]))


def test_shards_without_a_pair_are_refused_before_the_first_step(data: Path, tmp_path: Path) -> None:
    path = write_shards(tmp_path, rows=20, shards=1, captions=dict.fromkeys(range(20), ()))
    save_manifest(load_manifest(path).model_copy(update={"without_caption": 20, "without_picture": 0}), path)
    with pytest.raises(UserError, match=rf"{path}: 20 of the 20 rows have no caption: training needs pairs"):
        opened(with_data(run_on(data), manifest=str(path)))


def test_pictures_differ_by_source(data: Path, second: Path) -> None:
    """The test above compares runs with each other; this one looks that both sources are read at all."""
    from limoe_dist.data.loader import Loader

    run = with_data(run_on(data, steps=2), mixture=[f"{data}=3", f"{second}=1"], validation="")
    inputs = opened(run)
    with Loader(run, inputs.train, inputs.tokenizer, rank=0, world=1, first_step=0, device=CPU) as loader:
        rows = np.concatenate([batch.rows for batch in loader])
    assert ((rows < 64).sum(), (rows >= 64).sum()) == (24, 8)
    assert rows.max() < 88


def test_concepts_of_texts_alone_are_no_classes_to_choose_between(data: Path, tmp_path: Path) -> None:
    nothing = dict.fromkeys(range(8), b"")
    validation = write_shards(tmp_path / "texts", rows=8, shards=1, pictures=nothing, vocab_size=None)
    run = run_on(data)
    run = run.model_copy(update={"data": run.data.model_copy(update={"validation": str(validation)})})
    assert opened(run).classes is None


def test_a_cache_that_cannot_hold_what_is_read_at_once_is_refused_before_the_first_step(
    data: Path, tmp_path: Path
) -> None:
    store = fsspec.filesystem("memory")
    for name in ("train", "validation"):
        for file in (data.parent.parent / name).iterdir():
            store.pipe(f"/{name}/{file.name}", file.read_bytes())
    train, validation = (
        sum(shard.bytes for shard in load_manifest(f"memory://{name}").shards) / 1e9 for name in ("train", "validation")
    )

    def with_room(cache_gb: float) -> Run:
        places = {"manifest": "memory://train", "validation": "memory://validation", "cache": str(tmp_path)}
        # Here: from a URL the vocabulary, much larger than these shards, would come into the cache, too.
        places["tokenizer"] = str(data.parent / "tokenizer.model")
        return with_data(run_on(data), **places, cache_gb=cache_gb)

    for room in (0.9 * train, train + 0.9 * validation):
        with pytest.raises(UserError, match=r"data\.cache_gb=.* and what is evaluated meanwhile, are shards of up to"):
            opened(with_room(room))
    opened(with_room(train + 1.1 * validation)).close()
