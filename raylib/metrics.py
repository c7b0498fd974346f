"""Scores: recall at 1, 5, 10; 95 % confidence intervals of a mean over seeds, and of a score over the images
that it was measured on."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raylib.errors import require
from raylib.finite import require_finite
from raylib.randomness import Key, generator, string_key

RANKS = (1, 5, 10)
RESAMPLES = 1000
MILLION = 10**6  # scores are summed in millionths: integers add up to the same in any order
ELEMENTS = 2**18  # of a table of resamples at a time


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


def recall_figures(i2t: Tensor, t2i: Tensor) -> dict[str, float]:
    """{"i2t_r1", "i2t_r5", ... "t2i_r10"} from the hits (n, 3) of images and (c, 3) of captions."""
    ways = {"i2t": i2t, "t2i": t2i}
    return {f"{way}_r{k}": value for way, hits in ways.items() for k, value in mean_hits(hits).items()}


def mean_recall_at_1(figures: Mapping[str, float]) -> float:
    """Recall@1 without a direction: the mean of both."""
    return (figures["i2t_r1"] + figures["t2i_r1"]) / 2


def hit_chances(scores: Tensor, relevant: Tensor, first: Tensor | None = None) -> Tensor:
    """Return the chance that one of a query's relevant keys is among its first {1, 5, 10}, the highest score
    first and keys of equal score in random order: (q, 3) in float64. A model whose scores are all equal so
    reaches chance.

    Of m relevant and f other keys that tie for the best relevant place, with r places left before the cut,
    none of the relevant keys is within the cut with probability
    C(f, r) / C(f + m, r) = prod_{i < r} (f - i) / (f + m - i).

    Args:
        scores: (q, k).
        relevant: bool (q, k), the right keys of each query.
        first: bool (q, k), keys that stand before all others whatever the scores. Scores of the two levels
            are never compared, and may be of different kinds.
    """
    level, before = torch.ones_like(relevant), relevant.new_zeros(len(relevant), dtype=torch.int64)
    if first is not None:
        # the level on which the query's best relevant key stands, and how many keys stand above that level
        level = first == (relevant & first).any(1, keepdim=True)
        before = (first & ~level).sum(1)
    best = scores.masked_fill(~(relevant & level), -torch.inf).amax(1, keepdim=True)
    num_ahead = before + ((scores > best) & level).sum(1)
    tied = (scores == best) & level
    num_relevant = (tied & relevant).sum(1, keepdim=True)
    num_others = tied.sum(1, keepdim=True) - num_relevant
    # miss[:, r]: the chance that the first r of the tied keys are all others', one factor for each of them
    i = torch.arange(max(RANKS), device=scores.device)
    factors = (num_others - i).clamp(min=0).double() / (num_others + num_relevant - i).clamp(min=1)
    factors = torch.where(num_relevant > 0, factors, 1.0)  # a query without a relevant key is never answered
    miss = torch.cat([torch.ones_like(factors[:, :1]), factors.cumprod(1)], 1)
    places = (torch.tensor(RANKS, device=scores.device) - num_ahead[:, None]).clamp(min=0)
    return 1 - miss.gather(1, places)


def nearest_keys(scores: Tensor, count: int, order: Tensor) -> Tensor:
    """Return the indices (q, count) of the keys with the highest `scores` (q, k); of those that tie for the
    last places, the ones that come first in `order`, a permutation of the keys that is the same for every
    query and so favours no query's relevant key."""
    nearest = scores.topk(count, dim=1).indices
    cut = scores.gather(1, nearest).amin(1, keepdim=True)
    above, tied = scores > cut, scores == cut
    places = count - above.sum(1, keepdim=True)
    if bool((tied.sum(1, keepdim=True) == places).all()):
        return nearest
    # `topk` takes whichever of the tied keys it likes: here they come in `order`, as many as have a place
    within = torch.empty_like(tied).index_copy_(1, order, tied[:, order].cumsum(1) <= places)
    return (above | (tied & within)).nonzero()[:, 1].view(len(scores), count)


def disparity(scores: Iterable[float]) -> dict[str, float]:
    """Return how far languages are apart: sample standard deviation and range of their scores (paper 4, table
    2)."""
    scores = list(scores)
    return {"std": statistics.stdev(scores) if len(scores) > 1 else 0.0, "range": max(scores) - min(scores)}


def mean_or_zero(values: Iterable[float]) -> float:
    """Arithmetic mean; 0 for nothing."""
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def t_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """(mean, half of its 95 % confidence interval by Student's t; None of fewer than two values).

    Raises:
        UserError: SciPy is not installed.
    """
    if len(values) < 2:
        return values[0], None
    stats = require("scipy.stats", "finetune")
    error = statistics.stdev(values) / len(values) ** 0.5
    return statistics.fmean(values), float(stats.t.ppf(0.975, len(values) - 1) * error)


def bootstrap_interval(gained: np.ndarray, counts: np.ndarray, *key: Key) -> list[float] | None:
    """[low, high], the 2.5 and 97.5 % points of a score over `RESAMPLES` samples of its clusters, drawn with
    replacement by a generator seeded with `key` (percentile bootstrap). None of fewer than two clusters. A
    score without spread, such as 0 or 100 %, has an interval of no width: its sample knows no other outcome.

    The score is the mean over p parts of sum(gained) / sum(counts).

    Args:
        gained: int (c, p), what the items of each of c clusters (images) score in each part, in millionths.
        counts: int (c, p), how many items these are. Clusters without any item are left out.
    """
    parts = gained.shape[1]
    rows = np.concatenate([gained, counts], 1)[counts.any(1)]
    clusters = len(rows)
    if clusters < 2:
        return None
    # Clusters that score alike are one outcome: how often each outcome is drawn is multinomial, so that time
    # and memory grow with the number of different outcomes, and the order of the clusters does not matter.
    outcomes, frequency = np.unique(rows, axis=0, return_counts=True)
    rng, scores = generator(*key), []
    chunk = max(1, ELEMENTS // len(outcomes))
    for start in range(0, RESAMPLES, chunk):
        size = min(chunk, RESAMPLES - start)
        sums = rng.multinomial(clusters, frequency / clusters, size=size) @ outcomes
        scores.append((sums[:, :parts] / np.maximum(1, sums[:, parts:])).mean(1) / MILLION)
    low, high = np.quantile(np.concatenate(scores), (0.025, 0.975))
    return [float(low), float(high)]


def recall_interval(i2t: Any, t2i: Any, owner: Any, *key: Key) -> list[float] | None:
    """Return `bootstrap_interval` over images of the mean of both ways' recall: an image is drawn with all of
    its captions.

    Args:
        i2t, t2i: (n,), (c,), hits of the images and of the captions, in [0, 1].
        owner: (c,), the image of each caption, in 0 ... n - 1.
    """
    i2t, t2i, owner = (np.asarray(values) for values in (i2t, t2i, owner))
    gained = np.zeros((len(i2t), 2), np.int64)
    counts = np.ones_like(gained)
    gained[:, 0] = np.rint(MILLION * i2t)
    np.add.at(gained[:, 1], owner, np.rint(MILLION * t2i).astype(np.int64))
    counts[:, 1] = np.bincount(owner, minlength=len(i2t))
    return bootstrap_interval(gained, counts, *key)


class ItemClusters:
    """Scores of a stream of items by cluster (image), in memory that does not grow with it: a hash of its
    name puts a cluster into one of `BUCKETS`. Clusters that share one are drawn together; as they are
    independent, that leaves the interval about as wide as it was."""

    BUCKETS = 2**16

    def __init__(self):
        self.gained, self.counts = (np.zeros((self.BUCKETS, 1), np.int64) for _ in range(2))

    def add(self, names: Iterable[str], millionths: int) -> None:
        """An item of the cluster that all of `names` together mean."""
        bucket = string_key("\0".join(sorted(names))) % self.BUCKETS
        self.gained[bucket, 0] += millionths
        self.counts[bucket, 0] += 1

    def interval(self, *key: Key) -> list[float] | None:
        """`bootstrap_interval` of the mean over all items."""
        return bootstrap_interval(self.gained, self.counts, *key)
