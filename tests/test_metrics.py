from itertools import permutations

import pytest
import torch

from raylib.metrics import RANKS, hit_chances, mean_hits, mean_or_zero, nearest_keys, recall_hits


def test_recall_equals_sorting():
    torch.manual_seed(0)
    queries, keys = torch.randn(20, 8), torch.randn(45, 8)
    query_owner, key_owner = torch.arange(20), torch.arange(45) % 20
    out = mean_hits(recall_hits(queries, keys, query_owner, key_owner, chunk=7))
    for k in (1, 5, 10):
        hits = 0
        for i in range(20):
            first = sorted(range(45), key=lambda j: -float(queries[i] @ keys[j]))[:k]
            hits += any(key_owner[j] == i for j in first)
        assert out[k] == hits / 20


def slow_chances(scores: list[float], own: list[bool], first: list[bool]) -> list[float]:
    """One query: every order in which keys that tie may come, looked at one by one."""
    orders, hits = 0, dict.fromkeys(RANKS, 0)
    for order in permutations(range(len(scores))):
        orders += 1
        ranked = sorted(
            order, key=lambda j: (not first[j], -scores[j])
        )  # stable: `order` decides among equals
        for k in RANKS:
            hits[k] += any(own[j] for j in ranked[:k])
    return [hits[k] / orders for k in RANKS]


@pytest.mark.parametrize("levels", [False, True])
def test_recall_ties_count_fractionally(levels):
    """Few different scores, so that many tie, also across the cut of 1 and of 5; several own keys a query."""
    torch.manual_seed(1)
    scores = torch.randint(0, 3, (24, 7)).float()
    scores[:4] = 0.5
    own = torch.rand(24, 7) < 0.3
    own[torch.arange(24), torch.randint(0, 7, (24,))] = True
    first = torch.rand(24, 7) < 0.5 if levels else torch.zeros(24, 7, dtype=torch.bool)
    found = hit_chances(scores, own, first if levels else None)
    expected = [
        slow_chances(*rows) for rows in zip(scores.tolist(), own.tolist(), first.tolist(), strict=True)
    ]
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert 3 < ((found > 0) & (found < 1)).sum()


def test_recall_first_level_keys_rank_ahead_of_all_scores():
    scores, first = torch.tensor([[-900.0, -901.0, 0.9, 0.8]]), torch.tensor([[True, True, False, False]])
    for owner, place in enumerate((0, 1, 2, 3)):
        own = (torch.arange(4) == owner)[None]
        assert hit_chances(scores, own, first)[0, 0] == float(place == 0)


def test_recall_of_collapsed_model_is_chance():
    same = torch.ones(30, 4)
    out = mean_hits(recall_hits(same, same, torch.arange(30), torch.arange(30)))
    assert out == {k: pytest.approx(k / 30) for k in RANKS}
    # of 60 captions, two are right
    several = mean_hits(recall_hits(same, torch.ones(60, 4), torch.arange(30), torch.arange(60) // 2))
    assert several[1] == pytest.approx(2 / 60) and several[5] == pytest.approx(1 - (55 * 54) / (60 * 59))


def test_recall_hits_without_ties_are_whole_numbers():
    torch.manual_seed(0)
    hits = recall_hits(torch.randn(50, 8), torch.randn(80, 8), torch.arange(50), torch.arange(80) % 50)
    assert set(hits.unique().tolist()) == {0.0, 1.0}


def test_recall_query_without_key_is_never_a_hit():
    own = torch.zeros(1, 4, dtype=torch.bool)
    assert hit_chances(torch.ones(1, 4), own).tolist() == [[0.0, 0.0, 0.0]]


def test_nearest_keys_break_ties_by_given_order():
    scores = torch.tensor([[3.0, 1.0, 1.0, 2.0, 1.0], [1.0] * 5, [5.0, 4.0, 3.0, 2.0, 1.0]])
    order = torch.tensor([4, 2, 0, 1, 3])
    chosen = [set(row) for row in nearest_keys(scores, 3, order).tolist()]
    assert chosen == [{0, 3, 4}, {4, 2, 0}, {0, 1, 2}]


def test_mean_of_nothing_is_zero():
    assert mean_or_zero([]) == 0.0
