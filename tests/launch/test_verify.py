"""`limoe verify` as a user starts it, what it runs in place of a whole run, and the certificate that it writes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from launch import verify
from launch.certificate import certificate, fingerprint, table
from launch.verified import Change, Layout, needed_bytes, verified_run
from limoe_dist.config.errors import UserError
from limoe_dist.config.presets import preset
from limoe_dist.config.rules import check
from limoe_dist.config.schema import Run
from limoe_dist.train.parity.checks import CHECKS, Check
from limoe_dist.train.parity.compare import Blame, Comparison
from limoe_dist.train.parity.facts import Facts
from tests.launch.forked import limoe


def changed(run: Run, **sections: dict[str, object]) -> Run:
    return run.model_copy(
        update={name: getattr(run, name).model_copy(update=update) for name, update in sections.items()}
    )


def test_a_layout_of_the_preset_is_verified_on_real_ranks_and_certified(tmp_path: Path) -> None:
    out = tmp_path / "certificate.json"
    words = ["verify", "tiny", "--layout", "dp=2,tp=2,ep=4", "--shrink", "--out", str(out)]
    done = subprocess.run([sys.executable, "-m", "limoe_dist", *words], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "limoe verify: fp32: 4 steps on 4 ranks" in done.stdout
    assert "optimizer state" in done.stdout
    found = json.loads(out.read_text())
    assert (found["format"], found["result"]) == ("limoe-dist certificate 1", "passed")
    assert found["layout"]["used"] == {"dp": 2, "tp": 2, "edp": 1, "ep": 4, "ranks": 4}
    assert found["device"] == "CPU, gloo"
    assert {change["setting"] for change in found["changes"]} >= {"model.width", "text.vocab_size"}
    assert found["settings"]["moe"]["num_experts"] == 8
    assert [one["precision"] for one in found["comparisons"]] == ["fp64", "fp32"]
    for one in found["comparisons"]:
        assert {entry["what"] for entry in one["checks"]} == set(CHECKS)
        assert all(entry["passed"] and entry["error"] <= entry["tolerance"] for entry in one["checks"])
        # An agreement of zeros would be none.
        assert any(entry["error"] > 0 for entry in one["checks"])
        assert one["facts"]["dropped_frac"] >= 0.05
        assert one["facts"]["idle"]
        assert one["facts"]["groups"] == {"pictures and captions": 8, "pictures alone": 4, "captions alone": 4}
    gradients = [entry for entry in found["comparisons"][0]["checks"] if entry["what"] == "gradients"]
    assert [entry["step"] for entry in gradients] == [
        "step 1: pairs",
        "step 2: images",
        "step 3: texts",
        "step 4: pairs",
    ]


def test_batches_that_drop_no_token_fail_and_say_so(tmp_path: Path) -> None:
    out = tmp_path / "certificate.json"
    words = ["verify", "tiny", "--layout", "dp=2,tp=1,ep=2", "--shrink", "--out", str(out)]
    words += ["--moe.capacity-factor", "9", "--train.dtype", "fp32"]
    done = limoe(*words)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "limoe: error: fp32: the batches prove too little: 0.0% of the tokens were dropped" in done.stderr
    assert "Traceback" not in done.stderr
    found = json.loads(out.read_text())
    assert found["result"] == "failed"
    assert found["first_difference"] is None
    assert "moe.capacity_factor=9" in found["comparisons"][0]["lacking"][0]


@pytest.mark.parametrize("text", ["foo", "dp=2,tp=3", "dp=2,tp=2,ep=0", "dp=2,tp=2,ep=4,ep=4", "dp=2;tp=2;ep=4", ""])
def test_a_layout_that_cannot_be_read_says_how_to_write_one(text: str) -> None:
    with pytest.raises(UserError) as raised:
        verify.main(["tiny", "--layout", text])
    assert str(raised.value).endswith("as in --layout dp=2,tp=2,ep=4")


def test_an_impossible_layout_is_refused_with_every_problem_and_no_rank_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.ranks.run_local", lambda *words, **settings: pytest.fail("ranks were started"))
    words = ["tiny", "--layout", "dp=2,tp=3,ep=5", "--model.width", "97", "--out", str(tmp_path / "c.json")]
    with pytest.raises(UserError) as raised:
        verify.main(words)
    lines = str(raised.value).splitlines()
    assert all(line.startswith("--layout dp=2,tp=3,ep=5: ") for line in lines)
    assert [line.split(": ")[1].split("=")[0] for line in lines] == [
        "model.heads",
        "parallel.ep",
        "parallel.ep",
        "parallel.tp",
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--layout", "dp=1,tp=1,ep=1"], "nothing to compare"),
        (["--layout", "dp=2,tp=1,ep=2", "--parallel.ep", "4"], "--parallel.ep 4 and --layout dp=2,tp=1,ep=2 differ"),
        (["--layout", "dp=2,tp=1,ep=2", "--out", "no/such/folder/c.json"], "must be a file in a folder that exists"),
        (["--layout", "dp=2,tp=2,ep=2", "--optim.engine", "deepspeed"], "optim.engine=deepspeed cannot run"),
        ([], "--layout is missing"),
    ],
)
def test_mistakes_are_told_before_anything_starts(words: list[str], text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.ranks.run_local", lambda *words, **settings: pytest.fail("ranks were started"))
    with pytest.raises(UserError, match=text):
        verify.main(["tiny", *words])


def test_more_gpus_than_there_are_and_more_memory_than_there_is_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.ranks.run_local", lambda *words, **settings: pytest.fail("ranks were started"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="a GPU for each of the 4 ranks, 0 are here"):
        verify.main(["tiny", "--layout", "dp=4,tp=1,ep=2", "--device", "cuda"])
    # Set here so that it is put back: the command hides the GPUs from its ranks.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(UserError, match=r"16 ranks and the reference need about [0-9]+ GB of memory"):
        verify.main(["h14", "--layout", "dp=16,tp=1,ep=8"])


def test_ranks_of_a_launcher_run_the_whole_layout_and_must_be_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    command = verify.VerifyCommand(run=preset("b16"), layout="dp=32,tp=1,ep=8", shrink=True)
    assert verify._task(command, started=None).used == Layout(16, 1, 8)
    assert verify._task(command, started=32).used == Layout(32, 1, 8)
    # Those that this command itself has started after the cut.
    assert verify._task(command, started=16).used == Layout(16, 1, 8)
    with pytest.raises(UserError, match="has 32 ranks, but 8 were started"):
        verify._task(command, started=8)


@pytest.mark.parametrize(
    ("asked", "used"),
    [
        # Up to 16 ranks nothing is cut.
        ("dp=16,tp=1,ep=8", "dp=16,tp=1,ep=8"),
        ("dp=4,tp=4,ep=2", "dp=4,tp=4,ep=2"),
        # 32 * 1 = 4 * 8: edp 2 needs 16 ranks.
        ("dp=32,tp=1,ep=8", "dp=16,tp=1,ep=8"),
        ("dp=256,tp=1,ep=2", "dp=4,tp=1,ep=2"),
        ("dp=32,tp=2,ep=8", "dp=8,tp=2,ep=8"),
        # edp is 2 with dp=1 already, but then no weight that tp cuts would be summed over dp.
        ("dp=16,tp=4,ep=2", "dp=2,tp=4,ep=2"),
        # One rank for each expert's shard was asked for: 32 remain.
        ("dp=32,tp=1,ep=32", "dp=32,tp=1,ep=32"),
        # ep=3 divides 6 * tp.
        ("dp=24,tp=2,ep=3", "dp=3,tp=2,ep=3"),
    ],
)
def test_dp_is_cut_beyond_16_ranks_to_what_keeps_two_of_everything(asked: str, used: str) -> None:
    assert str(Layout.parse(asked).cut()) == used


@pytest.mark.parametrize("name", ["tiny", "s16", "b16", "l16", "h14", "b16-dense"])
def test_shrinking_keeps_experts_groups_heads_and_both_kinds_of_blocks(name: str) -> None:
    asked, layout = preset(name), Layout(8, 2, 8 if "dense" not in name else 1)
    used, changes = verified_run(asked, layout, shrink=True)
    check(used, world=16)
    kept = ("num_experts", "top_k", "group_pairs", "capacity_factor", "min_image_experts", "noise_std")
    assert all(getattr(used.moe, field) == getattr(asked.moe, field) for field in kept)
    assert (used.model.heads, used.image.patch, used.text.length) == (
        asked.model.heads,
        asked.image.patch,
        asked.text.length,
    )
    assert used.model.width <= 64
    if asked.moe.blocks:
        assert len(used.moe.blocks) == 2
        assert len(used.moe.blocks) < used.model.depth
        assert used.train.batch_pairs == 16 * asked.moe.group_pairs
    assert all(change.why for change in changes)
    assert {change.setting: change.asked for change in changes}.get("model.width", 64) == max(64, asked.model.width)


def test_what_is_verified_is_said_to_differ_only_where_it_does() -> None:
    run = changed(preset("tiny"), train={"microbatch_pairs": 64, "batch_pairs": 256}, moe={"noise_std": 0.0})
    used, changes = verified_run(run, Layout(2, 2, 4), shrink=False)
    assert [(change.setting, change.asked, change.used) for change in changes] == [
        ("train.microbatch_pairs", 64, 32),
        ("moe.noise_std", 0.0, 1.0),
    ]
    assert (used.model, used.image, used.text, used.optim) == (run.model, run.image, run.text, run.optim)
    assert (used.parallel.tp, used.parallel.ep) == (2, 4)


def test_the_memory_formula_grows_with_the_model_and_with_what_each_rank_holds_twice() -> None:
    def needed(run: Run, layout: Layout) -> int:
        return needed_bytes(verified_run(changed(run, train={"dtype": "fp64"}), layout, shrink=False)[0], layout)

    # H/14 has 5.6 B parameters: the reference alone keeps at least four numbers of 8 bytes for each, in four steps.
    assert needed(preset("h14"), Layout(2, 1, 2)) > 5.6e9 * 8 * 4 * 4
    small = verified_run(changed(preset("h14"), train={"dtype": "fp64"}), Layout(16, 1, 8), shrink=True)[0]
    # 16 processes with torch are most of it.
    assert 4.8e9 < needed_bytes(small, Layout(16, 1, 8)) < 10e9


FACTS = Facts(dropped_frac=0.3, idle={1: [5]}, groups={"pictures alone": 4}, norms=[math.nan, 0.5, 2.0])


def failed_comparison() -> tuple[Comparison, Blame]:
    bad = Check(
        "gradients", "step 1: pairs", math.inf, 1e-9, "blocks.1.moe.router", ("blocks.1.moe.router", "norm.bias")
    )
    good = Check.of("contrastive loss", "step 1: pairs", {"contrastive loss": 1e-15}, 1e-9)
    found = Comparison("fp64", (good, bad), FACTS, (), ("norm",))
    return found, Blame("fp64", bad, "blocks.1.moe.router", "blocks.1.moe.router")


def certified(run: Run, layout: Layout) -> dict[str, object]:
    found, blamed = failed_comparison()
    return certificate(
        run,
        run,
        layouts=(layout, layout.cut()),
        changes=[Change("model.width", 96, 64, "--shrink")],
        comparisons=[found],
        blamed=blamed,
        device="CPU, gloo",
        seconds=12.34,
        made="2031-01-01T00:00:00+00:00",
    )


def test_a_failure_is_certified_with_its_first_difference_and_is_still_json() -> None:
    content = json.loads(json.dumps(certified(preset("tiny"), Layout(32, 1, 8)), allow_nan=False))
    assert content["result"] == "failed"
    assert content["first_difference"] == {
        "precision": "fp64",
        "check": "gradients",
        "step": "step 1: pairs",
        "place": "blocks.1.moe.router",
        "parameter": "blocks.1.moe.router",
    }
    bad = content["comparisons"][0]["checks"][1]
    assert (bad["error"], bad["passed"], bad["failed"]) == (None, False, ["blocks.1.moe.router", "norm.bias"])
    assert content["comparisons"][0]["facts"]["norms"] == [None, 0.5, 2.0]
    assert content["layout"]["asked"]["ranks"] == 32
    assert content["layout"]["used"]["ranks"] == 16


def test_the_table_shows_the_worst_step_and_what_failed(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    Console(width=120).print(table([failed_comparison()[0]]))
    shown = capsys.readouterr().out
    assert "blocks.1.moe.router (step 1: pairs)" in shown
    assert "FAILED" in shown
    assert shown.count("ok") == 1


def test_the_fingerprint_tells_settings_and_layouts_apart_and_not_where_the_data_lies() -> None:
    run, layout = preset("tiny"), Layout(2, 2, 4)
    same = changed(run, data={"manifest": "elsewhere/manifest.json"}, log={"every_steps": 3})
    assert fingerprint(same, layout) == fingerprint(run, layout)
    others = [
        fingerprint(run, Layout(4, 1, 4)),
        fingerprint(changed(run, optim={"lr": 0.5}), layout),
        fingerprint(changed(run, optim={"engine": "deepspeed"}), layout),
    ]
    assert len({fingerprint(run, layout), *others}) == 4
