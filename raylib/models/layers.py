"""Encoders of blocks (`raylib.models.attention`): the text encoder, the unified encoder.

All is flat: tokens of all rows end to end; a plan, made of lengths alone, says which belong together.

Shape legend: n rows, d width; T tokens in all, R tokens of an output mask; m rows and C tokens of a memory.
"""

from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from raylib.errors import UserError
from raylib.models.attention import Block, BlockMemory, Plan, plan_attention
from raylib.models.recompute import RecomputedModule, SplitModule
from raylib.packed import Ragged, join_rows, row_starts, select, token_index, unless_in_order, upload
from raylib.precision import LayerNorm

# On a CPU, rows run in chunks whose widest activation is so many floats: larger ones leave the cache, and
# malloc maps and unmaps them page by page.
CHUNK = 2**23


def init_weights(module: nn.Module) -> None:
    """Normal weights of variance 1 / inputs, zero biases; embeddings of half that deviation, since they are
    also the decoder of the masked-language head. Use with `Module.apply`. At width 768 this is near BERT's
    0.02; at `tiny`'s width 0.02 would all but close the residual branches, and learning takes three times as
    long (docs/results.md)."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.5 * module.embedding_dim**-0.5)


class MemoryLayout(NamedTuple):
    """Of a `Memory`, what plans are made of: the `lengths` (m,) of its rows, and the row that each text row
    attends to, `rows` (n,), both on the CPU."""

    lengths: Tensor
    rows: Tensor


class Memory(NamedTuple):
    """The memory that rows attend to: `states` of images or sentences, and for each text row the state row
    (n,) it attends to (CPU)."""

    states: Ragged
    rows: Tensor

    @property
    def layout(self) -> MemoryLayout:
        """Lengths and rows."""
        return MemoryLayout(self.states.lengths, self.rows)


class TextEmbedding(RecomputedModule):
    """Word and position embeddings, layer norm. Token types, where a checkpoint has them, are folded into the
    positions (`raylib.models.hf_weights`): every text here is of type 0."""

    def __init__(self, vocabulary: int, positions: int, width: int, dropout: float, eps: float):
        super().__init__()
        self.word = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(positions, width)
        self.norm = LayerNorm(width, eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Ragged, positions: Tensor | None = None) -> Tensor:
        """ids (T,), and where they have been planned already their positions (T,) -> (T, d)."""
        return self.add_positions(ids.with_values(self.word(ids.values)), positions)

    def add_positions(self, words: Ragged, positions: Tensor | None = None) -> Tensor:
        """Word embeddings (T, d) -> with their positions, normed (T, d)."""
        if positions is None:
            positions = upload(self.plan(words.lengths), words.values.device)
        return self.dropout(self.norm(words.values + self.position(positions)))

    def plan(self, lengths: Tensor) -> Tensor:
        """(T,) the position of each token in its row, on the CPU.

        Raises:
            UserError: a row is longer than there are positions.
        """
        # on a GPU, an index out of range would end the process without a line of ours
        longest, positions = max(lengths.tolist(), default=0), len(self.position.weight)
        if longest > positions:
            raise UserError(f"a text of {longest} tokens, the model has {positions} positions; lower length=")
        return torch.arange(int(lengths.sum())) - torch.repeat_interleave(row_starts(lengths), lengths)


class BlockList(nn.ModuleList):
    """Blocks, and a type checker knows that they are."""

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[Block]: ...
        def __getitem__(self, index: Any) -> Any: ...


class ChunkPlan(NamedTuple):
    """A chunk of an encoder's rows.

    tokens: (t,) its tokens among all of the call; None: all, in order. output_index: (R,) those of the chunk
    that come out; None: all. attention, cross: of all blocks but the last, and of the last one. memory_index:
    (c,) the memory's tokens that it attends to; None: all. memory_span: first token and end of the part of
    the memory that is the chunk's alone, which `memory_index` then counts from; None: chunks share it.
    """

    tokens: Tensor | None
    output_index: Tensor | None
    attention: tuple[Plan, Plan]
    memory_index: Tensor | None = None
    cross: tuple[Plan, Plan] | None = None
    memory_span: tuple[int, int] | None = None


class EncoderPlan(NamedTuple):
    """A call of an `Encoder`, all that follows from lengths alone: made on the CPU, run on any device.

    joined: (U,) tokens of text and memory, row by row, where these are one row; None: they are not. chunks:
    in which rows run. order: (R,) moves the chunks' outputs into the order of the flat tokens; None: no need.
    """

    joined: Tensor | None
    chunks: tuple[ChunkPlan, ...]
    order: Tensor | None


class Encoder(SplitModule):
    """A stack of `Block`s over packed rows.

    With `cross` the blocks attend to the memory by layers of their own; without (the paper's ablation "w/o
    uni-arch") a memory is appended to the row and one self-attention sees both. With `causal` (set on a copy
    by `raylib.models.decoder`) a token sees nothing of its row that comes after it; all tokens are output.
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
        """Plan a call and run it: states after the last block.

        Args:
            text: values (T, d).
            output_mask: (T,) bool on the CPU; the last block computes these tokens alone. None: all of them.
            memory: seen by cross-attention; None skips it.
        Returns:
            (R, d), the tokens of the mask in flat order; (T, d) without one.
        """
        device = text.values.device
        plan = upload(self.plan(text.lengths, device, output_mask, memory and memory.layout), device)
        return self.run(text.values, plan, None if memory is None else memory.states.values)

    def plan(
        self,
        lengths: Tensor,
        device: torch.device,
        output_mask: Tensor | None = None,
        memory: MemoryLayout | None = None,
    ) -> EncoderPlan:
        """Plan a call on `device` over n rows of these `lengths`; all of the plan is on the CPU."""
        assert output_mask is None or not self.causal, "a causal mask lines up with all queries alone"
        if output_mask is None:
            output_mask = torch.ones(int(lengths.sum()), dtype=torch.bool)
        elif len(lengths) and not output_mask.any():
            # Another worker's rows may have outputs where these have none, and ZeRO adds up the workers'
            # gradients in the order in which backward reaches parameters: so one token runs through all
            # blocks, and is dropped.
            plan = self.plan(lengths, device, torch.arange(len(output_mask)) == 0, memory)
            return plan._replace(order=torch.empty(0, dtype=torch.int64))
        joined = None
        if memory is not None and not self.cross:
            joined, output_mask = _append_memory(lengths, output_mask, memory)
            lengths, memory = lengths + memory.lengths[memory.rows], None
        chunks, tokens_of_outputs, is_whole = [], [], bool(output_mask.all())
        for rows in self._chunks(lengths, device, memory):
            tokens = token_index(lengths, rows)
            chunk_mask = output_mask[tokens]
            if chunk_mask.any():
                chunk_memory, span = None, None
                if memory is not None:
                    chunk_memory, span = _memory_of(memory, rows, self.pieces_now > 1)
                chunk = self._plan_chunk(lengths[rows], device, chunk_mask, is_whole, chunk_memory)
                tokens_in_order = unless_in_order(tokens, len(output_mask))
                chunks.append(chunk._replace(tokens=tokens_in_order, memory_span=span))
                tokens_of_outputs.append(tokens[chunk_mask])
        # chunks took the rows in an order of theirs: back into that of the flat tokens
        order = torch.cat([output_mask.new_empty(0, dtype=torch.int64), *tokens_of_outputs]).argsort()
        return EncoderPlan(joined, tuple(chunks), unless_in_order(order, len(order)))

    def run(self, x: Tensor, plan: EncoderPlan, memory: Tensor | None = None) -> Tensor:
        """Text (T, d) and states of a memory (C, d) -> (R, d), as planned. `plan` is where `x` is."""
        if plan.joined is not None:
            assert memory is not None
            x, memory = torch.cat([x, memory]).index_select(0, plan.joined), None
        memories: Sequence[Tensor | None] = [memory] * len(plan.chunks)
        projected: list[Tensor] | None = None
        if memory is not None and plan.chunks and plan.chunks[0].memory_span:
            memories = _split_spans(memory, [chunk.memory_span or (0, 0) for chunk in plan.chunks])
        elif memory is not None and len(plan.chunks) > 1:
            # once for all chunks and all rows that attend to the same image; one chunk's blocks do it
            # themselves, so that keys and values too can be computed again
            keep = self.blocks if self.pieces_now else ()
            projected = [block.cross_attention.key_value(memory) for block in keep]
        outputs = [
            self.run_piece(self._run_chunk, select(x, chunk.tokens), chunk, values, projected)
            for chunk, values in zip(plan.chunks, memories, strict=True)
        ]
        if not outputs:
            return x[:0]
        return select(torch.cat(outputs) if len(outputs) > 1 else outputs[0], plan.order)

    def layer_states(self, text: Ragged, layers: Sequence[int], memory: Memory | None = None) -> list[Ragged]:
        """States of all tokens, as rows (T, d), after each of `layers`: rising, the lowest is 1."""
        states, device = [], text.values.device
        plan = upload(self.plan(text.lengths, device, None, memory and memory.layout), device)
        for low, high in pairwise([0, *layers]):
            part = Encoder(0, 0, 0, 0, 0.0, 0.0, self.cross)
            part.blocks = self.blocks[low:high]  # the stack's own, not copies
            part.num_pieces = self.num_pieces
            values = part.run(text.values, plan, None if memory is None else memory.states.values)
            text = text.with_values(values)
            states.append(text)
        return states

    def _chunks(self, lengths: Tensor, device: torch.device, memory: MemoryLayout | None) -> list[Tensor]:
        """Rows in chunks that run at once: by ascending length on a CPU, by the memory's rows on a GPU. A GPU
        has one chunk, or one a piece, of about as many tokens."""
        if device.type == "cpu":
            rows = lengths.argsort(stable=True)
        else:
            rows = torch.arange(len(lengths)) if memory is None else memory.rows.argsort(stable=True)
        if memory is not None and self.pieces_now > 1:
            # all texts that attend to a row of the memory are in one piece, which alone projects it
            tokens = memory.lengths.index_add(0, memory.rows, lengths)
            piece = ((tokens.cumsum(0) - 1) * self.pieces_now // tokens.sum())[memory.rows]
            rows = rows[piece[rows].argsort(stable=True)]
            chunk = piece[rows]
        else:
            size = int(lengths.sum()) // max(1, self.pieces_now) + 1
            if device.type == "cpu":
                size = min(size, max(1, CHUNK // self.blocks[0].intermediate.out_features))
            chunk = (lengths[rows].cumsum(0) - 1) // size
        return list(rows.split(chunk.unique_consecutive(return_counts=True)[1].tolist()))

    def _plan_chunk(
        self,
        lengths: Tensor,
        device: torch.device,
        output_mask: Tensor,
        is_whole: bool,
        memory: MemoryLayout | None,
    ) -> ChunkPlan:
        """Plan all blocks over the rows of `_chunks`. `is_whole`: all tokens of the call, not of the chunk
        alone, come out: rows by chance in one chunk do not decide how the last block runs, and so in which
        order parameters get their gradients."""
        counts = lengths
        if not is_whole:  # how many tokens of each row are output
            counts = output_mask.cumsum(0)[lengths.cumsum(0) - 1].diff(prepend=lengths.new_zeros(1))
        # All tokens are queries but in the last layer, where those of the mask alone are: so two plans serve
        # all layers, or one where these are the same, or where the last layer is the only one.
        queries = [counts] if is_whole or len(self.blocks) == 1 else [lengths, counts]
        plans = [plan_attention(lengths, n, device, causal=self.causal) for n in queries]
        output_index = None if is_whole else output_mask.nonzero().squeeze(1)
        chunk = ChunkPlan(None, output_index, (plans[0], plans[-1]))
        if memory is None:
            return chunk
        used, rank = _used_rows(memory, device)
        cross = [_plan_cross(memory.lengths[used], rank, n, device) for n in queries]
        memory_index = unless_in_order(token_index(memory.lengths, used), int(memory.lengths.sum()))
        return chunk._replace(memory_index=memory_index, cross=(cross[0], cross[-1]))

    def _run_chunk(
        self, x: Tensor, chunk: ChunkPlan, memory: Tensor | None, projected: list[Tensor] | None
    ) -> Tensor:
        """All blocks over a chunk (t, d) and its memory (C, d) -> (R, d). `projected`: the memory's keys and
        values, by block, where chunks share them: what is missing is added; None: blocks project it."""
        for i, block in enumerate(self.blocks):
            is_last = i == len(self.blocks) - 1
            cross = None
            if memory is not None and chunk.cross is not None:
                if projected is not None and i == len(projected):
                    # here, where a single chunk's block would do it, so that parameters get their
                    # gradients in the same order: in that of each worker, ZeRO adds up those of all
                    projected.append(block.cross_attention.key_value(memory))
                values = memory if projected is None else projected[i]
                cross = BlockMemory(values, projected is not None, chunk.memory_index, chunk.cross[is_last])
            x = block(x, chunk.attention[is_last], cross, chunk.output_index if is_last else None)
        return x


def _memory_of(
    memory: MemoryLayout, rows: Tensor, is_split: bool
) -> tuple[MemoryLayout, tuple[int, int] | None]:
    """The memory of some text rows; if it `is_split` among pieces, from the first row to the last that these
    attend to, and which tokens that is."""
    chosen = memory.rows[rows]
    if not is_split:
        return memory._replace(rows=chosen), None
    first, end = int(chosen.min()), int(chosen.max()) + 1
    start = int(memory.lengths[:first].sum())
    lengths = memory.lengths[first:end]
    return MemoryLayout(lengths, chosen - first), (start, start + int(lengths.sum()))


def _split_spans(x: Tensor, spans: Sequence[tuple[int, int]]) -> Sequence[Tensor]:
    """Rising parts of x (T, ...) that do not overlap; in one operation, whose backward is one too."""
    bounds = [0, *chain.from_iterable(spans), len(x)]
    return x.split([end - start for start, end in pairwise(bounds)])[1::2]


def _used_rows(memory: MemoryLayout, device: torch.device) -> tuple[Tensor, Tensor]:
    """The memory's rows that any text attends to (m,), by ascending length on a CPU, and for each text row
    the place of its own among them (n,)."""
    used, index = memory.rows.unique(return_inverse=True)
    if device.type != "cpu":
        return used, index
    order = memory.lengths[used].argsort(stable=True)
    return used[order], order.argsort()[index]


def _plan_cross(keys: Tensor, rows: Tensor, counts: Tensor, device: torch.device) -> Plan:
    """Plan for memory rows with so many `keys` (m,): the queries of all text rows that attend to one of them
    are together. `rows` (n,): the memory row of each text row; `counts` (n,): its queries."""
    queries = torch.zeros_like(keys).index_add_(0, rows, counts)
    # on a GPU they are together as they are (`Encoder._chunks`)
    tokens = token_index(counts, rows.argsort(stable=True)) if device.type == "cpu" else None
    return plan_attention(keys, queries, device, tokens)


def _append_memory(lengths: Tensor, output_mask: Tensor, memory: MemoryLayout) -> tuple[Tensor, Tensor]:
    """Rows with their memory behind them: which tokens of text and memory, end to end, these are (U,), and
    (U,) which are output, of the text alone."""
    text = Ragged(torch.arange(len(output_mask)), lengths)
    appended = Ragged(
        len(output_mask) + token_index(memory.lengths, memory.rows), memory.lengths[memory.rows]
    )
    no_output = appended.with_values(torch.zeros_like(appended.values, dtype=torch.bool))
    masks = join_rows(text.with_values(output_mask), no_output)
    return join_rows(text, appended).values, masks.values
