"""Retrieval metrics."""

import statistics
from collections.abc import Iterable

import torch
from torch import Tensor

from raylib.finite import require_finite

RANKS = (1, 5, 10)


def recalls(queries: Tensor, keys: Tensor, query_owner: Tensor, key_owner: Tensor, chunk: int = 1024) -> dict[int, float]:
    """Recall@{1, 5, 10}: the share of queries with a key of their own among the first k by inner product.

    A key that scores as high as a query's own counts as ahead of it, so that a collapsed model scores 0 and not 1.

    Args:
        queries, keys: (n, e), (m, e). query_owner, key_owner: (n,), (m,), equal where a key answers a query; every
            query has a key.

    Raises:
        NotFinite: a query or key is not finite: nothing would be ahead of its own.
    """
    require_finite("embeddings of queries", queries)
    require_finite("embeddings of keys", keys)
    hits = dict.fromkeys(RANKS, 0)
    for start in range(0, len(queries), chunk):
        scores = queries[start : start + chunk] @ keys.T
        own = query_owner[start : start + chunk, None] == key_owner
        best = scores.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
        ahead = ((scores >= best) & ~own).sum(1)
        for k in RANKS:
            hits[k] += int((ahead < k).sum())
    return {k: hit / len(queries) for k, hit in hits.items()}


def disparity(scores: Iterable[float]) -> dict[str, float]:
    """How far languages are apart: sample standard deviation and range of their scores (paper 4, table 2)."""
    scores = list(scores)
    return {"std": statistics.stdev(scores) if len(scores) > 1 else 0.0, "range": max(scores) - min(scores)}


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean; 0 for nothing."""
    values = list(values)
    return sum(values) / len(values) if values else 0.0
