"""ViT (Dosovitskiy et al., 2020): layer norm before each residual, a CLS token, learned positions."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raylib.model.attention import Attention
from raylib.ragged import Plan

Pixels = tuple[float | tuple[float, float, float], float | tuple[float, float, float]]  # (mean, deviation), or one a colour


def normalise(images: Tensor, pixels: Pixels, dtype: torch.dtype) -> Tensor:
    """uint8 images (..., 3) -> what is left of them less the mean, over the deviation."""
    mean, deviation = (v if isinstance(v, float | int) else torch.tensor(v, dtype=dtype, device=images.device) for v in pixels)
    return (images.to(dtype) - mean) / deviation


class VisionBlock(nn.Module):
    """Pre-norm self-attention and feed-forward."""

    def __init__(self, width: int, heads: int, feedforward: int, dropout: float, eps: float):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps)
        self.attention = Attention(width, heads, dropout)
        self.output_norm = nn.LayerNorm(width, eps)
        self.intermediate = nn.Linear(width, feedforward)
        self.output = nn.Linear(feedforward, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(b, M + 1, d) -> (b, M + 1, d)."""
        b, n, _ = x.shape
        normed = self.attention_norm(x).flatten(0, 1)
        attended = self.attention(normed, self.attention.key_value(normed), Plan([(b, n, n)], None, None))
        x = x + self.dropout(attended.view_as(x))
        return x + self.dropout(self.output(F.gelu(self.intermediate(self.output_norm(x)))))


class VisionEncoder(nn.Module):
    """Pixels to M = (size / patch)^2 patch states behind one CLS state."""

    def __init__(
        self, size: int, patch: int, layers: int, width: int, heads: int, feedforward: int, dropout: float,
        out: int, pixels: Pixels = (127.5, 127.5),
    ):  # fmt: skip
        """`out`: the width that others want. `pixels`: (mean, deviation) of 0..255 pixel values, of all colours or of each."""
        super().__init__()
        self.patch, self.pixels = patch, pixels
        self.patch_embedding = nn.Linear(3 * patch * patch, width)
        self.cls = nn.Parameter(torch.zeros(width))
        self.position = nn.Parameter(torch.randn(1 + (size // patch) ** 2, width) * 0.02)
        self.blocks = nn.ModuleList(VisionBlock(width, heads, feedforward, dropout, 1e-12) for _ in range(layers))
        self.norm = nn.LayerNorm(width, 1e-12)
        self.output = nn.Linear(width, out) if out != width else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 images (b, H, W, 3) -> (b, M + 1, out). Normalised here, on the device."""
        b, height, width, _ = images.shape
        p = self.patch
        pixels = normalise(images, self.pixels, self.cls.dtype)
        patches = pixels.view(b, height // p, p, width // p, p, 3).transpose(2, 3).reshape(b, -1, 3 * p * p)
        x = torch.cat([self.cls.expand(b, 1, -1), self.patch_embedding(patches)], 1) + self.position
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x if self.output is None else self.output(x)
