"""Text encoder and unified encoder: stacks of blocks that run bucket by bucket over ragged rows."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from raylib.model.attention import Block, as_index
from raylib.ragged import Ragged, buckets, join_rows, pick


class Condition(NamedTuple):
    """What rows attend to: `states` of images or sentences, and for each text row the state row (n,) it sees (CPU)."""

    states: Ragged
    rows: Tensor


class TextEmbedding(nn.Module):
    """Word and position embeddings, layer norm. Token types, where a checkpoint has them, are folded into the positions
    (`raylib.model.load`): every text here is of type 0."""

    def __init__(self, vocabulary: int, positions: int, width: int, dropout: float, eps: float):
        super().__init__()
        self.word = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(positions, width)
        self.norm = nn.LayerNorm(width, eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Ragged) -> Tensor:
        """ids (T,) -> (T, d)."""
        place = torch.arange(len(ids.values)) - torch.repeat_interleave(ids.starts, ids.lengths)
        place = place.to(ids.values.device, non_blocking=True)
        return self.dropout(self.norm(self.word(ids.values) + self.position(place)))


class Encoder(nn.Module):
    """A stack of `Block`s over ragged rows.

    With `cross` the blocks attend to the condition by layers of their own; without (the paper's ablation "w/o
    uni-arch") a condition is appended to the row and one self-attention sees both.
    """

    def __init__(self, layers: int, width: int, heads: int, feedforward: int, dropout: float, eps: float, cross: bool):
        super().__init__()
        self.cross = cross
        self.blocks = nn.ModuleList(Block(width, heads, feedforward, dropout, eps, cross) for _ in range(layers))

    def forward(self, text: Ragged, read: Tensor | None = None, condition: Condition | None = None) -> Tensor:
        """States after the last block.

        Args:
            text: values (T, d).
            read: (T,) bool on the CPU; the last block computes these tokens alone. None: all of them.
            condition: seen by cross-attention; None skips it.
        Returns:
            (R, d), the read tokens in flat order; (T, d) when all are read.
        """
        if condition is not None and not self.cross:
            text, read = _entangle(text, read, condition)
            condition = None
        projected = [b.cross_attention.key_value(condition.states.values) for b in self.blocks] if condition else []
        device = text.values.device
        outputs, targets = [], []
        for bucket in buckets(text.lengths, text.values.shape[1], read):
            x = pick(text.values, as_index(bucket.index, device))
            mask = None if bucket.valid is None else as_index(bucket.valid, device)[:, None, None]
            seen = _seen(condition, bucket.rows, device) if condition else None
            columns = None if bucket.read is None else as_index(bucket.read, device)
            for i, block in enumerate(self.blocks):
                last = i == len(self.blocks) - 1
                x = block(x, mask, (pick(projected[i], seen[0]), seen[1]) if seen else None, columns if last else None)
            outputs.append(x.flatten(0, 1).index_select(0, as_index(bucket.kept, device)))
            targets.append(torch.from_numpy(bucket.target))
        if not outputs:
            return text.values[:0]
        return torch.cat(outputs).index_select(0, torch.cat(targets).argsort().to(device, non_blocking=True))


def _seen(condition: Condition, rows, device) -> tuple[Tensor, Tensor | None]:
    """(n, C) flat positions of the condition tokens that these rows see, and their mask, None when nothing is padded."""
    chosen = condition.rows[torch.from_numpy(rows)]
    lengths = condition.states.lengths[chosen]
    columns = torch.arange(int(lengths.max()))
    valid = columns < lengths[:, None]
    index = condition.states.starts[chosen, None] + torch.where(valid, columns, 0)
    mask = None if bool(valid.all()) else valid[:, None, None].to(device, non_blocking=True)
    return index.to(device, non_blocking=True), mask


def _entangle(text: Ragged, read: Tensor | None, condition: Condition) -> tuple[Ragged, Tensor]:
    """Each row with its condition appended; only text tokens are read."""
    seen = condition.states.take(condition.rows)
    read = torch.ones(len(text.values), dtype=torch.bool) if read is None else read
    unread = torch.zeros(len(seen.values), dtype=torch.bool)
    return join_rows(text, seen), join_rows(text.with_values(read), seen.with_values(unread)).values
