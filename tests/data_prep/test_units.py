from __future__ import annotations

import pytest

from data_prep.packing.claims import at_work, claim, door
from data_prep.units import WHOLE, Meeting, Ranks, Unit, find_meeting, find_unit
from limoe_dist.config.errors import UserError


def ranks(rank, size):
    meeting = Meeting()
    meeting.rank, meeting.size = rank, size
    return meeting


def array(**values):
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


def place(unit):
    return unit.index, unit.count


def test_units_together_do_every_piece_once():
    shares = [piece for index in range(3) for piece in Unit(index, 3).share(10)]
    assert sorted(shares) == [*range(10)]
    assert [*WHOLE.share(4)] == [0, 1, 2, 3]


def test_a_unit_by_hand():
    assert place(find_unit("2/8", Meeting(), {})) == (2, 8)
    assert find_unit("", Meeting(), {}) == WHOLE


@pytest.mark.parametrize("given", ["8/8", "1/0", "-1/2", "1", "a/b", "1/2/3", " 0/1", "٣/٤", "1e0/2"])
def test_a_unit_that_is_none_is_refused(given):
    with pytest.raises(UserError, match="must be I/N with 0 <= I < N"):
        find_unit(given, Meeting(), {})


def test_a_task_of_a_slurm_array_is_a_unit_wherever_the_array_begins():
    assert place(find_unit("", Meeting(), array(ID=3, MIN=0, MAX=7, COUNT=8))) == (3, 8)
    assert place(find_unit("", Meeting(), array(ID=5, MIN=1, MAX=8, COUNT=8, STEP=1))) == (4, 8)
    assert place(find_unit("", Meeting(), array(ID=8, MIN=0, MAX=20, COUNT=6, STEP=4))) == (2, 6)
    assert "task 3 of a Slurm array" in str(find_unit("", Meeting(), array(ID=3, MIN=0, MAX=7, COUNT=8)))


@pytest.mark.parametrize(
    "values",
    [{"ID": 5, "MIN": 1, "MAX": 7, "COUNT": 3, "STEP": 1}, {"ID": 5, "COUNT": 3}, {"ID": "x", "MIN": 0, "MAX": 1}],
)
def test_an_array_with_gaps_asks_for_the_unit(values):
    with pytest.raises(UserError, match=r"not evenly spaced .* --unit I/N"):
        find_unit("", Meeting(), array(**values))


def test_the_option_counts_more_than_the_array():
    assert place(find_unit("0/1", Meeting(), array(ID=3, MIN=0, MAX=7, COUNT=8))) == (0, 1)


def test_ranks_divide_the_share_of_a_task():
    environment = array(ID=1, MIN=0, MAX=1, COUNT=2)
    units = [find_unit("", ranks(rank, 3), environment) for rank in range(3)]
    assert [place(unit) for unit in units] == [(3, 6), (4, 6), (5, 6)]


def test_one_process_meets_nobody():
    assert find_meeting({}).size == 1
    assert find_meeting({"OMPI_COMM_WORLD_SIZE": "1"}).size == 1


def test_a_unit_is_claimed_once_and_free_again_when_it_ends(tmp_path):
    with door(tmp_path), claim(tmp_path, Unit(0, 2), "--out x"):
        assert place(*at_work(tmp_path)) == (0, 2)
        with pytest.raises(UserError, match=r"--out x: unit 0 of 2 is being written by process \d+"):
            claim(tmp_path, Unit(0, 2), "--out x")
        claim(tmp_path, Unit(1, 2), "--out x").close()
    assert at_work(tmp_path) == []
    with door(tmp_path):
        claim(tmp_path, Unit(0, 2), "--out x").close()


def test_the_work_is_not_divided_in_two_ways_at_once(tmp_path):
    with (
        door(tmp_path),
        claim(tmp_path, Unit(0, 2), "--out x"),
        pytest.raises(
            UserError, match=r"unit 0 of 2 is being packed there now, and unit 0 of 1 would do some of the same"
        ),
    ):
        claim(tmp_path, WHOLE, "--out x")


def test_what_a_dead_process_left_is_removed(tmp_path):
    (tmp_path / "unit-0-of-3.lock").write_text("process 1 on elsewhere\n")
    assert at_work(tmp_path) == []
    assert not list(tmp_path.glob("unit-*"))


class World:
    """Answers as MPI does for one rank of two, of which the other sends what is in `other`."""

    def __init__(self, rank, other):
        self.rank, self.other = rank, other

    def bcast(self, told):
        return self.other if self.rank else told

    def allgather(self, told):
        return [self.other, told] if self.rank else [told, self.other]


def ranks_of(world):
    meeting = object.__new__(Ranks)
    meeting._world, meeting.rank, meeting.size = world, world.rank, 2
    return meeting


def refused():
    raise UserError("mine")


@pytest.mark.parametrize(
    ("rank", "other", "work", "told_by", "text"),
    [
        (0, None, refused, 0, "mine"),
        (1, None, refused, 1, "mine"),
        (1, "theirs", list, 0, "theirs"),
        (0, "theirs", list, 1, "theirs"),
        (1, "theirs", refused, 0, "theirs"),
    ],
)
def test_where_one_rank_has_an_error_all_raise_the_first_of_them(rank, other, work, told_by, text):
    with pytest.raises(UserError, match=text) as raised:
        ranks_of(World(rank, other)).all_or_none(work)
    assert raised.value.told_by == told_by


def test_what_the_first_rank_cannot_do_the_others_do_not_try():
    done = []
    with pytest.raises(UserError, match="theirs"):
        ranks_of(World(1, "theirs")).first_then_others(lambda: done.append(1))
    assert done == []
    ranks_of(World(1, None)).first_then_others(lambda: done.append(1))
    assert done == [1]
