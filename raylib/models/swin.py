"""Swin (Liu et al., 2021) from `transformers` as image encoder: attention in windows, patches merged from
stage to stage.

Shape legend: b images, M patches of the last stage, d width.
"""

from typing import Any, cast

import numpy as np
import torch
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
    window, as CCLM and X2-VLM do (BEiT's rule): by a cubic spline whose knots, the old positions, move apart
    geometrically from the middle until they reach the new window's edge."""
    # relative positions from -(w - 1) to w - 1 in each direction: a square image of biases, one a head
    old, new = round(len(table) ** 0.5), round(rows**0.5)
    if old == new:
        return table
    # in float64, as the public code's SciPy: a spline's system is not well conditioned
    spline = torch.from_numpy(_spline_matrix(_geometric_places(old, new), np.arange(new) - new // 2))
    spline = spline.to(table.device)
    grid = spline @ table.T.reshape(-1, old, old).double() @ spline.T
    return grid.flatten(1).T.to(table.dtype).contiguous()


def _geometric_places(old: int, new: int) -> np.ndarray:
    """(old,) where the relative positions of a window stand in one with `new` of them, which is odd: 0 in the
    middle, then steps of 1, q, q^2 ... with q from 1.01 to 1.5, so that the last reaches new // 2."""
    steps = old // 2
    low, high, q = 1.01, 1.5, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if (1 - q**steps) / (1 - q) > new // 2 else (q, high)
    away = np.cumsum(q ** np.arange(steps))
    return np.concatenate([-away[::-1], [0.0], away])


def _spline_matrix(knots: np.ndarray, places: np.ndarray) -> np.ndarray:
    """(p, k): values at k rising knots -> those at `places` (p,) of the cubic spline through them, without a
    knot at the second and the last but one (FITPACK's); beyond the knots, the value at the outermost."""
    count, identity = len(knots), np.eye(len(knots))
    places = np.clip(places, knots[0], knots[-1])
    if count < 4:  # too few for a cubic: the polynomial through them
        return np.vander(places, count) @ np.linalg.inv(np.vander(knots, count))
    # the second derivatives at the knots (k, k) solve a system: slopes meet at the inner knots
    widths = np.diff(knots)
    system, slopes = np.zeros((count, count)), np.zeros((count, count))
    for i in range(1, count - 1):
        left, right = widths[i - 1], widths[i]
        system[i, i - 1 : i + 2] = left, 2 * (left + right), right
        slopes[i] = 6 * ((identity[i + 1] - identity[i]) / right - (identity[i] - identity[i - 1]) / left)
    # ... and third derivatives at the second and the last but one
    for row, i in ((0, 0), (-1, count - 3)):
        left, right = widths[i], widths[i + 1]
        system[row, i : i + 3] = right, -(left + right), left
    curvature = np.linalg.solve(system, slopes)
    at = np.clip(np.searchsorted(knots, places, "right") - 1, 0, count - 2)
    width = widths[at][:, None]
    b = (places[:, None] - knots[at][:, None]) / width
    a = 1 - b
    bend = (a**3 - a) * curvature[at] + (b**3 - b) * curvature[at + 1]
    return a * identity[at] + b * identity[at + 1] + bend * width**2 / 6
