"""The rendered scripts: what Slurm is asked for, and what bash does with them."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from limoe_dist.config.errors import UserError
from slurm.options import Array, Job
from slurm.script import Preparation, Training, render_preparation, render_training

JOB = Job(time="1-12", nodes=2, gpus_per_node=0, ranks_per_node=2)
VARIANTS = {
    "once": {},
    "requeue": {"requeue": True, "exclude": "n[3-4],n9", "env": ("GREETING=a b'c",), "modules": ("cuda/12.4",)},
    "chain": {"chain": 3, "mem": "10G", "sbatch": ("reservation=on friday", "exclusive")},
    "gpus": {"gpus_per_node": 4, "ranks_per_node": 0, "signal": "TERM"},
    "pyxis": {"container": "pyxis", "container_image": "limoe.sqsh", "mounts": ("/data", "/a:/b")},
    "apptainer": {"container": "apptainer", "container_image": "limoe.sif", "gpus_per_node": 2, "ranks_per_node": 2},
}


def training(run: Path) -> Training:
    return Training(
        run=run,
        script=run / "slurm" / "001.sbatch",
        log=run / "slurm" / "job-%j.log",
        start=("tiny", "--data", "shards, all/manifest.json", "--eval.templates", "a {}", "$(date)"),
        go_on=("--stop-after", "7"),
        threads=3,
        cpus_per_rank=4,
        before_s=180,
        wait_s=120,
        folder=Path("/somewhere"),
        mounts=(str(run.parent),),
    )


def script(run: Path, **changes: object) -> str:
    return render_training(replace(JOB, **changes), training(run))


def directives(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]


def array_scripts(notes: Path) -> tuple[str, str]:
    array = Array(time="30", tasks=4, concurrent=2, cpus=3, env=("A=1",), partition="cpu")
    again = "limoe submit-prep --tasks 4 --indices INDICES -- pack --out 'a b'"
    words = ("pack", "--source", "x y", "--out", "a b")
    place = Preparation(words, notes.with_suffix(".sbatch"), notes, notes / "%a.log", Path("/from here"), again)
    return render_preparation(array, place)


@pytest.mark.parametrize("name", VARIANTS)
def test_bash_can_read_every_script(name, tmp_path):
    text = script(tmp_path / "my run", **VARIANTS[name])
    done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_bash_can_read_the_scripts_of_an_array(tmp_path):
    for text in array_scripts(tmp_path / "001"):
        assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def test_slurm_is_asked_for_a_task_for_each_rank_and_a_signal_to_them():
    lines = directives(script(Path("/runs/first"), gpus_per_node=4, ranks_per_node=0))
    assert lines == [
        "--job-name=limoe-first",
        "--nodes=2",
        "--ntasks-per-node=4",
        "--gpus-per-node=4",
        "--cpus-per-task=4",
        "--time=1-12:00:00",
        "--chdir=/somewhere",
        "--output=/runs/first/slurm/job-%j.log",
        "--open-mode=append",
        "--signal=USR2@180",
        "--no-requeue",
    ]


def test_options_stand_in_the_script_and_blanks_are_quoted():
    lines = directives(script(Path("/runs/my run"), **VARIANTS["chain"]))
    assert {"--mem=10G", '--reservation="on friday"', "--exclusive", '--job-name="limoe-my run"'} <= set(lines)
    assert '--output="/runs/my run/slurm/job-%j.log"' in lines
    assert "--requeue" in directives(script(Path("/runs/first"), requeue=True))


def test_no_directive_comes_after_the_first_command():
    for changes in VARIANTS.values():
        lines = script(Path("/runs/first"), **changes).splitlines()
        last = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
        assert all(line.startswith("#") or not line for line in lines[: last + 1])


@pytest.mark.parametrize(
    ("run", "folder", "reason"),
    [
        ("/runs/100%", "/x", "holds '%'"),
        ("/runs/a\nb", "/x", "would not read as it stands"),
        ("/runs/a", "/x\n#SBATCH --nodes=9", "would not read as it stands"),
        ("/runs/a", '/say "x"', "would not read as it stands"),
        ("/runs/\udcff", "/x", "is no UTF-8"),
    ],
)
def test_a_path_that_sbatch_would_change_is_refused(run, folder, reason):
    with pytest.raises(UserError, match=reason):
        render_training(JOB, replace(training(Path(run)), folder=Path(folder)))


def test_a_percent_sign_in_the_present_folder_is_no_harm():
    text = render_training(JOB, replace(training(Path("/runs/a")), folder=Path("/100%")))
    assert "--chdir=/100%" in directives(text)


def test_hosts_that_a_person_excludes_are_one_word_for_bash(tmp_path):
    text = script(tmp_path / "run", exclude="gpu[03-05],gpu9")
    assert "hosts='gpu[03-05],gpu9'\n" in text


def test_a_container_is_entered_by_srun_or_by_apptainer():
    inside = script(Path("/runs/first"), **VARIANTS["pyxis"])
    assert "--container-image=limoe.sqsh '--container-mounts=/runs:/runs,/data:/data,/a:/b'" in inside
    assert '"${ranks_limoe[@]}" "${train[@]}"' in inside
    assert "apptainer exec --nv --bind /runs limoe.sif limoe" in script(Path("/runs/first"), **VARIANTS["apptainer"])
