"""Which rows are packed, by what their captions and score columns say; pictures are judged in transform.py.

Captions that are too short or too long are dropped one by one; a row that had captions and has none left is refused. A
row that came without captions, a picture alone, is not judged by them. Scores bound a row: every limit must hold, and
a row that lacks the column, or has no number there, is refused unless the limit says otherwise with a `?`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from data_prep.sources.source import Sample
from limoe_dist.config.errors import UserError

_LIMIT = re.compile(
    r"\s*(?P<column>[^<>=?\s](?:[^<>=?]*[^<>=?\s])?)\s*(?P<sign>>=|<=)\s*(?P<value>\S+?)(?P<missing>\?)?\s*"
)
_EXAMPLE = '"similarity>=0.28", "nsfw<=0.5", or "nsfw<=0.5?" to let rows without that score pass'


@dataclass(frozen=True)
class ScoreLimit:
    column: str
    """As the source calls it."""
    least: float = -math.inf
    most: float = math.inf
    """Both ends belong to the range."""
    missing_passes: bool = False

    def refusal(self, scores: Mapping[str, float]) -> str | None:
        """Why a row with these scores is left out, or None."""
        score = scores.get(self.column)
        if score is None or math.isnan(score):
            return None if self.missing_passes else f"has no score {self.column}"
        if score < self.least:
            return f"has {self.column} {score:g}, less than {self.least:g}"
        if score > self.most:
            return f"has {self.column} {score:g}, more than {self.most:g}"
        return None


@dataclass(frozen=True)
class Filters:
    min_caption_chars: int = 0
    max_caption_chars: int = 0
    """Of a caption without the spaces around it; 0: no limit."""
    scores: tuple[ScoreLimit, ...] = ()

    def __post_init__(self) -> None:
        """Raises UserError for lengths out of range."""
        least, most = self.min_caption_chars, self.max_caption_chars
        for name, value in (("min", least), ("max", most)):
            if value < 0:
                raise UserError(f"--{name}-caption-chars={value}: must be a number of characters, or 0 for no limit")
        if most and least > most:
            raise UserError(
                f"--min-caption-chars={least} is more than --max-caption-chars={most}: no caption would be left"
            )

    @property
    def columns(self) -> tuple[str, ...]:
        """The score columns that a source has to read."""
        return tuple(dict.fromkeys(limit.column for limit in self.scores))

    def kept_captions(self, captions: Sequence[str]) -> tuple[str, ...]:
        """Those whose length is within the limits, unchanged and in order."""
        most = self.max_caption_chars or math.inf
        return tuple(caption for caption in captions if self.min_caption_chars <= len(caption.strip()) <= most)

    def refusal(self, sample: Sample) -> str | None:
        """Why the row is left out, or None. What it says is a rule of the settings, not damage of the row."""
        for limit in self.scores:
            if reason := limit.refusal(sample.scores):
                return reason
        if sample.captions and not self.kept_captions(sample.captions):
            return f"has no caption of {self._lengths()} characters"
        return None

    def _lengths(self) -> str:
        if not self.max_caption_chars:
            return f"at least {self.min_caption_chars}"
        return f"{self.min_caption_chars} to {self.max_caption_chars}"


def parse_limits(texts: Sequence[str], option: str = "--score") -> tuple[ScoreLimit, ...]:
    """`similarity>=0.28` and the like, one limit for each text; two of one column make a range.

    option: what errors call the setting. Raises UserError for a text that is no limit, a value that is no number, and
    for limits of one column that no number can meet.
    """
    limits = tuple(_limit(text, option) for text in texts)
    for column in dict.fromkeys(limit.column for limit in limits):
        of_column = [limit for limit in limits if limit.column == column]
        least, most = max(limit.least for limit in of_column), min(limit.most for limit in of_column)
        if least > most:
            raise UserError(
                f"{option}: {column} cannot be at least {least:g} and at most {most:g}: no row would be left"
            )
    return limits


def _limit(text: str, option: str) -> ScoreLimit:
    found = _LIMIT.fullmatch(text)
    if found is None:
        raise UserError(f'{option} "{text}": must be a column, >= or <=, and a number, as in {_EXAMPLE}')
    try:
        value = float(found["value"])
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f'{option} "{text}": "{found["value"]}" is no finite number; a limit is like {_EXAMPLE}')
    column, missing = found["column"], found["missing"] is not None
    if found["sign"] == ">=":
        return ScoreLimit(column, least=value, missing_passes=missing)
    return ScoreLimit(column, most=value, missing_passes=missing)
