"""Attention over packed rows (`raylib.packed`), and the transformer block around it.

No key is padded and nothing is masked, in either of two ways. On a CPU attention runs once for all rows with
equally many keys (`BucketPlan`). On a GPU, where each call costs more than the work in it, it runs once: the
kernels read from cumulative lengths where rows begin and end (`VarlenPlan`).

Shape legend: T tokens in all, n rows, R tokens that are queries. In attention: n rows of a bucket, S keys, Q
queries of each, d width, h heads, e = d / h; C tokens of a memory.
"""

from functools import cache
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raylib.models.recompute import RecomputedModule
from raylib.packed import Ragged, select, upload
from raylib.precision import LayerNorm, autocast_dtype, fusible, join_cast

# cuDNN, PyTorch's first choice on Hopper, builds a graph for each new shape, and batches bring new ones in
# every step: on an H100 a step of `base` took 38 s with it and 0.54 s without
# (benchmarks/results/gpu.jsonl). The setting is the process's, so it holds for evaluation and for the
# encoders of `transformers` too.
torch.backends.cuda.enable_cudnn_sdp(False)

MAX_FLASH_WIDTH = 192  # of a head; not every GPU takes wider ones backward


class BucketPlan(NamedTuple):
    """The way of attention over n ragged rows of ascending length, a call for each bucket.

    `buckets`: (rows, queries of the longest, keys) of each bucket of rows with equally many keys. `pad_index`
    (P,): the query token in each cell of the padded queries (any token where a cell is empty); `unpad_index`
    (R,): the cell of each query token. Both are None where nothing is padded or moved. `causal`: every token
    asks, and sees itself and what is before it.
    """

    buckets: list[tuple[int, int, int]]
    pad_index: Tensor | None
    unpad_index: Tensor | None
    causal: bool = False

    def attend(self, queries: Tensor, key_value: Tensor, heads: int, dropout: float) -> Tensor:
        """queries (R, d), key_value (C, 2d) -> (R, d)."""
        if queries.device.type == "cpu" and queries.dtype == torch.bfloat16:
            # PyTorch's CPU kernel takes ten times as long backward in bf16 as in float32
            # (`docs/performance.md`)
            queries, key_value = queries.float(), key_value.float()
        keys, values = key_value.unflatten(1, (2, heads, -1)).unbind(1)
        return self.attend_heads(queries.unflatten(1, (heads, -1)), keys, values, dropout)

    def attend_heads(self, queries: Tensor, keys: Tensor, values: Tensor, dropout: float) -> Tensor:
        """queries (R, h, e), keys and values (C, h, e) -> (R, d)."""
        # within a bucket each row gets as many queries as its longest: empty cells hold some token's query,
        # whose output is never picked up again
        if self.pad_index is not None:
            queries = queries.index_select(0, self.pad_index)
        bucket_queries = queries.split([n * q for n, q, _ in self.buckets])
        bucket_keys, bucket_values = (x.split([n * s for n, _, s in self.buckets]) for x in (keys, values))
        outputs = []
        # all rows of a bucket have equally many keys, so no key is padded and there is no mask, for which
        # the fast kernels would not run
        with torch.autocast(queries.device.type, enabled=False):
            parts = zip(self.buckets, bucket_queries, bucket_keys, bucket_values, strict=True)
            for (n, q, s), q_rhe, k_che, v_che in parts:
                if q:
                    q_nhqe = q_rhe.unflatten(0, (n, q)).transpose(1, 2)
                    k_nhse, v_nhse = (x.unflatten(0, (n, s)).transpose(1, 2) for x in (k_che, v_che))
                    out = F.scaled_dot_product_attention(
                        q_nhqe, k_nhse, v_nhse, dropout_p=dropout, is_causal=self.causal
                    )
                    outputs.append(out.transpose(1, 2).reshape(n * q, -1))
        out = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        return out if self.unpad_index is None else out.index_select(0, self.unpad_index)


class VarlenPlan(NamedTuple):
    """The way of attention over n ragged rows in any order, in one call on a GPU.

    `query_ends`, `key_ends`: (n + 1,) int32, 0 and the end of each row's queries and keys; a row may have no
    queries. `max_queries`, `max_keys`: those of the longest row. `causal`: as in a `BucketPlan`.
    """

    query_ends: Tensor
    key_ends: Tensor
    max_queries: int
    max_keys: int
    causal: bool = False

    def attend(self, queries: Tensor, key_value: Tensor, heads: int, dropout: float) -> Tensor:
        """queries (R, d), key_value (C, 2d) -> (R, d)."""
        keys, values = key_value.unflatten(1, (2, heads, -1)).unbind(1)
        return self.attend_heads(queries.unflatten(1, (heads, -1)), keys, values, dropout)

    def attend_heads(self, queries: Tensor, keys: Tensor, values: Tensor, dropout: float) -> Tensor:
        """queries (R, h, e), keys and values (C, h, e) -> (R, d)."""
        if queries.dtype == torch.float64:  # of tests alone: no kernel takes it
            return self.in_buckets().attend_heads(queries, keys, values, dropout)
        is_half = queries.dtype in (torch.bfloat16, torch.float16)
        is_flash = is_half and _has_flash(queries.device, queries.shape[2])
        if not is_flash:
            queries, keys, values = queries.float(), keys.float(), values.float()
        sizes = self.query_ends, self.key_ends, self.max_queries, self.max_keys
        # The kernels behind `scaled_dot_product_attention`, which itself takes no rows of unequal length;
        # `torch.nn.attention.varlen` wraps the first, but without dropout, and takes the host longer.
        if is_flash:
            out = torch.ops.aten._flash_attention_forward(
                queries, keys, values, *sizes, dropout, self.causal, False
            )[0]
        else:
            saves = torch.is_grad_enabled() and any(x.requires_grad for x in (queries, keys, values))
            out = torch.ops.aten._efficient_attention_forward(
                queries[None], keys[None], values[None], None, *sizes, dropout, int(self.causal), saves
            )[0][0]
        return out.flatten(1)

    def in_buckets(self) -> BucketPlan:
        """The same, each row a bucket of its own. Waits for the device."""
        queries, keys = self.query_ends.diff().tolist(), self.key_ends.diff().tolist()
        return BucketPlan([(1, q, s) for q, s in zip(queries, keys, strict=True)], None, None, self.causal)


Plan = BucketPlan | VarlenPlan


@cache
def _has_flash(device: torch.device, width: int) -> bool:
    """Return whether FlashAttention takes bf16 heads of this width on `device`; "meta" is taken for a GPU
    that has it."""
    is_new = device.type == "meta" or torch.cuda.get_device_capability(device) >= (8, 0)
    return is_new and width % 8 == 0 and width <= MAX_FLASH_WIDTH


def plan_attention(
    keys: Tensor, queries: Tensor, device: torch.device, tokens: Tensor | None = None, causal: bool = False
) -> Plan:
    """Plan attention over n rows that will be on `device`; all of the plan is on the CPU.

    Args:
        keys: (n,) number of keys of each row; on the CPU rows come by ascending number.
        queries: (n,) number of queries of each row.
        tokens: (R,) which query tokens these are, row after row; None, as always on a GPU, when they are in
            this order.
    """
    if device.type != "cpu":
        assert tokens is None
        ends = [F.pad(n.cumsum(0), (1, 0)).to(torch.int32) for n in (queries, keys)]
        return VarlenPlan(ends[0], ends[1], int(queries.max()), int(keys.max()), causal)
    keys, rows = keys.unique_consecutive(return_counts=True)
    longest = torch.stack([run.max() for run in queries.split(rows.tolist())])
    buckets = list(zip(rows.tolist(), longest.tolist(), keys.tolist(), strict=True))
    padded, count = longest.repeat_interleave(rows), int(queries.sum())
    if tokens is None and int(padded.sum()) == count:
        return BucketPlan(buckets, None, None, causal)
    tokens = torch.arange(count) if tokens is None else tokens
    shift = (padded.cumsum(0) - padded) - (queries.cumsum(0) - queries)
    cell = torch.arange(count) + shift.repeat_interleave(queries)
    pad_index, unpad_index = torch.zeros(int(padded.sum()), dtype=torch.int64), torch.empty_like(cell)
    pad_index[cell], unpad_index[tokens] = tokens, cell
    return BucketPlan(buckets, pad_index, unpad_index, causal)


class Attention(nn.Module):
    """Multi-head attention. Keys and values are projected by `key_value`, apart from the call, so that a
    memory that many rows attend to is projected once."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width)
        self.key_value: nn.Module = nn.Linear(width, 2 * width)  # or what `raylib.models.peft` puts there
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor, key_value: Tensor | None, plan: Plan) -> Tensor:
        """x (R, d), key_value (T, 2d), each row's tokens together -> (R, d). `key_value` None: those of x."""
        dropout = self.dropout if self.training else 0.0
        if key_value is None and x.device.type != "cpu" and self._is_plain():
            queries, keys, values = self.project_together(x)
            return self.output(plan.attend_heads(queries, keys, values, dropout))
        key_value = self.key_value(x) if key_value is None else key_value
        return self.output(plan.attend(self.query(x), key_value, self.heads, dropout))

    def _is_plain(self) -> bool:
        """Return whether the projections are what they were built as; `raylib.models.peft` changes them."""
        return type(self.query) is nn.Linear and type(self.key_value) is nn.Linear

    def project_together(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values (T, h, e) of x (T, d) in one product: x is read once, and its gradient
        written once."""
        maps, dtype = (self.query, cast(nn.Linear, self.key_value)), autocast_dtype(x.device.type) or x.dtype
        weight = join_cast(dtype, *(m.weight for m in maps))
        bias = join_cast(dtype, *(m.bias for m in maps))
        return F.linear(x, weight, bias).unflatten(1, (3, self.heads, -1)).unbind(1)


class BlockMemory(NamedTuple):
    """The memory of a block's cross-attention: the `tokens` (C,) of `values`, None: all, in the order of
    `plan`.

    values: states (M, d), which the block projects, so that its keys and values are computed again with it;
        or, where `is_projected`, keys and values (M, 2d) that several calls share.
    """

    values: Tensor
    is_projected: bool
    tokens: Tensor | None
    plan: Plan


class Block(RecomputedModule):
    """Self-attention, pluggable cross-attention, feed-forward; layer norm after each residual, as in BERT and
    XLM-R (paper 2, figure 2)."""

    is_block = True

    def __init__(self, width: int, heads: int, feedforward: int, dropout: float, eps: float, cross: bool):
        super().__init__()
        self.cross = cross
        self.attention = Attention(width, heads, dropout)
        self.attention_norm = LayerNorm(width, eps)
        if cross:
            self.cross_attention = Attention(width, heads, dropout)
            self.cross_norm = LayerNorm(width, eps)
        self.intermediate = nn.Linear(width, feedforward)
        self.output = nn.Linear(feedforward, width)
        self.output_norm = LayerNorm(width, eps)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        plan: Plan,
        memory: BlockMemory | None = None,
        output_index: Tensor | None = None,
    ) -> Tensor:
        """x (T, d) -> (T, d), or (R, d) at the tokens `output_index` (R,) alone, which are then those that
        `plan` has as queries. Without `memory` the cross-attention is skipped.
        """
        cross = None
        if memory is not None:
            values = memory.values
            if not memory.is_projected:
                values = self.cross_attention.key_value(values)
            cross = select(values, memory.tokens), memory.plan
        key_value = None
        if output_index is not None:
            key_value, x = self.attention.key_value(x), x.index_select(0, output_index)
        return self._attend(x, key_value, plan, cross)

    def cross_row(self, x: Tensor, rows: Ragged) -> Tensor:
        """x (n, d) -> (n, d): token i attends to row i of n, and is not part of it."""
        # a plan for the CPU wants rows by ascending length; the outputs go back into the order of the tokens
        order = rows.lengths.argsort(stable=True)
        plan = plan_attention(rows.lengths[order], torch.ones_like(order), x.device)
        moves = rows.token_index(order), order, order.argsort()
        tokens, order, back, plan = upload((*moves, plan), x.device)
        key_value = self.attention.key_value(rows.values.index_select(0, tokens))
        return self._attend(x.index_select(0, order), key_value, plan, None).index_select(0, back)

    def _attend(
        self, x: Tensor, key_value: Tensor | None, plan: Plan, memory: tuple[Tensor, Plan] | None
    ) -> Tensor:
        """Queries (R, d) and the keys and values of self-attention, None: the same tokens'; those of
        cross-attention (C, 2d) with their plan -> (R, d)."""
        x = _add_norm(self.attention_norm, self.dropout, x, self.attention(x, key_value, plan))
        if memory is not None:
            x = _add_norm(self.cross_norm, self.dropout, x, self.cross_attention(x, *memory))
        return _feed_forward(self, x)


@fusible
def _add_norm(norm: nn.Module, dropout: nn.Module, x: Tensor, added: Tensor) -> Tensor:
    return norm(x + dropout(added))


@fusible
def _feed_forward(block: Block, x: Tensor) -> Tensor:
    return block.output_norm(x + block.dropout(block.output(F.gelu(block.intermediate(x)))))
