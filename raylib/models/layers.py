"""Attention and the transformer block of the text and unified encoders.

Everything is flat: tokens of all rows end to end; a `Plan` says which belong together.

Shape legend: n rows of a run, S keys, Q queries, d width, h heads, e = d / h; T tokens, R tokens that ask.


Text encoder and unified encoder: stacks of blocks over ragged rows."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raylib.errors import UserError
from raylib.packed import Plan, Ragged, join_rows, plan_attention

# cuDNN, PyTorch's first choice on Hopper, builds a graph for each new shape, and packed batches bring new
# lengths in every step: on an H100 a step of `base` took 38 s with it and 0.54 s without
# (benchmarks/results/gpu.jsonl). The setting is the process's, so it holds for evaluation and for the
# encoders of `transformers` too.
torch.backends.cuda.enable_cudnn_sdp(False)


class Attention(nn.Module):
    """Multi-head attention. Keys and values are projected by `key_value`, apart from the call, so that a
    memory that many rows attend to is projected once."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor, key_value: Tensor, plan: Plan) -> Tensor:
        """x (R, d), key_value (T, 2d), each row's tokens together -> (R, d)."""
        d, h = x.shape[1], self.heads
        queries = self.query(x)
        if x.device.type == "cpu" and queries.dtype == torch.bfloat16:
            # PyTorch's CPU kernel takes ten times as long backward in bf16 as in float32
            # (`benchmarks/README.md`)
            queries, key_value = queries.float(), key_value.float()
        if plan.pad_index is not None:
            queries = queries.index_select(0, plan.pad_index)
        dropout, out = self.dropout if self.training else 0.0, []
        asked = queries.split([n * q for n, q, _ in plan.buckets])
        seen = key_value.split([n * s for n, _, s in plan.buckets])
        with torch.autocast(x.device.type, enabled=False):
            for (n, q, s), mine, theirs in zip(plan.buckets, asked, seen, strict=True):
                if q:
                    mine = mine.view(n, q, h, d // h).transpose(1, 2)
                    keys, values = theirs.view(n, s, 2, h, d // h).permute(2, 0, 3, 1, 4)
                    run = F.scaled_dot_product_attention(
                        mine, keys, values, dropout_p=dropout, is_causal=plan.causal
                    )
                    out.append(run.transpose(1, 2).reshape(n * q, d))
        out = torch.cat(out)
        return self.output(out if plan.unpad_index is None else out.index_select(0, plan.unpad_index))


class Block(nn.Module):
    """Self-attention, pluggable cross-attention, feed-forward; layer norm after each residual, as in BERT and
    XLM-R (paper 2, figure 2)."""

    def __init__(self, width: int, heads: int, feedforward: int, dropout: float, eps: float, cross: bool):
        super().__init__()
        self.attention = Attention(width, heads, dropout)
        self.attention_norm = nn.LayerNorm(width, eps)
        if cross:
            self.cross_attention = Attention(width, heads, dropout)
            self.cross_norm = nn.LayerNorm(width, eps)
        self.intermediate = nn.Linear(width, feedforward)
        self.output = nn.Linear(feedforward, width)
        self.output_norm = nn.LayerNorm(width, eps)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, plan: Plan, memory: tuple[Tensor, Plan] | None = None, read: Tensor | None = None
    ) -> Tensor:
        """x (T, d) -> (T, d), or (R, d) at the tokens `read` (R,) alone, which are then those that `plan` has
        as queries.

        `memory` is (projected keys and values (C, 2d), plan); None skips the cross-attention.
        """
        key_value = self.attention.key_value(x)
        if read is not None:
            x = x.index_select(0, read)
        return self._finish(x, key_value, plan, memory)

    def beside(self, x: Tensor, rows: Ragged) -> Tensor:
        """x (n, d) -> (n, d): token i attends to row i of n, and is not part of it."""
        order = rows.lengths.argsort(stable=True)
        sorted_rows, place = rows.select_rows(order), order.to(x.device)
        plan = plan_attention(sorted_rows.lengths, torch.ones_like(order), x.device)
        made = self._finish(
            x.index_select(0, place), self.attention.key_value(sorted_rows.values), plan, None
        )
        return made.index_select(0, place.argsort())

    def _finish(self, x: Tensor, key_value: Tensor, plan: Plan, memory: tuple[Tensor, Plan] | None) -> Tensor:
        """Tokens that ask (R, d) and what self-attention sees -> (R, d)."""
        x = self.attention_norm(x + self.dropout(self.attention(x, key_value, plan)))
        if memory is not None:
            x = self.cross_norm(x + self.dropout(self.cross_attention(x, *memory)))
        hidden = self.output(F.gelu(self.intermediate(x)))
        return self.output_norm(x + self.dropout(hidden))


def init_weights(module: nn.Module) -> None:
    """Normal weights of variance 1 / inputs, zero biases; embeddings of half that deviation, since they are
    also the decoder of the masked-language head. Use with `Module.apply`. At width 768 this is near BERT's
    0.02; at `tiny`'s width 0.02 would all but close the residual branches, and learning takes three times as
    long (README)."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.5 * module.embedding_dim**-0.5)


# On a CPU, rows run in chunks whose widest activation is so many floats: larger ones leave the cache, and
# malloc maps and unmaps them page by page.
CHUNK = 2**23


class Memory(NamedTuple):
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

    With `cross` the blocks attend to the memory by layers of their own; without (the paper's ablation "w/o
    uni-arch") a memory is appended to the row and one self-attention sees both. With `causal` (set on a
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

    def forward(self, text: Ragged, read: Tensor | None = None, memory: Memory | None = None) -> Tensor:
        """States after the last block.

        Args:
            text: values (T, d).
            read: (T,) bool on the CPU; the last block computes these tokens alone. None: all of them.
            memory: seen by cross-attention; None skips it.
        Returns:
            (R, d), the read tokens in flat order; (T, d) when all are read.
        """
        if memory is not None and not self.cross:
            text, read = _entangle(text, read, memory)
            memory = None
        device = text.values.device
        assert read is None or not self.causal, "a causal mask lines up with all queries alone"
        read = torch.ones(len(text.values), dtype=torch.bool) if read is None else read
        projected = [b.cross_attention.key_value(memory.states.values) for b in self.blocks] if memory else []
        outputs, places = [], []
        for rows in self._chunks(text.lengths, device):
            tokens = text.token_index(rows)
            wanted = read[tokens]
            if wanted.any():
                seen = memory and Memory(memory.states, memory.rows[rows])
                chosen = Ragged(text.values.index_select(0, tokens.to(device)), text.lengths[rows])
                outputs.append(self._run(chosen, wanted, seen, projected))
                places.append(tokens[wanted])
        if not outputs:
            return text.values[:0]
        return torch.cat(outputs).index_select(0, torch.cat(places).argsort().to(device, non_blocking=True))

    def after(self, text: Ragged, layers: Sequence[int], memory: Memory | None = None) -> list[Ragged]:
        """States of all tokens, as rows (T, d), after each of `layers`: rising, the lowest is 1."""
        found = []
        for low, high in pairwise([0, *layers]):
            part = Encoder(0, 0, 0, 0, 0.0, 0.0, self.cross)
            part.blocks = self.blocks[low:high]  # the stack's own, not copies
            text = text.with_values(part(text, None, memory))
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

    def _run(self, text: Ragged, read: Tensor, memory: Memory | None, projected: list[Tensor]) -> Tensor:
        """All blocks over rows of ascending length -> (R, d). `projected`: the memory's keys and values,
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
        if memory is not None:
            seen, rank = _order(memory)
            keys = memory.states.token_index(seen).to(device, non_blocking=True)
            crosses = [_plan_cross(memory.states.lengths[seen], rank, n, device) for n in asked]
        for i, block in enumerate(self.blocks):
            last = i == len(self.blocks) - 1
            place = -1 if last else 0
            cross = (projected[i].index_select(0, keys), crosses[place]) if memory is not None else None
            x = block(x, plans[place], cross, columns if last else None)
        return x


def check_layers(layers: Sequence[int], model: nn.Module) -> None:
    """Raises UserError: `layers` are not some of the layers of `model`, rising."""
    if not layers or any(low >= high for low, high in pairwise([0, *layers, model.num_layers + 1])):
        raise UserError(
            f"layers {list(layers)}: {model.kind} has layers 1 to {model.num_layers}; name some, each once, "
            "rising"
        )


def _order(memory: Memory) -> tuple[Tensor, Tensor]:
    """The memory's rows that are seen, by ascending length (m,), and for each text row its place among
    them (n,)."""
    seen, place = memory.rows.unique(return_inverse=True)
    order = memory.states.lengths[seen].argsort(stable=True)
    return seen[order], order.argsort()[place]


def _plan_cross(keys: Tensor, rows: Tensor, counts: Tensor, device: torch.device) -> Plan:
    """Plan for memory rows with so many `keys` (m,): all text rows that see one of them ask together.
    `rows` (n,): the memory row that each text row sees; `counts` (n,): its queries."""
    queries = torch.zeros_like(keys).index_add_(0, rows, counts)
    tokens = Ragged(rows, counts).token_index(rows.argsort(stable=True))
    return plan_attention(keys, queries, device, tokens)


def _entangle(text: Ragged, read: Tensor | None, memory: Memory) -> tuple[Ragged, Tensor]:
    """Each row with its memory appended; only text tokens are read."""
    seen = memory.states.select_rows(memory.rows)
    read = torch.ones(len(text.values), dtype=torch.bool) if read is None else read
    unread = torch.zeros(len(seen.values), dtype=torch.bool)
    return join_rows(text, seen), join_rows(text.with_values(read), seen.with_values(unread)).values
