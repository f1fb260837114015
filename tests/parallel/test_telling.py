"""What is told of a hang or a lost connection, from answers that the test makes up; tests/ranks has real ones."""

from __future__ import annotations

import socket

from limoe_dist.parallel.fault import Fault
from limoe_dist.parallel.telling import Answer, Finding, Gone, why_gone

HOSTS = ("n1", "n1", "n2", "n2", "n3")
WAITS = Answer("in all_reduce", True, {"main thread": "    a.py:1 wait", "limoe-loader": "    l.py:2 get"})
READS = Answer("outside", False, {"main thread": "    a.py:9 read", "limoe-loader": "    l.py:2 get"})


def hang(answers: dict[int, Answer]) -> Finding:
    return Finding("hang", 0, HOSTS, answers, 4.0, "no progress for parallel.timeout_s=600 seconds")


def test_silent_ranks_are_to_blame_before_those_that_are_in_no_collective() -> None:
    finding = hang({0: WAITS, 1: WAITS, 3: READS, 4: WAITS})
    assert finding.fault() == Fault(
        "hang",
        (2,),
        ("n2",),
        "no progress for parallel.timeout_s=600 seconds; rank 2 (host n2) did not answer in 4 seconds: it died, "
        "perhaps killed for want of memory, or it stands still",
    )
    assert "  rank 2 (host n2): silent" in finding.text().splitlines()


def test_where_all_answer_those_that_the_others_wait_for_are_to_blame() -> None:
    fault = hang({0: WAITS, 1: WAITS, 2: READS, 3: READS, 4: WAITS}).fault()
    assert (fault.ranks, fault.hosts) == ((2, 3), ("n2",))
    assert fault.text.endswith("ranks 2-3 (host n2) did not come to the collective that the others are in")


def test_where_all_ranks_are_in_collectives_nobody_is_to_blame() -> None:
    fault = hang(dict.fromkeys(range(5), WAITS)).fault()
    assert (fault.ranks, fault.hosts) == ((), ())


def test_a_connection_that_broke_while_all_answer_has_nobody_to_blame() -> None:
    answers = {0: READS, 1: WAITS, 2: READS, 3: WAITS, 4: WAITS}
    finding = Finding("broken", 0, HOSTS, answers, 4.0, "RuntimeError: Connection closed", "Traceback ...")
    assert finding.fault() == Fault(
        "broken", (), (), "rank 0 (host n1) lost a connection: RuntimeError: Connection closed"
    )
    assert finding.text().startswith("limoe: rank 0 (host n1) lost a connection:\nTraceback ...\nWhat each rank is in:")


def test_stacks_that_are_alike_are_shown_once_and_the_odd_one_comes_first() -> None:
    text = hang({0: WAITS, 1: WAITS, 2: WAITS, 3: READS, 4: WAITS}).text()
    assert text.partition("\nStack")[2].splitlines() == [
        " of the main thread of rank 3 (host n2), innermost first:",
        "    a.py:9 read",
        "Stack of the main thread of ranks 0-1 (host n1), rank 2 (host n2), rank 4 (host n3), innermost first:",
        "    a.py:1 wait",
        "Stack of the limoe-loader of ranks 0-1 (host n1), ranks 2-3 (host n2), rank 4 (host n3), innermost first:",
        "    l.py:2 get",
    ]


def test_a_store_that_is_gone_has_another_reason_where_its_port_still_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert why_gone("127.0.0.1", port).kind == "hang"
    died = why_gone("127.0.0.1", port)
    assert died == Gone("broken", True, "it died; look at its output")
    unknown = why_gone("no-such-host.invalid", port)
    assert (unknown.kind, unknown.of_process) == ("broken", False)
