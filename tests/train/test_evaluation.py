from __future__ import annotations

from pathlib import Path

import torch

from limoe_dist.data.arrow import ShardSet
from limoe_dist.data.tokenizer import open_tokenizer
from limoe_dist.eval.classes import classes_of_concepts, concepts_of
from limoe_dist.eval.contrastive import contrastive
from limoe_dist.eval.retrieval import retrieval
from limoe_dist.eval.zeroshot import zeroshot
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.train.evaluation import Evaluation, evaluate
from limoe_dist.train.inputs import Inputs
from tests.eval.models import CPU, RUN, small_model
from tests.support.shards import write_shards


def evaluated(shards: ShardSet, *, concepts: bool = True) -> tuple[Evaluation, list[str]]:
    """The evaluation, and one letter for each forward pass in it."""
    model, passes = small_model(), []
    model.register_forward_hook(lambda _, given, __: passes.append("t" if given[0] is None else "p"))
    inputs = Inputs(
        train=shards,
        validation=shards,
        classes=classes_of_concepts(concepts_of(shards), place="here") if concepts else None,
        tokenizer=open_tokenizer(RUN, shards.manifest, shards.folder),
        data_hash="",
        tokenizer_hash="",
    )
    found = evaluate(model, RUN, inputs, mesh=Mesh.single(), device=CPU, between=lambda: None)
    return found, passes


def test_every_task_finds_what_it_finds_alone_in_one_pass_over_the_pictures(tmp_path: Path) -> None:
    shards = ShardSet(write_shards(tmp_path, rows=8))
    found, passes = evaluated(shards)
    tokenizer = open_tokenizer(RUN, shards.manifest, shards.folder)
    alone = {
        task.__name__: task(small_model(), RUN, shards, tokenizer, mesh=Mesh.single(), device=CPU).to_json()
        for task in (zeroshot, retrieval, contrastive)
    }
    for figures in alone.values():
        figures.pop("examples", None)
    assert found.to_json() == alone
    # 8 pictures in passes of 4, once; 16 prompts and 8 captions, each list once for all tasks.
    assert (passes.count("p"), passes.count("t")) == (2, 4 + 2)
    assert "zero-shot top-1" in found.line()
    assert "contrastive accuracy" in found.line()
    assert "in 8 pairs" in found.line()


def test_pictures_alone_are_classified_and_nothing_else(tmp_path: Path) -> None:
    found, _ = evaluated(ShardSet(write_shards(tmp_path, rows=8, captions={row: [] for row in range(8)})))
    assert set(found.to_json()) == {"zeroshot"}
    assert "retrieval" not in found.line()


def test_where_nothing_can_be_measured_the_run_goes_on_and_is_told(tmp_path: Path) -> None:
    shards = ShardSet(write_shards(tmp_path, rows=8, captions={row: [] for row in range(8)}, concepts=False))
    found, passes = evaluated(shards, concepts=False)
    assert (found.to_json(), passes) == ({}, [])
    assert found.line() == "validation: no row has a concept or a caption beside its picture"
    assert torch.is_grad_enabled()
