"""What a run does by its settings, where their effect is no number of a step."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from limoe_dist.config.errors import UserError
from limoe_dist.config.schema import Parallel, Run
from limoe_dist.data import loader
from limoe_dist.data.arrow import ShardSet
from limoe_dist.data.loader import Loader
from limoe_dist.model.tower import build_model
from limoe_dist.optim.engine import make_engine
from limoe_dist.parallel import bootstrap
from limoe_dist.parallel.gradients import Gradients
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.parallel.traffic import Traffic
from limoe_dist.train import training
from limoe_dist.train.evaluation import evaluate
from limoe_dist.train.inputs import open_inputs
from limoe_dist.train.loop import train
from tests.config.settings import changed
from tests.support.cases import small_run
from tests.support.ranks import RanksPool
from tests.support.shards import write_shards
from tests.train.small import lines, run_on

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("behaviour")
    write_shards(folder / "validation", rows=5, captions={0: ["a red square", "something else", "a third"]})
    return write_shards(folder / "train", rows=64)


def run_with(data: Path, **settings: Any) -> Run:
    return changed(run_on(data), {"parallel.ep": 1} | {name.replace("__", "."): v for name, v in settings.items()})


def steps_in(out: Path, name: str) -> list[int]:
    return [line["step"] for line in lines(out, name)] if (out / name).exists() else []


def test_a_run_writes_at_the_steps_that_its_settings_name(data: Path, tmp_path: Path) -> None:
    run = run_with(data, log__every_steps=2, eval__every_steps=4, checkpoint__every_steps=3, checkpoint__keep=9)
    train(run, tmp_path / "a", mesh=Mesh.single(), device=CPU, resume=False)
    assert steps_in(tmp_path / "a", "metrics.jsonl") == [2, 4, 6]
    assert steps_in(tmp_path / "a", "evaluations.jsonl") == [4, 6]
    assert sorted(path.name[-1] for path in (tmp_path / "a" / "checkpoints").glob("step-*")) == ["3", "6"]
    assert list((tmp_path / "a" / "tensorboard").iterdir())
    quiet = {"log__every_steps": 5, "log__tensorboard": False, "data__validation": "", "checkpoint__every_steps": 0}
    train(run_with(data, **quiet), tmp_path / "b", mesh=Mesh.single(), device=CPU, resume=False)
    # The last step is logged and saved whatever the settings are.
    assert steps_in(tmp_path / "b", "metrics.jsonl") == [5, 6]
    assert steps_in(tmp_path / "b", "evaluations.jsonl") == []
    assert [path.name[-1] for path in (tmp_path / "b" / "checkpoints").glob("step-*")] == ["6"]
    assert not (tmp_path / "b" / "tensorboard").exists()


def test_a_run_watches_for_stragglers_by_its_factor(data: Path, tmp_path: Path) -> None:
    run = run_with(data, log__straggler_factor=2.5, train__steps=4, eval__every_steps=0)
    with mock.patch.object(training, "Heartbeat", wraps=training.Heartbeat) as heartbeat:
        train(run, tmp_path / "run", mesh=Mesh.single(), device=CPU, resume=False, stop_after=1)
    assert heartbeat.call_args.kwargs["straggler_factor"] == 2.5


def test_checksums_of_shards_are_compared_at_the_start_or_never(tmp_path: Path) -> None:
    data = write_shards(tmp_path / "train", rows=24)
    write_shards(tmp_path / "validation", rows=8)
    shard = next(data.parent.glob("*.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    open_inputs(run_with(data, data__check="never"), Mesh.single(), CPU).close()
    with pytest.raises(UserError, match="its checksum is not the one in the manifest"):
        open_inputs(run_with(data, data__check="start"), Mesh.single(), CPU)


def test_the_loader_gives_its_threads_to_the_decoder(data: Path) -> None:
    run = run_with(data, data__threads=3)
    shards = ShardSet(str(data), data=run.data)
    with mock.patch.object(loader, "Decoder", wraps=loader.Decoder) as decoder:
        Loader(run, shards, mock.Mock(), rank=0, world=1, first_step=0, device=CPU).close()
    assert decoder.call_args.kwargs["threads"] == 3


def test_the_axes_of_the_mesh_are_those_of_the_settings() -> None:
    parallel, place, meeting = Parallel(tp=2, ep=4, timeout_s=50.0), mock.Mock(world=8, rank=3), mock.Mock()
    with (
        mock.patch.object(bootstrap.dist, "PrefixStore"),
        mock.patch.object(bootstrap.dist, "init_process_group") as joined,
        mock.patch.object(bootstrap.Mesh, "build") as built,
    ):
        bootstrap._connect(parallel, place, meeting, CPU, Traffic())
    assert (built.call_args.kwargs["tp"], built.call_args.kwargs["ep"]) == (2, 4)
    # The watchdog names the missing rank first; the process group gives up a little later.
    limit = timedelta(seconds=50.0 + bootstrap.BEHIND_S)
    assert joined.call_args.kwargs["timeout"] == built.call_args.kwargs["timeout"] == limit


@pytest.mark.parametrize("overlap", [True, False])
def test_with_overlap_buckets_leave_in_the_backward_pass(overlap: bool) -> None:
    run = changed(small_run(), {"parallel.overlap": overlap, "parallel.bucket_mb": 0.01})
    model = build_model(run, mesh=Mesh.single(), device=CPU)
    engine = make_engine(model, run, Mesh.single())
    sums: Gradients = engine.sums  # type: ignore[attr-defined]
    engine.backward(torch.stack([p.sum() for p in model.parameters()]).sum(), last=True)
    assert sums._left == (len(engine.buckets) if overlap else 0)  # type: ignore[attr-defined]


def test_a_rank_computes_with_the_threads_of_its_settings() -> None:
    before = torch.get_num_threads()
    try:
        with bootstrap.start(Parallel(threads=before + 1), {}):
            assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def deepspeed_flags(run_json: str) -> list[tuple[str, bool, bool]]:
    """On a rank: the engine, whether it shards gradients too, and whether its state is in the CPU's memory."""
    run, found = Run.model_validate_json(run_json), []
    for engine, stage, offload in (("native", 1, False), ("deepspeed", 1, False), ("deepspeed", 2, True)):
        chosen = changed(run, {"optim.engine": engine, "optim.zero_stage": stage, "optim.offload": offload})
        mesh = Mesh.build(tp=1, ep=1)
        made: Any = make_engine(build_model(chosen, mesh=mesh, device=CPU), chosen, mesh)
        zero = made.zeros[0] if engine == "deepspeed" else mock.Mock(partition_gradients=False, cpu_offload=False)
        found.append((type(made).__name__, bool(zero.partition_gradients), bool(zero.cpu_offload)))
    return found


def test_deepspeed_is_told_stage_and_offload(ranks2: RanksPool) -> None:
    found = ranks2.run(deepspeed_flags, small_run("fp32").model_dump_json())
    wanted = [("NativeEngine", False, False), ("DeepSpeedEngine", False, False), ("DeepSpeedEngine", True, True)]
    assert found == [wanted, wanted]


def test_an_evaluation_takes_its_batch_classes_and_prompts(data: Path) -> None:
    def evaluated(**settings: Any) -> tuple[dict[str, Any], int]:
        usual = {"eval__batch_pairs": 5, "eval__minibatch": 4, "eval__templates": ("{}",)}
        run = run_with(data, **(usual | settings))
        inputs, passes = open_inputs(run, Mesh.single(), CPU), []
        model = build_model(run, mesh=Mesh.single(), device=CPU)
        found = evaluate(model, run, inputs, mesh=Mesh.single(), device=CPU, between=lambda: passes.append(1))
        inputs.close()
        return found.to_json(), len(passes)

    usual, passes = evaluated()
    # 5 rows: one pass for pictures, one for prompts, one for captions. 5 concepts, and 5 first captions.
    assert (usual["zeroshot"]["classes"], usual["zeroshot"]["templates_used"], passes) == (5, 1, 3)
    assert (usual["retrieval"]["texts"], usual["contrastive"]["minibatch"]) == (5, 4)
    # In twos: 3 passes for each.
    assert evaluated(eval__batch_pairs=2)[1] == 9
    # The training rows have 8 concepts.
    assert evaluated(eval__classes="trained")[0]["zeroshot"]["classes"] == 8
    assert evaluated(eval__templates=("{}", "a {}"))[0]["zeroshot"]["templates_used"] == 2
    # 3 captions of the first row, 2 of each other.
    assert evaluated(eval__captions="all")[0]["retrieval"]["texts"] == 3 + 4 * 2
    assert evaluated(eval__minibatch=2)[0]["contrastive"]["minibatch"] == 2
