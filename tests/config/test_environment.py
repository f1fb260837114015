"""What run.json keeps of the environment: what decides how a run was computed, and nothing that may be secret."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from limoe_dist.config.environment import HIDDEN, captured, has_password, holds_secret, is_secret, without_secrets
from limoe_dist.config.parse import load_run, save_run
from limoe_dist.config.presets import preset

ORDINARY = {
    "SLURM_JOB_ID": "17",
    "SLURM_JOB_NODELIST": "gpu[03-05,9]",
    "SLURM_EXPORT_ENV": "ALL",
    "NCCL_DEBUG": "INFO",
    "NCCL_SOCKET_IFNAME": "^lo,docker",
    "NVIDIA_REQUIRE_CUDA": "cuda>=12.6 brand=tesla,driver>=535,driver<536",
    "OMP_NUM_THREADS": "8",
    "OMPI_MCA_orte_hnp_uri": "12.0;tcp://127.0.0.1:5000",
    "LD_LIBRARY_PATH": "/opt/keys:/usr/lib:/opt/keycloak/lib",
    "LIMOE_LAUNCHER": "srun",
    "RANK": "3",
    "MASTER_ADDR": "n1",
}


def test_ordinary_variables_stay_as_they_are() -> None:
    assert captured(ORDINARY) == ORDINARY


@pytest.mark.parametrize("name", ["HOME", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "UNKNOWN", "LIMOE_NOTE", "PATH"])
def test_names_that_nobody_knows_are_left_out(name: str) -> None:
    assert captured({name: "x", "SLURM_SPANK_X11": "x", "RANK": "0"}) == {"RANK": "0"}


@pytest.mark.parametrize(
    "name", ["SLURM_JWT", "NCCL_TOKEN", "SLURM_MY_CREDS", "OMPI_COOKIE", "SLURM_passwd", "DS_GITHUB_PAT", "FI_SIG"]
)
def test_a_variable_is_hidden_by_its_name(name: str) -> None:
    assert captured({name: "hush"}) == {name: HIDDEN}
    assert is_secret(name)


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "SLURM_JOB_ID", "CUDA_PATH", "SIGNAL"])
def test_ordinary_names_are_no_secrets(name: str) -> None:
    assert not is_secret(name)


@pytest.mark.parametrize("name", ["SLURM_EXPORT_ENV", "SLURM_JOB_COMMENT", "OMPI_MCA_mca_base_env_list"])
def test_lists_of_variables_and_comments_are_hidden_as_a_whole(name: str) -> None:
    assert captured({name: "ALL,DB_PASS=hunter2,JWT=abc.def,COOKIE=c00k,MY_CREDS=zz,X=plain"}) == {name: HIDDEN}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("--token hush", "--token (hidden)"),
        ("run --hub-token 'hush hush' now", "run --hub-token '(hidden)"),
        ("Authorization: Bearer hush", "Authorization: (hidden)"),
        ("curl Bearer hush", "curl Bearer (hidden)"),
        ('{"api_key": "hush"}', '{"api_key": (hidden)'),
        ("'password': 'hu sh'", "'password': (hidden)"),
        ("API_TOKEN=hu;sh,h&u\nsh", "API_TOKEN=(hidden)"),
        ("password = hush", "password = (hidden)"),
        ("password:/hush", "password:(hidden)"),
        ("https://me:hush@host/a", "https://(hidden)@host/a"),
        ("https://me:hu@sh@host", "https://(hidden)@host"),
        ("https://me:hu/sh@host", "https://(hidden)@host"),
        ("https://hush@host", "https://(hidden)@host"),
        ("https://host/a?x=1&sig=hush", "https://host/a?x=1&sig=(hidden)"),
        ("hello hf_hushhushhushhushhush", "hello (hidden)"),
        ("eyJhush.eyJhush.hush", "(hidden)"),
    ],
)
def test_a_secret_in_a_value_is_hidden_to_its_end(text: str, shown: str) -> None:
    assert without_secrets(text) == shown
    assert captured({"SLURM_JOB_NAME": text}) == {"SLURM_JOB_NAME": shown}


@pytest.mark.parametrize(
    "text", ["https://host:8080/a", "a sigma=2", "--data.tokenizer x.model", "n1:5000", "the key to it", "risk-of-it"]
)
def test_ordinary_values_are_not_touched(text: str) -> None:
    assert without_secrets(text) == text


@pytest.mark.parametrize(
    ("text", "has"),
    [
        ("http://me:word@host/", True),
        ("http://me:wo/rd@host/", True),
        ("http://:word@host/", True),
        ("sftp://me@host/a", False),
        ("https://host:8080/set@v2/manifest.json", False),
        ("s3://bucket/set@v2.json", False),
    ],
)
def test_a_url_has_a_password_only_behind_a_user(text: str, has: bool) -> None:
    assert has_password(text) is has
    assert holds_secret(text) is has


def test_a_secret_outside_of_urls_is_found_too() -> None:
    assert holds_secret("Authorization: Basic hush")
    assert not holds_secret("/opt/keys:/usr/lib")


def test_bytes_that_are_no_text_are_kept_as_marks_and_can_be_written(tmp_path: Path) -> None:
    environ = {os.fsdecode(b"SLURM_\xff"): "1", "LD_LIBRARY_PATH": os.fsdecode(b"/tmp/\xff")}
    kept = captured(environ)
    assert kept == {"SLURM_\ufffd": "1", "LD_LIBRARY_PATH": "/tmp/\ufffd"}
    save_run(preset("tiny"), tmp_path / "run.json", environment=kept)
    assert json.loads((tmp_path / "run.json").read_text())["environment"] == kept


def test_a_run_file_with_the_environment_is_read_as_the_run_alone(tmp_path: Path) -> None:
    run = preset("tiny")
    save_run(run, tmp_path / "run.json", environment=captured(ORDINARY))
    assert load_run(tmp_path / "run.json") == run


def test_a_value_is_cut_only_after_its_secrets_were_found() -> None:
    # The @ behind the password would be cut off.
    (shown,) = captured({"SLURM_X": "a" * 4080 + " https://me:hush@host"}).values()
    assert shown == ("a" * 4080 + " https://(hidden)@host")[:4096]


@pytest.mark.parametrize("part", ["a", "key", "-", "key ", " ", "eyJ", "a-"])
def test_a_long_value_is_looked_through_at_once_and_cut_after_that(part: str) -> None:
    # As long as Linux lets a variable be. Backtracking over all of it would take minutes.
    value = part * (131_000 // len(part))
    began = time.monotonic()
    (shown,) = captured({"SLURM_X": value + " https://me:hush@host"}).values()
    assert time.monotonic() - began < 5
    assert len(shown) <= 4096
