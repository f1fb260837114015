"""The doctor: what it finds, what it says of what is missing, and that nothing takes it along."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from launch import doctor, probes
from launch.probes import packages
from launch.probes.finding import Finding, examine, missing, ok
from limoe_dist.config.errors import UserError

ROOT = Path(doctor.__file__).parents[1]


def _lacks_needed() -> list[Finding]:
    return [missing("engine", "not installed", "everything", needed=True)]


def _lacks_extra() -> list[Finding]:
    return [missing("extra", "not installed", "little: see [docs]")]


def _has_needed() -> list[Finding]:
    return [ok("engine", "1.0", needed=True)]


def _raises() -> list[Finding]:
    raise RuntimeError("no such bus")


def test_a_missing_extra_leaves_status_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.diagnose([_has_needed, _lacks_extra], as_json=False) == 0
    shown = capsys.readouterr().out
    # The square brackets of a text are not taken for rich's markup.
    assert "see [docs]" in " ".join(shown.split())
    assert "training can run" in shown


def test_a_missing_need_gives_status_1_and_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.diagnose([_lacks_needed, _lacks_extra], as_json=False) == 1
    assert "training cannot run without engine" in capsys.readouterr().out


def test_a_probe_that_raises_is_a_finding_and_the_others_are_still_made(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.diagnose([_raises, _has_needed], as_json=True) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [(one["name"], one["status"]) for one in answer["findings"]] == [("_raises", "missing"), ("engine", "ok")]
    assert "no such bus" in answer["findings"][0]["found"]


def test_a_package_that_crashes_its_process_is_missing_with_its_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "_TORCH", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    (finding,) = packages.torch()
    assert (finding.name, finding.status, finding.needed) == ("torch", "missing", True)
    assert "signal 11" in finding.found


def test_torch_without_gloo_is_enough_only_with_gpus() -> None:
    without = {"nccl": True, "gloo": False, "cuda": False}
    assert [one.name for one in packages._collectives(without) if one.needed] == ["gloo"]
    assert not [
        one for one in packages._collectives(without | {"cuda": True}) if one.needed and one.status == "missing"
    ]


def _install(folder: Path, *files: str) -> None:
    for file in files:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise SystemExit('apex must not be imported')\n")


def test_apex_is_known_by_its_features_not_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert packages.apex()[0].found == "not installed"
    _install(tmp_path, "apex/__init__.py")
    (pyramid,) = packages.apex()
    assert pyramid.status == "missing"
    assert "another project" in pyramid.found
    _install(tmp_path, "apex/optimizers/fused_adam.py", "apex/normalization/fused_layer_norm.py")
    (without_kernels,) = packages.apex()
    assert without_kernels.status == "missing"
    assert "amp_C and fused_layer_norm_cuda" in without_kernels.found
    assert "github.com/NVIDIA/apex" in without_kernels.loss
    _install(tmp_path, "amp_C.py", "fused_layer_norm_cuda.py")
    sys.path_importer_cache.clear()
    assert packages.apex()[0].status == "ok"


def test_an_unknown_option_is_named_with_the_nearest() -> None:
    with pytest.raises(UserError, match='unknown option "--jason"; did you mean "--json"'):
        doctor.main(["--jason"])


def test_the_doctor_of_a_python_without_packages_says_so_and_ends_with_1(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    command = [str(tmp_path / "bare" / "bin" / "python"), "-m", "limoe_dist", "doctor"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "training cannot run without torch, DALI, Arrow" in done.stdout


def test_this_machine_can_train_as_the_other_tests_do() -> None:
    findings = {finding.name: finding for finding in examine(probes.ALL)}
    assert {"Python", "torch", "MKL", "oneDNN", "OpenMP", "CUDA", "NCCL", "gloo", "DALI", "DeepSpeed"} <= set(findings)
    assert {"apex", "MPI", "Slurm", "containers", "InfiniBand", "Node.js", "CPU", "memory"} <= set(findings)
    assert {"disk", "/dev/shm", "open files"} <= set(findings)
    assert not [one for one in findings.values() if one.status == "missing" and one.needed]
    # Every gap says what it costs.
    assert all(one.loss for one in findings.values() if one.status == "missing")


def test_a_quick_look_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "run", refuse)
    found = {finding.name: finding for finding in examine(probes.QUICK)}
    assert [found[name].status for name in packages.NEEDED] == ["ok"] * len(packages.NEEDED)
    assert not [one for one in found.values() if "the check failed" in one.found]


def test_a_quick_look_imports_no_package_and_costs_little() -> None:
    code = "import sys; from launch.cli import main; print(main(['doctor', '--quick', '--json']), *sys.modules)"
    used = [resource.getrusage(resource.RUSAGE_CHILDREN)]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    used.append(resource.getrusage(resource.RUSAGE_CHILDREN))
    status, *modules = done.stdout.splitlines()[-1].split()
    assert status == "0", done.stderr
    assert not {"torch", "numpy", "nvidia.dali", "pyarrow", "sentencepiece", "pydantic"} & set(modules)
    # CPU time, which other programs on the machine do not lengthen: 0.1 s here; importing torch takes over a second.
    assert used[1].ru_utime + used[1].ru_stime - used[0].ru_utime - used[0].ru_stime < 0.6


def test_a_quick_look_misses_a_package_that_training_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(packages.NEEDED, "DALI", "nvidia_without.dali")
    assert doctor.diagnose(probes.QUICK, as_json=True) == 1
