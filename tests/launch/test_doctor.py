"""The doctor: what it finds, what it says of what is missing, and that nothing takes it along."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from launch import doctor, probes
from launch.probes import Finding
from limoe_dist.config.errors import UserError


def _lacks_needed() -> list[Finding]:
    return [probes.missing("engine", "not installed", "everything", needed=True)]


def _lacks_extra() -> list[Finding]:
    return [probes.missing("extra", "not installed", "little: see [docs]")]


def _has_needed() -> list[Finding]:
    return [probes.ok("engine", "1.0", needed=True)]


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
    monkeypatch.setattr(probes, "_TORCH", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    (finding,) = probes.torch()
    assert (finding.name, finding.status, finding.needed) == ("torch", "missing", True)
    assert "signal 11" in finding.found


def test_torch_without_gloo_is_enough_only_with_gpus() -> None:
    without = {"nccl": True, "gloo": False, "cuda": False}
    assert [one.name for one in probes._collectives(without) if one.needed] == ["gloo"]
    assert not [one for one in probes._collectives(without | {"cuda": True}) if one.needed and one.status == "missing"]


def _install(folder: Path, *files: str) -> None:
    for file in files:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise SystemExit('apex must not be imported')\n")


def test_apex_is_known_by_its_features_not_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert probes.apex()[0].found == "not installed"
    _install(tmp_path, "apex/__init__.py")
    (pyramid,) = probes.apex()
    assert pyramid.status == "missing"
    assert "another project" in pyramid.found
    _install(tmp_path, "apex/optimizers/fused_adam.py", "apex/normalization/fused_layer_norm.py")
    (without_kernels,) = probes.apex()
    assert without_kernels.status == "missing"
    assert "amp_C and fused_layer_norm_cuda" in without_kernels.found
    assert "github.com/NVIDIA/apex" in without_kernels.loss
    _install(tmp_path, "amp_C.py", "fused_layer_norm_cuda.py")
    sys.path_importer_cache.clear()
    assert probes.apex()[0].status == "ok"


def test_slurm_is_missing_where_one_of_its_programs_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("sbatch", "srun"):
        assert name in probes.slurm()[0].found
        program = tmp_path / name
        program.write_text("#!/bin/sh\necho slurm 23.11.4\n")
        program.chmod(0o755)
    assert probes.slurm()[0] == probes.ok("Slurm", f"slurm 23.11.4 at {tmp_path}/sbatch")


def test_an_unknown_option_is_named_with_the_nearest() -> None:
    with pytest.raises(UserError, match='unknown option "--jason"; did you mean "--json"'):
        doctor.main(["--jason"])


def test_the_doctor_of_a_python_without_packages_says_so_and_ends_with_1(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    root = Path(doctor.__file__).parents[1]
    command = [str(tmp_path / "bare" / "bin" / "python"), "-m", "limoe_dist", "doctor"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "training cannot run without torch, DALI, Arrow" in done.stdout


def test_this_machine_can_train_as_the_other_tests_do() -> None:
    findings = {finding.name: finding for finding in probes.examine(probes.ALL)}
    assert {"Python", "torch", "MKL", "oneDNN", "OpenMP", "CUDA", "NCCL", "gloo", "DALI", "DeepSpeed"} <= set(findings)
    assert {"apex", "MPI", "Slurm", "Node.js", "CPU", "memory", "disk", "/dev/shm"} <= set(findings)
    assert not [one for one in findings.values() if one.status == "missing" and one.needed]
    # Every gap says what it costs.
    assert all(one.loss for one in findings.values() if one.status == "missing")
