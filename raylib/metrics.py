"""Retrieval metrics."""

import statistics
from collections.abc import Iterable

import torch
from torch import Tensor

from raylib.finite import require_finite

RANKS = (1, 5, 10)


def recalls(
    queries: Tensor, keys: Tensor, query_owner: Tensor, key_owner: Tensor, chunk: int = 1024
) -> dict[int, float]:
    """Recall@{1, 5, 10}: the share of queries with a key of their own among the first k by inner product, as
    `recall_hits` counts them."""
    return mean_hits(recall_hits(queries, keys, query_owner, key_owner, chunk))


def recall_hits(
    queries: Tensor, keys: Tensor, query_owner: Tensor, key_owner: Tensor, chunk: int = 1024
) -> Tensor:
    """Chance of each query that a key of its own is among the first {1, 5, 10} by inner product: (n, 3) in
    float64, 0 or 1 but where keys tie (`hit_chances`).

    Args:
        queries, keys: (n, e), (m, e).
        query_owner, key_owner: (n,), (m,), equal where a key answers a query; every query has a key.

    Raises:
        NotFinite: a query or key is not finite: nothing would be ahead of its own.
    """
    require_finite("embeddings of queries", queries)
    require_finite("embeddings of keys", keys)
    hits = [torch.zeros(0, len(RANKS), dtype=torch.float64)]
    for start in range(0, len(queries), chunk):
        rows = slice(start, start + chunk)
        hits.append(hit_chances(queries[rows] @ keys.T, query_owner[rows, None] == key_owner))
    return torch.cat(hits)


def mean_hits(hits: Tensor) -> dict[int, float]:
    """Recall@{1, 5, 10} from the hits (n, 3) of all queries; 0 of none."""
    sums = hits.sum(0).tolist()
    return {k: total / max(1, len(hits)) for k, total in zip(RANKS, sums, strict=True)}


def hit_chances(scores: Tensor, own: Tensor, first: Tensor | None = None) -> Tensor:
    """Chance that one of a query's own keys is among its first {1, 5, 10}, the highest score first and keys
    of equal score in random order: (q, 3) in float64. A model whose scores are all equal so reaches chance.

    Of o own and f other keys that tie for the best own place, with r places left before the cut, none of the
    own keys is within the cut with probability C(f, r) / C(f + o, r) = prod_{i < r} (f - i) / (f + o - i).

    Args:
        scores: (q, m). own: bool (q, m), the right keys of each query.
        first: bool (q, m), keys that stand before all others whatever the scores. Scores of the two levels
            are never compared, and may be of different kinds.
    """
    level, before = torch.ones_like(own), 0
    if first is not None:
        # the level on which the query's best own key stands, and how many keys stand above that level
        level = first == (own & first).any(1, keepdim=True)
        before = (first & ~level).sum(1)
    best = scores.masked_fill(~(own & level), -torch.inf).amax(1, keepdim=True)
    ahead = before + ((scores > best) & level).sum(1)
    tied = (scores == best) & level
    mine = (tied & own).sum(1)
    others = tied.sum(1) - mine
    # missed[:, r]: the chance that the first r of the tied keys are all others'
    drawn = torch.arange(max(RANKS), device=scores.device)
    left = (others[:, None] - drawn).clamp(min=0).double()
    shares = left / (others[:, None] + mine[:, None] - drawn).clamp(min=1)
    shares = torch.where(mine[:, None] > 0, shares, 1.0)  # a query without a key of its own is never answered
    missed = torch.cat([torch.ones_like(shares[:, :1]), shares.cumprod(1)], 1)
    places = (torch.tensor(RANKS, device=scores.device) - ahead[:, None]).clamp(min=0)
    return 1 - missed.gather(1, places)


def nearest_keys(scores: Tensor, count: int, order: Tensor) -> Tensor:
    """Indices (q, count) of the keys with the highest `scores` (q, m); of those that tie for the last places,
    the ones that come first in `order`, a permutation of the keys that is the same for every query and so
    favours no query's own key."""
    chosen = scores.topk(count, dim=1).indices
    cut = scores.gather(1, chosen).amin(1, keepdim=True)
    above, tied = scores > cut, scores == cut
    places = count - above.sum(1, keepdim=True)
    if bool((tied.sum(1, keepdim=True) == places).all()):
        return chosen
    within = torch.empty_like(tied).index_copy_(1, order, tied[:, order].cumsum(1) <= places)
    return (above | (tied & within)).nonzero()[:, 1].view(len(scores), count)


def disparity(scores: Iterable[float]) -> dict[str, float]:
    """How far languages are apart: sample standard deviation and range of their scores (paper 4, table 2)."""
    scores = list(scores)
    return {"std": statistics.stdev(scores) if len(scores) > 1 else 0.0, "range": max(scores) - min(scores)}


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean; 0 for nothing."""
    values = list(values)
    return sum(values) / len(values) if values else 0.0
