import pytest
import torch

from raylib.models.attention import BucketPlan, plan_attention
from raylib.packed import Ragged, concatenate, first_tokens, join_rows


def rows_of(ragged):
    return [row.tolist() for row in ragged.values.split(ragged.lengths.tolist())]


def made(*rows):
    return Ragged(torch.tensor([v for row in rows for v in row]), torch.tensor([len(row) for row in rows]))


def test_packed_select_concatenate_and_interleave():
    a, b = made([1, 2], [3], [4, 5, 6]), made([7], [8, 9], [0])
    assert rows_of(a.select_rows(torch.tensor([2, 0, 2]))) == [[4, 5, 6], [1, 2], [4, 5, 6]]
    assert rows_of(concatenate([a, b])) == [*rows_of(a), *rows_of(b)]
    assert rows_of(join_rows(a, b)) == [[1, 2, 7], [3, 8, 9], [4, 5, 6, 0]]
    assert first_tokens(a.lengths).tolist() == [True, False, True, True, False, False]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shuffled", [False, True])
def test_packed_cross_attention_puts_queries_beside_their_row(seed, shuffled):
    g = torch.Generator().manual_seed(seed)
    keys = torch.randint(1, 9, (20,), generator=g).sort().values
    queries = torch.randint(0, 4, (20,), generator=g)
    count = int(queries.sum())
    tokens = torch.randperm(count, generator=g) if shuffled else None
    plan = plan_attention(keys, queries, torch.device("cpu"), tokens)
    assert [s for n, _, s in plan.buckets for _ in range(n)] == keys.tolist()
    owner = torch.arange(20).repeat_interleave(queries)  # the row of the i-th query
    names = torch.arange(count) if tokens is None else tokens
    cells = [
        (row, q) for row, q in zip(range(20), [q for n, q, _ in plan.buckets for _ in range(n)], strict=True)
    ]
    rows = torch.tensor([row for row, q in cells for _ in range(q)])
    assert plan.pad_index[plan.unpad_index].tolist() == list(range(count))
    assert rows[plan.unpad_index[names]].tolist() == owner.tolist()


def test_packed_cross_attention_moves_nothing_for_own_rows():
    keys = torch.tensor([2, 2, 5])
    assert plan_attention(keys, keys, torch.device("cpu")) == BucketPlan([(2, 2, 2), (1, 5, 5)], None, None)
