"""Sequences of unequal length, end to end, without padding.

A batch of sentences is one flat tensor and a vector of lengths. Every per-token operation (embeddings, projections,
heads) runs on the flat tensor; attention runs on `Bucket`s, groups of rows of similar length that are padded only to
their own longest row (`SPEED.md`: on a CPU this beats nested tensors and block-diagonal masks).

Lengths, and every index made from them, live on the CPU, so that planning never waits for a GPU.

Shape legend: T tokens in all, n rows, S padded width, R tokens that are read, Q padded width of what is read.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CALL_WORK = 1 << 24  # one more call costs as much as CALL_WORK / width^2 tokens; sets how finely lengths are separated


class Ragged(NamedTuple):
    """n sequences end to end: `values` (T, ...), `lengths` (n,) int64 on the CPU."""

    values: Tensor
    lengths: Tensor

    @property
    def starts(self) -> Tensor:
        """(n,) offset of each row's first token."""
        return self.lengths.cumsum(0) - self.lengths

    def with_values(self, values: Tensor) -> "Ragged":
        """The same rows over other per-token values (T, ...)."""
        return Ragged(values, self.lengths)

    def take(self, rows: Tensor) -> "Ragged":
        """The rows in the order of `rows` (m,), repeats allowed; T becomes the sum of their lengths."""
        lengths = self.lengths[rows]
        return Ragged(self.values.index_select(0, self.tokens(rows).to(self.values.device)), lengths)

    def tokens(self, rows: Tensor) -> Tensor:
        """Flat positions of the tokens of `rows`, row after row."""
        lengths = self.lengths[rows]
        first = torch.repeat_interleave(self.starts[rows] - (lengths.cumsum(0) - lengths), lengths)
        return first + torch.arange(len(first))


class Sentences(NamedTuple):
    """A stream's sentences: clean and masked ids (T,) over the same `lengths` (n,); the flat `positions` (m,), rising
    and on the CPU, whose original ids `labels` (m,) are to be predicted; `text_id` (n,), equal for equal texts."""

    clean: Tensor
    masked: Tensor
    lengths: Tensor
    positions: Tensor
    labels: Tensor
    text_id: Tensor

    def take(self, rows: Tensor) -> "Sentences":
        """The sentences of `rows` (on the CPU), in that order."""
        tokens = Ragged(self.clean, self.lengths).tokens(rows)
        place = torch.full((int(self.lengths.sum()),), -1)
        place[self.positions] = torch.arange(len(self.positions))
        chosen = place[tokens]
        positions = (chosen >= 0).nonzero().squeeze(1)
        device = self.clean.device
        return Sentences(
            self.clean.index_select(0, tokens.to(device)),
            self.masked.index_select(0, tokens.to(device)),
            self.lengths[rows],
            positions,
            self.labels.index_select(0, chosen[positions].to(device)),
            self.text_id.index_select(0, rows.to(device)),
        )

    def predicted(self) -> Tensor:
        """(T,) bool on the CPU: True at `positions`."""
        mask = torch.zeros(int(self.lengths.sum()), dtype=torch.bool)
        mask[self.positions] = True
        return mask


class Bucket(NamedTuple):
    """Rows that are padded together. `index` (n, S) flat token positions (padding repeats the row's first token);
    `valid` (n, S), None when nothing is padded; `read` (n, Q) columns that the last layer computes, None for all;
    `kept` flat cells of the (n, S) or (n, Q) output that are real; `target` their places in the output (R,)."""

    rows: np.ndarray
    index: np.ndarray
    valid: np.ndarray | None
    read: np.ndarray | None
    kept: np.ndarray
    target: np.ndarray


def pick(values: Tensor, index: Tensor) -> Tensor:
    """`values` (T, d) at `index` (n, S) -> (n, S, d). An embedding lookup, because the gradient of plain indexing adds up
    in no fixed order on several threads."""
    return F.embedding(index, values)


def concatenate(parts: list[Ragged]) -> Ragged:
    """All rows of `parts`, part after part."""
    return Ragged(torch.cat([part.values for part in parts]), torch.cat([part.lengths for part in parts]))


def join_rows(left: Ragged, right: Ragged) -> Ragged:
    """Row i of `left` followed by row i of `right`, as one row (n, lengths added)."""
    both = concatenate([left, right])
    pairs = torch.arange(2 * len(left.lengths)).view(2, -1).T.reshape(-1)
    return Ragged(both.take(pairs).values, left.lengths + right.lengths)


def first_tokens(lengths: Tensor) -> Tensor:
    """(T,) bool: True at the first token, the CLS, of each row."""
    mask = torch.zeros(int(lengths.sum()), dtype=torch.bool)
    mask[lengths.cumsum(0) - lengths] = True
    return mask


def buckets(lengths: Tensor, width: int, read: Tensor | None = None) -> Iterator[Bucket]:
    """Cut rows into buckets that pad little in few calls.

    Args:
        lengths: (n,) on the CPU. width: of the states, which decides what padding costs beside a call.
        read: (T,) bool, the tokens whose last-layer states are wanted; None for all of them. Outputs come in flat order.
    """
    lengths = lengths.numpy()
    starts = np.cumsum(lengths) - lengths
    place = np.cumsum(read.numpy()) - 1 if read is not None else None
    order = np.argsort(lengths, kind="stable")
    for low, high in _cuts(lengths[order], CALL_WORK / width**2):
        rows = order[low:high]
        columns = np.arange(lengths[rows[-1]])
        valid = columns < lengths[rows, None]
        index = starts[rows, None] + np.where(valid, columns, 0)
        padded = None if valid.all() else valid
        if read is None:
            kept = np.flatnonzero(valid)
            yield Bucket(rows, index, padded, None, kept, index.reshape(-1)[kept])
            continue
        wanted = read.numpy()[index] & valid
        most = int(wanted.sum(1).max(initial=0))
        if most:
            columns_read = np.argsort(~wanted, axis=1, kind="stable")[:, :most]
            kept = np.flatnonzero(np.take_along_axis(wanted, columns_read, 1))
            target = place[np.take_along_axis(index, columns_read, 1).reshape(-1)[kept]]
            yield Bucket(rows, index, padded, columns_read, kept, target)


def _cuts(lengths: np.ndarray, call_cost: float) -> list[tuple[int, int]]:
    """Where to cut ascending `lengths` so that (padded tokens + `call_cost` per call) is least: exact, by dynamic
    programming over the distinct lengths."""
    widths, counts = np.unique(lengths, return_counts=True)
    ends = np.concatenate([[0], np.cumsum(counts)])
    best, previous = np.zeros(len(widths) + 1), np.zeros(len(widths) + 1, dtype=int)
    for j in range(1, len(widths) + 1):
        cost = best[:j] + (ends[j] - ends[:j]) * widths[j - 1] + call_cost
        previous[j] = int(cost.argmin())
        best[j] = cost[previous[j]]
    cuts, j = [], len(widths)
    while j:
        cuts.append((int(ends[previous[j]]), int(ends[j])))
        j = previous[j]
    return cuts[::-1]
