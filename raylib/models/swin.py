"""Swin (Liu et al., 2021) from `transformers` as image encoder: attention in windows, patches merged from
stage to stage.

Shape legend: b images, M patches of the last stage, d width.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raylib.errors import require
from raylib.models.recompute import SplitModule, recompute_layers
from raylib.models.vision import normalize_pixels
from raylib.precision import replace_norms
from raylib.settings import Checkpointing, PixelStats, SwinSizes


class SwinEncoder(SplitModule):
    """Pixels to the states of M = (size / patch / merges)^2 patches, behind their mean in the place of a CLS
    state (CCLM).

    A window is as wide as the last stage's grid, as in every published Swin: 7 patches at 224 pixels, 12 at
    384.
    """

    # of `VisionEncoder`, each with a CLS state; Swin's own are shifted from layer to layer and have none
    num_windows = 0

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
        return self.run_pieces(self._encode, images)

    def set_recomputation(self, checkpointing: Checkpointing, micro_batches: int) -> None:
        super().set_recomputation(checkpointing, micro_batches)
        for stage in cast(Any, self.swin).encoder.layers:
            recompute_layers(stage.blocks, checkpointing)

    def _encode(self, images: Tensor) -> Tensor:
        dtype = next(self.swin.parameters()).dtype
        pixels = normalize_pixels(images, self.pixel_mean, self.pixel_std, dtype)
        states = self.swin(pixels.permute(0, 3, 1, 2)).last_hidden_state
        # CCLM: the mean of the patches stands where a ViT has its CLS
        states = torch.cat([states.mean(1, keepdim=True), states], 1)
        return states if self.output is None else self.output(states)

    def resize(self, size: int) -> None:
        """Another resolution, a multiple of patch x merges: other windows, the biases of relative positions
        interpolated."""
        # the windows' width is part of the architecture: a new model takes the weights of the old one over
        weights = self.swin.state_dict()
        fresh = self._build(size).to(weights["layernorm.weight"])
        for name, value in fresh.state_dict().items():
            if name.endswith("relative_position_bias_table"):
                weights[name] = interpolate_bias(weights[name], len(value))
        fresh.load_state_dict(weights)
        self.swin = fresh

    def _build(self, size: int) -> nn.Module:
        transformers = require("transformers", "transfer")
        config = transformers.SwinConfig(
            image_size=size,
            patch_size=self.patch,
            embed_dim=self.sizes.width,
            depths=list(self.sizes.layers),
            num_heads=list(self.sizes.heads),
            window_size=size // (self.patch * self.sizes.merges),
            drop_path_rate=self.dropout,
        )
        swin = transformers.SwinModel(config, add_pooling_layer=False)
        replace_norms(swin)
        return swin


def interpolate_bias(table: Tensor, rows: int) -> Tensor:
    """Biases ((2 w - 1)^2, heads) by relative position in a window w wide -> (rows, heads) for another
    window, bicubic."""
    # relative positions from -(w - 1) to w - 1 in each direction: a square image of biases, one a head
    old, new = round(len(table) ** 0.5), round(rows**0.5)
    if old == new:
        return table
    grid = F.interpolate(
        table.T.reshape(1, -1, old, old), size=(new, new), mode="bicubic", align_corners=False
    )
    return grid.flatten(2)[0].T.contiguous()
