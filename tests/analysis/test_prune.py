"""Which experts are counted, which stay, and that a model without the others computes what it did."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from limoe_dist.analysis.prune import (
    Usage,
    captions_of,
    covering,
    interleaved,
    parameters,
    pruned_run,
    sharing,
    unlimited,
    usage_of_pictures,
    usage_of_texts,
    write_pruned,
)
from limoe_dist.analysis.pruned import pruned_for, refuse_other_modality
from limoe_dist.checkpoint.logical import model_shards
from limoe_dist.checkpoint.reader import Reader, load_weights
from limoe_dist.checkpoint.state import read_state
from limoe_dist.config.errors import UserError
from limoe_dist.config.parse import decisive
from limoe_dist.config.schema import Run
from limoe_dist.data.arrow import ShardSet
from limoe_dist.data.evaluation import evaluation_batches
from limoe_dist.data.tokenizer import open_tokenizer
from limoe_dist.model.tower import Limoe, build_model
from limoe_dist.parallel.mesh import Mesh
from tests.eval.models import CPU, RUN, small_model
from tests.support.checkpoints import a_state, save
from tests.support.shards import truncated, write_shards

ALONE = Mesh.single()


def usage(*count_E: int) -> Usage:
    return Usage("text", 1, {3: count_E})


@pytest.mark.parametrize(
    ("coverage", "experts"),
    [
        # 70 + 20 = 90, + 7 = 97, + 3 = 100; expert 4 serves nobody
        (0.5, (2,)),
        (0.7, (2,)),
        (0.71, (0, 2)),
        (0.9, (0, 2)),
        (0.97, (0, 2, 3)),
        (0.971, (0, 1, 2, 3)),
        (1.0, (0, 1, 2, 3)),
    ],
)
def test_the_fewest_experts_that_cover_the_share_stay(coverage: float, experts: tuple[int, ...]) -> None:
    (kept,) = covering(usage(20, 3, 70, 7, 0), coverage, at_least=1)
    assert (kept.block, kept.experts) == (3, experts)
    assert kept.coverage == sum((20, 3, 70, 7, 0)[expert] for expert in experts) / 100
    assert kept.needed_for == {0.9: 2, 0.99: 4, 0.999: 4, 1.0: 4}


def test_a_share_is_taken_as_it_was_written() -> None:
    # In binary 0.7 * 10 is 7.000000000000001, which 7 would not reach.
    (kept,) = covering(usage(7, 3), 0.7, at_least=1)
    assert kept.experts == (0,)


def test_of_equal_experts_the_first_stays_and_top_k_of_them_do() -> None:
    (kept,) = covering(usage(5, 5, 5, 0), 0.1, at_least=1)
    assert kept.experts == (0,)
    (kept,) = covering(usage(0, 9, 0, 0), 0.9, at_least=2)
    assert kept.experts == (0, 1)


def test_experts_with_the_least_share_or_more_stay() -> None:
    (kept,) = sharing(usage(20, 3, 70, 7, 0), 0.07, at_least=1)
    assert kept.experts == (0, 2, 3)
    (kept,) = sharing(usage(20, 3, 70, 7, 0), 1.0, at_least=1)
    assert kept.experts == (2,)
    (kept,) = sharing(usage(20, 3, 70, 7, 0), 0.0, at_least=1)
    assert kept.experts == (0, 1, 2, 3, 4)


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    """Ten rows, of which row 4 cannot be decoded, row 1 has no caption and row 2 has one."""
    return ShardSet(
        write_shards(tmp_path / "data", rows=10, pictures={4: truncated(4)}, captions={1: (), 2: ("a moon",)})
    )


def test_every_token_of_every_good_picture_is_counted_once(shards: ShardSet) -> None:
    run = unlimited(RUN)
    found = usage_of_pictures(small_model(run), run, shards, device=CPU)
    # (16 / 8) ** 2 = 4 tokens a picture; batches of 4 rows, the last of which is filled up with row 0.
    assert found.inputs == 9
    assert {block: sum(count_E) for block, count_E in found.count_E.items()} == {1: 36}
    assert found.count_E == by_hand(run, shards)


def by_hand(run: Run, shards: ShardSet) -> dict[int, tuple[int, ...]]:
    """One picture at a time, by the largest logit of the router."""
    model = small_model(run)
    seen: list[torch.Tensor] = []
    layer = model.blocks[1].moe
    layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for batch in evaluation_batches(run, shards, None, batch_pairs=1, rank=0, world=1, device=CPU):
        if batch.real.item():
            model(batch.images, None)
    expert_T = (torch.cat(seen) @ layer.router).argmax(-1)
    return {1: tuple(expert_T.bincount(minlength=4).tolist())}


def test_texts_are_counted_without_masked_padding(shards: ShardSet) -> None:
    run = unlimited(RUN)
    tokenizer = open_tokenizer(run, shards.manifest, shards.folder)
    texts = captions_of(shards, run.eval.templates)
    found = usage_of_texts(small_model(run), run, tokenizer, texts, device=CPU)
    assert found.inputs == len(texts)
    assert sum(found.count_E[1]) == int(tokenizer(texts).valid.sum())


def test_texts_of_rows_are_all_captions_or_the_prompts_of_a_concept(shards: ShardSet) -> None:
    texts = captions_of(shards, ("{}", "a {} here"))
    assert texts[:5] == ["a red square", "picture of a red square", "green circle", "a green circle here", "a moon"]
    assert len(texts) == 8 * 2 + 2 + 1


def pruned(run: Run, tmp_path: Path, shards: ShardSet, coverage: float) -> tuple[Limoe, Limoe, Path]:
    """The model before, the model after, and the checkpoint in between."""
    whole = small_model(run)
    with torch.no_grad():
        # No token wants expert 2: its column points away from what the layer norm's bias adds to every token.
        whole.blocks[1].norm2.bias.fill_(1.0)
        whole.blocks[1].moe.router[:, 2] = -1.0
    folder = save(tmp_path / "run", a_state(3, settings=decisive(run)), model_shards(whole, ALONE), ALONE)
    kept = covering(usage_of_pictures(whole, unlimited(run), shards, device=CPU), coverage, at_least=run.moe.top_k)
    smaller = pruned_run(run, kept)
    written = write_pruned(Reader(folder, ALONE, CPU), smaller, kept, tmp_path / "out")
    after = build_model(smaller, mesh=ALONE, device=CPU)
    load_weights(Reader(written, ALONE, CPU), after, ALONE)
    return whole, after, written


@pytest.mark.parametrize("top_k", [1, 2])
def test_pictures_are_embedded_as_before_where_no_token_lost_its_expert(
    tmp_path: Path, shards: ShardSet, top_k: int
) -> None:
    run = RUN.model_copy(update={"moe": RUN.moe.model_copy(update={"top_k": top_k})})
    whole, after, written = pruned(run, tmp_path, shards, 1.0)
    kept = after.run.moe.kept_experts
    assert "2" not in kept[0].split()
    assert parameters(after).total < parameters(whole).total
    assert parameters(after).experts == parameters(whole).experts * len(kept[0].split()) // 4
    for batch in evaluation_batches(run, shards, None, batch_pairs=5, rank=0, world=1, device=CPU):
        before_BP, after_BP = (model(batch.images, None).image_BP for model in (whole, after))
        # Experts in one batched product: another number of them may change the last bits.
        torch.testing.assert_close(after_BP[batch.real], before_BP[batch.real], rtol=0, atol=1e-6)
    state = read_state(written)
    assert state.settings["moe.kept_experts"] == list(kept)
    assert (state.layout.engine, state.step) == ("prune", 3)


def test_a_token_whose_expert_is_gone_takes_the_best_that_is_left(tmp_path: Path, shards: ShardSet) -> None:
    whole, after, _ = pruned(RUN, tmp_path, shards, 0.01)
    (kept,) = after.run.moe.kept_experts
    assert len(kept.split()) == 1
    record = after(torch.zeros(2, 3, 16, 16), None).records[1]
    assert record.routed_E2[int(kept), 0] == record.tokens_2[0] == 8
    assert torch.equal(after.blocks[1].moe.experts.up_weight[0], whole.blocks[1].moe.experts.up_weight[int(kept)])
    assert torch.equal(after.blocks[1].moe.router, whole.blocks[1].moe.router)


def test_two_functions_take_turns() -> None:
    called: list[str] = []
    times = iter([0.0, 1.0, 1.0, 3.0, 3.0, 4.0, 4.0, 8.0])
    seconds = interleaved(lambda: called.append("a"), lambda: called.append("b"), times=2, clock=lambda: next(times))
    assert called == ["a", "b", "a", "b"]
    assert seconds == ([1.0, 1.0], [2.0, 4.0])


def test_a_task_for_the_other_modality_is_refused(tmp_path: Path) -> None:
    run = RUN.model_copy(update={"moe": RUN.moe.model_copy(update={"kept_experts": ("0 1",)})})
    refuse_other_modality(tmp_path, RUN, "zero-shot")
    with pytest.raises(UserError, match="does not say for which modality"):
        pruned_for(tmp_path, run)
    (tmp_path / "pruned.json").write_text(json.dumps({"modality": "image"}))
    assert pruned_for(tmp_path, run) == "image"
    refuse_other_modality(tmp_path, run, "few-shot", ["image"])
    with pytest.raises(UserError, match=r"keeps the experts of images alone, and zero-shot needs texts too"):
        refuse_other_modality(tmp_path, run, "zero-shot")
