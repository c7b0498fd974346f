"""Text encoder and unified encoder: stacks of blocks over ragged rows."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from raylib.errors import UserError
from raylib.models.attention import Block
from raylib.packed import Plan, Ragged, join_rows, plan_attention

# On a CPU, rows run in chunks whose widest activation is so many floats: larger ones leave the cache, and
# malloc maps and unmaps them page by page.
CHUNK = 2**23


class Condition(NamedTuple):
    """What rows attend to: `states` of images or sentences, and for each text row the state row (n,) it sees
    (CPU)."""

    states: Ragged
    rows: Tensor


class TextEmbedding(nn.Module):
    """Word and position embeddings, layer norm. Token types, where a checkpoint has them, are folded into the
    positions (`raylib.models.hf_weights`): every text here is of type 0."""

    def __init__(self, vocabulary: int, positions: int, width: int, dropout: float, eps: float):
        super().__init__()
        self.word = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(positions, width)
        self.norm = nn.LayerNorm(width, eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Ragged) -> Tensor:
        """ids (T,) -> (T, d)."""
        return self.place(ids.with_values(self.word(ids.values)))

    def place(self, words: Ragged) -> Tensor:
        """Word embeddings (T, d) -> with their positions, normed (T, d)."""
        place = torch.arange(len(words.values)) - torch.repeat_interleave(words.starts, words.lengths)
        place = place.to(words.values.device, non_blocking=True)
        return self.dropout(self.norm(words.values + self.position(place)))


class Encoder(nn.Module):
    """A stack of `Block`s over ragged rows.

    With `cross` the blocks attend to the condition by layers of their own; without (the paper's ablation "w/o
    uni-arch") a condition is appended to the row and one self-attention sees both. With `causal` (set on a
    copy by `finetune.decoder`) a token sees nothing of its row that comes after it, and all tokens are read.
    """

    causal = False

    def __init__(
        self, layers: int, width: int, heads: int, feedforward: int, dropout: float, eps: float, cross: bool
    ):
        super().__init__()
        self.cross = cross
        self.blocks = nn.ModuleList(
            Block(width, heads, feedforward, dropout, eps, cross) for _ in range(layers)
        )

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
        device = text.values.device
        assert read is None or not self.causal, "a causal mask lines up with all queries alone"
        read = torch.ones(len(text.values), dtype=torch.bool) if read is None else read
        projected = (
            [b.cross_attention.key_value(condition.states.values) for b in self.blocks] if condition else []
        )
        outputs, places = [], []
        for rows in self._chunks(text.lengths, device):
            tokens = text.tokens(rows)
            wanted = read[tokens]
            if wanted.any():
                seen = condition and Condition(condition.states, condition.rows[rows])
                chosen = Ragged(text.values.index_select(0, tokens.to(device)), text.lengths[rows])
                outputs.append(self._run(chosen, wanted, seen, projected))
                places.append(tokens[wanted])
        if not outputs:
            return text.values[:0]
        return torch.cat(outputs).index_select(0, torch.cat(places).argsort().to(device, non_blocking=True))

    def after(self, text: Ragged, layers: Sequence[int], condition: Condition | None = None) -> list[Ragged]:
        """States of all tokens, as rows (T, d), after each of `layers`: rising, the lowest is 1."""
        found = []
        for low, high in pairwise([0, *layers]):
            part = Encoder(0, 0, 0, 0, 0.0, 0.0, self.cross)
            part.blocks = self.blocks[low:high]  # the stack's own, not copies
            text = text.with_values(part(text, None, condition))
            found.append(text)
        return found

    def _chunks(self, lengths: Tensor, device: torch.device) -> list[Tensor]:
        """Rows by ascending length, in chunks that run at once."""
        rows = lengths.argsort(stable=True)
        if device.type != "cpu":
            return [rows]
        size = max(1, CHUNK // self.blocks[0].intermediate.out_features)
        chunk = (lengths[rows].cumsum(0) - 1) // size
        return list(rows.split(chunk.unique_consecutive(return_counts=True)[1].tolist()))

    def _run(
        self, text: Ragged, read: Tensor, condition: Condition | None, projected: list[Tensor]
    ) -> Tensor:
        """All blocks over rows of ascending length -> (R, d). `projected`: the condition's keys and values,
        by block."""
        device, x, lengths = text.values.device, text.values, text.lengths
        whole = bool(read.all())
        columns = None if whole else read.nonzero().squeeze(1).to(device, non_blocking=True)
        counts = (
            lengths if whole else read.cumsum(0)[lengths.cumsum(0) - 1].diff(prepend=lengths.new_zeros(1))
        )
        # queries of the first layers, of the last: which may be the same, or the only one
        asked = [counts] if whole or len(self.blocks) == 1 else [lengths, counts]
        plans = [plan_attention(lengths, n, device)._replace(causal=self.causal) for n in asked]
        if condition is not None:
            seen, rank = _order(condition)
            keys = condition.states.tokens(seen).to(device, non_blocking=True)
            crosses = [_plan_cross(condition.states.lengths[seen], rank, n, device) for n in asked]
        for i, block in enumerate(self.blocks):
            last = i == len(self.blocks) - 1
            place = -1 if last else 0
            cross = (projected[i].index_select(0, keys), crosses[place]) if condition is not None else None
            x = block(x, plans[place], cross, columns if last else None)
        return x


def check_layers(layers: Sequence[int], model: nn.Module) -> None:
    """Raises UserError: `layers` are not some of the layers of `model`, rising."""
    if not layers or any(low >= high for low, high in pairwise([0, *layers, model.depths + 1])):
        raise UserError(
            f"layers {list(layers)}: {model.kind} has layers 1 to {model.depths}; name some, each once, "
            "rising"
        )


def _order(condition: Condition) -> tuple[Tensor, Tensor]:
    """The condition's rows that are seen, by ascending length (m,), and for each text row its place among
    them (n,)."""
    seen, place = condition.rows.unique(return_inverse=True)
    order = condition.states.lengths[seen].argsort(stable=True)
    return seen[order], order.argsort()[place]


def _plan_cross(keys: Tensor, rows: Tensor, counts: Tensor, device: torch.device) -> Plan:
    """Plan for condition rows with so many `keys` (m,): all text rows that see one of them ask together.
    `rows` (n,): the condition row that each text row sees; `counts` (n,): its queries."""
    queries = torch.zeros_like(keys).index_add_(0, rows, counts)
    tokens = Ragged(rows, counts).tokens(rows.argsort(stable=True))
    return plan_attention(keys, queries, device, tokens)


def _entangle(text: Ragged, read: Tensor | None, condition: Condition) -> tuple[Ragged, Tensor]:
    """Each row with its condition appended; only text tokens are read."""
    seen = condition.states.take(condition.rows)
    read = torch.ones(len(text.values), dtype=torch.bool) if read is None else read
    unread = torch.zeros(len(seen.values), dtype=torch.bool)
    return join_rows(text, seen), join_rows(text.with_values(read), seen.with_values(unread)).values
