"""Attention and the transformer block of the text and unified encoders.

Everything is flat: tokens of all rows end to end; a `Plan` says which belong together.

Shape legend: n rows of a run, S keys, Q queries, d width, h heads, e = d / h; T tokens, R tokens that ask.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raylib.packed import Plan, Ragged, plan_attention

# cuDNN, PyTorch's first choice on Hopper, builds a graph for each new shape, and packed batches bring new
# lengths in every step: on an H100 a step of `base` took 38 s with it and 0.54 s without
# (benchmarks/results/gpu.jsonl). The setting is the process's, so it holds for evaluation and for the
# encoders of `transformers` too.
torch.backends.cuda.enable_cudnn_sdp(False)


class Attention(nn.Module):
    """Multi-head attention. Keys and values are projected by `key_value`, apart from the call, so that a
    condition that many rows attend to is projected once."""

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
        if plan.cells is not None:
            queries = queries.index_select(0, plan.cells)
        dropout, out = self.dropout if self.training else 0.0, []
        asked = queries.split([n * q for n, q, _ in plan.runs])
        seen = key_value.split([n * s for n, _, s in plan.runs])
        with torch.autocast(x.device.type, enabled=False):
            for (n, q, s), mine, theirs in zip(plan.runs, asked, seen, strict=True):
                if q:
                    mine = mine.view(n, q, h, d // h).transpose(1, 2)
                    keys, values = theirs.view(n, s, 2, h, d // h).permute(2, 0, 3, 1, 4)
                    run = F.scaled_dot_product_attention(
                        mine, keys, values, dropout_p=dropout, is_causal=plan.causal
                    )
                    out.append(run.transpose(1, 2).reshape(n * q, d))
        out = torch.cat(out)
        return self.output(out if plan.place is None else out.index_select(0, plan.place))


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
        self, x: Tensor, plan: Plan, condition: tuple[Tensor, Plan] | None = None, read: Tensor | None = None
    ) -> Tensor:
        """x (T, d) -> (T, d), or (R, d) at the tokens `read` (R,) alone, which are then those that `plan` has
        as queries.

        `condition` is (projected keys and values (C, 2d), plan); None skips the cross-attention.
        """
        key_value = self.attention.key_value(x)
        if read is not None:
            x = x.index_select(0, read)
        return self._finish(x, key_value, plan, condition)

    def beside(self, x: Tensor, rows: Ragged) -> Tensor:
        """x (n, d) -> (n, d): token i attends to row i of n, and is not part of it."""
        order = rows.lengths.argsort(stable=True)
        sorted_rows, place = rows.take(order), order.to(x.device)
        plan = plan_attention(sorted_rows.lengths, torch.ones_like(order), x.device)
        made = self._finish(
            x.index_select(0, place), self.attention.key_value(sorted_rows.values), plan, None
        )
        return made.index_select(0, place.argsort())

    def _finish(
        self, x: Tensor, key_value: Tensor, plan: Plan, condition: tuple[Tensor, Plan] | None
    ) -> Tensor:
        """Tokens that ask (R, d) and what self-attention sees -> (R, d)."""
        x = self.attention_norm(x + self.dropout(self.attention(x, key_value, plan)))
        if condition is not None:
            x = self.cross_norm(x + self.dropout(self.cross_attention(x, *condition)))
        hidden = self.output(F.gelu(self.intermediate(x)))
        return self.output_norm(x + self.dropout(hidden))


def initialise(module: nn.Module) -> None:
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
