"""Settings that are used in several places: the value reaches each of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from launch import submit
from launch import train as train_command
from limoe_dist.config.schema import Checkpoint, Data, Image, Parallel, Run, Train
from limoe_dist.data import dali, evaluation
from limoe_dist.data.arrow import ShardSet
from limoe_dist.data.loader import Loader
from limoe_dist.data.tokenizer import open_tokenizer
from limoe_dist.model.tower import build_model
from limoe_dist.optim.engine import make_engine
from limoe_dist.parallel import apex, bootstrap
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.train import restart
from limoe_dist.train.evaluation import evaluate
from limoe_dist.train.inputs import open_inputs
from limoe_dist.train.loop import train
from limoe_dist.train.restart import Restart
from tests.config.settings import changed
from tests.support.cases import small_run
from tests.support.ranks import RanksPool
from tests.support.shards import write_shards
from tests.train.small import losses, run_on

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("reach") / "train", rows=24)


def test_every_norm_and_the_update_look_for_the_kernels_of_the_settings() -> None:
    two_towers = {"moe.blocks": (), "model.towers": "two", "model.depth": 2}
    run = changed(small_run("fp32"), two_towers | {"parallel.kernels": "apex"})
    with mock.patch.object(apex, "_find", return_value=None) as find:
        make_engine(build_model(run, mesh=Mesh.single(), device=CPU), run, Mesh.single())
    # 2 towers of 2 blocks with 2 norms each, the last norm of each tower, and the update.
    assert [call.args[0] for call in find.call_args_list] == ["apex"] * (2 * 2 * 2 + 2 + 1)


def deepspeed_numbers(run_json: str) -> tuple[Any, ...]:
    """What DeepSpeed was given, on a rank: its rule's numbers, its buckets, and the limit of the gradient."""
    run = Run.model_validate_json(run_json)
    mesh = Mesh.build(tp=1, ep=1)
    engine: Any = make_engine(build_model(run, mesh=mesh, device=CPU), run, mesh)
    (zero,) = engine.zeros
    groups = zero.optimizer.param_groups
    rules = {(*group["betas"], group["eps"]) for group in groups}
    decays = sorted({group["weight_decay"] for group in groups})
    return rules, decays, zero.reduce_bucket_size, zero.overlap_comm, engine.clip_norm


def test_deepspeed_has_every_setting_of_the_update(ranks2: RanksPool) -> None:
    optim = {"beta1": 0.5, "beta2": 0.7, "eps": 1e-3, "weight_decay": 0.3, "clip_norm": 2.5, "engine": "deepspeed"}
    chosen = {f"optim.{name}": value for name, value in optim.items()}
    run = changed(small_run("fp32"), chosen | {"parallel.bucket_mb": 0.5, "parallel.overlap": False})
    # A bucket of half a megabyte holds 125,000 numbers of 4 bytes. Biases and norms do not decay.
    wanted = {(0.5, 0.7, 1e-3)}, [0.0, 0.3], 125_000, False, 2.5
    assert ranks2.run(deepspeed_numbers, run.model_dump_json()) == [wanted, wanted]


def test_minutes_between_checkpoints_are_of_60_seconds_on_the_clock_of_rank_0() -> None:
    def due(seconds: float, *, minutes: float, rank: int = 0) -> bool:
        state = mock.Mock(
            run=Run(checkpoint=Checkpoint(every_minutes=minutes)), mesh=mock.Mock(rank=rank), _saved_at=1000
        )
        with mock.patch.object(restart.time, "monotonic", return_value=1000 + seconds):
            return Restart.due_by_the_clock(state)

    assert [due(seconds, minutes=1.5) for seconds in (1, 89, 90, 1000)] == [False, False, True, True]
    assert not due(1000, minutes=0)
    assert not due(1000, minutes=1.5, rank=1)


def test_decoders_of_an_evaluation_and_their_resize_have_the_threads_of_the_settings(data: Path) -> None:
    run = changed(run_on(data), {"data.threads": 3})
    shards = ShardSet(str(data), data=run.data)
    with mock.patch.object(evaluation, "Decoder", wraps=evaluation.Decoder) as decoder:
        next(iter(evaluation.evaluation_batches(run, shards, None, batch_pairs=4, rank=0, world=1, device=CPU)))
        evaluation.decode_rows(run, shards, [0, 5], device=CPU)
    assert [call.kwargs["threads"] for call in decoder.call_args_list] == [3, 3]
    with (
        mock.patch.object(dali, "Pipeline", wraps=dali.Pipeline) as pipeline,
        mock.patch.object(dali, "ThreadPoolExecutor", wraps=dali.ThreadPoolExecutor) as pool,
    ):
        dali.Decoder(Image(size=16, patch=4), mode="evaluation", batch_size=2, threads=3, device=CPU)
    # Decoding and finishing.
    assert [call.kwargs["num_threads"] for call in pipeline.call_args_list] == [3, 3]
    assert pool.call_args.args == (3,)


def test_a_new_run_takes_the_weights_that_the_settings_name(tmp_path: Path) -> None:
    for place, taken in (("", []), (str(tmp_path), [tmp_path])):
        state = mock.Mock(run=Run(train=Train(init_from=place)), mesh=Mesh.single(), device=CPU)
        state.engine.shards.return_value = {"model/head": 1, "adamw/head": 2}
        with mock.patch.object(restart, "take_weights") as take_weights:
            Restart.initialise(state)
        # The moments begin anew.
        assert [call.args[:2] for call in take_weights.call_args_list] == [(one, {"model/head": 1}) for one in taken]
        assert state.engine.adopt.call_count == len(taken)


@contextmanager
def started(parallel: Parallel) -> Iterator[tuple[mock.Mock, mock.Mock]]:
    """A rank of two that has started, without the other: what was called to meet it, and to watch over both."""
    place, threads = mock.Mock(world=2, rank=0, local_rank=0), torch.get_num_threads()
    with (
        mock.patch.object(bootstrap, "discover", return_value=place),
        mock.patch.object(bootstrap, "meet") as meet,
        mock.patch.object(bootstrap, "watch") as watch,
        mock.patch.object(bootstrap, "_connect"),
        mock.patch.object(bootstrap, "check_links"),
    ):
        try:
            with bootstrap.start(parallel, {}):
                yield meet, watch
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize(("start_s", "whole_s", "first"), [(40.0, 70.0, "start_timeout_s"), (90.0, 70.0, "timeout_s")])
def test_the_first_contact_has_the_shorter_limit_and_training_its_own(
    start_s: float, whole_s: float, first: str
) -> None:
    with started(Parallel(start_timeout_s=start_s, timeout_s=whole_s)) as (meet, watch):
        assert meet.call_args.kwargs["timeout_s"] == start_s
        asked = watch.call_args.kwargs
        assert (asked["limit_s"], asked["limit_name"]) == (min(start_s, whole_s), f"parallel.{first}")
        watchdog = watch.return_value.__enter__.return_value
        watchdog.limit.assert_called_once_with(70.0, "parallel.timeout_s")


def test_ranks_of_this_machine_are_started_with_the_threads_and_the_grace_of_the_settings(tmp_path: Path) -> None:
    run = Run(parallel=Parallel(threads=3), train=Train(stop_grace_s=77.0))
    command = mock.Mock(ranks=2)
    with (
        mock.patch("launch.launchers.start_ranks") as start_ranks,
        mock.patch("launch.launchers.status_of", return_value=0) as status_of,
    ):
        train_command._start_ranks(["tiny"], run, tmp_path, command, mock.Mock())
    asked = start_ranks.call_args.kwargs
    assert (asked["ranks"], asked["threads"], asked["grace_s"]) == (2, 3, 77.0)
    assert status_of.call_args.kwargs["grace_s"] == 77.0


def test_a_job_has_the_cores_and_the_grace_of_the_settings(tmp_path: Path) -> None:
    run = Run(parallel=Parallel(threads=3), data=Data(threads=5), train=Train(stop_grace_s=77.0))
    asked = mock.Mock(words=("tiny",), out=tmp_path / "run", resume=False)
    asked.job.cpus_per_rank, asked.command.stop_after = 0, None
    found = submit._training(asked, run, tmp_path / "job.sh")
    assert (found.threads, found.cpus_per_rank, found.wait_s) == (3, 3 + 5, 77)
    asked.job.before_s.assert_called_once_with(77.0)


def batches_of(run: Run, data: Path, *, rank: int = 0, world: int = 1) -> list[Any]:
    shards = ShardSet(str(data), data=run.data)
    tokenizer = open_tokenizer(run, shards.parts[0].manifest, shards.parts[0].folder)
    with Loader(run, shards, tokenizer, rank=rank, world=world, first_step=0, device=CPU) as loader:
        return list(loader)


def test_the_loader_orders_by_the_seed_and_ends_with_the_steps(data: Path) -> None:
    run = changed(run_on(data), {"train.batch_pairs": 8, "train.steps": 3})
    rows, other = (
        [row for batch in batches_of(each, data) for row in batch.rows.tolist()]
        for each in (run, changed(run, {"train.seed": 8}))
    )
    # An epoch of 24 rows: each once.
    assert sorted(rows) == sorted(other) == list(range(24))
    assert rows != other


def test_the_loader_augments_by_the_seed(tmp_path: Path) -> None:
    # One row, so that its order is the same with every seed.
    data = write_shards(tmp_path / "train", rows=1, shards=1)
    run = changed(run_on(data), {"image.rotate_degrees": 30.0, "train.batch_pairs": 8, "train.steps": 1})
    (batch,), (same,), (other,) = (
        batches_of(changed(run, {"train.seed": seed}), data) for seed in (run.train.seed, run.train.seed, 8)
    )
    assert torch.equal(batch.images, same.images)
    assert not any(torch.equal(one, two) for one, two in zip(batch.images, other.images, strict=True))


def test_a_mixture_is_read_by_its_weights_and_spelled_by_the_manifest_of_the_settings(
    data: Path, tmp_path: Path
) -> None:
    other = write_shards(tmp_path / "other", rows=24, vocab_size=27)
    mixed = {"data.mixture": (f"{data}=1", f"{other}=3"), "data.validation": "", "train.batch_pairs": 8}
    run = changed(run_on(data), mixed | {"data.manifest": "", "train.steps": 2})
    for manifest, home in (("", data), (str(data), data), (str(other), other)):
        inputs = open_inputs(changed(run, {"data.manifest": manifest}), Mesh.single(), CPU)
        assert inputs.tokenizer.path.parent == home.parent
        inputs.close()
    shards = ShardSet(str(data), str(other), data=run.data)
    tokenizer = open_tokenizer(run, shards.parts[0].manifest, shards.parts[0].folder)
    with Loader(run, shards, tokenizer, rank=0, world=1, first_step=0, device=CPU) as loader:
        # Rows from 24 on are those of the other source: 3 of 4.
        assert [int((batch.rows >= 24).sum()) for batch in loader] == [6, 6]


EVALUATIONS: dict[str, tuple[Any, set[str]]] = {
    "eval.batch_pairs": (2, set()),
    "eval.classes": ("trained", {"zeroshot"}),
    "eval.templates": (("a {}", "{}"), {"zeroshot"}),
    "eval.captions": ("all", {"retrieval"}),
    "eval.minibatch": (2, {"contrastive"}),
    "data.threads": (2, set()),
    "image.flip": (1.0, set()),
    "moe.noise_std": (3.0, set()),
}
"""Settings with another value, and the evaluations that change with it."""


def test_a_setting_of_evaluation_changes_its_own_result_alone(tmp_path: Path) -> None:
    data = write_shards(tmp_path / "train", rows=24)
    write_shards(tmp_path / "validation", rows=6, captions={0: ["a red square", "something else", "a third"]})
    usual = changed(
        run_on(data),
        {"parallel.ep": 1, "train.dtype": "fp64", "eval.batch_pairs": 6, "eval.minibatch": 4, "eval.templates": ("{}",)}
        | {"data.validation": str(tmp_path / "validation" / "manifest.json")},
    )

    def evaluated(run: Run) -> dict[str, Any]:
        model, inputs = build_model(run, mesh=Mesh.single(), device=CPU), open_inputs(run, Mesh.single(), CPU)
        found = evaluate(model, run, inputs, mesh=Mesh.single(), device=CPU, between=lambda: None)
        inputs.close()
        return found.to_json()

    before = evaluated(usual)
    for name, (value, affects) in EVALUATIONS.items():
        after = evaluated(changed(usual, {name: value}))
        assert {kind for kind in before if before[kind] != after[kind]} == affects, name


def test_what_a_run_writes_reads_ahead_and_watches_for_changes_no_loss(data: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "validation", rows=6)
    usual = changed(run_on(data, steps=4), {"parallel.ep": 1, "data.validation": "", "checkpoint.every_steps": 0})
    busy = {
        "data.validation": str(tmp_path / "validation" / "manifest.json"),
        "data.prefetch": 5,
        "data.threads": 2,
        "data.check": "never",
        "eval.every_steps": 1,
        "checkpoint.every_steps": 1,
        "checkpoint.keep": 1,
        "checkpoint.read_back": False,
        "guard.spike": "off",
        "guard.collapse": "off",
        "guard.spike_window": 8,
        "log.tensorboard": False,
        "log.straggler_factor": 1.0,
        "parallel.overlap": False,
        "parallel.kernels": "torch",
    }
    with mock.patch.object(apex, "check", wraps=apex.check) as check:
        for name, run in (("usual", usual), ("busy", changed(usual, busy))):
            train(run, tmp_path / name, mesh=Mesh.single(), device=CPU, resume=False)
    assert [call.args[0] for call in check.call_args_list] == ["auto", "torch"]
    assert losses(tmp_path / "busy") == losses(tmp_path / "usual")
