"""Where in a picture a word looks: weights of the unified encoder's cross-attention (paper 2, figure 3).

The fused kernel keeps its weights to itself. `look` runs the model as it is, notes what goes into each
cross-attention (`raylib.models.layers`) and multiplies queries and keys once more.

Shape legend: l unified layers, T tokens, R queries, h heads, e = d / h, S keys of a picture (CLS, then
patches), g x g patches.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from raylib.errors import UserError
from raylib.models.layers import Attention, Memory
from raylib.models.unified import UnifiedModel
from raylib.packed import Plan, Ragged


def weights_of(attention: Attention, x: Tensor, key_value: Tensor, plan: Plan) -> Tensor:
    """What `attention(x, key_value, plan)` weighs its values by: (R, h, S), float32 or finer. All rows have S
    keys."""
    (n, q, s), *others = plan.buckets
    assert not others and not plan.causal, "rows with different numbers of keys"
    h, e = attention.heads, x.shape[1] // attention.heads
    queries = attention.query(x)
    if plan.pad_index is not None:
        queries = queries.index_select(0, plan.pad_index)
    mine = queries.view(n, q, h, e).transpose(1, 2)
    keys = key_value.view(n, s, 2, h, e)[:, :, 0].permute(0, 2, 3, 1)
    weights = (mine @ keys / math.sqrt(e)).softmax(-1).transpose(1, 2).reshape(n * q, h, s)
    return weights if plan.unpad_index is None else weights.index_select(0, plan.unpad_index)


@torch.inference_mode()
def look(backbone: UnifiedModel, text: Ragged, picture: Ragged) -> Tensor:
    """Weights (l, T, h, S) of all tokens of `text` (ids, n rows) on one picture's states, on the CPU."""
    rows = text.lengths.argsort(stable=True)  # the order in which the encoder runs them
    tokens, sorted_text = text.token_index(rows), text.select_rows(rows)
    blocks = backbone.fusion.blocks
    noted: list[list[Tensor]] = [[] for _ in blocks]

    def note(place: int):
        def hook(attention: nn.Module, inputs: tuple) -> None:
            noted[place].append(weights_of(attention, *inputs))

        return hook

    handles = [block.cross_attention.register_forward_pre_hook(note(i)) for i, block in enumerate(blocks)]
    try:
        states = sorted_text.with_values(backbone.encode_text(sorted_text))
        backbone.fuse(states, memory=Memory(picture, torch.zeros(len(rows), dtype=torch.int64)))
    finally:
        for handle in handles:
            handle.remove()
    weights = torch.stack([torch.cat(parts) for parts in noted]).cpu()
    return weights[:, tokens.argsort()]


def word_maps(weights: Tensor, text: Ragged, words: Sequence[list[int]]) -> np.ndarray:
    """Attention of a word in each of n texts: `weights` (l, T, h, S), `words[i]` the word's tokens in row i
    -> (n, l, S), mean over tokens and heads."""
    starts = text.starts.tolist()
    return (
        torch.stack(
            [
                weights[:, [start + t for t in word]].mean((1, 2))
                for start, word in zip(starts, words, strict=True)
            ]
        )
        .double()
        .numpy()
    )


def choose_layer(maps: np.ndarray, layer: str) -> np.ndarray:
    """(n, l, S) -> (n, S): of the "last" layer, the "mean" over all, or the one with this number (1 is the
    lowest).

    Raises:
        UserError: none of these.
    """
    count = maps.shape[1]
    if layer == "mean":
        return maps.mean(1)
    number = str(count) if layer == "last" else layer
    if not number.isdecimal() or not 1 <= int(number) <= count:
        raise UserError(f"--layer {layer}: give last, mean, or a unified layer from 1 to {count}")
    return maps[:, int(number) - 1]


def to_grid(weights: np.ndarray, windows: int = 0) -> np.ndarray:
    """(..., S) -> (..., g, g): shares of the attention on patches, the CLS left out; they add up to 1. With
    `windows`, their CLS states come next, and patches window after window (`raylib.models.vision`)."""
    patches = weights[..., 1 + windows :]
    side = math.isqrt(patches.shape[-1])
    assert side * side == patches.shape[-1], "a picture's patches are a square"
    shares = patches / patches.sum(-1, keepdims=True)
    if windows:
        across = math.isqrt(windows)
        cells = shares.reshape(*shares.shape[:-1], across, across, side // across, side // across)
        shares = np.swapaxes(cells, -3, -2)
    return shares.reshape(*patches.shape[:-1], side, side)


def quadrants(grid: np.ndarray) -> np.ndarray:
    """(..., g, g) -> (..., 4): what falls into top left, top right, bottom left, bottom right; patches on a
    middle line, where g is odd, fall into both sides alike."""
    g = grid.shape[-1]
    fine = grid.repeat(2, -1).repeat(2, -2) / 4
    return fine.reshape(*grid.shape[:-2], 2, g, 2, g).sum((-3, -1)).reshape(*grid.shape[:-2], 4)
