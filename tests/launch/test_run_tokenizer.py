"""The vocabulary of a run, wherever it is."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest

from launch.run_tokenizer import open_run_tokenizer
from limoe_dist.checkpoint import state
from limoe_dist.config.presets import preset
from limoe_dist.data.manifest import sha256_of
from tests.support.shards import write_shards


def test_a_vocabulary_may_be_given_by_its_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_shards(tmp_path / "shards", rows=2, shards=1).parent / "tokenizer.model"
    fsspec.filesystem("memory").pipe("/given/tokenizer.model", model.read_bytes())
    checkpoint = SimpleNamespace(tokenizer=sha256_of(model))
    monkeypatch.setattr(state, "read_state", lambda folder: checkpoint)
    tiny = preset("tiny")
    places = {"tokenizer": "memory://given/tokenizer.model", "cache": str(tmp_path / "cache")}
    run = tiny.model_copy(update={"data": tiny.data.model_copy(update=places)})
    assert open_run_tokenizer(run, tmp_path).path.parent == tmp_path / "cache"
