"""`limoe prep download` and `retry-failed` as commands, against servers on loopback."""

from __future__ import annotations

import csv
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import pytest

from data_prep.cli import main
from data_prep.fetching import download, download_run, hosts, ledger
from limoe_dist.config.errors import UserError
from tests.soak.download_faults import fault_run
from tests.soak.list_memory import measure
from tests.support.hostile_server import HostileServer


@pytest.fixture(scope="module")
def server():
    with HostileServer() as one:
        yield one


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    """Waits of the command that would only lengthen a test."""
    monkeypatch.setattr(hosts, "FIRST_WAIT_S", 0.05)
    monkeypatch.setattr(download, "FIRST_RETRY_S", 0.05)


def list_of(path: Path, urls: list[str]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["url", "caption", "clip"])
        writer.writerows([url, f"caption {number}", number / 4] for number, url in enumerate(urls))
    return path


def words(listed: Path, out: Path, server: HostileServer, *more: str) -> list[str]:
    allowed = f"127.0.0.1:{server.port}"
    return ["download", "--list", str(listed), "--out", str(out), "--allow-private", allowed, *more]


def classes(out: Path) -> dict[str, str]:
    return {key: row["error"] for part in ledger.whole_parts(out) for key, row in ledger.latest(out, part).items()}


def members(out: Path) -> Counter[str]:
    names: Counter[str] = Counter()
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            names.update(tar.getnames())
    return names


def test_a_list_becomes_tars_a_ledger_and_totals(tmp_path, server, capsys):
    listed, out = list_of(tmp_path / "a.csv", [server.url("ok", number) for number in range(25)]), tmp_path / "out"
    assert main(words(listed, out, server, "--rows-per-part", "10")) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "download.json",
        *(f"part-0000{part}.{suffix}" for part in range(3) for suffix in ("parquet", "tar")),
    ]
    assert members(out) == {
        f"0000{n // 10}{n % 10}.{suffix}": 1 for n in range(25) for suffix in ("jpg", "txt", "json")
    }
    with tarfile.open(out / "part-00001.tar") as tar:
        assert tar.extractfile("000013.jpg").read() == server.pictures[13]
        assert tar.extractfile("000013.txt").read() == b"caption 13"
        told = json.loads(tar.extractfile("000013.json").read())
    assert (told["url"], told["clip"], told["width"]) == (server.url("ok", 13), 13 / 4, 64)
    state = json.loads((out / "download.json").read_text())
    assert (state["complete"], state["rows"], state["totals"]["by_class"]) == (True, 25, {"ok": 25})
    assert "25 rows, 25 pictures" in capsys.readouterr().out


def test_a_finished_download_asks_for_nothing_again(tmp_path, server):
    listed, out = (
        list_of(tmp_path / "a.csv", [server.url("ok", f"{number}?once") for number in range(4)]),
        tmp_path / "out",
    )
    for _ in range(2):
        assert main(words(listed, out, server)) == 0
        left_by_a_kill = (out / "part-00000.jsonl", out / "part-00000.lock")
        assert not any(path.exists() for path in left_by_a_kill)
        for path in left_by_a_kill:
            path.touch()
    assert [count for path, count in server.hits.items() if path.endswith("?once")] == [1] * 4


def test_every_kind_of_fault_ends_in_its_class_and_nothing_private_is_met(tmp_path, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9/")
    found = fault_run(tmp_path, 200)
    assert found.wrong == []
    assert found.private_hits == 0


def test_killed_and_stopped_and_started_again_every_row_is_there_once(tmp_path, server):
    count = 300
    listed, out = list_of(tmp_path / "a.csv", [server.url("slow", f"{n}?k") for n in range(count)]), tmp_path / "out"
    command = words(listed, out, server, "--rows-per-part", "150", "--connections", "8")

    def asked() -> int:
        return sum(hits for path, hits in server.hits.items() if path.endswith("?k"))

    for number, status in ((signal.SIGKILL, -9), (signal.SIGTERM, 143)):
        before = asked()
        process = subprocess.Popen(
            [sys.executable, "-m", "limoe_dist", "prep", *command], stdout=subprocess.PIPE, text=True
        )
        while process.poll() is None and asked() < before + 60:
            time.sleep(0.01)
        process.send_signal(number)
        printed, _ = process.communicate(timeout=20)
        assert process.returncode == status, printed
    assert "stopped: the same command goes on from here" in printed
    assert not json.loads((out / "download.json").read_text())["complete"]
    assert 120 <= asked() < count
    assert main(command) == 0
    assert Counter(classes(out).values()) == {"ok": count}
    assert {*members(out).values()} == {1}
    assert len(members(out)) == 3 * count
    # Asked for again: only what was under way at the two ends, or fetched and not yet told.
    assert asked() <= count + 2 * 8 + 40


def test_units_divide_the_parts_and_together_are_the_whole(tmp_path, server, monkeypatch):
    listed, out = list_of(tmp_path / "a.csv", [server.url("ok", number) for number in range(10)]), tmp_path / "out"
    command = words(listed, out, server, "--rows-per-part", "2")
    assert main([*command, "--unit", "1/2"]) == 0
    assert [*ledger.whole_parts(out)] == ["part-00001", "part-00003"]
    for name, value in (("ID", "5"), ("MIN", "5"), ("MAX", "6"), ("COUNT", "2")):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    assert main(command) == 0
    assert json.loads((out / "download.json").read_text())["complete"]
    assert len(members(out)) == 30


def test_failed_rows_of_chosen_classes_are_asked_for_again_and_counted_once(tmp_path, server):
    urls = [server.url("ok", 1), server.url("flaky", "r1"), server.url("status", "404/r"), server.url("flaky", "r2")]
    listed, out = list_of(tmp_path / "a.csv", urls), tmp_path / "out"
    allowed = ["--allow-private", f"127.0.0.1:{server.port}"]
    assert main(words(listed, out, server, "--retries", "0", "--rows-per-part", "3")) == 0
    assert [*classes(out).values()] == ["ok", "http_5xx", "http_4xx", "http_5xx"]
    assert main(["retry-failed", str(out), "--classes", "timeout,http_5xx", *allowed]) == 0
    assert [*classes(out).values()] == ["ok", "ok", "http_4xx", "ok"]
    assert ledger.totals(out).rows == {"ok": 3, "http_4xx": 1}
    assert {path.name for path in out.glob("*retry*.tar")} == {"part-00000-retry-01.tar", "part-00001-retry-01.tar"}
    assert server.hits["/status/404/r"] == 1
    # Again: nothing of these classes is left; of another class, the second file of its part.
    assert main(["retry-failed", str(out), *allowed]) == 0
    assert main(["retry-failed", str(out), "--classes", "http_4xx", *allowed]) == 0
    assert server.hits["/status/404/r"] == 2
    assert ledger.totals(out).rows == {"ok": 3, "http_4xx": 1}
    state = json.loads((out / "download.json").read_text())
    assert (state["complete"], state["totals"]["rows"]) == (True, 4)
    with pytest.raises(UserError, match=r'--classes timeouts: is none of .*did you mean "timeout"'):
        main(["retry-failed", str(out), "--classes", "timeouts"])


def test_memory_that_is_short_slows_and_loses_nothing(tmp_path, server):
    kinds = ["ok", "chunked", "large"]
    urls = [server.url(kinds[number % 3], number) for number in range(60)]
    listed, out = list_of(tmp_path / "a.csv", urls), tmp_path / "out"
    # 1 MB in all: 256 kB are set aside for each, and a large one that finds no more is asked for again with 900 kB.
    assert main(words(listed, out, server, "--max-mb", "0.9", "--memory-mb", "1")) == 0
    assert Counter(classes(out).values()) == {"ok": 60}
    assert sum(hits for path, hits in server.hits.items() if path.startswith("/large/")) > 20


def test_a_full_disk_is_told_and_what_is_whole_stays(tmp_path, server):
    listed, out = list_of(tmp_path / "a.csv", [server.url("slow", number) for number in range(64)]), tmp_path / "out"
    command = words(listed, out, server, "--connections", "4")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    try:
        with pytest.raises(
            UserError, match=r"--out .*: cannot be written: File too large; .* run the same command again"
        ):
            main(command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(out.glob("*.tar"))
    assert main(command) == 0
    assert Counter(classes(out).values()) == {"ok": 64}
    assert {*members(out).values()} == {1}


def test_not_one_picture_is_status_1(tmp_path, server):
    listed, out = list_of(tmp_path / "a.csv", [server.url("status", "404"), "http://10.0.0.1/a.jpg"]), tmp_path / "out"
    assert main(words(listed, out, server)) == 1
    assert main(["retry-failed", str(out), "--classes", "http_4xx", "--allow-private", f"127.0.0.1:{server.port}"]) == 1


def test_names_that_cannot_be_decoded_end_in_the_ledger(tmp_path, server):
    # An empty label, so that no name server is asked.
    urls = ["http://xn--a..b/a.jpg", server.url("ok", 1)]
    listed, out = list_of(tmp_path / "a.csv", urls), tmp_path / "out"
    assert main(words(listed, out, server, "--retries", "0")) == 0
    assert [*classes(out).values()] == ["dns", "ok"]


def test_a_host_that_has_its_share_does_not_hold_up_the_next_part(tmp_path):
    """24 rows of one host, which answers one at a time; those of the other host are in the next part."""
    with HostileServer(hosts=2) as server:
        urls = [f"http://{server.hosts[number // 24]}:{server.port}/slow/{number}" for number in range(28)]
        listed, out = list_of(tmp_path / "a.csv", urls), tmp_path / "out"
        options = [f"127.0.0.2:{server.port}", "--rows-per-part", "24", "--connections", "2", "--per-host", "1"]
        assert main(words(listed, out, server, *options)) == 0
    # Eight rows that wait are enough for two connections, but only where both may ask for them.
    assert [*server.hits].index("/slow/24") < 12


def test_a_disk_that_is_read_only_is_told_before_anything_is_fetched(tmp_path, server, monkeypatch):
    listed, out = list_of(tmp_path / "a.csv", [server.url("ok", "1?read-only")]), tmp_path / "out"
    assert main(words(listed, out, server)) == 0
    asked, opened = server.hits.total(), Path.open

    def refused(path: Path, mode: str = "r", *more, **named):
        if out in path.parents and mode not in ("r", "rb"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(path, mode, *more, **named)

    monkeypatch.setattr(Path, "open", refused)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=r"--out .*out: cannot be written: Read-only file system"):
        main(words(listed, out, server))
    with pytest.raises(UserError, match=r"out: files cannot be made there"):
        main(["retry-failed", str(out), "--classes", "robots"])
    assert server.hits.total() == asked


@pytest.mark.parametrize(
    ("soft", "hard", "allowed"), [(1_024, 1 << 20, 4_296), (1_024, 2_000, 2_000), (8_000, 8_000, 0)]
)
def test_the_limit_of_open_files_is_raised_as_far_as_it_may(monkeypatch, soft, hard, allowed):
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: told.append(limits))
    download_run._allow_files(256)
    assert told == ([(allowed, hard)] if allowed else [])
    with pytest.raises(UserError, match=rf"--connections=\d+: needs \d+ open files, and this system allows {hard} "):
        download_run._allow_files(hard)


def test_a_folder_is_of_one_list(tmp_path, server):
    listed, out = list_of(tmp_path / "a.csv", [server.url("ok", 1)]), tmp_path / "out"
    assert main(words(listed, out, server)) == 0
    with pytest.raises(UserError, match="was begun with --rows-per-part 10000, now 5"):
        main(words(listed, out, server, "--rows-per-part", "5"))
    with pytest.raises(UserError, match="was begun with other columns"):
        main(words(listed, out, server, "--caption-column", "clip"))
    list_of(listed, [server.url("ok", 2), server.url("ok", 3)])
    with pytest.raises(UserError, match=r"was begun with another .*a.csv: it has changed since"):
        main(words(listed, out, server))
    with pytest.raises(UserError, match="was begun with another list"):
        main(words(list_of(tmp_path / "b.csv", [server.url("ok", 1)]), out, server))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--connections", "0"], "--connections=0: must be from 1 to 10000"),
        (["--timeout", "nan"], "--timeout=nan: must be from 0.1"),
        (["--memory-mb", "2"], "--memory-mb=2: must be at least --max-mb=20"),
        (["--rows-per-part", "0"], "--rows-per-part=0: must be from 1 to 100000"),
        (["--allow-private", "everything"], "--allow-private everything: must be addresses"),
        (["--unit", "2/2"], "--unit=2/2"),
        (["--user-agent", "a\nb"], "--user-agent .*: must be plain ASCII"),
        (["--keep-columns", "clop"], '--keep-columns clop: not among .*did you mean "clip"'),
    ],
)
def test_wrong_values_are_named_and_leave_nothing(options, reason, tmp_path):
    listed = list_of(tmp_path / "a.csv", ["http://example.com/a.jpg"])
    with pytest.raises(UserError, match=reason):
        main(["download", "--list", str(listed), "--out", str(tmp_path / "out"), *options])
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_none_of_ours_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no download.json"):
        main(["retry-failed", str(tmp_path)])
    (tmp_path / "download.json").write_text('{"format": "other"}')
    with pytest.raises(UserError, match=r"is not of this version"):
        main(["retry-failed", str(tmp_path)])
    with pytest.raises(UserError, match="must be a folder of this machine"):
        main(["download", "--list", "a.csv", "--out", "s3://bucket/a"])


def test_memory_stays_where_it_is_while_a_list_goes_by(tmp_path):
    found = measure(tmp_path, 5_000, rows_per_part=250)
    # The modules alone take about 150 MB; the rows in memory are those of at most six parts.
    assert found.peak_bytes < 400_000_000
