"""ViT (Dosovitskiy et al., 2020): layer norm before each residual, a CLS token, learned positions.

Swin (Liu et al., 2021) from `transformers` as image encoder: attention in windows, patches merged from
stage to stage.

Shape legend: b images, M patches of the last stage, d width.
"""

import math

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from raylib.config import Config
from raylib.errors import UserError
from raylib.models.layers import Attention
from raylib.packed import Plan

PixelStats = float | tuple[float, float, float]  # of a pixel's 0..255: for all colours, or one each

# what published image encoders were trained with; ViTs in Hugging Face folders: 127.5 both
CLIP_MEAN = (255 * 0.48145466, 255 * 0.4578275, 255 * 0.40821073)
CLIP_STD = (255 * 0.26862954, 255 * 0.26130258, 255 * 0.27577711)
IMAGENET_MEAN = (255 * 0.485, 255 * 0.456, 255 * 0.406)
IMAGENET_STD = (255 * 0.229, 255 * 0.224, 255 * 0.225)


def normalize_pixels(images: Tensor, mean: PixelStats, std: PixelStats, dtype: torch.dtype) -> Tensor:
    """uint8 images (..., 3) -> less the mean, over the standard deviation."""
    shift, scale = (
        v if isinstance(v, float | int) else torch.tensor(v, dtype=dtype, device=images.device)
        for v in (mean, std)
    )
    return (images.to(dtype) - shift) / scale


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

    With `window`, the image is cut into n windows of so many pixels, which never see each other: each has
    the CLS state and the positions of an image of its own, and a learned place among them. The states are
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
        pixel_mean: PixelStats = 127.5,
        pixel_std: PixelStats = 127.5,
        window: int | None = None,
    ):
        """`out`: the width that others want. `pixel_mean`, `pixel_std`: of `normalize_pixels`."""
        super().__init__()
        self.patch, self.window = patch, window
        self.pixel_mean, self.pixel_std = pixel_mean, pixel_std
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
        pixels = normalize_pixels(images, self.pixel_mean, self.pixel_std, self.cls.dtype)
        # Cut the image into its windows, row after row of them, and each window into its patches: every
        # window is then an image of its own, so that self-attention never leaves it. Without windows there is
        # one, the whole image.
        grid = pixels.view(b, height // side, side, -1, side, 3).transpose(2, 3)
        windows = grid.reshape(-1, side // p, p, side // p, p, 3)
        # a patch is flattened as (row, column, colour): `hf_weights.copy_vision` orders a kernel so
        patches = windows.transpose(2, 3).reshape(len(windows), -1, 3 * p * p)
        cls = self.cls.expand(len(patches), 1, -1)
        x = torch.cat([cls, self.patch_embedding(patches)], 1) + self.position
        if self.place is not None:
            x = x + self.place.repeat(b, 1)[:, None]
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        if self.place is not None:
            # back to one row an image: the mean CLS comes first, where every reader looks for the image's
            x = x.view(b, len(self.place), *x.shape[1:])
            cls = x[:, :, 0]
            x = torch.cat([cls.mean(1, keepdim=True), cls, x[:, :, 1:].flatten(1, 2)], 1)
        x = self.norm(x)
        return x if self.output is None else self.output(x)

    @property
    def num_windows(self) -> int:
        """How many CLS states, one a window, follow the first state; 0: the image is one window."""
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


class SwinSizes(Config):
    """Sizes of a Swin. The defaults are Swin-B.

    width: of the first stage's states; it doubles from stage to stage. layers, heads: of each stage.
    """

    width: int = 128
    layers: tuple[int, ...] = (2, 2, 18, 2)
    heads: tuple[int, ...] = (4, 8, 16, 32)

    @model_validator(mode="after")
    def _fits(self) -> "SwinSizes":
        if not self.layers or len(self.layers) != len(self.heads):
            raise ValueError(f"layers {self.layers} and heads {self.heads} do not speak of the same stages")
        for stage, heads in enumerate(self.heads):
            if self.width * 2**stage % heads:
                raise ValueError(
                    f"stage {stage} is {self.width * 2**stage} wide, no multiple of its {heads} heads"
                )
        return self

    @property
    def merges(self) -> int:
        """How many patches, in each direction, one of the last stage was made of."""
        return 2 ** (len(self.layers) - 1)


class SwinEncoder(nn.Module):
    """Pixels to the states of M = (size / patch / merges)^2 patches, behind their mean in the place of a CLS
    state (CCLM).

    A window is as wide as the last stage's grid, as in every published Swin: 7 patches at 224 pixels, 12 at
    384.
    """

    num_windows = 0  # that never see each other (`VisionEncoder`): Swin's own are shifted

    def __init__(
        self,
        sizes: SwinSizes,
        size: int,
        patch: int,
        dropout: float,
        out: int,
        pixel_mean: PixelStats,
        pixel_std: PixelStats,
    ):
        """`dropout`: the rate of stochastic depth. `out`: the width that others want. `pixel_mean`,
        `pixel_std`: of `normalize_pixels`."""
        super().__init__()
        self.sizes, self.patch, self.dropout = sizes, patch, dropout
        self.pixel_mean, self.pixel_std = pixel_mean, pixel_std
        self.swin = self._build(size)
        width = sizes.width * sizes.merges
        self.output = nn.Linear(width, out) if out != width else None

    def forward(self, images: Tensor) -> Tensor:
        """uint8 images (b, H, W, 3) -> (b, M + 1, out). Normalised here, on the device."""
        dtype = next(self.swin.parameters()).dtype
        pixels = normalize_pixels(images, self.pixel_mean, self.pixel_std, dtype)
        states = self.swin(pixels.permute(0, 3, 1, 2)).last_hidden_state
        # CCLM: the mean of the patches stands where a ViT has its CLS
        states = torch.cat([states.mean(1, keepdim=True), states], 1)
        return states if self.output is None else self.output(states)

    def resize(self, size: int) -> None:
        """Another resolution, a multiple of patch x merges: other windows, the biases of relative positions
        interpolated."""
        weights = self.swin.state_dict()
        fresh = self._build(size).to(weights["layernorm.weight"])
        for name, value in fresh.state_dict().items():
            if name.endswith("relative_position_bias_table"):
                weights[name] = interpolate_bias(weights[name], len(value))
        fresh.load_state_dict(weights)
        self.swin = fresh

    def _build(self, size: int) -> nn.Module:
        try:
            from transformers import SwinConfig, SwinModel
        except ImportError as e:
            raise UserError(
                f"a Swin image encoder wants transformers ({e}); pip install transformers==5.23.0"
            ) from e
        config = SwinConfig(
            image_size=size,
            patch_size=self.patch,
            embed_dim=self.sizes.width,
            depths=list(self.sizes.layers),
            num_heads=list(self.sizes.heads),
            window_size=size // (self.patch * self.sizes.merges),
            drop_path_rate=self.dropout,
        )
        return SwinModel(config, add_pooling_layer=False)


def interpolate_bias(table: Tensor, rows: int) -> Tensor:
    """Biases ((2 w - 1)^2, heads) by relative position in a window w wide -> (rows, heads) for another
    window, bicubic."""
    old, new = round(len(table) ** 0.5), round(rows**0.5)
    if old == new:
        return table
    grid = F.interpolate(
        table.T.reshape(1, -1, old, old), size=(new, new), mode="bicubic", align_corners=False
    )
    return grid.flatten(2)[0].T.contiguous()
