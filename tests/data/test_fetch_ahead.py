"""Which shards a loader asks its cache for: those of all sources in turn, each time that they change."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from limoe_dist.data.loader import Loader


def test_the_first_shards_of_all_sources_come_before_the_second_ones_and_only_when_they_change() -> None:
    wanted: list[list[int]] = []
    # Source 1 has its shards behind the 10 of source 0, and less of them are ahead.
    ahead = {0: lambda sample: [sample // 100, sample // 100 + 1, 7], 1: lambda sample: [sample // 50]}
    loader: Any = SimpleNamespace(
        shards=SimpleNamespace(cache=object(), want=wanted.append),
        _mixture=SimpleNamespace(period=3, samples=lambda p: (np.array([0, 1, 0]), p * 10 + np.array([5, 0, -5]))),
        _orders=[SimpleNamespace(shards_from=ahead[0]), SimpleNamespace(shards_from=ahead[1])],
        _first_shards=[0, 10],
        _ahead=None,
    )
    # From position 10 on source 0 reads samples 105 and 115, and source 1 sample 110.
    for position in (10, 11, 20):
        Loader._fetch_ahead(loader, position)
    assert wanted == [[1, 12, 2, 7], [2, 14, 3, 7]]
    loader.shards.cache = None
    Loader._fetch_ahead(loader, 50)
    assert len(wanted) == 2
