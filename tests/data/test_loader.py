from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import numpy as np
import pytest
import torch

from limoe_dist.config.errors import UserError
from limoe_dist.config.schema import Data, Image, Run, Text, Train
from limoe_dist.data.arrow import ShardSet
from limoe_dist.data.augment import augment_params, caption_index
from limoe_dist.data.loader import Batch, Loader
from limoe_dist.data.mixture import entries_of
from limoe_dist.data.order import row_at, rows_checksum
from limoe_dist.data.tokenizer import Tokenizer, open_tokenizer
from tests.soak import loader_memory
from tests.support.shards import damaged, picture, truncated, write_shards
from tests.support.store import Store

CPU = torch.device("cpu")
AUGMENTED = Image(
    size=16, patch=8, min_crop_area=0.5, flip=0.5, rotate_degrees=10.0, scale=0.2, brightness=0.2, saturation=0.3
)


def a_run(*, batch_pairs: int = 12, steps: int = 4, seed: int = 5, **data: object) -> Run:
    return Run(
        image=AUGMENTED,
        text=Text(length=8, vocab_size=100),
        data=Data.model_validate(data),
        train=Train(batch_pairs=batch_pairs, steps=steps, seed=seed),
    )


def tokenizer_of(run: Run, shards: ShardSet) -> Tokenizer:
    return open_tokenizer(run, shards.manifest, shards.folder)


def a_loader(run: Run, path: Path, *, rank: int = 0, world: int = 1, first_step: int = 0, **more: Any) -> Loader:
    """more: first_pair, replaced."""
    shards = ShardSet(path)
    tokenizer = tokenizer_of(run, shards)
    return Loader(run, shards, tokenizer, rank=rank, world=world, first_step=first_step, device=CPU, **more)


def batches(run: Run, path: Path, *, rank: int = 0, world: int = 1, first_step: int = 0, **more: Any) -> list[Batch]:
    with a_loader(run, path, rank=rank, world=world, first_step=first_step, **more) as loader:
        return list(loader)


def pairs(run: Run, path: Path, *, world: int = 1) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Images, tokens and rows of all positions of the run in order, put together from all ranks."""
    ranks = [batches(run, path, rank=rank, world=world) for rank in range(world)]
    parts = [ranks[rank][step] for step in range(run.train.steps) for rank in range(world)]
    assert [part.first_position for part in parts] == list(
        range(0, run.train.steps * run.train.batch_pairs, run.train.batch_pairs // world)
    )
    return (
        torch.cat([part.images for part in parts]),
        torch.cat([part.tokens for part in parts]),
        [int(row) for part in parts for row in part.rows],
    )


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("clean"), rows=40, shards=3)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert [thread.name for thread in set(threading.enumerate()) - before if thread.name == "limoe-loader"] == []


def test_a_position_is_the_same_pair_whatever_ranks_batch_size_and_threads(clean: Path) -> None:
    images, tokens, rows = pairs(a_run(batch_pairs=12, steps=4), clean)
    assert len(set(rows[:40])) == 40
    for world, batch_pairs, steps, threads in (
        (2, 12, 4, 1),
        (3, 12, 4, 2),
        (1, 24, 2, 2),
        (4, 16, 3, 1),
        (1, 1, 48, 1),
    ):
        others = pairs(a_run(batch_pairs=batch_pairs, steps=steps, threads=threads), clean, world=world)
        assert torch.equal(others[0], images), (world, batch_pairs)
        assert torch.equal(others[1], tokens), (world, batch_pairs)
        assert others[2] == rows, (world, batch_pairs)


def test_another_seed_gives_other_pairs(clean: Path) -> None:
    first, other = pairs(a_run(seed=5), clean), pairs(a_run(seed=6), clean)
    assert first[2] != other[2]
    assert not torch.equal(first[0], other[0])


def test_every_bit_of_the_seed_decides_the_order(clean: Path) -> None:
    seed = 5 + (1 << 40) + (1 << 62)
    batch = batches(a_run(batch_pairs=40, steps=1, seed=seed), clean)[0]
    assert batch.rows.tolist() == row_at(np.arange(40), rows=batch_rows(clean), seed=seed)[1].tolist()


def batch_rows(path: Path) -> int:
    return len(ShardSet(path))


def test_the_same_row_is_augmented_anew_in_each_epoch(clean: Path) -> None:
    images, _, rows = pairs(a_run(batch_pairs=20, steps=4), clean)
    again = rows.index(rows[0], 1)
    assert again >= 40
    assert not torch.equal(images[0], images[again])


def test_no_batch_is_lost_while_a_step_takes_its_time(clean: Path) -> None:
    with a_loader(a_run(prefetch=1), clean) as loader:
        steps = []
        for batch in loader:
            steps.append(batch.step)
            # Longer than the thread waits for room in the queue.
            time.sleep(0.15)
    assert steps == [0, 1, 2, 3]


def test_a_run_that_resumes_reads_what_it_would_have_read(clean: Path) -> None:
    whole = batches(a_run(), clean)
    resumed = batches(a_run(), clean, first_step=2)
    assert [batch.step for batch in resumed] == [2, 3]
    assert [batch.first_position for batch in resumed] == [24, 36]
    for a, b in zip(whole[2:], resumed, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.tokens, b.tokens)


def test_a_run_that_resumes_with_another_batch_reads_on_where_it_was(clean: Path) -> None:
    # 2 steps of 12 pairs, then steps of 8 from pair 24 on.
    whole = batches(a_run(batch_pairs=48, steps=1), clean)[0]
    resumed = batches(a_run(batch_pairs=8, steps=5), clean, first_step=2, first_pair=24)
    assert [(batch.step, batch.first_position) for batch in resumed] == [(2, 24), (3, 32), (4, 40)]
    assert torch.equal(torch.cat([batch.images for batch in resumed]), whole.images[24:])
    assert torch.equal(torch.cat([batch.tokens for batch in resumed]), whole.tokens[24:])
    # Checksums of parts add up to that of the whole.
    first = batches(a_run(batch_pairs=24, steps=1), clean)[0]
    assert sum(batch.checksum for batch in [first, *resumed]) % 2**64 == whole.checksum


def test_a_batch_holds_the_rows_and_captions_of_its_positions(clean: Path) -> None:
    run, shards = a_run(), ShardSet(clean)
    batch = batches(run, clean, rank=1, world=2)[1]
    # Step 1 of 12 pairs, rank 1 of 2: positions 18 to 23.
    positions = np.arange(18, 24)
    assert (batch.step, batch.first_position) == (1, 18)
    assert batch.rows.tolist() == row_at(positions, rows=40, seed=5)[1].tolist()
    draws = augment_params(positions, run.image, seed=5).caption
    texts = [shards.row(int(n)).captions[caption_index(draw, 2)] for n, draw in zip(batch.rows, draws, strict=True)]
    assert {text.startswith("picture") for text in texts} == {True, False}
    expected = tokenizer_of(run, shards)(texts)
    assert (batch.tokens.numpy() == expected.tokens).all()
    assert (batch.valid.numpy() == expected.valid).all()
    assert (batch.images.shape, batch.images.dtype) == ((6, 3, 16, 16), torch.float32)
    assert (batch.tokens.dtype, batch.valid.dtype) == (torch.int64, torch.bool)


def with_bad(folder: Path, bad: Mapping[int, bytes], *, rows: int = 40, shards: int = 1) -> Path:
    return write_shards(folder, rows=rows, shards=shards, pictures=bad)


def test_a_bad_row_is_replaced_by_the_next_counted_and_named(clean: Path, tmp_path: Path) -> None:
    run = a_run(batch_pairs=40, steps=2)
    # Two shards of 20: row 4 -> 5; 10 -> 12, over the bad 11; 19 wraps to 0.
    bad = {4: damaged(4), 10: b"", 11: truncated(11, format="JPEG"), 19: b"hello"}
    first, second = batches(run, with_bad(tmp_path, bad, shards=2))
    order = row_at(np.arange(40), rows=40, seed=5)[1].tolist()
    stand_in = {4: 5, 10: 12, 11: 12, 19: 0}
    assert first.rows.tolist() == [stand_in.get(row, row) for row in order]
    # Row 10 meets 10 and then 11: five bad rows in all.
    met = {4: ["row-4"], 10: ["row-10", "row-11"], 11: ["row-11"], 19: ["row-19"]}
    expected = [(position, key) for position, row in enumerate(order) for key in met.get(row, [])]
    assert [(found.position, found.key) for found in first.replaced] == expected
    reasons = {found.key: found.reason for found in first.replaced}
    assert reasons["row-10"] == "no picture"
    assert reasons["row-19"] == "neither PNG nor JPEG nor WebP"
    assert reasons["row-4"] == "cannot be decoded (damaged pixels)"
    # The checksum is that of the rows that were used.
    assert first.checksum == rows_checksum(np.arange(40), np.array([stand_in.get(row, row) for row in order]))
    assert (first.bad, first.seen) == (5, 45)
    assert (second.bad, second.seen) == (10, 90)


def test_replaced_rows_are_written_down_with_their_stand_ins(tmp_path: Path) -> None:
    bad = {4: damaged(4), 10: b"", 11: truncated(11, format="JPEG")}
    path, file = with_bad(tmp_path, bad, shards=2), tmp_path / "replaced" / "rank-00000.jsonl"
    batches(a_run(batch_pairs=40, steps=1), path, replaced=file)
    order = row_at(np.arange(40), rows=40, seed=5)[1].tolist()
    lines = {line["row"]: line for line in map(json.loads, file.read_text().splitlines())}
    assert {row: (line["stand_in"], line["bad_stand_ins"]) for row, line in lines.items()} == {
        4: (5, []),
        10: (12, [11]),
        11: (12, []),
    }
    assert all(order[line["position"]] == row and line["key"] == f"row-{row}" for row, line in lines.items())
    assert lines[10]["reason"] == "no picture"


def test_a_line_about_a_replaced_row_is_not_spoiled_by_the_half_one_before_it(tmp_path: Path) -> None:
    path, file = with_bad(tmp_path, {4: b""}), tmp_path / "replaced" / "rank-00000.jsonl"
    file.parent.mkdir()
    file.write_text('{"position": 3, "ro')
    batches(a_run(batch_pairs=40, steps=2), path, replaced=file)
    cut, *whole = file.read_text().splitlines()
    assert cut == '{"position": 3, "ro'
    assert [json.loads(line)["row"] for line in whole] == [4, 4]


def test_a_set_behind_a_url_is_read_as_the_local_one_and_named_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_shards(tmp_path / "local", rows=48, shards=8)
    for file in path.parent.iterdir():
        fsspec.filesystem("memory").pipe(f"/loaded/{file.name}", file.read_bytes())
    run = a_run(batch_pairs=4, steps=24, window_rows=12, cache=str(tmp_path / "cache"))
    wanted: list[list[int]] = []
    monkeypatch.setattr(ShardSet, "want", lambda shards, numbers: wanted.append(list(numbers)))
    with (
        closing(ShardSet("memory://loaded", data=run.data)) as shards,
        Loader(run, shards, tokenizer_of(run, shards), rank=0, world=1, first_step=0, device=CPU) as loader,
    ):
        read = list(loader)
        # A window of 12 rows that begins within a shard of 6.
        assert shards.most_open == 3
    for ours, theirs in zip(read, batches(run, path), strict=True):
        assert ours.rows.tolist() == theirs.rows.tolist()
        assert torch.equal(ours.images, theirs.images)
        assert ours.checksum == theirs.checksum
    # Two epochs of four windows: at the beginning of each the shards of that window and of the next are named.
    assert len(wanted) == 8
    for window, numbers in enumerate(wanted):
        rows = np.concatenate([batch.rows for batch in read[3 * window : 3 * window + 6]])
        assert {int(row) // 6 for row in rows} <= set(numbers)


def test_closing_does_not_wait_for_a_shard_that_does_not_come(tmp_path: Path) -> None:
    path, store = write_shards(tmp_path / "local", rows=12, shards=3), Store()
    for file in path.parent.iterdir():
        store.put(f"held/{file.name}", file.read_bytes())
    run = a_run(batch_pairs=4, steps=3, cache=str(tmp_path / "cache"))
    with closing(store), closing(ShardSet(store.url("held"), data=run.data)) as shards:
        tokenizer = tokenizer_of(run, shards)
        store.gate.clear()
        loader = Loader(run, shards, tokenizer, rank=0, world=1, first_step=0, device=CPU)
        for _ in range(500):
            if sum(path.endswith(".arrow") for path, _ in store.asked):
                break
            threading.Event().wait(0.01)
        began = time.monotonic()
        loader.close()
        assert time.monotonic() - began < 3
        assert not list((tmp_path / "cache").glob("*.arrow"))


def test_a_set_behind_a_url_can_be_read_again_after_a_loader_was_closed_amid_a_fetch(tmp_path: Path) -> None:
    path, store = write_shards(tmp_path / "local", rows=24, shards=6), Store()
    for file in path.parent.iterdir():
        store.put(f"again/{file.name}", file.read_bytes())
    run = a_run(batch_pairs=4, steps=6, window_rows=4, prefetch=1, cache=str(tmp_path / "cache"))
    local = batches(run, path)
    with closing(store), closing(ShardSet(store.url("again"), data=run.data)) as shards:
        tokenizer = tokenizer_of(run, shards)
        first = Loader(run, shards, tokenizer, rank=0, world=1, first_step=0, device=CPU)
        next(first)
        first.close()
        # The rest comes only now, and is asked for by the second alone.
        for file in (tmp_path / "cache").glob("*.arrow"):
            file.unlink()
        with Loader(run, shards, tokenizer, rank=0, world=1, first_step=1, device=CPU) as second:
            again = [next(second)]
            first.close()
            again += second
    assert [batch.step for batch in again] == [1, 2, 3, 4, 5]
    for ours, theirs in zip(again, local[1:], strict=True):
        assert torch.equal(ours.images, theirs.images)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("limoe-shards")]


def test_good_pictures_beside_a_bad_one_are_as_they_would_be(clean: Path, tmp_path: Path) -> None:
    run = a_run(batch_pairs=40, steps=1)
    whole = batches(run, write_shards(tmp_path / "whole", rows=40, shards=1))[0]
    holed = batches(run, with_bad(tmp_path / "holed", {7: damaged(7)}))[0]
    good = [i for i, row in enumerate(whole.rows) if row != 7]
    assert len(good) == 39
    assert torch.equal(holed.images[good], whole.images[good])
    assert torch.equal(holed.tokens[good], whole.tokens[good])
    place = int(np.flatnonzero(whole.rows == 7)[0])
    assert holed.rows[place] == 8
    assert holed.images[place].abs().sum() > 0


def test_a_stand_in_depends_on_the_row_alone(tmp_path: Path) -> None:
    path = with_bad(tmp_path, {7: damaged(7), 8: damaged(8)})
    images, tokens, rows = pairs(a_run(batch_pairs=20, steps=2), path)
    others = pairs(a_run(batch_pairs=20, steps=2), path, world=4)
    assert torch.equal(others[0], images)
    assert torch.equal(others[1], tokens)
    assert others[2] == rows
    assert 7 not in rows
    assert rows.count(9) == 3


def test_a_row_without_a_caption_is_bad(tmp_path: Path) -> None:
    path = write_shards(tmp_path, rows=12, shards=1, captions={3: ["", " "]})
    (batch,) = batches(a_run(steps=1), path)
    assert [(found.key, found.reason) for found in batch.replaced] == [("row-3", "no caption, or only blank ones")]
    assert 3 not in batch.rows


def test_sixteen_bad_stand_ins_end_the_run_with_the_first_and_the_last(tmp_path: Path) -> None:
    sixteen = write_shards(tmp_path / "a", rows=24, shards=1, pictures=dict.fromkeys(range(3, 19), b""))
    # Row 3 is the first of 16 bad ones: its 16th stand-in, row 19, is good.
    assert 19 in batches(a_run(batch_pairs=24, steps=1, max_bad_frac=1.0), sixteen)[0].rows
    seventeen = write_shards(tmp_path / "b", rows=24, shards=1, pictures=dict.fromkeys(range(3, 20), b""))
    with pytest.raises(UserError, match=r'row 3 \(key "row-3": no picture\) is bad, and so are the 16 rows after it'):
        batches(a_run(batch_pairs=24, steps=1, max_bad_frac=1.0), seventeen)


def test_a_shard_of_bad_rows_only_ends_the_run(tmp_path: Path) -> None:
    path = write_shards(tmp_path, rows=3, shards=1, pictures={i: damaged(i) for i in range(3)})
    with pytest.raises(UserError, match=r"and so are the 2 rows after it that could stand in \(the last: cannot be"):
        batches(a_run(batch_pairs=3, steps=1), path)


def test_too_many_bad_rows_stop_the_run_and_name_the_first(tmp_path: Path) -> None:
    bad = dict.fromkeys(range(0, 32, 2), b"")
    path = with_bad(tmp_path, bad, rows=64)
    # One epoch meets 16 bad rows among 64 + 16: 20 %.
    assert batches(a_run(batch_pairs=64, steps=1, max_bad_frac=0.2), path)[0].bad == 16
    with pytest.raises(
        UserError, match=r"16 of the 80 rows read so far are bad, more than data\.max_bad_frac=0\.19"
    ) as e:
        batches(a_run(batch_pairs=64, steps=1, max_bad_frac=0.19), path)
    report = tmp_path / "rank-00000.jsonl"
    with pytest.raises(UserError, match=rf"all of them: {report}"):
        batches(a_run(batch_pairs=64, steps=1, max_bad_frac=0.19), path, replaced=report)
    assert len(report.read_text().splitlines()) == 16
    assert str(e.value).count("no picture") == 5


def test_fewer_than_sixteen_bad_rows_never_stop_a_run(tmp_path: Path) -> None:
    path = with_bad(tmp_path, dict.fromkeys(range(0, 30, 2), b""), rows=40)
    assert batches(a_run(batch_pairs=40, steps=1, max_bad_frac=0.0), path)[0].bad == 15


def test_closing_early_ends_the_thread_and_the_iteration(clean: Path) -> None:
    loader = a_loader(a_run(steps=1000, prefetch=2), clean)
    assert next(loader).step == 0
    # A program that forgets to close it can still end.
    assert loader._thread.daemon
    with mock.patch.object(loader, "_prepare", wraps=loader._prepare) as prepare:
        loader.close()
    # The one that a thread in the midst of its loop may still begin.
    assert prepare.call_count <= 1
    assert not loader._thread.is_alive()
    with pytest.raises(StopIteration):
        next(loader)
    loader.close()


def test_the_thread_works_ahead_and_no_further_than_it_is_told(clean: Path) -> None:
    with a_loader(a_run(steps=1000, prefetch=3), clean) as loader:
        for _ in range(500):
            if loader._ready.full():
                break
            threading.Event().wait(0.01)
        assert loader._ready.qsize() == 3
        # Three are ready, and one more waits in the thread's hands.
        assert [next(loader).step for _ in range(6)] == [0, 1, 2, 3, 4, 5]


def test_what_the_thread_raises_is_raised_where_the_batch_is_awaited(
    clean: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, run = ShardSet(clean), a_run(steps=1000)
    loader = Loader(run, shards, tokenizer_of(run, shards), rank=0, world=1, first_step=0, device=CPU)
    with loader:
        next(loader)

        def gone(number: int) -> None:
            raise OSError("the disk is gone")

        monkeypatch.setattr(shards, "row", gone)
        with pytest.raises(OSError, match="the disk is gone"):
            list(loader)
        with pytest.raises(StopIteration):
            next(loader)


def test_ranks_that_do_not_divide_the_batch_are_refused(clean: Path) -> None:
    with pytest.raises(ValueError, match="batch_pairs=12 must be a multiple of the number of ranks, 5"):
        a_loader(a_run(), clean, world=5)


def mixture_of(folder: Path, *weights: int, rows: tuple[int, ...] = (40, 10), **bad: Mapping[int, bytes]) -> list[str]:
    """Entries of shard sets a, b, ... with other pictures each; bad: by the name of the set."""
    entries = []
    for n, (weight, count) in enumerate(zip(weights, rows, strict=True)):
        name = "abc"[n]
        pictures = {i: picture(1000 * n + i) for i in range(count)} | dict(bad.get(name, {}))
        entries.append(f"{write_shards(folder / name, rows=count, shards=2, pictures=pictures)}={weight}")
    return entries


def mixed_batches(run: Run, *, rank: int = 0, world: int = 1, first_step: int = 0) -> list[Batch]:
    shards = ShardSet(*(entry.path for entry in entries_of(run.data)))
    tokenizer = tokenizer_of(run, shards)
    with Loader(run, shards, tokenizer, rank=rank, world=world, first_step=first_step, device=CPU) as loader:
        return list(loader)


def test_a_batch_of_a_mixture_holds_exact_shares_of_both_sources(tmp_path: Path) -> None:
    run = a_run(batch_pairs=12, steps=5, mixture=mixture_of(tmp_path, 3, 1))
    read = [batch.rows for batch in mixed_batches(run)]
    for rows in read:
        # Rows 0 to 39 are the first source's, 40 to 49 the second's.
        assert ((rows < 40).sum(), (rows >= 40).sum()) == (9, 3)
    rows = np.concatenate(read)
    # 45 samples of 40 rows, 15 of 10: each source has read each of its rows once before it read one twice.
    assert sorted(rows[rows < 40][:40]) == list(range(40))
    assert sorted(rows[rows >= 40][:10]) == list(range(40, 50))


def test_the_pictures_of_a_mixture_are_those_of_its_sources(tmp_path: Path) -> None:
    entries = mixture_of(tmp_path, 3, 1)
    plain = {"image": Image(size=16, patch=8)}
    (mixed,) = mixed_batches(a_run(batch_pairs=24, steps=1, mixture=entries).model_copy(update=plain))
    for name, first, count in (("a", 0, 40), ("b", 40, 10)):
        run = a_run(batch_pairs=count, steps=1).model_copy(update=plain)
        (alone,) = batches(run, tmp_path / name / "manifest.json")
        by_row = {first + int(row): image for row, image in zip(alone.rows, alone.images, strict=True)}
        here = [i for i, row in enumerate(mixed.rows) if first <= row < first + count]
        assert here
        for i in here:
            assert torch.equal(mixed.images[i], by_row[int(mixed.rows[i])])


def test_a_mixture_is_the_same_whatever_ranks_batch_size_and_start(tmp_path: Path) -> None:
    entries = mixture_of(tmp_path, 5, 2)
    whole = mixed_batches(a_run(batch_pairs=12, steps=4, mixture=entries))
    rows = np.concatenate([batch.rows for batch in whole])
    images = torch.cat([batch.images for batch in whole])
    for world, batch_pairs, steps in ((3, 12, 4), (2, 24, 2), (4, 16, 3)):
        run = a_run(batch_pairs=batch_pairs, steps=steps, mixture=entries)
        ranks = [mixed_batches(run, rank=rank, world=world) for rank in range(world)]
        parts = [ranks[rank][step] for step in range(steps) for rank in range(world)]
        assert np.concatenate([part.rows for part in parts]).tolist() == rows.tolist()
        assert torch.equal(torch.cat([part.images for part in parts]), images)
    resumed = mixed_batches(a_run(batch_pairs=12, steps=4, mixture=entries), first_step=2)
    assert np.concatenate([batch.rows for batch in resumed]).tolist() == rows[24:].tolist()


def test_a_stand_in_is_of_the_same_source_and_equal_numbers_are_not_mixed_up(tmp_path: Path) -> None:
    # Row 3 of the second source, number 43, is bad; row 3 of the first is good.
    entries = mixture_of(tmp_path, 1, 1, rows=(40, 10), b={3: b""})
    batch = mixed_batches(a_run(batch_pairs=80, steps=1, mixture=entries))[0]
    # 40 samples of the second source are 4 epochs of its 10 rows; 43 -> 44.
    assert [int((batch.rows == row).sum()) for row in (3, 43, 44)] == [1, 0, 8]
    assert {(bad.key, bad.reason) for bad in batch.replaced} == {("row-3", "no picture")}
    assert len(batch.replaced) == 4


def test_rows_of_one_modality_are_replaced_and_too_many_are_told_as_that(tmp_path: Path) -> None:
    path = write_shards(
        tmp_path / "a", rows=64, shards=1, captions={i: [] for i in range(0, 32, 2)}, pictures={33: b""}
    )
    (batch,) = batches(a_run(batch_pairs=64, steps=1, max_bad_frac=0.5), path)
    assert (len(set(batch.rows.tolist())), batch.bad) == (47, 17)
    with pytest.raises(UserError, match=r"training needs pairs, rows with a picture and a caption: pack those alone"):
        batches(a_run(batch_pairs=64, steps=1, max_bad_frac=0.1), path)
    texts = write_shards(tmp_path / "b", rows=20, shards=1, pictures=dict.fromkeys(range(20), b""))
    with pytest.raises(UserError, match=r"the last: no picture\): training needs pairs"):
        batches(a_run(batch_pairs=4, steps=1), texts)


def test_quarantined_positions_are_jumped_over_in_a_mixture_and_nothing_moves(tmp_path: Path) -> None:
    run = a_run(batch_pairs=12, steps=4, mixture=mixture_of(tmp_path, 3, 1))
    whole = np.concatenate([batch.rows for batch in mixed_batches(run)])
    shards = ShardSet(*(entry.path for entry in entries_of(run.data)))
    ranges = ((5, 9), (20, 21))
    loader = Loader(
        run, shards, tokenizer_of(run, shards), rank=0, world=1, first_step=0, device=CPU, quarantined=ranges
    )
    with loader:
        rows = np.concatenate([batch.rows for batch in loader])
    assert rows[:43].tolist() == np.delete(whole, [5, 6, 7, 8, 20]).tolist()


def test_memory_stays_where_it_is_epoch_after_epoch() -> None:
    """A cut of the soak: 2 epochs of batches that somebody kept would be some 45 MB."""
    figures = loader_memory.measure(rows=800, shards=20, size=48, batch_pairs=32, window_rows=240)
    grown = figures["growth_after_the_first_epoch_mb"]
    assert max(grown.values()) < 12, grown
