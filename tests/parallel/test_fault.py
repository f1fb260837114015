"""Which hosts are to blame for a fault, and that to note one neither fails nor hangs."""

from __future__ import annotations

import errno
import threading
import time

import pytest
import torch

from limoe_dist.config.errors import UserError
from limoe_dist.config.exit_codes import FAILED, MEND
from limoe_dist.config.schema import Parallel
from limoe_dist.parallel import fault
from limoe_dist.parallel.bootstrap import start
from limoe_dist.parallel.fault import Fault, FaultError, blamed, describe, note, of_the_host

FAULT = Fault("absent", (2,), ("n2",), "rank 2 did not come")
TWO_EACH = ["n1", "n1", "n2", "n2", "n3", "n3", "n4", "n4"]


@pytest.mark.parametrize(
    ("ranks", "hosts", "expected"),
    [
        ([2, 3], TWO_EACH, ("n2",)),
        ([7, 2, 3], TWO_EACH, ("n2", "n4")),
        # Three of four hosts: rather the one that asks is cut off.
        ([2, 4, 6], TWO_EACH, ()),
        ([2], ["n1", "n1", "n2", "n2"], ("n2",)),
        ([0, 3], ["n1", "n1", "n2", "n2"], ()),
        # There is no network in between.
        ([1], ["n1", "n1"], ("n1",)),
        ([], TWO_EACH, ()),
        ([2], {0: "n1", 1: "n1"}, ()),
    ],
)
def test_hosts_are_blamed_unless_most_of_them_would_be(ranks, hosts, expected) -> None:
    assert blamed(ranks, hosts) == expected


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.EIO, "Input/output error"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (FileNotFoundError(errno.ENOENT, "No such file"), False),
        (OSError("without a number"), False),
        (MemoryError(), True),
        (torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"), True),
        (RuntimeError("CUDA error: unspecified launch failure"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), False),
        (RuntimeError("CUDA error: out of memory"), False),
        (RuntimeError("shapes do not match"), False),
        (KeyError("CUDA error: a key"), False),
    ],
)
def test_an_error_blames_its_host_only_where_it_speaks_of_the_host(error: Exception, expected: bool) -> None:
    assert of_the_host(error) is expected


@pytest.mark.parametrize(("error", "hosts"), [(KeyError("x"), ()), (OSError(errno.EIO, "Input/output error"), ("n7",))])
def test_a_process_alone_blames_its_host_only_for_the_hosts_errors(error: Exception, hosts: tuple[str, ...]) -> None:
    noted: list[Fault] = []
    environ = {"SLURMD_NODENAME": "n7"}
    with pytest.raises(type(error)), start(Parallel(), environ, on_fault=noted.append):
        raise error
    assert [(each.kind, each.hosts) for each in noted] == [("failed", hosts)]


def test_a_fault_has_another_exit_status_than_a_setting() -> None:
    assert FaultError(FAULT).status == FAILED != UserError("lr").status == MEND


def test_an_error_in_a_note_and_a_disk_that_hangs_do_not_keep_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fault, "NOTE_S", 0.2)
    noted, release = [], threading.Event()

    def fails(each: Fault) -> None:
        noted.append(each)
        raise OSError("no room")

    note(fails, FAULT)
    assert noted == [FAULT]
    began = time.monotonic()
    note(lambda each: release.wait(30) and None, FAULT)
    release.set()
    assert time.monotonic() - began < 10
    note(None, FAULT)


def test_an_error_is_described_by_its_first_line_alone() -> None:
    assert describe(RuntimeError("Connection closed\nException raised from ...")) == "RuntimeError: Connection closed"
    assert describe(ValueError()) == "ValueError: "
    assert len(describe(ValueError("x" * 10_000))) == fault.LINE
