import pytest
import torch

from raylib.ragged import Ragged, _cuts, buckets, concatenate, first_tokens, join_rows


def rows_of(ragged):
    return [row.tolist() for row in ragged.values.split(ragged.lengths.tolist())]


def made(*rows):
    return Ragged(torch.tensor([v for row in rows for v in row]), torch.tensor([len(row) for row in rows]))


def test_take_concatenate_join():
    a, b = made([1, 2], [3], [4, 5, 6]), made([7], [8, 9], [0])
    assert rows_of(a.take(torch.tensor([2, 0, 2]))) == [[4, 5, 6], [1, 2], [4, 5, 6]]
    assert rows_of(concatenate([a, b])) == [*rows_of(a), *rows_of(b)]
    assert rows_of(join_rows(a, b)) == [[1, 2, 7], [3, 8, 9], [4, 5, 6, 0]]
    assert first_tokens(a.lengths).tolist() == [True, False, True, True, False, False]


@pytest.mark.parametrize("seed", range(5))
def test_buckets_cover_every_token_once(seed):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 40, (50,), generator=g)
    tokens = int(lengths.sum())
    for read in (None, torch.rand(tokens, generator=g) < 0.2, torch.zeros(tokens, dtype=torch.bool)):
        values, wanted = torch.arange(tokens), torch.arange(tokens) if read is None else read.nonzero().squeeze(1)
        out = torch.full((len(wanted),), -1)
        seen = []
        for bucket in buckets(lengths, 512, read):
            seen += bucket.rows.tolist()
            x = values[torch.from_numpy(bucket.index)]
            assert bucket.valid is None or (x[torch.from_numpy(~bucket.valid)] >= 0).all()
            if bucket.read is not None:
                x = x.gather(1, torch.from_numpy(bucket.read))
            out[torch.from_numpy(bucket.target)] = x.flatten()[torch.from_numpy(bucket.kept)]
        assert out.tolist() == wanted.tolist()
        if read is None:
            assert sorted(seen) == list(range(50))


def test_cuts_are_the_cheapest():
    lengths = [3, 3, 4, 9, 10, 30, 31]

    def cost(cuts):
        return sum((high - low) * lengths[high - 1] + 192 for low, high in cuts)

    def every(low):
        if low == len(lengths):
            yield []
        for high in range(low + 1, len(lengths) + 1):
            for rest in every(high):
                yield [(low, high), *rest]

    import numpy as np

    lengths = [length * 20 for length in lengths]
    assert cost(_cuts(np.array(lengths), 192)) == min(cost(cuts) for cuts in every(0))
