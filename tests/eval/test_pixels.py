from __future__ import annotations

from pathlib import Path

import pytest

from limoe_dist.data.arrow import ShardSet
from limoe_dist.data.evaluation import decode_rows
from limoe_dist.eval import pixels
from limoe_dist.eval.pixels import PixelNeighbour, pixel_nearest_neighbour
from limoe_dist.parallel.mesh import Mesh
from tests.eval.planted import CPU, RUN, flat, flat_shards
from tests.support.ranks import RanksPool
from tests.support.shards import CONCEPTS, picture, truncated, write_shards


def compared(training: ShardSet, shards: ShardSet, mesh: Mesh | None = None) -> PixelNeighbour:
    return pixel_nearest_neighbour(RUN, training, shards, mesh=mesh or Mesh.single(), device=CPU)


def test_the_nearest_grey_gives_the_class(tmp_path: Path) -> None:
    # Training: row i, class i % 8, has grey level 4 * i. Evaluated rows 0 to 7 have these greys:
    #   row 0: grey of training row 0          -> class 0 first
    #   row 1: of row 9, class 1 again         -> class 1 first
    #   row 2: of row 3                        -> class 3 first; then 2 and 4: class 2 is in the first five
    #   row 3: of row 15, class 7              -> the nearest are 15, 14, 13, 12, 11: class 3 (row 11) is fifth
    #   row 4: of row 15                       -> class 4 (row 12) is fourth
    #   row 5: of row 15                       -> class 5 (row 13) is third
    #   row 6: of row 0                        -> 0, 1, 2, 3, 4: class 6 is seventh
    #   row 7: of row 0                        -> class 7 is eighth
    training = flat_shards(tmp_path / "training", 16)
    greys = {row: flat(of) for row, of in enumerate((0, 9, 3, 15, 15, 15, 0, 0))}
    found = compared(training, flat_shards(tmp_path / "evaluated", 8, pictures=greys))
    assert found == PixelNeighbour(rows=8, training_rows=16, classes=8, classes_in_training=8, top1=2 / 8, top5=6 / 8)


def noisy(folder: Path, rows: int, first: int) -> ShardSet:
    return ShardSet(write_shards(folder, rows=rows, pictures={row: picture(first + row) for row in range(rows)}))


def by_hand(training: ShardSet, shards: ShardSet) -> tuple[float, float]:
    """Distances as plain differences, and the order of distinct concepts as a walk from the nearest picture on."""
    known = decode_rows(RUN, training, range(len(training)), device=CPU).images.double()
    asked = decode_rows(RUN, shards, range(len(shards)), device=CPU).images.double()
    places = []
    for row, image in enumerate(asked):
        order = (known - image).square().sum((1, 2, 3)).argsort().tolist()
        concepts = list(dict.fromkeys(CONCEPTS[number % 8] for number in order))
        places.append(concepts.index(CONCEPTS[row % 8]))
    return sum(place < 1 for place in places) / len(places), sum(place < 5 for place in places) / len(places)


def test_real_pictures_agree_with_plain_differences(tmp_path: Path) -> None:
    training, shards = noisy(tmp_path / "training", 37, 1000), noisy(tmp_path / "evaluated", 21, 0)
    found = compared(training, shards)
    assert (found.top1, found.top5) == by_hand(training, shards)
    assert 0 < found.top5 < 1


def test_chunks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training, shards = noisy(tmp_path / "training", 37, 1000), noisy(tmp_path / "evaluated", 21, 0)
    whole = compared(training, shards)
    # One pass of 4 pictures a chunk: the training pictures are read six times.
    monkeypatch.setattr(pixels, "CHUNK_BYTES", 1)
    assert compared(training, shards) == whole


def test_training_pictures_of_other_concepts_are_passed_over(tmp_path: Path) -> None:
    # Evaluated rows 0 and 1 have the greys of training rows 2 and 3, of other concepts: of rows 0, 1, 8 and 9 the
    # nearest to grey 2 is row 1 (class 1, wrong for row 0), the nearest to grey 3 too (right for row 1).
    shards = flat_shards(tmp_path / "evaluated", 2, pictures={0: flat(2), 1: flat(3)})
    found = compared(flat_shards(tmp_path / "training", 16), shards)
    assert (found.training_rows, found.classes, found.top1, found.top5) == (4, 2, 0.5, 1.0)


def test_a_class_without_training_pictures_counts_as_wrong(tmp_path: Path) -> None:
    # Of 8 evaluated classes, 3 are in the training set: the other five are wrong also among the first five.
    found = compared(flat_shards(tmp_path / "training", 3), flat_shards(tmp_path / "evaluated", 8))
    assert (found.classes, found.classes_in_training) == (8, 3)
    assert (found.top1, found.top5) == (3 / 8, 3 / 8)


def test_bad_pictures_of_both_sets_are_left_out(tmp_path: Path) -> None:
    # Training row 1, the only one of its class, is bad; so is evaluated row 2. Rows 0, 1 and 3 remain; 1 is wrong.
    training = flat_shards(tmp_path / "training", 4, pictures={1: truncated(1)})
    found = compared(training, flat_shards(tmp_path / "evaluated", 4, pictures={2: b""}))
    assert (found.rows, found.training_rows, found.classes_in_training) == (3, 3, 3)
    assert found.top1 == 2 / 3


def compared_on_a_rank(training: Path, evaluated: Path) -> PixelNeighbour:
    return compared(ShardSet(training), ShardSet(evaluated), Mesh.build(tp=1, ep=1))


def test_two_ranks_find_what_one_process_finds(tmp_path: Path, ranks2: RanksPool) -> None:
    training, shards = noisy(tmp_path / "training", 37, 1000), noisy(tmp_path / "evaluated", 21, 0)
    expected = compared(training, shards)
    assert ranks2.run(compared_on_a_rank, training.path, shards.path) == [expected, expected]
