"""Attention over packed rows (`raylib.packed`), and the transformer block around it.

Attention runs once for all rows with equally many keys (`Plan`), so that keys are never padded and nothing is
masked.

Shape legend: T tokens in all, n rows, R tokens that are queries. In attention: n rows of a bucket, S keys, Q
queries of each, d width, h heads, e = d / h; C tokens of a memory.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raylib.packed import Ragged
from raylib.precision import LayerNorm

# cuDNN, PyTorch's first choice on Hopper, builds a graph for each new shape, and packed batches bring new
# lengths in every step: on an H100 a step of `base` took 38 s with it and 0.54 s without
# (benchmarks/results/gpu.jsonl). The setting is the process's, so it holds for evaluation and for the
# encoders of `transformers` too.
torch.backends.cuda.enable_cudnn_sdp(False)


class Plan(NamedTuple):
    """The way of attention over n ragged rows of ascending length.

    `buckets`: (rows, queries of the longest, keys) of each bucket of rows with equally many keys. `pad_index`
    (P,): the query token in each cell of the padded queries (any token where a cell is empty); `unpad_index`
    (R,): the cell of each query token. Both are None where nothing is padded or moved. `causal`: every token
    asks, and sees itself and what is before it.
    """

    buckets: list[tuple[int, int, int]]
    pad_index: Tensor | None
    unpad_index: Tensor | None
    causal: bool = False


def plan_attention(keys: Tensor, queries: Tensor, device: torch.device, tokens: Tensor | None = None) -> Plan:
    """Plan attention over n rows.

    Args:
        keys: (n,) ascending number of keys of each row.
        queries: (n,) number of queries of each row.
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
            # (`docs/performance.md`)
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
        return self.output_norm(x + self.dropout(self.output(F.gelu(self.intermediate(x)))))
