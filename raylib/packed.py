"""Sequences of unequal length, end to end, without padding.

A batch of sentences is one flat tensor and a vector of lengths. Every per-token operation (embeddings,
projections, feed-forward, heads) runs on the flat tensor; attention alone sees rows
(`raylib.models.attention`).

Lengths, and every index made from them, live on the CPU, so that planning never waits for a GPU.

Shape legend: T tokens in all, n rows, R tokens of an output mask, d width.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raylib.errors import UserError

ALIGN = 64


class Ragged(NamedTuple):
    """n sequences end to end: `values` (T, ...), `lengths` (n,) int64 on the CPU."""

    values: Tensor
    lengths: Tensor

    @property
    def starts(self) -> Tensor:
        """(n,) offset of each row's first token."""
        return row_starts(self.lengths)

    def with_values(self, values: Tensor) -> "Ragged":
        """The same rows over other per-token values (T, ...)."""
        return Ragged(values, self.lengths)

    def select_rows(self, rows: Tensor) -> "Ragged":
        """The rows in the order of `rows` (m,), repeats allowed; T becomes the sum of their lengths."""
        tokens = upload(self.token_index(rows), self.values.device)
        return Ragged(self.values.index_select(0, tokens), self.lengths[rows])

    def first(self) -> Tensor:
        """(n, ...) each row's first token."""
        # equally long rows need no index
        if self.lengths.unique().numel() == 1:
            return self.values.unflatten(0, (len(self.lengths), -1))[:, 0]
        return self.values.index_select(0, upload(self.starts, self.values.device))

    def padded(self, columns: int, fill: float = 0) -> tuple[Tensor, Tensor]:
        """The values as a table (n, columns, ...) that `fill` completes, as models of others read it,
        and its mask (n, columns), True at tokens.

        Raises:
            UserError: a row is longer.
        """
        longest = max(self.lengths.tolist(), default=0)
        if longest > columns:
            raise UserError(f"a text of {longest} tokens, the model has {columns} positions; lower length=")
        on_host = torch.arange(columns) < self.lengths[:, None]
        # the cells by their numbers: a GPU would have to count those of a mask while the host waits
        mask, cells = upload((on_host, on_host.flatten().nonzero().squeeze(1)), self.values.device)
        table = self.values.new_full((mask.numel(), *self.values.shape[1:]), fill)
        table = table.index_copy(0, cells, self.values)
        return table.view(*mask.shape, *self.values.shape[1:]), mask

    def token_index(self, rows: Tensor) -> Tensor:
        """Flat positions of the tokens of `rows`, row after row."""
        return token_index(self.lengths, rows)


def select(x: Tensor, index: Tensor | None) -> Tensor:
    """x (T, ...) at `index` (R,); None: all of it."""
    # to copy all of it would cost a pass over memory forward, and another backward
    return x if index is None else x.index_select(0, index)


def select_mask(x: Tensor, mask: Tensor) -> Tensor:
    """x (T, ...) where `mask` (T,), on the CPU, is True."""
    # by numbers of rows: to count those of a mask on a GPU, the host would wait
    return x.index_select(0, upload(mask.nonzero().squeeze(1), x.device))


def unless_in_order(index: Tensor, count: int) -> Tensor | None:
    """None if `index`, on the CPU, selects all of `count` rows in order."""
    return None if len(index) == count and index.equal(torch.arange(count)) else index


def row_starts(lengths: Tensor) -> Tensor:
    """(n,) offset of the first token of each row."""
    return lengths.cumsum(0) - lengths


def token_index(lengths: Tensor, rows: Tensor) -> Tensor:
    """Flat positions of the tokens of `rows` (m,), row after row, in rows of these `lengths` (n,)."""
    starts, chosen = row_starts(lengths), lengths[rows]
    # one ramp over all tokens, shifted to where each row begins: no loop over rows
    first = torch.repeat_interleave(starts[rows] - (chosen.cumsum(0) - chosen), chosen)
    return first + torch.arange(len(first))


class Sentences(NamedTuple):
    """A stream's sentences: clean and masked ids (T,) over the same `lengths` (n,); the flat `positions`
    (m,), rising and on the CPU, whose original ids `labels` (m,) are to be predicted; `text_id` (n,), on the
    CPU too, equal for equal texts."""

    clean: Tensor
    masked: Tensor
    lengths: Tensor
    positions: Tensor
    labels: Tensor
    text_id: Tensor

    def find_rows(self, rows: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Of the sentences of `rows`, in that order: `lengths`, `positions`, and the index of their "tokens"
        and "labels" among these; all on the CPU."""
        tokens = token_index(self.lengths, rows)
        # a table from each token to its label, -1 where it has none, so that labels move with their tokens
        label_at = torch.full((int(self.lengths.sum()),), -1)
        label_at[self.positions] = torch.arange(len(self.positions))
        label_index = label_at[tokens]
        positions = (label_index >= 0).nonzero().squeeze(1)
        return self.lengths[rows], positions, {"tokens": tokens, "labels": label_index[positions]}


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


class Upload:
    """A tree of CPU tensors that was added to `Uploads`."""

    def __init__(self, tree: Any, uploads: "Uploads"):
        self._tree, self._uploads, self.is_done = tree, uploads, False

    @property
    def value(self) -> Any:
        """The tree on the device."""
        if not self.is_done:
            self._uploads.run()
        return self._tree


class Uploads:
    """Trees of CPU tensors on their way to `device`. Those that were added since the last copy travel in one,
    when the first of them is asked for: so plan all that can be planned, then ask."""

    def __init__(self, device: torch.device):
        self.device = device
        self._pending: list[Upload] = []

    def add(self, tree: Any) -> Upload:
        """Add a tree, as of `upload`."""
        self._pending.append(Upload(tree, self))
        return self._pending[-1]

    def run(self) -> None:
        """Copy what is pending."""
        # each copy costs the host as much as several operators: one for all
        trees = upload(tuple(pending._tree for pending in self._pending), self.device)
        for pending, tree in zip(self._pending, trees, strict=True):
            pending._tree, pending.is_done = tree, True
        self._pending = []
