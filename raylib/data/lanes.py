"""The order of samples: the global batch is a pure function of (seed, step), whatever the number of workers.

A source is cut into a fixed number of *lanes*: lane l owns the slice [l N / L, (l + 1) N / L) of each
language's samples. A lane draws its languages in periods of PERIOD draws, in which each language has its
exact share (q proportional to p^alpha, at least once), shuffled. Within a language the lane runs through
epochs: its blocks (cut at shard borders and at every `block` samples of a shard) in an order permuted anew,
samples permuted inside each block, so that reading stays local. Any position is found directly; only the
current block's order is kept. Every step takes the same count of draws from each lane: see
`list_step_draws`.
"""

import itertools
from collections import OrderedDict
from typing import NamedTuple

import numpy as np

from raylib.distributed import worker_rows
from raylib.errors import UserError
from raylib.randomness import permutation

PERIOD = 1024


class Lanes:
    """Orders one source.

    Args:
        sizes: samples of every shard, by language (`Source.sizes()`).
        name: of the stream; with `seed` it determines every order.
        lanes: number of lanes L.
        alpha: 1 draws languages by their size, 0 draws them evenly.
        block: samples that are shuffled together.

    Raises UserError: more lanes than samples of a language, more languages than PERIOD.
    """

    def __init__(
        self, sizes: dict[str, list[int]], name: str, seed: int, lanes: int, alpha=0.3, block: int = 4096
    ):
        self.languages = sorted(sizes)
        self.name, self.seed, self.lanes, self.block = name, seed, lanes, block
        self.borders = {language: np.cumsum([0] + list(sizes[language])) for language in self.languages}
        # checked here: a lane without samples of a language could not serve its share of a step
        totals = np.array([self.borders[language][-1] for language in self.languages])
        if not len(totals):
            raise UserError(f"{name}: the source has no language")
        for language, total in zip(self.languages, totals, strict=True):
            if total < lanes:
                raise UserError(
                    f"{name}: {lanes} lanes but {total} samples of language {language!r}; set fewer lanes"
                )
        self.counts = apportion(totals**alpha / (totals**alpha).sum(), PERIOD, name)
        self._reset_caches()

    def _reset_caches(self) -> None:
        """Start with empty caches; nothing else ever changes."""
        self._language_orders: OrderedDict[tuple[int, int], tuple[list, list]] = OrderedDict()
        self._block_orders: dict[tuple[int, str], tuple[int, int, np.ndarray]] = {}
        self._block_borders: dict[tuple[int, str], np.ndarray] = {}

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name[0] != "_"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._reset_caches()

    def span(self, lane: int, language: str) -> tuple[int, int]:
        """The lane's slice [first, last) of a language's samples."""
        total = int(self.borders[language][-1])
        return lane * total // self.lanes, (lane + 1) * total // self.lanes

    def draw(self, lane: int, position: int) -> tuple[str, int]:
        """(language, number of the sample in its language) at a position >= 0 of a lane."""
        period, offset = divmod(position, PERIOD)
        languages, earlier = self._order_languages(lane, period)
        k = languages[offset]
        language = self.languages[k]
        # every period draws a language equally often, so its own position is found without a walk
        return language, self._find_sample(lane, language, period * int(self.counts[k]) + earlier[offset])

    def _order_languages(self, lane: int, period: int) -> tuple[list[int], list[int]]:
        """Of each draw in a period: its language, and how often that language was drawn earlier in the
        period."""
        if (order := self._language_orders.get((lane, period))) is None:
            languages = np.repeat(np.arange(len(self.counts)), self.counts)
            languages = languages[permutation(PERIOD, self.seed, self.name, "languages", lane, period)]
            # positions sorted by language: within one, they count up from 0
            earlier = np.empty(PERIOD, np.int64)
            firsts = np.cumsum(self.counts) - self.counts
            by_language = np.argsort(languages, kind="stable")
            earlier[by_language] = np.arange(PERIOD) - np.repeat(firsts, self.counts)
            order = self._language_orders[lane, period] = languages.tolist(), earlier.tolist()
            if len(self._language_orders) > 2 * self.lanes:
                self._language_orders.popitem(last=False)
        return order

    def _find_sample(self, lane: int, language: str, position: int) -> int:
        """Sample number at a position of a lane's run through one language."""
        start, stop, order = self._block_orders.get((lane, language), (0, 0, np.empty(0, np.int64)))
        if not start <= position < stop:
            start, order = self._order_block(lane, language, position)
            self._block_orders[lane, language] = start, start + len(order), order
        return int(order[position - start])

    def _order_block(self, lane: int, language: str, position: int) -> tuple[int, np.ndarray]:
        """The block around a position: where it starts, and its sample numbers in their order."""
        cuts = self._cut_blocks(lane, language)
        epoch, offset = divmod(position, int(cuts[-1] - cuts[0]))
        keys = (self.seed, self.name, "samples", lane, language, epoch)
        # blocks in this epoch's order, then the one in which the offset falls, shuffled: one block's
        # order at a time is in memory
        blocks = permutation(len(cuts) - 1, *keys)
        ends = np.cumsum((cuts[1:] - cuts[:-1])[blocks])
        place = int(ends.searchsorted(offset, "right"))
        block = int(blocks[place])
        size = int(cuts[block + 1] - cuts[block])
        order = (cuts[block] + permutation(size, *keys, block)).astype(np.uint32)
        return position - offset + int(ends[place]) - size, order

    def _cut_blocks(self, lane: int, language: str) -> np.ndarray:
        """Borders of a lane's blocks in a language, ascending sample numbers, both ends included."""
        if (cuts := self._block_borders.get((lane, language))) is None:
            first, last = self.span(lane, language)
            # never across the border of a shard: a block is read from one file
            inner = [
                np.arange(a, b, self.block)
                for a, b in itertools.pairwise(self.borders[language])
                if a < last and b > first
            ]
            cuts = np.unique(np.concatenate([*inner, [first, last]]).clip(first, last))
            self._block_borders[lane, language] = cuts
        return cuts


def apportion(shares: np.ndarray, total: int, name: str = "source") -> np.ndarray:
    """Whole numbers >= 1 that sum to `total`, nearest to total * shares (largest remainders)."""
    if len(shares) > total:
        raise UserError(f"{name}: {len(shares)} languages, more than {total} cannot be mixed; merge some")
    quota = shares * total
    counts = np.maximum(np.floor(quota), 1).astype(np.int64)
    # shares below one draw were rounded up: others, the best served first, give theirs back
    while counts.sum() != total:
        over = counts.sum() > total
        remainder = np.where(counts > 1, quota - counts, np.inf) if over else quota - counts
        counts[remainder.argmin() if over else remainder.argmax()] += -1 if over else 1
    return counts


class StepDraw(NamedTuple):
    """A place in the global batch: the lane that fills it, with which of its draws in the step."""

    global_index: int
    lane: int
    draw: int


def list_step_draws(lanes: int, batch: int, rank: int = 0, world: int = 1) -> list[StepDraw]:
    """The places that a rank fills in every step: one run of them (`worker_rows`), so that it serves whole
    lanes, and perhaps a part of its first and of its last one.

    In step s a lane's draw j lies at position s * (batch / lanes) + j and gets index lane * (batch / lanes) +
    j. Raises UserError if the lanes do not divide the batch.
    """
    if batch % lanes:
        raise UserError(
            f"{lanes} lanes do not divide a batch of {batch}; set a batch that is a multiple of the lanes"
        )
    return [StepDraw(index, *divmod(index, batch // lanes)) for index in worker_rows(batch, rank, world)]
