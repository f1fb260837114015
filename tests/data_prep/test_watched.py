from __future__ import annotations

from data_prep.inspection.findings import Findings, printable
from data_prep.watched import line, watched


def test_without_a_terminal_a_line_comes_every_so_often(capsys):
    times = iter([0.0, 10.0, 31.0, 40.0, 62.0])
    with watched("verifying", 400, unit="rows", every_s=30, clock=lambda: next(times)) as advance:
        for steps in (100, 50, 50, 100):
            advance(steps)
    assert capsys.readouterr().err.splitlines() == [
        "verifying: 150 of 400 rows, 5/s, 52 s left",  # 150 rows in 31 s, 250 left: 51.7 s
        "verifying: 300 of 400 rows, 5/s, 21 s left",  # 300 in 62 s, 100 left: 20.7 s
    ]


def test_on_a_terminal_a_bar_tells_the_rate_and_takes_no_markup_from_strangers(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    times = iter([0.0, 2.0])
    with watched("verifying [/b]", 400, unit="rows", clock=lambda: next(times)) as advance:
        advance(100)
    shown = capsys.readouterr().err
    assert "verifying [/b]" in shown
    assert "50 rows/s" in shown


def test_work_of_unknown_length_has_no_end_in_sight():
    assert line("reading", 5000, 0, "captions", 10) == "reading: 5,000 captions, 500/s"
    assert line("reading", 0, 10, "rows", 0) == "reading: 0 of 10 rows, 0/s"


def test_findings_name_a_few_and_count_all():
    one, other = Findings(), Findings()
    for n in range(4):
        one.add("a", f"row {n}", "x")
        other.add("a", f"row {n + 4}", "x")
    one.include(other)
    ((kind, count, first),) = one
    assert (kind, count) == ("a", 8)
    assert [finding.where for finding in first] == [f"row {n}" for n in range(5)]


def test_text_for_a_terminal_has_no_control_characters_and_an_end():
    assert printable("\x1b[31mred\n\u202e") == "\\x1b[31mred\\n\\u202e"
    assert printable("x" * 500, most=10) == "x" * 9 + "\N{HORIZONTAL ELLIPSIS}"
    assert printable("猫 кот") == "猫 кот"
