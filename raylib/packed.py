"""Sequences of unequal length, end to end, without padding.

A batch of sentences is one flat tensor and a vector of lengths. Every per-token operation (embeddings,
projections, feed-forward, heads) runs on the flat tensor; attention alone sees rows
(`raylib.models.attention`).

Lengths, and every index made from them, live on the CPU, so that planning never waits for a GPU.

Shape legend: T tokens in all, n rows, R tokens of an output mask, d width.
"""

import math
from collections.abc import Callable, Sequence, Set
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from raylib.errors import UserError
from raylib.settings import Version

ALIGN = 64


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
        tokens = self.token_index(rows).to(self.values.device)
        return Ragged(self.values.index_select(0, tokens), self.lengths[rows])

    def padded(self, columns: int, fill: float = 0) -> tuple[Tensor, Tensor]:
        """The values as a table (n, columns, ...) that `fill` completes, as models of others read it,
        and its mask (n, columns), True at tokens.

        Raises:
            UserError: a row is longer.
        """
        longest = max(self.lengths.tolist(), default=0)
        if longest > columns:
            raise UserError(f"a text of {longest} tokens, the model has {columns} positions; lower length=")
        mask = (torch.arange(columns) < self.lengths[:, None]).to(self.values.device)
        table = self.values.new_full((*mask.shape, *self.values.shape[1:]), fill)
        table[mask] = self.values
        return table, mask

    def token_index(self, rows: Tensor) -> Tensor:
        """Flat positions of the tokens of `rows`, row after row."""
        return token_index(self.lengths, rows)


def token_index(lengths: Tensor, rows: Tensor) -> Tensor:
    """Flat positions of the tokens of `rows` (m,), row after row, in rows of these `lengths` (n,)."""
    starts, chosen = lengths.cumsum(0) - lengths, lengths[rows]
    # one ramp over all tokens, shifted to where each row begins: no loop over rows
    first = torch.repeat_interleave(starts[rows] - (chosen.cumsum(0) - chosen), chosen)
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
        # a table from each token to its label, -1 where it has none, so that labels move with their tokens
        label_at = torch.full((int(self.lengths.sum()),), -1)
        label_at[self.positions] = torch.arange(len(self.positions))
        label_index = label_at[tokens]
        positions = (label_index >= 0).nonzero().squeeze(1)
        device = self.clean.device
        return Sentences(
            self.clean.index_select(0, tokens.to(device)),
            self.masked.index_select(0, tokens.to(device)),
            self.lengths[rows],
            positions,
            self.labels.index_select(0, label_index[positions].to(device)),
            self.text_id.index_select(0, rows.to(device)),
        )

    def predicted(self) -> Tensor:
        """(T,) bool on the CPU: True at `positions`."""
        mask = torch.zeros(int(self.lengths.sum()), dtype=torch.bool)
        mask[self.positions] = True
        return mask


class TokenSegments(NamedTuple):
    """The parts that the T tokens of n rows belong to: positions in the flat rows, int64 on the CPU, in the
    order in which words, tags and regions came, which is that of their own rows.

    cls: (n,). text: n rows (W,), from CLS to SEP. tags: n rows (G,), their SEP last. regions: n rows (R,).
    empty: (n,) the last tokens of the rows, if these are slots without a region; else (0,).
    """

    cls: Tensor
    text: Ragged
    tags: Ragged
    regions: Ragged
    empty: Tensor


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
    masks = [group.output_mask for group in groups]
    states = encode(concatenate([group.rows for group in groups]), torch.cat(masks))
    parts = states.split([int(mask.sum()) for mask in masks])
    for group, part in zip(groups, parts, strict=True):
        group.states = part


class StreamEncoding:
    """One stream's sentences: the `full` batch for contrast, a `subset` of it for the unified encoder.

    Args:
        sentences: local ones, all of them.
        index: (n,) in the global batch.
        every: the subset is the sentences whose index is a multiple of it.
        embedded: the version whose CLS states contrast reads, if any.
        fused: versions that the unified encoder reads.
    """

    def __init__(
        self, sentences: Sentences, index: Tensor, every: int, embedded: Version | None, fused: Set[Version]
    ):
        self.full, self.embedded = sentences, embedded
        self.subset_rows = (index % every == 0).nonzero().squeeze(1)
        self.subset = sentences.select_rows(self.subset_rows) if every > 1 else sentences
        self.calls: dict[Version, EncoderRows] = {}
        # in one order in every process: sums of floats depend on it
        for version in get_args(Version):
            if version == embedded or version in fused:
                of = self.full if version == embedded else self.subset
                rows = Ragged(of.clean if version == "clean" else of.masked, of.lengths)
                # embedded sentences give at least their CLS, fused ones all tokens
                outputs = first_tokens(rows.lengths)
                if version in fused:
                    outputs[rows.token_index(self._fused_rows(version))] = True
                self.calls[version] = EncoderRows(rows, outputs)
        # masks are drawn anew in each step: only clean sentences come again, and may be remembered
        self.only_cls = embedded == "clean" and "clean" not in fused

    def _fused_rows(self, version: Version) -> Tensor:
        """Rows of the subset in the call of `version`."""
        return self.subset_rows if version == self.embedded else torch.arange(len(self.subset_rows))

    def cls(self) -> Tensor:
        """(n, d) CLS states of all sentences, of the version that contrast reads."""
        assert self.embedded is not None
        call = self.calls[self.embedded]
        return call.states_at(call.rows.starts)

    def subset_states(self, version: Version) -> Ragged:
        """States of the subset, for the unified encoder."""
        call = self.calls[version]
        rows = self._fused_rows(version)
        return Ragged(call.states_at(call.rows.token_index(rows)), call.rows.lengths[rows])


def join_rows(left: Ragged, right: Ragged) -> Ragged:
    """Row i of `left` followed by row i of `right`, as one row (n, lengths added)."""
    both = concatenate([left, right])
    # 0, n, 1, n + 1, ...: row i of the left one, then row i of the right one
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
    texts, tagged, grounding, last = (
        Ragged((part == i).nonzero().squeeze(1), lengths[:, i]) for i in range(4)
    )
    return TokenSegments(cls, texts, tagged, grounding, last.values)


class TensorSlot(NamedTuple):
    """Place of a tensor in the packed bytes."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


class TreeLayout:
    """A tree with slots for its tensors; a class of its own, so that torch's pinning passes it by."""

    def __init__(self, tree: Any):
        self.tree = tree


def pack_tree(tree: Any, pin: bool = False) -> tuple[TreeLayout, Tensor]:
    """A tree of dicts and tuples with CPU tensors as leaves -> (layout, one uint8 tensor, in pinned memory if
    `pin`)."""
    slots: list[tuple[TensorSlot, Tensor]] = []
    end = 0

    def reserve(tensor: Tensor) -> TensorSlot:
        nonlocal end
        slot = TensorSlot(end, tensor.dtype, tuple(tensor.shape))
        end += -(-slot.bytes // ALIGN) * ALIGN  # a view of another dtype must begin at a multiple of its size
        slots.append((slot, tensor))
        return slot

    layout = TreeLayout(_map(tree, Tensor, reserve))
    data = torch.empty(end, dtype=torch.uint8, pin_memory=pin)
    for slot, tensor in slots:
        _view(slot, data).copy_(tensor)
    return layout, data


def unpack_tree(layout: TreeLayout, data: Tensor) -> Any:
    """The tree again, its tensors views of `data`."""
    return _map(layout.tree, TensorSlot, lambda slot: _view(slot, data))


def _view(slot: TensorSlot, data: Tensor) -> Tensor:
    return data[slot.start : slot.start + slot.bytes].view(slot.dtype).view(slot.shape)


def _map(tree: Any, leaf: type, change) -> Any:
    if isinstance(tree, leaf):
        return change(tree)
    if isinstance(tree, dict):
        return {name: _map(value, leaf, change) for name, value in tree.items()}
    if isinstance(tree, tuple):
        values = [_map(value, leaf, change) for value in tree]
        return tuple(values) if type(tree) is tuple else type(tree)(*values)  # a named tuple of its own kind
    return tree


def upload(tree: Any, device: torch.device) -> Any:
    """Return a tree of dicts and tuples of CPU tensors with these on `device`: one copy, which nothing waits
    for. On a CPU, the tree itself."""
    if device.type == "cpu":
        return tree
    # Pinned memory of its own each time: PyTorch's allocator gives it out again only when the copy is over.
    layout, data = pack_tree(tree, pin=device.type == "cuda")
    return unpack_tree(layout, data.to(device, non_blocking=True))
