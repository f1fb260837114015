from __future__ import annotations

import pytest

from data_prep.imaging.filters import Filters, ScoreLimit, parse_limits
from data_prep.sources.source import Sample
from limoe_dist.config.errors import UserError


def sample(*captions: str, image: bytes = b"a picture", **scores: float) -> Sample:
    return Sample("key", image, captions, scores=scores)


def test_without_settings_nothing_is_refused():
    for row in (sample("a"), sample(), sample("a" * 10_000, similarity=0.0), sample("a", image=b"")):
        assert Filters().refusal(row) is None
        assert Filters().kept_captions(row.captions) == row.captions


def test_captions_of_a_wrong_length_are_dropped_one_by_one():
    filters = Filters(min_caption_chars=3, max_caption_chars=5)
    assert filters.kept_captions(("ab", "abc", "abcde", "abcdef", " ab  ")) == ("abc", "abcde")
    assert filters.refusal(sample("ab", "abcd")) is None
    assert filters.refusal(sample("ab", "abcdef")) == "has no caption of 3 to 5 characters"
    assert Filters(min_caption_chars=3).refusal(sample("ab")) == "has no caption of at least 3 characters"


def test_a_picture_that_came_without_captions_stays():
    assert Filters(min_caption_chars=3).refusal(sample()) is None


def test_a_text_alone_is_judged_by_its_length():
    assert Filters(min_caption_chars=3).refusal(sample("ab", image=b"")) is not None
    assert Filters(min_caption_chars=3).refusal(sample("abc", image=b"")) is None


def test_the_ends_of_a_range_belong_to_it():
    filters = Filters(scores=parse_limits(["similarity>=0.28", "similarity<=0.5"]))
    assert filters.refusal(sample("a", similarity=0.28)) is None
    assert filters.refusal(sample("a", similarity=0.5)) is None
    assert filters.refusal(sample("a", similarity=0.279)) == "has similarity 0.279, less than 0.28"
    assert filters.refusal(sample("a", similarity=0.51)) == "has similarity 0.51, more than 0.5"


def test_every_limit_must_hold():
    filters = Filters(scores=parse_limits(["similarity>=0.28", "punsafe<=0.5"]))
    assert filters.columns == ("similarity", "punsafe")
    assert filters.refusal(sample("a", similarity=0.3, punsafe=0.1)) is None
    assert filters.refusal(sample("a", similarity=0.3, punsafe=0.6)) == "has punsafe 0.6, more than 0.5"


@pytest.mark.parametrize("scores", [{}, {"punsafe": float("nan")}])
def test_a_row_without_the_score_is_refused_unless_the_limit_lets_it_pass(scores):
    assert Filters(scores=parse_limits(["punsafe<=0.5"])).refusal(sample("a", **scores)) == "has no score punsafe"
    assert Filters(scores=parse_limits(["punsafe<=0.5?"])).refusal(sample("a", **scores)) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("similarity>=0.28", ScoreLimit("similarity", least=0.28)),
        (" nsfw <= -1e-3 ", ScoreLimit("nsfw", most=-0.001)),
        ("clip b32 score>=1", ScoreLimit("clip b32 score", least=1.0)),
        ("p.water-mark<=.5?", ScoreLimit("p.water-mark", most=0.5, missing_passes=True)),
    ],
)
def test_limits_are_read(text, expected):
    assert parse_limits([text]) == (expected,)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "similarity",
        "similarity>0.3",
        "similarity=0.3",
        ">=0.3",
        "a>=",
        "a>=b",
        "a>=nan",
        "a<=inf",
        "a>=1 2",
        "a>=1<=2",
    ],
)
def test_what_is_no_limit_is_refused_with_an_example(text):
    with pytest.raises(UserError, match=r'--score ".*similarity>=0.28'):
        parse_limits([text])


def test_limits_that_no_row_can_meet_are_refused():
    with pytest.raises(UserError, match=r"--score: a cannot be at least 0.6 and at most 0.5"):
        parse_limits(["a>=0.6", "b>=1", "a<=0.5"])
    with pytest.raises(UserError, match="--min-caption-chars=9 is more than --max-caption-chars=5"):
        Filters(min_caption_chars=9, max_caption_chars=5)
    with pytest.raises(UserError, match="--max-caption-chars=-1"):
        Filters(max_caption_chars=-1)
