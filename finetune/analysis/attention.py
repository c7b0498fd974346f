"""Attention of a word to an image: weights of the unified encoder's cross-attention (paper 2, figure 3),
measured on emoji scenes in several languages, drawn for a few images.

The fused kernel keeps its weights to itself. `attention_weights` runs the model as it is, records what goes
into each cross-attention (`raylib.models.layers`) and multiplies queries and keys once more.

Shape legend: l unified layers, T tokens, R queries, h heads, e = d / h, S keys of an image (CLS, then
patches), g x g patches, n languages.
"""

import math
import textwrap
from collections.abc import Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.analysis.parallel import (
    Mention,
    find_tokens,
    find_word,
    write_figure,
)
from finetune.batches import encode_texts
from finetune.stores.images import ImageSource
from raylib.display import markdown_table, open_pyplot, percent
from raylib.errors import UserError
from raylib.finite import require_finite
from raylib.models.attention import Attention, BucketPlan, Plan
from raylib.models.layers import Memory
from raylib.models.unified import UnifiedModel
from raylib.packed import Ragged
from raylib.precision import exact_products
from raylib.text import Tokenizer

CHANCE = 0.25  # of the attention, on a quadrant
FONT = "DejaVu Sans"  # comes with matplotlib
BOXES = "Last Resort"  # a font that has a box for every character


def layer_weights(attention: Attention, x: Tensor, key_value: Tensor, plan: Plan) -> Tensor:
    """Compute the weights that `attention(x, key_value, plan)` gives its values: (R, h, S), float32 or finer.
    All rows have S keys."""
    # all texts look at the same image, so the plan has one bucket: n rows of q queries over s keys, padded
    plan = plan if isinstance(plan, BucketPlan) else plan.in_buckets()
    (n, q, s), *others = plan.buckets
    assert not others and not plan.causal, "rows with different numbers of keys"
    h, e = attention.heads, x.shape[1] // attention.heads
    queries = attention.query(x)
    if plan.pad_index is not None:
        queries = queries.index_select(0, plan.pad_index)
    padded = queries.view(n, q, h, e).transpose(1, 2)
    keys = key_value.view(n, s, 2, h, e)[:, :, 0].permute(0, 2, 3, 1)
    exact = torch.promote_types(padded.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False), exact_products():
        weights = (padded.to(exact) @ keys.to(exact) / math.sqrt(e)).softmax(-1)
    weights = weights.transpose(1, 2).reshape(n * q, h, s)
    return weights if plan.unpad_index is None else weights.index_select(0, plan.unpad_index)


@torch.inference_mode()
def attention_weights(backbone: UnifiedModel, text: Ragged, image: Ragged) -> Tensor:
    """Compute the weights (l, T, h, S) of all tokens of `text` (ids, n rows) on one image's states, on the
    CPU."""
    # the encoder runs rows by their lengths, so hooks see them in this order; undone by the last line
    rows = text.lengths.argsort(stable=True)
    tokens, sorted_text = text.token_index(rows), text.select_rows(rows)
    blocks = backbone.fusion.blocks
    recorded: list[list[Tensor]] = [[] for _ in blocks]

    def record(layer: int, attention: Any, inputs: tuple) -> None:
        recorded[layer].append(layer_weights(attention, *inputs))

    handles = [
        block.cross_attention.register_forward_pre_hook(partial(record, i)) for i, block in enumerate(blocks)
    ]
    try:
        states = sorted_text.with_values(backbone.encode_text(sorted_text))
        backbone.fuse(states, memory=Memory(image, torch.zeros(len(rows), dtype=torch.int64)))
    finally:
        for handle in handles:
            handle.remove()
    weights = torch.stack([torch.cat(parts) for parts in recorded]).cpu()
    return weights[:, tokens.argsort()]


def word_maps(weights: Tensor, text: Ragged, words: Sequence[list[int]]) -> np.ndarray:
    """Attention of a word in each of n texts: `weights` (l, T, h, S), `words[i]` the word's tokens in row i
    -> (n, l, S), mean over tokens and heads."""
    pairs = zip(text.starts.tolist(), words, strict=True)
    maps = [weights[:, [start + t for t in word]].mean((1, 2)) for start, word in pairs]
    return torch.stack(maps).double().numpy()


def select_layer(maps: np.ndarray, layer: str) -> np.ndarray:
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
    `windows`, their CLS states come next, and patches window after window."""
    patches = weights[..., 1 + windows :]
    side = math.isqrt(patches.shape[-1])
    assert side * side == patches.shape[-1], "an image's patches are a square"
    shares = patches / patches.sum(-1, keepdims=True)
    # windows are squares of patches: (across, across, side, side) -> rows of patches over the whole image
    if windows:
        across = math.isqrt(windows)
        cells = shares.reshape(*shares.shape[:-1], across, across, side // across, side // across)
        shares = np.swapaxes(cells, -3, -2)
    return shares.reshape(*patches.shape[:-1], side, side)


def quadrant_shares(grid: np.ndarray) -> np.ndarray:
    """(..., g, g) -> (..., 4): what falls into top left, top right, bottom left, bottom right; patches on a
    middle line, where g is odd, fall into both sides alike."""
    g = grid.shape[-1]
    # each patch as 2 x 2, so that an odd g has a middle line to cut at
    fine = grid.repeat(2, -1).repeat(2, -2) / 4
    return fine.reshape(*grid.shape[:-2], 2, g, 2, g).sum((-3, -1)).reshape(*grid.shape[:-2], 4)


def measure_attention(
    backbone: UnifiedModel,
    mentions: Sequence[Mention],
    languages: Sequence[str],
    source: ImageSource,
    tokenizer: Tokenizer,
    length: int,
    layer: str,
    num_images: int,
) -> dict[str, Any]:
    """Measure the numbers of the figure.

    Returns:
        {"layer", "items", "on_patches": the attention that is not on the image's CLS, "drawn": the first
        `num_images` different images, [{"id", "image", "word", "text", "map": {language: (g, g)}}]}; where it
        is known what the words name, also shares of the attention on patches, means over items:
        {"own_quadrant", "standard_error", "other_things": a quadrant with another thing in it,
        "own_by_layer", "chance"}.
    """
    device, num_windows = next(backbone.parameters()).device, backbone.num_windows
    examples: dict[str, dict[str, Any]] = {}
    named_shares, other_shares, by_layer, patches = [], [], [], []
    for mention in mentions:
        texts, tokens = [e.texts[-1] for e in mention.item], []
        for code, text in zip(languages, texts, strict=True):
            span = find_word(mention.words[code], text)
            tokens.append(find_tokens(tokenizer, text, span, length) if span else [])
        if not all(tokens):
            continue  # cut off behind `length` tokens
        with torch.inference_mode():
            image = backbone.encode_images(source.read([mention.image])["images"].to(device))
        ids = encode_texts(texts, tokenizer, length)
        weights = attention_weights(backbone, Ragged(ids.values.to(device), ids.lengths), image)
        maps = word_maps(weights, ids, tokens)
        require_finite(f"attention on {mention.image}", maps)
        layer_maps = select_layer(maps, layer)
        grids = to_grid(layer_maps, num_windows)
        patches.append(layer_maps[:, 1 + num_windows :].sum(1))
        if mention.object:
            shares = quadrant_shares(grids)
            named_shares.append(shares[:, mention.object.quadrant])
            by_layer.append(quadrant_shares(to_grid(maps, num_windows))[:, :, mention.object.quadrant])
            if mention.other_quadrants:
                other_shares.append(shares[:, list(mention.other_quadrants)].mean(1))
        if mention.image not in examples and len(examples) < num_images:
            examples[mention.image] = _record(mention, languages, grids)
    if not patches:
        raise UserError(
            f"the word is behind the first {length} tokens of its sentence, which the model does not see"
        )
    values: dict[str, Any] = {
        "layer": layer,
        "items": len(patches),
        "drawn": list(examples.values()),
        "on_patches": _means(patches, languages),
    }
    if named_shares:
        has_error = len(named_shares) > 1
        error = np.std(named_shares, 0, ddof=1) / len(named_shares) ** 0.5 if has_error else np.empty(0)
        values |= {
            "chance": CHANCE,
            "own_quadrant": _means(named_shares, languages),
            "own_by_layer": _means(by_layer, languages),
            "standard_error": dict(zip(languages, error.tolist(), strict=has_error)),
            "other_things": _means(other_shares, languages) if other_shares else {},
        }
    return values


def _means(rows: Sequence[np.ndarray], languages: Sequence[str]) -> dict[str, Any]:
    return dict(zip(languages, np.mean(rows, 0).tolist(), strict=True))


def _record(mention: Mention, languages: Sequence[str], grids: np.ndarray) -> dict[str, Any]:
    record: dict[str, Any] = {
        "id": mention.item[0].id,
        "image": mention.image,
        "word": dict(mention.words),
        "text": {code: e.texts[-1] for code, e in zip(languages, mention.item, strict=True)},
        "map": dict(zip(languages, grids.tolist(), strict=True)),
    }
    if mention.object:
        shares = quadrant_shares(grids)[:, mention.object.quadrant].tolist()
        record |= {"quadrant": mention.object.quadrant, "share": dict(zip(languages, shares, strict=True))}
    return record


def attention_table(values: dict[str, Any]) -> str:
    """Markdown: shares of the attention, where it is known what the words name."""
    rows = [
        ["language", "on the quadrant of what is named, %", "± standard error", "on one of another thing, %"]
    ]
    for code, share in values["own_quadrant"].items():
        error, other = values["standard_error"].get(code), values["other_things"].get(code)
        rows.append([code, percent(share), percent(error), percent(other)])
    return markdown_table(rows)


def draw_attention(values: dict[str, Any], source: ImageSource, title: str, path: Path) -> set[str]:
    """Draw a row an image, a column a language: the attention over the image, from none (as it is) to its
    greatest (red).

    Returns:
        The languages whose words no font here can draw: their captions are the language's code alone.
    """
    pyplot = open_pyplot()
    languages = list(values["drawn"][0]["word"])
    captions = {
        text for record in values["drawn"] for text in (*record["word"].values(), *record["text"].values())
    }
    families, undrawable = find_fonts(captions)
    rows, columns = len(values["drawn"]), len(languages) + 1
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(1.75 * columns, 0.6 + 2.45 * rows), layout="constrained", squeeze=False
    )
    framed = "; %: share in the framed quadrant" if "own_quadrant" in values else ""
    figure.suptitle(
        f"{title}: attention of a word to the image, unified layer: {values['layer']}\n"
        f"darkest red: the greatest of each map{framed}",
        fontsize=9,
    )
    unprintable: set[str] = set()
    for row, record in zip(axes, values["drawn"], strict=True):
        image = source.store.read(record["image"])
        height, width = image.shape[:2]
        box = (0, width, height, 0)
        for cell in row:
            cell.imshow(image, extent=box)
            cell.set(xticks=[], yticks=[])
        if "quadrant" in record:
            down, right = divmod(record["quadrant"], 2)
            corner = right * width / 2, down * height / 2
            frame = pyplot.Rectangle(corner, width / 2, height / 2, fill=False, linestyle="--", linewidth=1.5)
            row[0].add_patch(frame)
        row[0].set_title(record["image"], fontsize=8)
        for cell, code in zip(row[1:], languages, strict=True):
            grid = np.array(record["map"][code])
            shade = pyplot.get_cmap("Reds")(np.full(grid.shape, 0.85))
            shade[..., 3] = 0.85 * grid / grid.max()
            cell.imshow(shade, extent=box, interpolation="bilinear")
            word, text = record["word"][code], record["text"][code]
            drawable = word not in undrawable and text not in undrawable
            unprintable |= set() if drawable else {code}
            head = f"{code}, {100 * record['share'][code]:.0f} %" if "share" in record else code
            # the word last: a number behind Arabic would change places with it
            cell.set_title(f"{head}: {word}" if drawable else head, fontsize=8, family=families)
            if drawable:
                cell.set_xlabel("\n".join(textwrap.wrap(text, 24)[:4]), fontsize=6.5, family=families)
    write_figure(figure, values, path)
    return unprintable


def find_fonts(texts: Iterable[str]) -> tuple[list[str], set[str]]:
    """(font families that draw `texts` between them, best first; those of the texts that no font here can
    draw)."""
    from matplotlib import font_manager

    texts = set(texts)
    missing = {ord(c) for text in texts for c in text if not c.isspace()} - _characters(
        font_manager.findfont(FONT)
    )
    families = [FONT]
    for font in font_manager.fontManager.ttflist:
        if (
            missing
            and font.style == "normal"
            and not font.name.startswith(BOXES)
            and missing & _characters(font.fname)
        ):
            families.append(font.name)
            missing -= _characters(font.fname)
    return families, {text for text in texts if any(ord(c) in missing for c in text)}


@cache
def _characters(path: str) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(path).get_charmap())
