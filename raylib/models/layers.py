"""Attention, the transformer block, and stacks of blocks: the text encoder and the unified encoder.

Everything is flat: tokens of all rows end to end; a `Plan` (`raylib.packed`) says which belong together.

Shape legend: n rows of a bucket, S keys, Q queries of each, d width, h heads, e = d / h; T tokens in all, R
tokens of an output mask, C tokens of a memory.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raylib.packed import Plan, Ragged, join_rows, plan_attention

# cuDNN, PyTorch's first choice on Hopper, builds a graph for each new shape, and packed batches bring new
# lengths in every step: on an H100 a step of `base` took 38 s with it and 0.54 s without
# (benchmarks/results/gpu.jsonl). The setting is the process's, so it holds for evaluation and for the
# encoders of `transformers` too.
torch.backends.cuda.enable_cudnn_sdp(False)

# On a CPU, rows run in chunks whose widest activation is so many floats: larger ones leave the cache, and
# malloc maps and unmaps them page by page.
CHUNK = 2**23


class Attention(nn.Module):
    """Multi-head attention. Keys and values are projected by `key_value`, apart from the call, so that a
    memory that many rows attend to is projected once."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width)
        self.key_value: nn.Module = nn.Linear(width, 2 * width)  # or what `raylib.models.peft` puts there
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor, key_value: Tensor, plan: Plan) -> Tensor:
        """x (R, d), key_value (T, 2d), each row's tokens together -> (R, d)."""
        d, h = x.shape[1], self.heads
        queries = self.query(x)
        if x.device.type == "cpu" and queries.dtype == torch.bfloat16:
            # PyTorch's CPU kernel takes ten times as long backward in bf16 as in float32
            # (`benchmarks/README.md`)
            queries, key_value = queries.float(), key_value.float()
        # within a bucket each row gets as many queries as its longest: empty cells hold some token's query,
        # whose output is never picked up again
        if plan.pad_index is not None:
            queries = queries.index_select(0, plan.pad_index)
        bucket_queries = queries.split([n * q for n, q, _ in plan.buckets])
        bucket_keys = key_value.split([n * s for n, _, s in plan.buckets])
        dropout, outputs = self.dropout if self.training else 0.0, []
        # all rows of a bucket have equally many keys, so no key is padded and there is no mask, for which
        # the fast kernels would not run
        with torch.autocast(x.device.type, enabled=False):
            for (n, q, s), q_nqd, kv_nsd in zip(plan.buckets, bucket_queries, bucket_keys, strict=True):
                if q:
                    q_nhqe = q_nqd.view(n, q, h, d // h).transpose(1, 2)
                    k_nhse, v_nhse = kv_nsd.view(n, s, 2, h, d // h).permute(2, 0, 3, 1, 4)
                    out = F.scaled_dot_product_attention(
                        q_nhqe, k_nhse, v_nhse, dropout_p=dropout, is_causal=plan.causal
                    )
                    outputs.append(out.transpose(1, 2).reshape(n * q, d))
        out = torch.cat(outputs)
        return self.output(out if plan.unpad_index is None else out.index_select(0, plan.unpad_index))


class Block(nn.Module):
    """Self-attention, pluggable cross-attention, feed-forward; layer norm after each residual, as in BERT and
    XLM-R (paper 2, figure 2)."""

    def __init__(self, width: int, heads: int, feedforward: int, dropout: float, eps: float, cross: bool):
        super().__init__()
        self.cross = cross
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
        self,
        x: Tensor,
        plan: Plan,
        memory: tuple[Tensor, Plan] | None = None,
        output_index: Tensor | None = None,
    ) -> Tensor:
        """x (T, d) -> (T, d), or (R, d) at the tokens `output_index` (R,) alone, which are then those that
        `plan` has as queries.

        `memory` is (projected keys and values (C, 2d), plan); None skips the cross-attention.
        """
        key_value = self.attention.key_value(x)
        if output_index is not None:
            x = x.index_select(0, output_index)
        return self._attend(x, key_value, plan, memory)

    def cross_row(self, x: Tensor, rows: Ragged) -> Tensor:
        """x (n, d) -> (n, d): token i attends to row i of n, and is not part of it."""
        # a plan wants rows by ascending length; the outputs go back into the order in which tokens came
        order = rows.lengths.argsort(stable=True)
        sorted_rows, index = rows.select_rows(order), order.to(x.device)
        plan = plan_attention(sorted_rows.lengths, torch.ones_like(order), x.device)
        key_value = self.attention.key_value(sorted_rows.values)
        return self._attend(x.index_select(0, index), key_value, plan, None).index_select(0, index.argsort())

    def _attend(self, x: Tensor, key_value: Tensor, plan: Plan, memory: tuple[Tensor, Plan] | None) -> Tensor:
        """Queries (R, d) and the keys and values of self-attention -> (R, d)."""
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


class Memory(NamedTuple):
    """What rows attend to: `states` of images or sentences, and for each text row the state row (n,) it
    attends to (CPU)."""

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
        return self.add_positions(ids.with_values(self.word(ids.values)))

    def add_positions(self, words: Ragged) -> Tensor:
        """Word embeddings (T, d) -> with their positions, normed (T, d)."""
        position = torch.arange(len(words.values)) - torch.repeat_interleave(words.starts, words.lengths)
        position = position.to(words.values.device, non_blocking=True)
        return self.dropout(self.norm(words.values + self.position(position)))


class BlockList(nn.ModuleList):
    """Blocks, and a type checker knows that they are."""

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[Block]: ...
        def __getitem__(self, index: Any) -> Any: ...


class Encoder(nn.Module):
    """A stack of `Block`s over packed rows.

    With `cross` the blocks attend to the memory by layers of their own; without (the paper's ablation "w/o
    uni-arch") a memory is appended to the row and one self-attention sees both. With `causal` (set on a copy
    by `finetune.decoder`) a token sees nothing of its row that comes after it, and all tokens are output.
    """

    causal = False

    def __init__(
        self, layers: int, width: int, heads: int, feedforward: int, dropout: float, eps: float, cross: bool
    ):
        super().__init__()
        self.cross = cross
        self.blocks = BlockList(Block(width, heads, feedforward, dropout, eps, cross) for _ in range(layers))

    def forward(
        self, text: Ragged, output_mask: Tensor | None = None, memory: Memory | None = None
    ) -> Tensor:
        """States after the last block.

        Args:
            text: values (T, d).
            output_mask: (T,) bool on the CPU; the last block computes these tokens alone. None: all of them.
            memory: seen by cross-attention; None skips it.
        Returns:
            (R, d), the tokens of the mask in flat order; (T, d) without one.
        """
        if memory is not None and not self.cross:
            text, output_mask = _append_memory(text, output_mask, memory)
            memory = None
        device = text.values.device
        assert output_mask is None or not self.causal, "a causal mask lines up with all queries alone"
        output_mask = torch.ones(len(text.values), dtype=torch.bool) if output_mask is None else output_mask
        # once for all chunks and all rows that attend to the same image
        projected = [b.cross_attention.key_value(memory.states.values) for b in self.blocks] if memory else []
        outputs, tokens_of_outputs = [], []
        for rows in self._chunks(text.lengths, device):
            tokens = text.token_index(rows)
            chunk_mask = output_mask[tokens]
            if chunk_mask.any():
                chunk = Ragged(text.values.index_select(0, tokens.to(device)), text.lengths[rows])
                chunk_memory = memory and Memory(memory.states, memory.rows[rows])
                outputs.append(self._run(chunk, chunk_mask, chunk_memory, projected))
                tokens_of_outputs.append(tokens[chunk_mask])
        if not outputs:
            return text.values[:0]
        # chunks took the rows by length: back into the order of the flat tokens
        order = torch.cat(tokens_of_outputs).argsort().to(device, non_blocking=True)
        return torch.cat(outputs).index_select(0, order)

    def layer_states(self, text: Ragged, layers: Sequence[int], memory: Memory | None = None) -> list[Ragged]:
        """States of all tokens, as rows (T, d), after each of `layers`: rising, the lowest is 1."""
        states = []
        for low, high in pairwise([0, *layers]):
            part = Encoder(0, 0, 0, 0, 0.0, 0.0, self.cross)
            part.blocks = self.blocks[low:high]  # the stack's own, not copies
            text = text.with_values(part(text, None, memory))
            states.append(text)
        return states

    def _chunks(self, lengths: Tensor, device: torch.device) -> list[Tensor]:
        """Rows by ascending length, in chunks that run at once."""
        rows = lengths.argsort(stable=True)
        if device.type != "cpu":
            return [rows]
        size = max(1, CHUNK // self.blocks[0].intermediate.out_features)
        chunk = (lengths[rows].cumsum(0) - 1) // size
        return list(rows.split(chunk.unique_consecutive(return_counts=True)[1].tolist()))

    def _run(
        self, text: Ragged, output_mask: Tensor, memory: Memory | None, projected: list[Tensor]
    ) -> Tensor:
        """All blocks over rows of ascending length -> (R, d). `projected`: the memory's keys and values, by
        block."""
        device, x, lengths = text.values.device, text.values, text.lengths
        is_whole = bool(output_mask.all())
        output_index = None if is_whole else output_mask.nonzero().squeeze(1).to(device, non_blocking=True)
        counts = lengths
        if not is_whole:  # how many tokens of each row are output
            counts = output_mask.cumsum(0)[lengths.cumsum(0) - 1].diff(prepend=lengths.new_zeros(1))
        # All tokens are queries but in the last layer, where those of the mask alone are: so two plans serve
        # all layers, or one where these are the same, or where the last layer is the only one.
        queries = [counts] if is_whole or len(self.blocks) == 1 else [lengths, counts]
        plans = [plan_attention(lengths, n, device)._replace(causal=self.causal) for n in queries]
        if memory is not None:
            used, rank = _used_rows(memory)
            memory_tokens = memory.states.token_index(used).to(device, non_blocking=True)
            cross_plans = [_plan_cross(memory.states.lengths[used], rank, n, device) for n in queries]
        for i, block in enumerate(self.blocks):
            is_last = i == len(self.blocks) - 1
            which = -1 if is_last else 0
            cross = None
            if memory is not None:
                cross = projected[i].index_select(0, memory_tokens), cross_plans[which]
            x = block(x, plans[which], cross, output_index if is_last else None)
        return x


def _used_rows(memory: Memory) -> tuple[Tensor, Tensor]:
    """The memory's rows that any text attends to, by ascending length (m,), and for each text row the place
    of its own among them (n,)."""
    used, index = memory.rows.unique(return_inverse=True)
    order = memory.states.lengths[used].argsort(stable=True)
    return used[order], order.argsort()[index]


def _plan_cross(keys: Tensor, rows: Tensor, counts: Tensor, device: torch.device) -> Plan:
    """Plan for memory rows with so many `keys` (m,): the queries of all text rows that attend to one of them
    are together. `rows` (n,): the memory row of each text row; `counts` (n,): its queries."""
    queries = torch.zeros_like(keys).index_add_(0, rows, counts)
    tokens = Ragged(rows, counts).token_index(rows.argsort(stable=True))
    return plan_attention(keys, queries, device, tokens)


def _append_memory(text: Ragged, output_mask: Tensor | None, memory: Memory) -> tuple[Ragged, Tensor]:
    """Each row with its memory appended; only text tokens are output."""
    appended = memory.states.select_rows(memory.rows)
    text_mask = torch.ones(len(text.values), dtype=torch.bool) if output_mask is None else output_mask
    no_output = torch.zeros(len(appended.values), dtype=torch.bool)
    masks = join_rows(text.with_values(text_mask), appended.with_values(no_output))
    return join_rows(text, appended), masks.values
