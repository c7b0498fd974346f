"""The ViT (Dosovitskiy et al., 2020), with layer norm before each residual, a CLS token, learned positions.

Shape legend: b images, M patches, d width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raylib.models.attention import Attention, BucketPlan
from raylib.models.recompute import RecomputedModule, SplitModule
from raylib.packed import upload
from raylib.precision import LayerNorm, fusible
from raylib.settings import PixelStats


def normalize_pixels(images: Tensor, mean: PixelStats, std: PixelStats, dtype: torch.dtype) -> Tensor:
    """uint8 images (..., 3) -> less the mean, over the standard deviation; floats have been normalised
    before."""
    if images.is_floating_point():
        return images.to(dtype)
    shift, scale = (
        v if isinstance(v, float | int) else upload(torch.tensor(v, dtype=dtype), images.device)
        for v in (mean, std)
    )
    return (images.to(dtype) - shift) / scale


PLACE_STD = 0.5  # of a window's place at the start, beside states of variance 1


class VisionBlock(RecomputedModule):
    """Pre-norm self-attention and feed-forward."""

    is_block = True

    def __init__(self, width: int, heads: int, feedforward: int, dropout: float, eps: float):
        super().__init__()
        self.attention_norm = LayerNorm(width, eps)
        self.attention = Attention(width, heads, dropout)
        self.output_norm = LayerNorm(width, eps)
        self.intermediate = nn.Linear(width, feedforward)
        self.output = nn.Linear(feedforward, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(b, M + 1, d) -> (b, M + 1, d)."""
        b, n, _ = x.shape
        normed = self.attention_norm(x).flatten(0, 1)
        attended = self.attention(normed, None, BucketPlan([(b, n, n)], None, None))
        return _vision_feed_forward(self, x, attended.view_as(x))


@fusible
def _vision_feed_forward(block: VisionBlock, x: Tensor, attended: Tensor) -> Tensor:
    x = x + block.dropout(attended)
    return x + block.dropout(block.output(F.gelu(block.intermediate(block.output_norm(x)))))


class VisionEncoder(SplitModule):
    """Pixels to M = (size / patch)^2 patch states behind one CLS state.

    With `window`, the image is cut into n windows of so many pixels, which never see each other: each has
    the CLS state and the positions of an image of its own. The states are then the mean of the windows' CLS
    states, these n themselves, and the patches, window after window; to those of each window its place among
    them is added, learned, random at first: a frozen encoder whose places were alike could not tell one
    window from another. An encoder of single drawings so reads a scene of them; what it sees in a window
    does not depend on the place.
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
        pixel_mean: PixelStats = 127.5,
        pixel_std: PixelStats = 127.5,
        window: int | None = None,
        eps: float = 1e-12,
    ):
        """`out`: the width that others want. `pixel_mean`, `pixel_std`: of `normalize_pixels`."""
        super().__init__()
        self.patch, self.window, self.heads = patch, window, heads
        self.pixel_mean, self.pixel_std = pixel_mean, pixel_std
        self.patch_embedding = nn.Linear(3 * patch * patch, width)
        self.cls = nn.Parameter(torch.zeros(width))
        self.position = nn.Parameter(torch.randn(1 + ((window or size) // patch) ** 2, width) * 0.02)
        self.place = nn.Parameter(torch.randn((size // window) ** 2, width) * PLACE_STD) if window else None
        self.blocks = nn.ModuleList(
            VisionBlock(width, heads, feedforward, dropout, eps) for _ in range(layers)
        )
        self.norm = LayerNorm(width, eps)
        self.output = nn.Linear(width, out) if out != width else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 images (b, H, W, 3) -> (b, M + 1, out), or (b, 1 + n + M, out). Normalised here, on the
        device."""
        return self.run_pieces(self._encode, images)

    def _encode(self, images: Tensor) -> Tensor:
        b, height, _, _ = images.shape
        p, side = self.patch, self.window or height
        pixels = normalize_pixels(images, self.pixel_mean, self.pixel_std, self.cls.dtype)
        # Cut the image into its windows, row after row of them, and each window into its patches: every
        # window is then an image of its own, so that self-attention never leaves it. Without windows there is
        # one, the whole image.
        grid = pixels.view(b, height // side, side, -1, side, 3).transpose(2, 3)
        windows = grid.reshape(-1, side // p, p, side // p, p, 3)
        # a patch is flattened as (row, column, colour): `hf_weights.copy_vision` orders a kernel so
        patches = windows.transpose(2, 3).reshape(len(windows), -1, 3 * p * p)
        embedded = self.patch_embedding(patches)
        dtype = self.norm.stream_dtype(embedded)
        cls = self.cls.to(dtype).expand(len(patches), 1, -1)
        x = torch.cat([cls, embedded.to(dtype)], 1) + self.position.to(dtype)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        if self.place is not None:
            # back to one row an image: the mean CLS comes first, where every reader looks for the image's
            x = x.view(b, len(self.place), *x.shape[1:])
            cls = x[:, :, 0]
            x = torch.cat([cls.mean(1, keepdim=True), cls, x[:, :, 1:].flatten(1, 2)], 1)
        x = self.norm(x)
        if self.place is not None:
            place = self.place.to(x.dtype)
            whole = place.new_zeros(1, len(place[0]))
            x = x + torch.cat([whole, place, place.repeat_interleave(patches.shape[1], 0)])
        return x if self.output is None else self.output(x)

    @property
    def num_windows(self) -> int:
        """Number of CLS states, one a window, behind the first state; 0: the image is one window."""
        return 0 if self.place is None else len(self.place)

    @torch.no_grad()
    def resize(self, size: int) -> None:
        """Take images of another resolution: positions, or the windows' places, are interpolated."""
        if self.window:
            assert self.place is not None
            with_cls = torch.cat([self.place[:1], self.place])  # `interpolate` leaves the first row alone
            self.place = nn.Parameter(interpolate(with_cls, (size // self.window) ** 2)[1:].contiguous())
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
