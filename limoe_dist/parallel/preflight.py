"""Before the process group: every rank comes to one store, and all must have been started alike.

The store holds, for each rank, its host and a digest of what it was started with. Rank 0 judges: it names the ranks
that did not come in time, or those that were started otherwise, and every rank that came ends with that text.
"""

from __future__ import annotations

import hashlib
import json
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from limoe_dist.config.errors import UserError
from limoe_dist.parallel.fault import Fault, FaultError, blamed
from limoe_dist.parallel.mpi import tell_by_mpi
from limoe_dist.parallel.place import Place, expected_hosts, host_name, name_ranks

POLL_S = 0.1
HEARD_S = 5.0
"""How long a rank waits for the others to read a refusal."""
AHEAD_S = 0.5
"""Of an error that all ranks raise, the rank that tells it ends first: at the first end a launcher ends all others."""
STORE_S = 60.0
"""The limit of one request to a store that was reached."""
SHOWN = 10


@dataclass(frozen=True)
class Meeting:
    """Where the ranks of one start talk beside the process groups."""

    store: dist.Store
    rank: int
    hosts: tuple[str, ...]
    """The host of each rank."""
    kept_by: int | None
    """The rank in whose process the store lives, and with which it ends; None: it is the launcher's."""
    at: tuple[str, int]
    """Host and port of the store."""

    @property
    def world(self) -> int:
        return len(self.hosts)


@dataclass(frozen=True)
class _Base:
    """A store that was reached."""

    store: dist.TCPStore
    kept_by: int | None
    host: str
    port: int

    @property
    def at(self) -> str:
        return f"{self.host}:{self.port}"

    def owner(self) -> str:
        return f"the launcher's store at {self.at}" if self.kept_by is None else f"rank 0 at {self.at}"


def meet(
    place: Place, environ: Mapping[str, str], *, timeout_s: float, agree: Mapping[str, str], problem: str
) -> Meeting:
    """Waits until all ranks have come, and were started with the same of `agree`, code and number of ranks.

    agree: by name, the text of each value that must be the same. problem: why this rank cannot go on, or empty; ranks
    come with it too, so that it is told once, or with the ranks that have it. Raises UserError on every rank that came
    where one differs or has a problem; FaultError where one did not come within timeout_s (seconds), and where rank 0
    cannot be reached.
    """
    host = host_name(environ)
    base = _open_store(place, environ, timeout_s)
    # A launcher's store outlives a start: one that is tried again, or a second one in the same process, is another.
    attempt = dist.PrefixStore(f"limoe/{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", base.store)
    store = dist.PrefixStore(f"start/{attempt.add(f'starts/{place.rank}', 1)}", attempt)
    expected = expected_hosts(place, environ)
    try:
        words = dict(agree) | code_version() | {"the number of ranks": str(place.world)}
        _come(store, place, host, words | {"problem": problem.replace("\n", "; ") or "none"})
        if place.rank == 0:
            verdict = _judge(store, place.world, expected, base.at, timeout_s)
            verdict["problem"] = verdict["problem"] or problem
            store.set("verdict", json.dumps(verdict))
        else:
            verdict = _await_verdict(store, place.world, expected, base.at, timeout_s)
        if verdict["problem"]:
            _hear(store, place, verdict["came"])
    except dist.DistError:
        text = f"{base.owner()} went away while this rank, on host {host}, met the others: look at its output"
        raise FaultError(Fault("broken", () if base.kept_by is None else (base.kept_by,), (), text)) from None
    if verdict["problem"]:
        teller = min(verdict["came"])
        time.sleep(0 if place.rank == teller else AHEAD_S)
        if "absent" in verdict:
            fault = Fault("absent", tuple(verdict["absent"]), tuple(verdict["blamed"]), verdict["problem"])
            raise FaultError(fault, told_by=teller)
        raise UserError(verdict["problem"], told_by=teller)
    if len(verdict["hosts"]) != place.world:
        raise UserError(
            f"this rank, on host {host}, was started as one of {place.world}, but rank 0 as one of "
            f"{len(verdict['hosts'])}: start all ranks with one launcher"
        )
    return Meeting(store, place.rank, tuple(verdict["hosts"]), base.kept_by, (base.host, base.port))


def code_version(package: Path = Path(__file__).parents[1]) -> dict[str, str]:
    """This package's version and a checksum over its Python files, and torch's version."""
    total = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        total.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes() + b"\0")
    try:
        number = version("limoe-dist")
    except PackageNotFoundError:
        number = "not installed"
    return {"limoe-dist": f"{number}, code {total.hexdigest()[:12]}", "torch": str(torch.__version__)}


def _open_store(place: Place, environ: Mapping[str, str], timeout_s: float) -> _Base:
    host, port = place.address, place.port
    if environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return _Base(_reach(host, port, place, environ, timeout_s), None, host, port)
    by_mpi = place.found_by == "MPI" and not (host and port)
    if place.rank == 0:
        store = _keep(0 if by_mpi else port)
        if by_mpi:
            host, port = socket.gethostname(), store.port
            tell_by_mpi(f"{host} {port}", rank=0, timeout_s=timeout_s)
        return _Base(store, 0, host, port)
    if by_mpi:
        host, told = tell_by_mpi("", rank=place.rank, timeout_s=timeout_s).split()
        port = int(told)
    return _Base(_reach(host, port, place, environ, timeout_s), 0, host, port)


def _keep(port: int) -> dist.TCPStore:
    try:
        return dist.TCPStore(
            "localhost",
            port,
            is_master=True,
            wait_for_workers=False,
            # A second start of one process at one port: the first one's store may still be held.
            multi_tenant=True,
            timeout=timedelta(seconds=STORE_S),
        )
    except dist.DistError as error:
        raise UserError(
            f"rank 0 on host {socket.gethostname()} cannot listen on port {port} ({_first_line(error)}): is another "
            "run there? Set MASTER_PORT to a free port, the same on all ranks"
        ) from None


def _reach(host: str, port: int, place: Place, environ: Mapping[str, str], timeout_s: float) -> dist.TCPStore:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            # Tried by hand first: the operating system's reason is plainer than the store's.
            with socket.create_connection((host, port), timeout=max(1.0, deadline - time.monotonic())):
                break
        except OSError as error:
            if time.monotonic() >= deadline:
                raise _out_of_reach(f"{host}:{port}", error, place, environ, timeout_s) from None
            time.sleep(POLL_S)
    try:
        return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=STORE_S))
    except dist.DistError as error:
        raise _out_of_reach(f"{host}:{port}", error, place, environ, timeout_s) from None


def _out_of_reach(at: str, error: Exception, place: Place, environ: Mapping[str, str], timeout_s: float) -> FaultError:
    text = (
        f"this rank, on host {host_name(environ)}, did not reach rank 0 at {at} within "
        f"parallel.start_timeout_s={timeout_s:g} seconds ({_first_line(error)}): did rank 0 start, is "
        f"{at.rpartition(':')[0]} the name of its host (MASTER_ADDR), and may the port be reached from here?"
    )
    # Who refuses can be reached, and has no rank 0. Of silence this rank's own host can be the cause as well.
    refused = isinstance(error, ConnectionRefusedError)
    return FaultError(Fault("absent", (0,), blamed([0], expected_hosts(place, environ)) if refused else (), text))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _come(store: dist.Store, place: Place, host: str, words: Mapping[str, str]) -> None:
    text = json.dumps(words, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    store.set(f"words/{digest}", text)
    about = {
        "host": host,
        "words": digest,
        "first": place.rank - place.local_rank,
        "local_world": place.local_world,
    }
    store.set(f"came/{place.rank}", json.dumps(about))


def _judge(store: dist.Store, world: int, expected: Mapping[int, str], at: str, timeout_s: float) -> dict[str, Any]:
    """What rank 0 finds: the hosts of all ranks, or the problem; and who can hear of it."""
    keys = [f"came/{rank}" for rank in range(world)]
    wait_until(lambda: store.check(keys), timeout_s)
    came = _came(store, world)
    if len(came) < world:
        return _absence(came, world, expected, at, timeout_s)
    hosts = [came[rank]["host"] for rank in range(world)]
    return {"problem": _disagreement(store, came, hosts), "came": list(came), "hosts": hosts}


def _await_verdict(
    store: dist.Store, world: int, expected: Mapping[int, str], at: str, timeout_s: float
) -> dict[str, Any]:
    """What rank 0 says, which may come late itself; where it does not come at all, its absence."""
    if wait_until(lambda: store.check(["came/0"]), timeout_s):
        if wait_until(lambda: store.check(["verdict"]), timeout_s + STORE_S):
            found: dict[str, Any] = json.loads(store.get("verdict"))
            return found
        raise dist.DistStoreError("no verdict")
    came = _came(store, world)
    return _absence(came, world, expected, at, timeout_s)


def wait_until(ready: Callable[[], bool], timeout_s: float) -> bool:
    """Asks again and again, in slices that Ctrl-C can interrupt; False where it took longer than timeout_s."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL_S)
    return True


def _came(store: dist.Store, world: int) -> dict[int, dict[str, Any]]:
    there = [rank for rank in range(world) if store.check([f"came/{rank}"])]
    return {rank: json.loads(store.get(f"came/{rank}")) for rank in there}


def _absence(
    came: Mapping[int, Mapping[str, Any]], world: int, expected: Mapping[int, str], at: str, timeout_s: float
) -> dict[str, Any]:
    """The verdict where ranks are missing: what it is of `_judge`, and the ranks and the hosts to blame."""
    missing = [rank for rank in range(world) if rank not in came]
    hosts = dict(expected) | _neighbours(came) | {rank: about["host"] for rank, about in came.items()}
    problem = (
        f"{name_ranks(missing, hosts)} of {world} did not come within parallel.start_timeout_s={timeout_s:g} seconds; "
        f"{name_ranks(came, hosts)} came. Look at the output of what is missing: was it started, and can its host "
        f"reach {at}? For a start that takes longer raise parallel.start_timeout_s"
    )
    return {"problem": problem, "came": list(came), "absent": missing, "blamed": blamed(missing, hosts)}


def _neighbours(came: Mapping[int, Mapping[str, Any]]) -> dict[int, str]:
    """The host of ranks that did not come, from those that did: the ranks of a host follow one another."""
    firsts: dict[str, set[int]] = {}
    for about in came.values():
        firsts.setdefault(about["host"], set()).add(about["first"])
    return {
        about["first"] + place: about["host"]
        for about in came.values()
        # MPI can deal ranks out to hosts in turn; then those of one host do not agree on their first.
        if len(firsts[about["host"]]) == 1
        for place in range(about["local_world"])
    }


def _disagreement(store: dist.Store, came: Mapping[int, Mapping[str, Any]], hosts: Sequence[str]) -> str:
    """One line for each value that is not the same on all ranks; empty where all agree."""
    ranks_of: dict[str, list[int]] = {}
    for rank, about in came.items():
        ranks_of.setdefault(about["words"], []).append(rank)
    if len(ranks_of) == 1:
        return ""
    told = {digest: json.loads(store.get(f"words/{digest}")) for digest in ranks_of}
    lines = []
    for name in sorted({name for words in told.values() for name in words}):
        having: dict[str, list[int]] = {}
        for digest, ranks in ranks_of.items():
            having.setdefault(told[digest].get(name, "missing"), []).extend(ranks)
        if len(having) > 1:
            lines.append(" but ".join(f"{value} on {name_ranks(ranks, hosts)}" for value, ranks in having.items()))
            lines[-1] = f"{name}={lines[-1]}"
    if len(lines) > SHOWN:
        lines = [*lines[:SHOWN], f"and {len(lines) - SHOWN} more"]
    return "\n".join([*lines, "start all ranks with the same settings, code and data"])


def _hear(store: dist.Store, place: Place, came: Sequence[int]) -> None:
    """A refusal is on its way: no rank ends, and none takes the store with it, before every rank that came has it."""
    store.set(f"heard/{place.rank}", "")
    with suppress(dist.DistError):
        wait_until(lambda: store.check([f"heard/{rank}" for rank in came]), HEARD_S)
