from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from limoe_dist.config.errors import UserError
from limoe_dist.config.schema import Run
from limoe_dist.data.arrow import ShardSet
from limoe_dist.data.evaluation import decode_rows
from limoe_dist.data.tokenizer import open_tokenizer
from limoe_dist.eval.contrastive import contrastive
from limoe_dist.eval.embed import embed_pictures, embed_texts, pass_size
from limoe_dist.eval.retrieval import retrieval
from limoe_dist.eval.zeroshot import zeroshot
from limoe_dist.parallel.mesh import Axis, Mesh
from tests.eval.models import CPU, RUN, laid_out, small_model
from tests.support.ranks import RanksPool
from tests.support.shards import CONCEPTS, truncated, write_shards

TEXTS = (*CONCEPTS, "a red square", "picture of a black cat", "red square", "sun", "")


def with_moe(**settings: object) -> Run:
    return RUN.model_copy(update={"moe": RUN.moe.model_copy(update=settings)})


def small_set(folder: Path, rows: int = 11) -> ShardSet:
    return ShardSet(write_shards(folder, rows=rows))


def texts_of(run: Run, shards: ShardSet, texts: tuple[str, ...], *, mesh: Mesh) -> Tensor:
    tokenizer = open_tokenizer(run, shards.manifest, shards.folder)
    return embed_texts(small_model(run, mesh=mesh), run, tokenizer, texts, mesh=mesh, device=CPU)


def pictures_one_by_one(run: Run, shards: ShardSet) -> Tensor:
    model, images = small_model(run), decode_rows(run, shards, range(len(shards)), device=CPU).images
    with torch.no_grad():
        return torch.cat([model(image[None], None).image_BP for image in images])


def one_of(world: int, rank: int) -> Mesh:
    """The mesh of a rank whose gathers bring nothing: what comes back is the rank's own part."""
    return replace(Mesh.single(), world=Axis("world", world, rank, None))


def test_a_picture_s_embedding_does_not_depend_on_its_batch(tmp_path: Path) -> None:
    shards = small_set(tmp_path)
    together = embed_pictures(small_model(), RUN, shards, mesh=Mesh.single(), device=CPU).image_RP
    # 1e-5: sums in another order, in float32.
    assert torch.allclose(together, pictures_one_by_one(RUN, shards), atol=1e-5, rtol=0)
    assert torch.allclose(together.norm(dim=1), torch.ones(11), atol=1e-5)
    assert torch.pdist(together).min() > 1e-3


def test_with_the_training_capacity_it_would_depend_on_it(tmp_path: Path) -> None:
    run, shards = with_moe(eval_capacity="paper"), small_set(tmp_path)
    together = embed_pictures(small_model(run), run, shards, mesh=Mesh.single(), device=CPU).image_RP
    assert (together - pictures_one_by_one(run, shards)).abs().max() > 1e-3


@pytest.mark.parametrize("batch_pairs", [3, 4, 64])
def test_the_training_capacity_is_obeyed_for_pictures_and_for_texts_alone(tmp_path: Path, batch_pairs: int) -> None:
    # Passes of 3 (no multiple of group_pairs = 4: one group), of 4 (a group), and of all 11 rows at once.
    evaluation = RUN.eval.model_copy(update={"batch_pairs": batch_pairs})
    run = with_moe(eval_capacity="paper").model_copy(update={"eval": evaluation})
    shards = small_set(tmp_path)
    pictures = embed_pictures(small_model(run), run, shards, mesh=Mesh.single(), device=CPU)
    assert pictures.good_R.all()
    assert torch.allclose(pictures.image_RP.norm(dim=1), torch.ones(11), atol=1e-5)
    texts = texts_of(run, shards, TEXTS, mesh=Mesh.single())
    assert torch.allclose(texts.norm(dim=1), torch.ones(len(TEXTS)), atol=1e-5)
    tokenizer = open_tokenizer(run, shards.manifest, shards.folder)
    found = zeroshot(small_model(run), run, shards, tokenizer, mesh=Mesh.single(), device=CPU)
    assert (found.rows, found.capacity) == (11, "paper")


def test_texts_of_rows_without_pictures_can_be_embedded(tmp_path: Path) -> None:
    with_pictures = small_set(tmp_path / "a", rows=3)
    texts_alone = ShardSet(write_shards(tmp_path / "b", rows=3, pictures=dict.fromkeys(range(3), b"")))
    captions = tuple(texts_alone.row(number).captions[0] for number in range(3))
    found = texts_of(RUN, texts_alone, captions, mesh=Mesh.single())
    assert torch.equal(found, texts_of(RUN, with_pictures, captions, mesh=Mesh.single()))


def test_a_text_s_embedding_does_not_depend_on_its_batch(tmp_path: Path) -> None:
    shards = small_set(tmp_path, rows=2)
    together = texts_of(RUN, shards, TEXTS, mesh=Mesh.single())
    alone = torch.cat([texts_of(RUN, shards, (text,), mesh=Mesh.single()) for text in TEXTS])
    assert together.shape == (len(TEXTS), 8)
    assert torch.allclose(together, alone, atol=1e-5, rtol=0)


def test_masked_padding_stays_masked(tmp_path: Path) -> None:
    shards = small_set(tmp_path, rows=2)
    encoded = open_tokenizer(RUN, shards.manifest, shards.folder)(["sun"])
    tokens, valid = torch.from_numpy(encoded.tokens), torch.from_numpy(encoded.valid)
    assert not valid.all()
    with torch.no_grad():
        masked, seen = (small_model()(None, tokens, mask).text_BP for mask in (valid, torch.ones_like(valid)))
    found = texts_of(RUN, shards, ("sun",), mesh=Mesh.single())
    assert torch.allclose(found, masked, atol=1e-6)
    assert not torch.allclose(found, seen, atol=1e-3)


def test_texts_with_equal_tokens_have_equal_embeddings_to_the_last_bit(tmp_path: Path) -> None:
    shards = small_set(tmp_path, rows=2)
    found = texts_of(RUN, shards, ("red square", "old tree", " Red  SQUARE", "sun"), mesh=Mesh.single())
    assert torch.equal(found[0], found[2])
    assert not torch.allclose(found[0], found[1], atol=1e-3)


@pytest.mark.parametrize(("world", "rows"), [(1, 13), (2, 8), (2, 13), (3, 3), (3, 13)])
def test_every_row_is_embedded_by_exactly_one_rank(tmp_path: Path, world: int, rows: int) -> None:
    shards = small_set(tmp_path, rows)
    whole = embed_pictures(small_model(), RUN, shards, mesh=Mesh.single(), device=CPU)
    parts = [embed_pictures(small_model(), RUN, shards, mesh=one_of(world, rank), device=CPU) for rank in range(world)]
    assert sum(part.good_R.int() for part in parts).tolist() == [1] * rows  # type: ignore[union-attr]
    assert torch.allclose(sum(part.image_RP for part in parts), whole.image_RP, atol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize(("world", "count"), [(1, 13), (2, 8), (2, 13), (3, 3), (3, 13)])
def test_every_text_is_embedded_by_exactly_one_rank(tmp_path: Path, world: int, count: int) -> None:
    shards = small_set(tmp_path, rows=2)
    whole = texts_of(RUN, shards, TEXTS[:count], mesh=Mesh.single())
    parts = [texts_of(RUN, shards, TEXTS[:count], mesh=one_of(world, rank)) for rank in range(world)]
    assert sum((part.norm(dim=1) > 0).int() for part in parts).tolist() == [1] * count  # type: ignore[union-attr]
    assert torch.allclose(sum(parts), whole, atol=1e-5)  # type: ignore[arg-type]


def test_passes_are_no_larger_than_the_work() -> None:
    # eval.batch_pairs = 4: 2 rows on 3 ranks are 1 each, 9 rows are 3 each, 13 rows want full passes.
    assert [pass_size(RUN, rows, world=3) for rows in (2, 9, 12, 13)] == [1, 3, 4, 4]


def test_a_bad_row_is_not_good_and_spoils_no_other(tmp_path: Path) -> None:
    shards = ShardSet(write_shards(tmp_path / "bad", rows=6, pictures={0: truncated(0), 4: b""}))
    found = embed_pictures(small_model(), RUN, shards, mesh=Mesh.single(), device=CPU)
    whole = embed_pictures(small_model(), RUN, small_set(tmp_path / "good", 6), mesh=Mesh.single(), device=CPU)
    assert found.good_R.tolist() == [False, True, True, True, False, True]
    good = found.good_R
    assert torch.allclose(found.image_RP[good], whole.image_RP[good], atol=1e-5)


def test_progress_ends_with_all_batches_done(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    embed_pictures(
        small_model(),
        RUN,
        small_set(tmp_path),
        mesh=Mesh.single(),
        device=CPU,
        progress=lambda *what: told.append(what),
    )
    assert told == [("pictures", 1, 3), ("pictures", 2, 3), ("pictures", 3, 3)]


def test_no_graph_is_kept_and_the_model_stays_in_training(tmp_path: Path) -> None:
    model = small_model()
    found = embed_pictures(model, RUN, small_set(tmp_path, 2), mesh=Mesh.single(), device=CPU)
    assert not found.image_RP.requires_grad
    assert model.training


def test_texts_of_diverged_weights_are_refused(tmp_path: Path) -> None:
    shards, model = small_set(tmp_path, 2), small_model()
    model.text_projection.data.fill_(float("inf"))
    tokenizer = open_tokenizer(RUN, shards.manifest, shards.folder)
    with pytest.raises(UserError, match="3 of the 3 embeddings of the texts are not finite"):
        embed_texts(model, RUN, tokenizer, ("red", "green", "blue"), mesh=Mesh.single(), device=CPU)


def evaluated(folder: Path, tp: int, ep: int) -> dict[str, object]:
    """What one rank finds: all embeddings, and the tasks' results."""
    run, shards = laid_out(tp=tp, ep=ep), ShardSet(folder)
    all_captions, minibatches = (
        run.model_copy(update={"eval": run.eval.model_copy(update=settings)})
        for settings in ({"captions": "all"}, {"minibatch": 5})
    )
    mesh = Mesh.build(tp=tp, ep=ep) if torch.distributed.is_initialized() else Mesh.single()
    model = small_model(run, mesh=mesh)
    tokenizer = open_tokenizer(run, shards.manifest, shards.folder)
    return {
        "pictures": embed_pictures(model, run, shards, mesh=mesh, device=CPU).image_RP,
        "texts": embed_texts(model, run, tokenizer, TEXTS, mesh=mesh, device=CPU),
        "zeroshot": zeroshot(model, run, shards, tokenizer, mesh=mesh, device=CPU).to_json(),
        "retrieval": retrieval(model, run, shards, tokenizer, mesh=mesh, device=CPU).to_json(),
        "all captions": retrieval(model, all_captions, shards, tokenizer, mesh=mesh, device=CPU).to_json(),
        "contrastive": contrastive(model, minibatches, shards, tokenizer, mesh=mesh, device=CPU).to_json(),
    }


@pytest.mark.parametrize(("tp", "ep"), [(1, 2), (2, 1), (2, 2)])
def test_two_ranks_find_what_one_process_finds(tmp_path: Path, ranks2: RanksPool, tp: int, ep: int) -> None:
    # 13 rows in passes of 4: the ranks' last passes hold rows that are not real.
    write_shards(tmp_path, rows=13, captions={3: ["a red square"], 7: [""]})
    expected = evaluated(tmp_path, 1, 1)
    for found in ranks2.run(evaluated, tmp_path, tp, ep):
        for name in ("pictures", "texts"):
            # 1e-5: sums in another order, in float32.
            assert torch.allclose(found[name], expected[name], atol=1e-5, rtol=0)  # type: ignore[arg-type]
        for task in ("zeroshot", "retrieval", "all captions", "contrastive"):
            assert found[task] == expected[task]
