"""Options of jobs: each that cannot work is refused before a script is written."""

from __future__ import annotations

from dataclasses import replace

import pytest

from limoe_dist.config.errors import UserError
from slurm.options import Array, Job, bytes_of, with_secrets

JOB = Job(time="24:00:00", nodes=2)
ARRAY = Array(time="1:00:00", tasks=8)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"time": ""}, "--time is missing"),
        ({"nodes": 0}, "--nodes 0: must be 1 or more"),
        ({"gpus_per_node": 0}, "--ranks-per-node is missing"),
        ({"ranks_per_node": 6}, "use 8, one rank for each GPU"),
        ({"requeue": True, "chain": 3}, "give one of them"),
        ({"chain": 1}, "must be 2 or more jobs"),
        ({"mem": "lots"}, "--mem lots"),
        ({"sbatch": ("time=5",)}, "the script sets time by itself"),
        ({"sbatch": ("--nodes=5",)}, "the script sets nodes by itself"),
        ({"sbatch": ("=5",)}, "must be an option of sbatch"),
        ({"env": ("WANDB_API_KEY=123",)}, "looks like a secret"),
        ({"env": ("PROXY=http://me:word@host/",)}, "looks like a secret"),
        ({"env": ("PROXY=http://me:w/rd@host/",)}, "looks like a secret"),
        ({"env": ("MY_CREDS=zz",)}, "looks like a secret"),
        ({"env": ("HEADER=Authorization: Bearer xyz",)}, "looks like a secret"),
        ({"env": ("1A=5",)}, "must be NAME=VALUE"),
        ({"container": "pyxis"}, "give both"),
        ({"container_image": "x.sif"}, "give both"),
        ({"mounts": ("/data",)}, "needs --container"),
        ({"partition": 'a"\nrm'}, "cannot hold quotes"),
        ({"exclude": "n1, n2"}, "must be hosts with commas and no blanks"),
        ({"exclude": "n1;reboot"}, "must be hosts with commas and no blanks"),
        ({"gpu_gb": 0.0}, "--gpu-gb 0: must be above 0"),
    ],
)
def test_what_cannot_work_is_refused(changes, reason):
    with pytest.raises(UserError, match=reason):
        replace(JOB, **changes).check()


def test_a_secret_is_not_said_again():
    with pytest.raises(UserError) as caught:
        replace(JOB, env=("API_TOKEN=hush",)).check()
    assert "hush" not in str(caught.value)


def test_all_problems_are_told_at_once():
    with pytest.raises(UserError) as caught:
        Job(time="1 day", mem="x", env=("A",)).check()
    assert len(str(caught.value).splitlines()) == 3


def test_ranks_are_told_to_save_in_time_for_a_save_and_a_minute_more():
    assert JOB.before_s(120.0) == 180
    assert replace(JOB, signal_before=600).before_s(120.0) == 600


def test_a_time_limit_without_time_to_train_is_refused():
    JOB.check_signal(120.0)
    with pytest.raises(UserError, match="nothing would be trained"):
        replace(JOB, time="3").check_signal(120.0)
    # 180 s before the end, or up to 60 s sooner: the first step would come after the signal.
    with pytest.raises(UserError, match="nothing would be trained"):
        replace(JOB, time="4").check_signal(120.0)
    replace(JOB, time="4:01").check_signal(120.0)
    with pytest.raises(UserError, match="at most 65535"):
        replace(JOB, signal_before=70_000).check_signal(120.0)


@pytest.mark.parametrize(("text", "found"), [("2G", 2 << 30), ("512", 512 << 20), ("0", None), ("", None)])
def test_memory_counts_in_megabytes_where_no_unit_stands(text, found):
    assert bytes_of(text) == found


def test_words_with_a_password_in_a_url_are_found():
    assert with_secrets(["--data", "s3://bucket/m.json", "--x", "https://me:word@host/a"]) == ["https://me:word@host/a"]


def test_indices_are_single_or_spans():
    assert replace(ARRAY, indices="0-2,5").numbers == (0, 1, 2, 5)
    assert replace(ARRAY, indices="0-2,5", concurrent=2).spec == "0-2,5%2"
    assert ARRAY.spec == "0-7"


@pytest.mark.parametrize("indices", ["8", "3-1", "a", "1,,2", "-1"])
def test_an_index_outside_the_array_is_refused(indices):
    with pytest.raises(UserError, match="must be indices from 0 to 7"):
        replace(ARRAY, indices=indices).check()
