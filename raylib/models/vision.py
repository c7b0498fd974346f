"""ViT (Dosovitskiy et al., 2020): layer norm before each residual, a CLS token, learned positions."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raylib.models.attention import Attention
from raylib.packed import Plan

Pixels = tuple[
    float | tuple[float, float, float], float | tuple[float, float, float]
]  # (mean, deviation), or one a colour


def normalise(images: Tensor, pixels: Pixels, dtype: torch.dtype) -> Tensor:
    """uint8 images (..., 3) -> what is left of them less the mean, over the deviation."""
    mean, deviation = (
        v if isinstance(v, float | int) else torch.tensor(v, dtype=dtype, device=images.device)
        for v in pixels
    )
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
    """Pixels to M = (size / patch)^2 patch states behind one CLS state.

    With `window`, the picture is cut into n windows of so many pixels, which never see each other: each has
    the CLS state and the positions of a picture of its own, and a learned place among them. The states are
    then the mean of the windows' CLS states, these n themselves, and the patches, window after window. An
    encoder of single drawings so reads a scene of them.
    """

    def __init__(
        self,
        size: int,
        patch: int,
        layers: int,
        width: int,
        heads: int,
        feedforward: int,
        dropout: float,
        out: int,
        pixels: Pixels = (127.5, 127.5),
        window: int | None = None,
    ):
        """`out`: the width that others want. `pixels`: (mean, deviation) of 0..255 pixel values, of all
        colours or of each."""
        super().__init__()
        self.patch, self.pixels, self.window = patch, pixels, window
        self.patch_embedding = nn.Linear(3 * patch * patch, width)
        self.cls = nn.Parameter(torch.zeros(width))
        self.position = nn.Parameter(torch.randn(1 + ((window or size) // patch) ** 2, width) * 0.02)
        self.place = nn.Parameter(torch.zeros((size // window) ** 2, width)) if window else None
        self.blocks = nn.ModuleList(
            VisionBlock(width, heads, feedforward, dropout, 1e-12) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width, 1e-12)
        self.output = nn.Linear(width, out) if out != width else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 images (b, H, W, 3) -> (b, M + 1, out), or (b, 1 + n + M, out). Normalised here, on the
        device."""
        b, height, _, _ = images.shape
        p, side = self.patch, self.window or height
        pixels = normalise(images, self.pixels, self.cls.dtype)
        windows = (
            pixels.view(b, height // side, side, -1, side, 3)
            .transpose(2, 3)
            .reshape(-1, side // p, p, side // p, p, 3)
        )
        patches = windows.transpose(2, 3).reshape(len(windows), -1, 3 * p * p)
        x = (
            torch.cat([self.cls.expand(len(patches), 1, -1), self.patch_embedding(patches)], 1)
            + self.position
        )
        if self.place is not None:
            x = x + self.place.repeat(b, 1)[:, None]
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        if self.place is not None:
            x = x.view(b, len(self.place), *x.shape[1:])
            cls = x[:, :, 0]
            x = torch.cat([cls.mean(1, keepdim=True), cls, x[:, :, 1:].flatten(1, 2)], 1)
        x = self.norm(x)
        return x if self.output is None else self.output(x)

    @torch.no_grad()
    def resize(self, size: int) -> None:
        """Take pictures of another resolution: positions, or the windows' places, are interpolated."""
        if self.window:
            there = torch.cat([self.place[:1], self.place])  # in the place of a CLS
            self.place = nn.Parameter(interpolate(there, (size // self.window) ** 2)[1:].contiguous())
        else:
            self.position = nn.Parameter(interpolate(self.position, (size // self.patch) ** 2).contiguous())


def interpolate(positions: Tensor, patches: int) -> Tensor:
    """Position embeddings (1 + M, d), CLS first, on a square grid -> (1 + patches, d)."""
    old, new = math.isqrt(len(positions) - 1), math.isqrt(patches)
    if old == new:
        return positions
    grid = positions[1:].T.reshape(1, -1, old, old)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([positions[:1], grid.flatten(2)[0].T])
