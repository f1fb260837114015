"""Shards for the tests of training, written once a module."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.shards import write_shards


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder / "validation", rows=24, shards=1)
    return write_shards(folder / "train", rows=64)
