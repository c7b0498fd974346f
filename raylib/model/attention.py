"""Attention and the transformer block of the text and unified encoders.

Shape legend: n rows, S keys, Q queries, d width, h heads, e = d / h.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention. Keys and values are projected by `key_value`, apart from the call, so that a condition
    that many rows attend to is projected once."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor, key_value: Tensor, mask: Tensor | None) -> Tensor:
        """x (n, Q, d), key_value (n, S, 2d), mask (n, 1, 1, S) True where a key may be seen -> (n, Q, d)."""
        n, q, d = x.shape
        queries = self.query(x).view(n, q, self.heads, -1).transpose(1, 2)
        keys, values = key_value.view(n, -1, 2, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        if x.device.type == "cpu" and queries.dtype == torch.bfloat16:
            # PyTorch's CPU kernel takes ten times as long backward in bf16 as in float32 (`benchmarks/README.md`)
            with torch.autocast("cpu", enabled=False):
                queries, keys, values = queries.float(), keys.float(), values.float()
                out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, dropout_p=dropout)
        else:
            out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, dropout_p=dropout)
        return self.output(out.transpose(1, 2).reshape(n, q, d))


class Block(nn.Module):
    """Self-attention, pluggable cross-attention, feed-forward; layer norm after each residual, as in BERT and XLM-R
    (paper 2, figure 2)."""

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
        self,
        x: Tensor,
        mask: Tensor | None,
        condition: tuple[Tensor, Tensor | None] | None = None,
        read: Tensor | None = None,
    ) -> Tensor:
        """x (n, S, d), mask (n, 1, 1, S) -> (n, S, d), or (n, Q, d) at the columns `read` (n, Q) alone.

        `condition` is (projected keys and values (n, C, 2d), mask (n, 1, 1, C)); None skips the cross-attention.
        """
        key_value = self.attention.key_value(x)
        if read is not None:
            x = x.gather(1, read[..., None].expand(-1, -1, x.shape[-1]))
        x = self.attention_norm(x + self.dropout(self.attention(x, key_value, mask)))
        if condition is not None:
            x = self.cross_norm(x + self.dropout(self.cross_attention(x, *condition)))
        hidden = self.output(F.gelu(self.intermediate(x)))
        return self.output_norm(x + self.dropout(hidden))


def initialise(module: nn.Module) -> None:
    """Normal weights of variance 1 / inputs, zero biases; embeddings of half that deviation, since they are also the
    decoder of the masked-language head. Use with `Module.apply`. At width 768 this is near BERT's 0.02; at `tiny`'s
    width 0.02 would all but close the residual branches, and learning takes three times as long (README)."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.5 * module.embedding_dim**-0.5)


def as_index(array, device: torch.device) -> Tensor:
    """A NumPy index on the device, without waiting for it."""
    return torch.from_numpy(array).to(device, non_blocking=True)
