"""Slurm's ways of writing a time limit."""

from __future__ import annotations

import re

from limoe_dist.config.errors import UserError

_DAYS = re.compile(r"(\d{1,5})-(\d{1,2})(?::(\d{1,2})(?::(\d{1,2}))?)?")
_HOURS = re.compile(r"(\d{1,6}):(\d{1,2}):(\d{1,2})")
_MINUTES = re.compile(r"(\d{1,8})(?::(\d{1,2}))?")
_FORMATS = "minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS, as 24:00:00 or 1-0 for a day"


def seconds_of(text: str, *, option: str = "--time") -> int:
    """Seconds of a time limit in any of Slurm's formats: 90 is 90 minutes, 1:30 a minute and a half, 1-12 36 hours.

    Raises UserError for any other text, a part that overflows into the next, and no time at all.
    """
    if found := _DAYS.fullmatch(text):
        days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
        largest = {"hours": (hours, 23), "minutes": (minutes, 59), "seconds": (seconds, 59)}
    elif found := _HOURS.fullmatch(text):
        days, (hours, minutes, seconds) = 0, (int(part) for part in found.groups())
        largest = {"minutes": (minutes, 59), "seconds": (seconds, 59)}
    elif found := _MINUTES.fullmatch(text):
        days, hours, (minutes, seconds) = 0, 0, (int(part or 0) for part in found.groups())
        largest = {"seconds": (seconds, 59)}
    else:
        raise UserError(f"{option} {text}: is no time of Slurm's: use {_FORMATS}")
    for name, (value, most) in largest.items():
        if value > most:
            raise UserError(f"{option} {text}: {value} {name}, but at most {most}: use {_FORMATS}")
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if total == 0:
        raise UserError(f"{option} {text}: a job needs time; Slurm takes 0 for a job without a limit, which saves last")
    return total


def time_problem(text: str) -> str | None:
    """What is wrong with a time limit, or None."""
    if not text:
        return "--time is missing: the time limit of the job, as --time 24:00:00"
    try:
        seconds_of(text)
    except UserError as error:
        return str(error)
    return None


def written(seconds: float) -> str:
    """D-HH:MM:SS, or HH:MM:SS below a day, as Slurm writes it."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days}-" if days else "") + f"{hour:02d}:{minute:02d}:{second:02d}"
