"""Sequences of unequal length, end to end, without padding.

A batch of sentences is one flat tensor and a vector of lengths. Every per-token operation (embeddings,
projections, feed-forward, heads) runs on the flat tensor; attention alone sees rows, and runs once for all
rows with equally many keys (`Plan`), so that keys are never padded and nothing is masked.

Lengths, and every index made from them, live on the CPU, so that planning never waits for a GPU.

Shape legend: T tokens in all, n rows, R tokens that are read or ask.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


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

    def select_rows(self, rows: Tensor) -> "Ragged":
        """The rows in the order of `rows` (m,), repeats allowed; T becomes the sum of their lengths."""
        lengths = self.lengths[rows]
        return Ragged(self.values.index_select(0, self.token_index(rows).to(self.values.device)), lengths)

    def token_index(self, rows: Tensor) -> Tensor:
        """Flat positions of the tokens of `rows`, row after row."""
        lengths = self.lengths[rows]
        first = torch.repeat_interleave(self.starts[rows] - (lengths.cumsum(0) - lengths), lengths)
        return first + torch.arange(len(first))


class Sentences(NamedTuple):
    """A stream's sentences: clean and masked ids (T,) over the same `lengths` (n,); the flat `positions`
    (m,), rising and on the CPU, whose original ids `labels` (m,) are to be predicted; `text_id` (n,), equal
    for equal texts."""

    clean: Tensor
    masked: Tensor
    lengths: Tensor
    positions: Tensor
    labels: Tensor
    text_id: Tensor

    def select_rows(self, rows: Tensor) -> "Sentences":
        """The sentences of `rows` (on the CPU), in that order."""
        tokens = Ragged(self.clean, self.lengths).token_index(rows)
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


class TokenSegments(NamedTuple):
    """Which of the T tokens of n rows are what: positions in the flat rows, int64 on the CPU, in the order in
    which words, tags and regions came, which is that of their own rows.

    cls: (n,). text: n rows (W,), from CLS to SEP. tags: n rows (G,), their SEP last. regions: n rows (R,).
    empty: (n,) the last tokens of the rows, if these are slots without a region; else (0,).
    """

    cls: Tensor
    text: Ragged
    tags: Ragged
    regions: Ragged
    empty: Tensor


class Plan(NamedTuple):
    """How attention runs over n ragged rows of ascending length.

    `buckets`: (rows, queries of the longest, keys) of each bucket of rows with equally many keys. `pad_index`
    (P,): the query token in each cell of the padded queries (any token where a cell is empty); `unpad_index`
    (R,): the cell of each query token. Both are None where nothing is padded or moved. `causal`: every token
    asks, and sees itself and what is before it.
    """

    buckets: list[tuple[int, int, int]]
    pad_index: Tensor | None
    unpad_index: Tensor | None
    causal: bool = False


def concatenate(parts: list[Ragged]) -> Ragged:
    """All rows of `parts`, part after part."""
    return Ragged(torch.cat([part.values for part in parts]), torch.cat([part.lengths for part in parts]))


class EncoderRows:
    """Rows for an encoder: which tokens' states come out of it, and, once it has run, these states."""

    states: Tensor  # (R, d) of the tokens in `output_mask`, in flat order

    def __init__(self, rows: Ragged, output_mask: Tensor):
        self.rows, self.output_mask = rows, output_mask
        # from a flat position to its place among the tokens that come out
        self._output_index = output_mask.cumsum(0) - 1

    def states_at(self, positions: Tensor) -> Tensor:
        """States at flat `positions` (k,), which must be among those that come out."""
        return self.states.index_select(0, self._output_index[positions].to(self.states.device))


def encode_together(groups: Sequence[EncoderRows], encode: Callable[[Ragged, Tensor], Tensor]) -> None:
    """Send all groups through one call of an encoder: `encode(rows, output_mask)` returns states (R, d)."""
    rows = concatenate([group.rows for group in groups])
    states = encode(rows, torch.cat([group.output_mask for group in groups]))
    parts = states.split([int(group.output_mask.sum()) for group in groups])
    for group, part in zip(groups, parts, strict=True):
        group.states = part


def join_rows(left: Ragged, right: Ragged) -> Ragged:
    """Row i of `left` followed by row i of `right`, as one row (n, lengths added)."""
    both = concatenate([left, right])
    pairs = torch.arange(2 * len(left.lengths)).view(2, -1).T.reshape(-1)
    return Ragged(both.select_rows(pairs).values, left.lengths + right.lengths)


def first_tokens(lengths: Tensor) -> Tensor:
    """(T,) bool: True at the first token, the CLS, of each row."""
    mask = torch.zeros(int(lengths.sum()), dtype=torch.bool)
    mask[lengths.cumsum(0) - lengths] = True
    return mask


def find_segments(text: Tensor, tags: Tensor, regions: Tensor, empty: bool = False) -> TokenSegments:
    """The segments of rows of so many tokens each: three times (n,), on the CPU. `empty`: and one more in
    each row."""
    lengths = torch.stack([text, tags, regions, torch.full_like(text, int(empty))], 1)
    # (T,): 0 text, 1 tags, 2 regions, 3 empty
    part = torch.arange(4).repeat(len(text)).repeat_interleave(lengths.flatten())
    cls = first_tokens(lengths.sum(1)).nonzero().squeeze(1)
    texts, tagged, grounding, last = ((part == i).nonzero().squeeze(1) for i in range(4))
    return TokenSegments(
        cls,
        Ragged(texts, lengths[:, 0]),
        Ragged(tagged, lengths[:, 1]),
        Ragged(grounding, lengths[:, 2]),
        last,
    )


def plan_attention(keys: Tensor, queries: Tensor, device: torch.device, tokens: Tensor | None = None) -> Plan:
    """Plan attention over n rows.

    Args:
        keys: (n,) ascending number of keys of each row. queries: (n,) number of queries of each row.
        tokens: (R,) which query tokens these are, row after row; None when they are in this order.
    """
    keys, rows = keys.unique_consecutive(return_counts=True)
    longest = torch.stack([run.max() for run in queries.split(rows.tolist())])
    buckets = list(zip(rows.tolist(), longest.tolist(), keys.tolist(), strict=True))
    padded, count = longest.repeat_interleave(rows), int(queries.sum())
    if tokens is None and int(padded.sum()) == count:
        return Plan(buckets, None, None)
    tokens = torch.arange(count) if tokens is None else tokens
    shift = (padded.cumsum(0) - padded) - (queries.cumsum(0) - queries)
    cell = torch.arange(count) + shift.repeat_interleave(queries)
    pad_index, unpad_index = torch.zeros(int(padded.sum()), dtype=torch.int64), torch.empty_like(cell)
    pad_index[cell], unpad_index[tokens] = tokens, cell
    return Plan(buckets, pad_index.to(device, non_blocking=True), unpad_index.to(device, non_blocking=True))
