"""What the rank that tells of a hang or a lost connection prints, and who is to blame, from what the ranks answered."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from limoe_dist.parallel.fault import Fault, blamed
from limoe_dist.parallel.place import name_ranks
from limoe_dist.parallel.stacks import alike

PROBE_S = 2.0
"""Longer is not waited for a host to take or refuse a connection."""


@dataclass(frozen=True)
class Answer:
    """What a rank says of itself."""

    line: str
    """What it is in or was in last."""
    inside: bool
    """In a collective, where it may only be waiting."""
    stacks: dict[str, str]
    """By name of the thread."""


@dataclass(frozen=True)
class Finding:
    kind: Literal["broken", "hang"]
    teller: int
    hosts: tuple[str, ...]
    """The host of each rank."""
    answers: Mapping[int, Answer]
    answer_s: float
    """So long the ranks had for it."""
    cause: str
    """hang: the limit that was reached; broken: the error."""
    trace: str = ""
    """broken: the error's traceback."""

    @property
    def silent(self) -> list[int]:
        return [rank for rank in range(len(self.hosts)) if rank not in self.answers]

    @property
    def missing(self) -> list[int]:
        """The ranks that the others wait for: those that are silent, else those that are in no collective.

        Empty where all ranks are in one, perhaps not in the same.
        """
        if self.silent or self.kind == "broken":
            return self.silent
        outside = [rank for rank, answer in self.answers.items() if not answer.inside]
        return [] if len(outside) == len(self.answers) else outside

    def text(self) -> str:
        """One line for each rank, then the stacks of those that answered."""
        lines = []
        if self.silent:
            lines.append(f"limoe: error: {self._silence()}; look at its output and its host's log")
        if self.kind == "broken":
            me = name_ranks([self.teller], self.hosts)
            lines += [f"limoe: {me} lost a connection:", self.trace.rstrip(), "What each rank is in:"]
        else:
            lines.append(f"limoe: error: {self.cause}; what each rank is in:")
        for rank in range(len(self.hosts)):
            answer = self.answers.get(rank)
            lines.append(f"  {name_ranks([rank], self.hosts)}: {'silent' if answer is None else answer.line}")
        lines += alike({rank: answer.stacks for rank, answer in self.answers.items()}, self.hosts)
        return "\n".join(lines)

    def fault(self) -> Fault:
        words = self.cause
        if self.kind == "broken":
            words = f"{name_ranks([self.teller], self.hosts)} lost a connection: {self.cause}"
        if self.silent:
            words += f"; {self._silence()}"
        elif self.missing:
            words += f"; {name_ranks(self.missing, self.hosts)} did not come to the collective that the others are in"
        return Fault(self.kind, tuple(self.missing), blamed(self.missing, self.hosts), words)

    def _silence(self) -> str:
        return (
            f"{name_ranks(self.silent, self.hosts)} did not answer in {self.answer_s:g} seconds: it died, perhaps "
            "killed for want of memory, or it stands still"
        )


@dataclass(frozen=True)
class Gone:
    """Of a store that does not answer."""

    kind: Literal["broken", "hang"]
    of_process: bool
    """It is the process that keeps the store, and not its host or the way to it."""
    why: str


def why_gone(host: str, port: int) -> Gone:
    """Asks the host of a store: it refuses a connection where the process is no more."""
    try:
        with socket.create_connection((host, port), timeout=PROBE_S):
            return Gone("hang", True, "its process stands still, while its host takes connections")
    except ConnectionRefusedError:
        return Gone("broken", True, "it died; look at its output")
    except OSError as error:
        return Gone("broken", False, f"its host does not answer ({error}): it died, or a network is cut")
