"""The order of samples, and the way of a batch from loader processes to the training process.

The global batch is a pure function of (seed, step), whatever the number of workers. A source is cut into a
fixed number of *lanes*: lane l owns the slice [l N / L, (l + 1) N / L) of each language's samples. A lane
draws its languages in periods of PERIOD draws, in which each language has its exact share (q proportional to
p^alpha, at least once), shuffled. Within a language the lane runs through epochs: its blocks (cut at shard
borders and at every `block` samples of a shard) in an order permuted anew, samples permuted inside each
block, so that reading stays local. Any position is found directly; only the current block's order is kept.
Every step takes the same count of draws from each lane: see `list_step_draws`.

A batch is dicts and named tuples of tensors, three dozen of them. torch hands each over as a file of shared
memory of its own (9 ms a batch in the training process, as long as building it took); here it travels as one
tensor (2 ms).
"""

import itertools
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from raylib.errors import UserError
from raylib.packed import Ragged, Sentences, TreeLayout, pack_tree, unpack_tree
from raylib.randomness import permutation

T = TypeVar("T")
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
    """The places that a rank fills in every step.

    Rank r of W serves lanes r, r + W, ...; in step s a lane's draw j lies at position s * (batch / lanes) + j
    and gets index lane * (batch / lanes) + j. Raises UserError if the world does not divide the lanes, or
    these the batch.
    """
    if lanes < 1 or lanes % world:
        raise UserError(
            f"{world} workers do not divide {lanes} lanes; set lanes to a multiple of the workers"
        )
    if batch % lanes:
        raise UserError(
            f"{lanes} lanes do not divide a batch of {batch}; set a batch that is a multiple of the lanes"
        )
    share = batch // lanes
    return [
        StepDraw(lane * share + draw, lane, draw)
        for lane in range(rank, lanes, world)
        for draw in range(share)
    ]


SHARED_MEMORY = "/dev/shm"
PREFETCH = 4  # batches that each loader process works ahead
# tensors of a batch by which the host plans the step (`raylib.packed`): reading them on a GPU would make the
# host wait for it
CPU_KEYS = ("index", "lengths", "positions")


class StepDataset(Dataset):
    """`batches[step]`: this worker's part of the global batch of a step, which says how many "samples" the
    global batch has, and, where known, "tokens" its own part.

    batch_bytes: the most that a part takes; 0 if that is not known. image_tokens: tokens that the model makes
    of an image.
    """

    batch_bytes = 0
    image_tokens = 0

    def epoch(self, steps: int) -> float | None:
        """Return how often the samples have been gone through after so many steps; None: they never end."""
        return None

    def count_tokens(self, batch: Any) -> int:
        """Count the tokens of a batch that are no padding: of texts, with specials; regions, or states, of
        images; images as the model cuts them."""
        if isinstance(batch, Ragged | Sentences):
            return int(batch.lengths.sum())
        if isinstance(batch, dict):
            images = len(batch["images"]) if "images" in batch else 0
            return images * self.image_tokens + sum(map(self.count_tokens, batch.values()))
        return 0


def load_batches(
    batches: StepDataset, first: int, last: int, workers: int, pin: bool = False
) -> Iterator[Any]:
    """`batches[first]` ... `batches[last - 1]`, read ahead by `workers` processes (0: in this one).

    Raises:
        UserError: no shared memory, or too little; and, as one line, what a loader process raised as a
            UserError.
    """
    if workers:
        _check_shared_memory(workers * PREFETCH * batches.batch_bytes)
    packed = DataLoader(
        _PackedBatches(batches),
        batch_size=None,
        sampler=range(first, last),
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=PREFETCH if workers else None,
    )
    # to hand over a file of shared memory, torch shakes hands with the process that wrote it, which takes
    # milliseconds where all cores are busy: a thread does it meanwhile
    for layout, data in prefetch(packed) if workers else packed:
        if isinstance(layout, UserError):
            raise layout
        yield unpack_tree(layout, data)


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """`items` in lists of `size`, the last perhaps shorter."""
    source = iter(items)
    while batch := list(itertools.islice(source, size)):
        yield batch


def prefetch(items: Iterable[T]) -> Iterator[T]:
    """`items`, the next one fetched by a thread while the last is used."""
    source = iter(items)
    end: Any = object()
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(next, source, end)
        while (item := future.result()) is not end:
            future = thread.submit(next, source, end)
            yield item


class _PackedBatches(Dataset):
    """Batches as one tensor each; a user's error as a value, since torch would wrap it in the worker's
    traceback."""

    def __init__(self, batches: StepDataset):
        self.batches = batches

    def __getitem__(self, step: int) -> tuple["TreeLayout | UserError", Tensor]:
        try:
            return pack_tree(self.batches[step])
        except UserError as error:
            return error, torch.empty(0)


def to_device(batch: Any, device: torch.device) -> Any:
    """Return a batch whose tensors are on `device`, but for those of `CPU_KEYS`."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {k: v if k in CPU_KEYS else to_device(v, device) for k, v in batch.items()}
    if isinstance(batch, tuple):
        named: Any = batch
        return type(batch)(**to_device(named._asdict(), device))
    return batch


def _check_shared_memory(num_bytes: int) -> None:
    try:
        space = os.statvfs(SHARED_MEMORY)
    except OSError:
        raise UserError(
            f"no shared memory at {SHARED_MEMORY} for loader processes; set fit.loader_workers=0"
        ) from None
    free = space.f_bavail * space.f_frsize
    if free < num_bytes:
        raise UserError(
            f"{SHARED_MEMORY} has {free >> 20} MB free, loader processes need {num_bytes >> 20}; set "
            "fit.loader_workers=0 or give the container more (docker run --shm-size)"
        )
