from __future__ import annotations

import json
import subprocess
import sys

import pytest

from data_prep.cli import COMMANDS, main
from limoe_dist.config.errors import UserError
from tests.data_prep.pictures_of import simple_source


def test_help_lists_every_command_with_a_line(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    for name, about in COMMANDS.items():
        assert f"  {name}" in printed
        assert about in printed


def test_no_command_is_wrong_usage(capsys):
    assert main([]) == 2
    assert "usage: limoe prep COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_has_help(name, capsys):
    assert main([name, "--help"]) == 0
    assert f"usage: limoe prep {name}" in capsys.readouterr().out


def test_an_unknown_command_names_the_nearest():
    with pytest.raises(UserError, match='unknown command "prep tokeniser"; did you mean "tokenizer"'):
        main(["tokeniser"])


def test_an_unknown_option_is_status_2(capsys):
    assert main(["pack", "--sauce", "x"]) == 2
    assert "--sauce" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--source", "--out", "x"], "--source: name at least one folder"),
        (["--source", "a", "--source", "b", "--out", "x"], "--source is given 2 times"),
        (["--source", "a", "--out", "x", "--workers", "-1"], "--workers=-1: must be a number of processes"),
        (["--source", "a", "--out", "x", "--unit", "2/2"], "--unit=2/2: must be I/N with 0 <= I < N"),
        (["--source", "a", "--out", "x", "--score", "nsfw<0.5"], '--score "nsfw<0.5": must be a column, >= or <='),
        (["--source", "a", "--out", "x", "--size", "-1"], "--size=-1: must be the shorter side in pixels"),
        (["--source", "a", "--out", "x", "--drop", "absent.txt"], "absent.txt: there is no such file"),
        (["--source", "a", "--out", "x", "--shard-mb", "nan"], "--shard-mb=nan: must be above 0"),
        (["--source", "a", "--out", "x", "--shard-mb", "inf"], "--shard-mb=inf: must be above 0, and below 1e9"),
        (["--source", "absent", "--out", "x"], "--source absent: there is no such folder"),
    ],
)
def test_wrong_values_are_named(options, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=reason):
        main(["pack", *options])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ["pack", "--source", "a", "--out", "s3://bucket/x"],
        ["dedup", "--source", "a", "--out", "s3://bucket/x"],
        ["stats", "a", "--out", "s3://bucket/x"],
        ["tokenizer", "--text", "a.txt", "--out", "gs://bucket/x"],
        ["verify", "a", "--json", "https://host/x.json"],
    ],
    ids=lambda words: words[0],
)
def test_a_store_is_no_place_to_write_to(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"is a URL of \w+, and what is written goes to a local disk"):
        main(words)
    assert list(tmp_path.iterdir()) == []


def test_from_folders_to_a_vocabulary(tmp_path, capsys):
    one, two = simple_source(tmp_path / "one"), simple_source(tmp_path / "two")
    out = tmp_path / "shards"
    pack = ["pack", "--source", str(one), str(two), "--out", str(out), "--shard-mb", "0.001"]
    assert main(pack) == 0
    printed = capsys.readouterr().out
    assert "12 rows" in printed
    assert "one: 6 rows, licence unknown" in printed
    assert main(["tokenizer", "--data", str(out / "manifest.json"), "--vocab-size", "40"]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["name"] == "shards"
    assert len(manifest["shards"]) > 1
    assert manifest["tokenizer"]["file"] == "tokenizer.model"
    assert main(pack) == 0
    assert "unchanged" in capsys.readouterr().out
    assert json.loads((out / "manifest.json").read_text()) == manifest


def test_the_command_line_loads_no_heavy_module():
    heavy = {"torch", "nvidia", "pyarrow", "PIL", "sentencepiece", "aiohttp", "fsspec"}
    names = [name.replace("-", "_") for name in COMMANDS]
    code = (
        "import sys, importlib, data_prep.cli\n"
        f"for name in {names}: importlib.import_module('data_prep.commands.' + name)\n"
        f"print(sorted({heavy} & {{*sys.modules}}))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
