from __future__ import annotations

import itertools

import pytest
import torch

from limoe_dist.eval import ranking
from limoe_dist.eval.ranking import chance_frac, evenly_spread, first_places, hit_fracs, linked_fracs, nearest_keys


def test_the_best_come_first_and_of_equal_scores_the_lower_number() -> None:
    score = torch.tensor([[1.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    assert first_places(score, 3).tolist() == [[1, 3, 2], [0, 1, 2]]


def test_there_are_never_more_places_than_keys() -> None:
    assert first_places(torch.tensor([[1.0, 2.0]]), 5).tolist() == [[1, 0]]


def test_scores_are_left_as_they_were() -> None:
    score = torch.tensor([[1.0, 2.0]])
    first_places(score, 2)
    assert score.tolist() == [[1.0, 2.0]]


def test_places_do_not_depend_on_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    # Whole numbers: dot products are exact, and full of ties.
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randint(-2, 3, (n, 4), generator=generator).float() for n in (23, 9))
    whole = nearest_keys(query, key, 5)
    expected = (query @ key.T).sort(dim=1, descending=True, stable=True).indices[:, :5]
    assert torch.equal(whole, expected)
    monkeypatch.setattr(ranking, "BLOCK_ELEMENTS", 20)
    assert torch.equal(nearest_keys(query, key, 5), whole)


def test_a_query_hits_where_any_key_of_its_label_is_near_enough() -> None:
    # Keys 0..3 have labels 7, 8, 8, 9.
    places = torch.tensor([[0, 1, 2], [0, 3, 2], [0, 1, 3], [1, 2, 3]])
    labels = torch.tensor([7, 8, 9, 7])
    # Query 0 hits at once, query 1 at its third place (key 2), query 2 at its third, query 3 never.
    assert hit_fracs(places, labels, torch.tensor([7, 8, 8, 9]), (1, 2, 3)) == [0.25, 0.25, 0.75]


def test_a_query_hits_where_any_key_linked_to_it_is_near_enough() -> None:
    places = torch.tensor([[0, 1, 2], [0, 3, 2], [3, 1, 0]])
    # Query 0 is linked to keys 1 and 2: second place. Query 1 to key 0: first. Query 2 to key 2, which is not there.
    links = torch.tensor([[0, 1], [0, 2], [1, 0], [2, 2]])
    assert linked_fracs(places, links, (1, 2, 3)) == [1 / 3, 2 / 3, 2 / 3]


@pytest.mark.parametrize(("keys", "right", "count"), [(6, 1, 1), (6, 2, 3), (5, 3, 2), (5, 4, 2), (3, 1, 5)])
def test_chance_is_the_share_of_orders_that_hit(keys: int, right: int, count: int) -> None:
    orders = list(itertools.permutations(range(keys)))
    hits = sum(any(key < right for key in order[:count]) for order in orders)
    assert chance_frac(keys, right, count) == pytest.approx(hits / len(orders), abs=1e-12)


def test_examples_are_spread_over_all_rows() -> None:
    assert evenly_spread(3) == [0, 1, 2]
    assert evenly_spread(100, most=4) == [0, 25, 50, 75]
    assert evenly_spread(0) == []


def test_links_of_queries_are_not_mixed_up_where_keys_are_many() -> None:
    # Query 0 is linked to key 5, query 1 to key 3: with 2 keys a query, 0 * 2 + 5 and 1 * 2 + 3 would be one pair.
    places, links = torch.tensor([[3, 0], [5, 0]]), torch.tensor([[0, 5], [1, 3]])
    assert linked_fracs(places, links, (1, 2)) == [0.0, 0.0]
