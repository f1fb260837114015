from __future__ import annotations

from tests.soak.pack_memory import measure


def test_a_list_of_rows_is_packed_in_bounded_memory(tmp_path):
    """The whole: python -m tests.soak.pack_memory, 10 million rows below 1 GB."""
    figures = measure(tmp_path, rows=30_000, workers=1)
    assert (figures["packed"], figures["rejected"], figures["processes"]) == (30, 29_970, 1)
    # The packages alone take about 140 MB.
    assert figures["peak_rss_mb"] < 260
