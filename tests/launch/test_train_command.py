"""`limoe train` as a user starts it: ranks, signals, resume, and mistakes that end in one clear line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.launch.forked import limoe
from tests.support.shards import write_shards
from tests.support.signalled import ranks_below

# fmt: off
SMALL = [
    "--model.width", "32", "--model.depth", "2", "--model.heads", "2", "--model.mlp-dim", "64",
    "--model.embed-dim", "16", "--image.size", "16", "--image.patch", "8", "--text.length", "8",
    "--text.vocab-size", "64", "--moe.blocks", "1", "--moe.group-pairs", "4", "--train.batch-pairs", "16",
    "--optim.warmup-steps", "2", "--optim.cooldown-steps", "2", "--log.every-steps", "1",
    "--checkpoint.every-steps", "0", "--log.no-tensorboard",
]
# fmt: on

# Every save of a rank takes this many seconds: Python imports a module of this name at its start.
SLOW_SAVE = """
import os, sys, time
seconds = float(os.environ.get("TEST_SAVE_SECONDS", "0"))
if seconds and "RANK" in os.environ:
    from limoe_dist.checkpoint import disk
    original = disk.create
    def slow(path):
        if path.name.startswith("rank-"):
            print("saving", flush=True)
            time.sleep(seconds)
        return original(path)
    disk.create = slow
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"), rows=64)


def limoe_from_the_start(*words: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, as a shell starts it."""
    command = [sys.executable, "-m", "limoe_dist", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def start(tmp_path: Path, command: list[str], save_seconds: float) -> subprocess.Popen[str]:
    (tmp_path / "sitecustomize.py").write_text(SLOW_SAVE)
    environ = os.environ | {"PYTHONPATH": str(tmp_path), "TEST_SAVE_SECONDS": str(save_seconds)}
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environ,
        start_new_session=True,
    )


def signal_in_training(process: subprocess.Popen[str], number: int) -> tuple[str, float]:
    """Waits for the third step and sends the signal to the launcher alone.

    Returns all that was printed, and the seconds from the signal to the end.
    """
    assert process.stdout is not None
    seen, signalled = [], 0.0
    for line in process.stdout:
        seen.append(line)
        if line.startswith("step 3/"):
            process.send_signal(number)
            signalled = time.monotonic()
            break
    rest, _ = process.communicate(timeout=120)
    return "".join(seen) + rest, time.monotonic() - signalled


def saved_step(out: Path) -> int:
    (manifest,) = (out / "checkpoints").glob("step-*/manifest.json")
    return int(json.loads(manifest.read_text())["step"])


@dataclass(frozen=True)
class SlowSave:
    """A run that was sent SIGTERM in training and takes 32 s to save: tests pass meanwhile."""

    out: Path
    process: subprocess.Popen[str]
    ended: Future[tuple[str, float]]


@pytest.fixture(scope="module", autouse=True)
def slow_save(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Iterator[SlowSave]:
    folder = tmp_path_factory.mktemp("slow")
    out = folder / "run"
    words = ["--data", str(data), "--out", str(out), "--ranks", "2", "--parallel.ep", "2", *SMALL]
    process = start(folder, ["limoe_dist", "train", "tiny", *words, "--train.steps", "100000"], save_seconds=32)
    with ThreadPoolExecutor(1) as pool:
        yield SlowSave(out, process, pool.submit(signal_in_training, process, signal.SIGTERM))
        process.kill()


def test_a_grace_shorter_than_the_save_kills_it_and_leaves_no_checkpoint(tmp_path: Path, data: Path) -> None:
    out = tmp_path / "run"
    command = ["limoe_dist", "train", "tiny", "--data", str(data), "--out", str(out), "--ranks", "2", *SMALL]
    process = start(tmp_path, [*command, "--train.steps", "100000", "--train.stop-grace-s", "3"], save_seconds=60)
    printed, seconds = signal_in_training(process, signal.SIGTERM)
    assert seconds < 60
    assert process.returncode == 1
    assert "the ranks were ended by signal 15 before they had saved" in printed
    assert "train.stop_grace_s=3" in printed
    assert not list((out / "checkpoints").glob("step-*/manifest.json"))


def test_a_signal_to_one_rank_is_not_taken_for_a_finished_run(tmp_path: Path, data: Path) -> None:
    out = tmp_path / "run"
    command = ["limoe_dist", "train", "tiny", "--data", str(data), "--out", str(out), "--ranks", "2", *SMALL]
    process = start(tmp_path, [*command, "--train.steps", "100000"], save_seconds=0)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 3/"):
            ranks_below(process.pid)[-1].send_signal(signal.SIGTERM)
            break
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert saved_step(out) >= 3


def test_ctrl_c_under_torchrun_saves_and_ends_and_the_run_goes_on(tmp_path: Path, data: Path) -> None:
    out = tmp_path / "run"
    command = ["torch.distributed.run", "--nproc-per-node", "2", "--shutdown-timeout", "60", "-m", "limoe_dist"]
    words = ["train", "tiny", "--data", str(data), "--out", str(out), "--parallel.ep", "2", *SMALL]
    process = start(tmp_path, [*command, *words, "--train.steps", "100000"], save_seconds=2)
    printed, _ = signal_in_training(process, signal.SIGINT)
    step = saved_step(out)
    assert f"stopped at step {step} of 100000, saved" in printed
    done = limoe("train", "--resume", str(out), "--parallel.ep", "1", "--stop-after", str(step + 2))
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, step + 3))


def test_a_run_goes_on_on_other_ranks_and_its_weights_begin_another(tmp_path: Path, data: Path) -> None:
    out, other = tmp_path / "run", tmp_path / "other"
    words = ["--data", str(data), "--train.steps", "8", *SMALL]
    begun = limoe_from_the_start("train", "tiny", *words, "--out", str(out), "--stop-after", "2")
    assert begun.returncode == 0, begun.stderr
    refused = limoe("train", "--resume", str(out), "--ranks", "3")
    assert refused.returncode == 2
    assert "3 ranks cannot share train.batch_pairs=16 evenly in groups of moe.group_pairs=4" in refused.stderr
    assert "use 1, 2 or 4 ranks" in refused.stderr
    more = limoe("train", "--resume", str(out), "--ranks", "2", "--parallel.ep", "2", "--stop-after", "4")
    assert more.returncode == 0, more.stderr
    assert (
        "ranks: 2, where the checkpoint was saved by 1: 8 pairs of the same batch on each, all at once" in more.stdout
    )
    fewer = limoe("train", "--resume", str(out), "--parallel.ep", "1", "--train.batch-pairs", "24", "--stop-after", "6")
    assert fewer.returncode == 0, fewer.stderr
    assert "24 pairs of a batch of 24 on each, 8 at once (train.microbatch_pairs=8)" in fewer.stdout
    assert "train.batch_pairs=24, where the checkpoint has 16: the data goes on at its pair 64" in fewer.stdout
    # 1 rank, 2 ranks, and 1 again with another batch: 112 positions, each row of an epoch once.
    result = tmp_path / "audit.json"
    assert limoe("prep", "audit", str(out), "--json", str(result)).returncode == 0
    found = json.loads(result.read_text())
    assert (found["position"], found["faults"], found["unchecked"]) == (112, [], 0)
    assert [epoch["once"] for epoch in found["epochs"]] == [64, 48]

    begun = limoe("train", "tiny", *words, "--out", str(other), "--init-from", str(out), "--image.size", "32",
                  "--stop-after", "1")  # fmt: skip
    assert begun.returncode == 0, begun.stderr
    assert f"parameters of {out / 'checkpoints' / 'step-00000006'}" in begun.stdout
    assert "positions were resized (1): image_embed.position" in begun.stdout
    kept = json.loads((other / "run.json").read_text())
    assert kept["train"]["init_from"] == str(out / "checkpoints" / "step-00000006")


def test_a_runs_settings_begin_another_with_one_thing_changed(tmp_path: Path, data: Path) -> None:
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    words = ["--data", str(data), "--train.steps", "8", *SMALL]
    assert limoe("train", "tiny", *words, "--out", str(first), "--stop-after", "1").returncode == 0
    settings = str(first / "run.json")
    # On two ranks too: each reads the file. Its data need not be given again.
    again = ["--optim.lr", "5e-4", "--ranks", "2", "--parallel.ep", "2", "--stop-after", "1"]
    done = limoe("train", settings, "--out", str(second), *again)
    assert done.returncode == 0, done.stderr
    before, after = (json.loads((out / "run.json").read_text()) for out in (first, second))
    # Of each start, what a person could want to know of its environment, and no setting.
    assert before.pop("environment")["OMP_NUM_THREADS"] == after.pop("environment")["OMP_NUM_THREADS"] == "1"
    assert (before["optim"].pop("lr"), after["optim"].pop("lr")) == (1e-3, 5e-4)
    assert (before.pop("parallel")["ep"], after.pop("parallel")["ep"]) == (1, 2)
    # The run's own copy of the vocabulary.
    assert (Path(before["data"].pop("tokenizer")), Path(after["data"].pop("tokenizer"))) == (
        first / "tokenizer.model",
        second / "tokenizer.model",
    )
    assert before == after

    other = write_shards(tmp_path / "other", rows=64)
    begun = limoe("train", settings, "--data", str(other), "--init-from", str(second), "--out", str(third),
                  "--stop-after", "1")  # fmt: skip
    assert begun.returncode == 0, begun.stderr
    kept = json.loads((third / "run.json").read_text())
    assert kept["data"]["manifest"] == str(other)
    assert kept["train"]["init_from"] == str(second / "checkpoints" / "step-00000001")
    # What began with another run's weights may begin with others.
    over = limoe("train", str(third / "run.json"), "--init-from", str(first), "--out", str(tmp_path / "fourth"),
                 "--stop-after", "1")  # fmt: skip
    assert over.returncode == 0, over.stderr
    assert f"parameters of {first / 'checkpoints' / 'step-00000001'}" in over.stdout


def test_a_recipe_trains_on_its_mixture_or_on_the_data_that_is_given(tmp_path: Path, data: Path) -> None:
    other = write_shards(tmp_path / "other", rows=64)
    words = [*SMALL, "--train.steps", "100000", "--optim.name", "adamw", "--stop-after", "1"]
    for name, given, mixture in (
        ("alone", ["--data", str(data)], []),
        ("mixed", ["--data.mixture", f"{data}=3", f"{other}=1"], [f"{data}=3", f"{other}=1"]),
    ):
        done = limoe("train", "h14-cotrain", *given, "--out", str(tmp_path / name), *words)
        assert done.returncode == 0, done.stderr
        kept = json.loads((tmp_path / name / "run.json").read_text())
        assert kept["data"]["mixture"] == mixture
        assert kept["data"]["manifest"] == str(data)
        assert (kept["preset"], kept["moe"]["num_experts"]) == ("h14", 32)


def test_help_lists_presets_twins_and_recipes() -> None:
    shown = limoe("train", "--help").stdout
    for part in (
        "  h14           ViT-H/14",
        "NAME-two-tower (dense two-tower twin)",
        "  h14-cotrain   H/14, 21,504 pairs",
    ):
        assert part in shown


def test_mistakes_end_in_one_line_with_status_2_before_anything_starts(tmp_path: Path, data: Path) -> None:
    out = tmp_path / "run"
    (tmp_path / "broken.json").write_text("{}")
    (tmp_path / "mistyped.json").write_text('{"moe": {"expertss": 4}}')
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "run.json").write_text("{}")
    common = ["--data", str(data), "--out", str(out)]
    cases = {
        'unknown preset "tinny"; did you mean "tiny"?': ["tinny", *common],
        "parallel.ep=3 must divide the number of ranks, 2: use 1 or 2, or another number of ranks": [
            "tiny", *common, "--ranks", "2", "--parallel.ep", "3",
        ],
        "train.batch_pairs=100 must be a multiple of 1 rank * moe.group_pairs=32 = 32: use 96 or 128": [
            "tiny", *common, "--train.batch-pairs", "100",
        ],
        "--data is missing": ["tiny", "--out", str(out)],
        "0 ranks cannot train: use 1 or more": ["tiny", *common, "--ranks", "0"],
        "--out is missing": ["tiny", "--data", str(data)],
        "broken.json: rows": ["tiny", "--data", str(tmp_path / "broken.json"), "--out", str(out)],
        "nothing.json: cannot be read": ["tiny", "--data", str(tmp_path / "nothing.json"), "--out", str(out)],
        "holds a run already": ["tiny", "--data", str(data), "--out", str(taken)],
        "this is not the directory of a run": ["--resume", str(tmp_path)],
        "give a preset first": ["--data", str(data)],
        "recipes: b16-ablation, ": ["qqqqqq", *common],
        f"{tmp_path} is a directory, and not a preset, a recipe or a run.json": [str(tmp_path), *common],
        "settings.json: cannot be read": [str(tmp_path / "settings.json"), *common],
        "moe.expertss": [str(tmp_path / "mistyped.json"), *common],
        "several: --data.mixture MANIFEST=WEIGHT": ["b16-ablation", "--out", str(out)],
        "--data.mixture both say what to train on": ["tiny", *common, "--data.mixture", f"{data}=1"],
        "--init-from nowhere: there is no such directory": ["tiny", *common, "--init-from", "nowhere"],
        "no whole checkpoint (steps there: none)": ["tiny", *common, "--init-from", str(taken)],
    }  # fmt: skip
    for text, words in cases.items():
        done = limoe("train", *words)
        assert done.returncode == 2, (words, done.stderr)
        assert text in done.stderr
        assert "Traceback" not in done.stderr
    assert not out.exists()
    assert (taken / "run.json").read_text() == "{}"


def test_all_broken_rules_are_told_at_once(tmp_path: Path, data: Path) -> None:
    words = ["--ranks", "2", "--parallel.ep", "3", "--model.heads", "5", "--train.batch-pairs", "100"]
    done = limoe_from_the_start("train", "tiny", "--data", str(data), "--out", str(tmp_path / "run"), *words)
    assert done.returncode == 2
    told = [line for line in done.stderr.splitlines() if line.startswith("limoe: error: ")]
    assert {line.split("=")[0].removeprefix("limoe: error: ") for line in told} == {
        "model.heads",
        "parallel.ep",
        "train.batch_pairs",
    }


def test_an_unknown_setting_offers_the_nearest_one(tmp_path: Path, data: Path) -> None:
    done = limoe("train", "tiny", "--data", str(data), "--out", str(tmp_path / "run"), "--parallel.epp", "2")
    assert done.returncode == 2
    assert "--parallel.ep" in done.stderr + done.stdout


def test_a_fault_that_only_ranks_can_find_is_told_once(tmp_path: Path) -> None:
    manifest = write_shards(tmp_path / "shards", rows=64, shards=1)
    shard = tmp_path / "shards" / "shard-00000.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    words = ["--data", str(manifest), "--out", str(tmp_path / "run"), "--ranks", "2", *SMALL, "--train.steps", "20"]
    done = limoe_from_the_start("train", "tiny", *words)
    assert done.returncode == 2
    assert done.stderr.count("limoe: error: ") == 1
    assert "its checksum is not the one in the manifest" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_sigterm_waits_for_a_save_that_takes_longer_than_the_launchers_own_30_seconds(slow_save: SlowSave) -> None:
    (printed, _), out = slow_save.ended.result(), slow_save.out
    assert slow_save.process.returncode == 128 + signal.SIGTERM, printed
    assert f"stopped at step {saved_step(out)} of 100000, saved; go on: limoe train --resume {out} --ranks 2" in printed
    assert "Traceback" not in printed
