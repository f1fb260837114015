"""Time limits as Slurm writes them."""

from __future__ import annotations

import pytest

from limoe_dist.config.errors import UserError
from slurm.times import seconds_of, written


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90 * 60),
        ("1:30", 90),
        ("24:00:00", 86_400),
        ("100:00:00", 360_000),
        ("1-12", 36 * 3600),
        ("1-12:30", 36 * 3600 + 1800),
        ("2-00:00:05", 2 * 86_400 + 5),
    ],
)
def test_all_formats_of_slurm_are_read(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("24h", "is no time of Slurm's"),
        ("", "is no time of Slurm's"),
        ("-5", "is no time of Slurm's"),
        ("1:2:3:4", "is no time of Slurm's"),
        ("1-24", "24 hours, but at most 23"),
        ("1:60:00", "60 minutes, but at most 59"),
        ("5:75", "75 seconds, but at most 59"),
        ("00:00:00", "a job needs time"),
        ("UNLIMITED", "is no time of Slurm's"),
    ],
)
def test_another_text_is_refused_with_the_formats(text, reason):
    with pytest.raises(UserError) as caught:
        seconds_of(text)
    assert reason in str(caught.value)
    assert str(caught.value).startswith(f"--time {text}: ")


@pytest.mark.parametrize("seconds", [5, 86_399, 86_400, 1_000_000])
def test_what_is_written_reads_as_the_same(seconds):
    assert seconds_of(written(seconds)) == seconds
