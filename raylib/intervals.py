"""95 % confidence intervals: of a mean over seeds; of a score, over the images that it was measured on."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from raylib.errors import needed
from raylib.randomness import Key, generator, string_key

RESAMPLES = 1000
MILLION = 10**6  # scores are summed in millionths: integers add up to the same in any order
ELEMENTS = 2**18  # of a table of resamples at a time


def t_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """(mean, half of its 95 % confidence interval by Student's t; None of fewer than two values).

    Raises:
        UserError: SciPy is not installed.
    """
    if len(values) < 2:
        return values[0], None
    stats = needed("scipy.stats", "finetune")
    error = statistics.stdev(values) / len(values) ** 0.5
    return statistics.fmean(values), float(stats.t.ppf(0.975, len(values) - 1) * error)


def bootstrap(gained: np.ndarray, counts: np.ndarray, *key: Key) -> list[float] | None:
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
    outcomes, often = np.unique(rows, axis=0, return_counts=True)
    draw, scores = generator(*key), []
    chunk = max(1, ELEMENTS // len(outcomes))
    for start in range(0, RESAMPLES, chunk):
        drawn = draw.multinomial(clusters, often / clusters, size=min(chunk, RESAMPLES - start))
        sums = drawn @ outcomes
        scores.append((sums[:, :parts] / np.maximum(1, sums[:, parts:])).mean(1) / MILLION)
    low, high = np.quantile(np.concatenate(scores), (0.025, 0.975))
    return [float(low), float(high)]


def recall_interval(i2t: Any, t2i: Any, owner: Any, *key: Key) -> list[float] | None:
    """`bootstrap` over images of the mean of both ways' recall: an image is drawn with all of its captions.

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
    return bootstrap(gained, counts, *key)


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
        """`bootstrap` of the mean over all items."""
        return bootstrap(self.gained, self.counts, *key)
