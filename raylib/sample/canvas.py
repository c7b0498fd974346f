"""Scenes: one to four emoji in the quadrants of a square white picture, each large or small."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from raylib.data.images import decode, resize
from raylib.randomness import Key, permutation, uniform
from raylib.sample.concepts import read_pictures

LARGE, SMALL = 0.94, 0.6  # shares of a quadrant's side


class Placed(NamedTuple):
    """A concept's drawing on the canvas: its key, its top left corner and its side in pixels, its quadrant (0
    top left, 1 top right, 2 bottom left, 3 bottom right) and whether it is drawn large."""

    key: str
    left: int
    top: int
    size: int
    quadrant: int
    large: bool


def place(keys: Sequence[str], size: int, *seeds: Key) -> list[Placed]:
    """Places for up to four concepts in different quadrants of a picture of `size` pixels, drawn from
    `seeds`."""
    cell = size // 2
    quadrants = permutation(4, *seeds, "quadrant")
    placed = []
    for i, key in enumerate(keys):
        large, x, y = uniform(*seeds, "place", i, np.arange(3)).tolist()
        side = round(cell * (LARGE if large < 0.5 else SMALL))
        quadrant, room = int(quadrants[i]), (cell - side) // 2 + 1  # about the middle of its quadrant
        left, top = ((cell - side - room + 1) // 2 + int(share * room) for share in (x, y))
        left, top = cell * (quadrant % 2) + left, cell * (quadrant // 2) + top
        placed.append(Placed(key, left, top, side, quadrant, large < 0.5))
    return placed


def draw(placed: Sequence[Placed], drawings: Mapping[str, np.ndarray], size: int) -> np.ndarray:
    """The picture: uint8 RGB (size, size, 3)."""
    canvas = np.full((size, size, 3), 255, np.uint8)
    for p in placed:
        canvas[p.top : p.top + p.size, p.left : p.left + p.size] = resize(drawings[p.key], p.size)
    return canvas


@cache
def decode_drawings(vendor: str) -> dict[str, np.ndarray]:
    """Key -> uint8 RGB (64, 64, 3) of every concept that `vendor` draws here."""
    return {key: decode(data, f"{vendor} {key}") for key, data in read_pictures(vendor).items()}
