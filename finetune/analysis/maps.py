"""The attention of a word over test pictures, in several languages: measured on emoji scenes, drawn for a few
pictures."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from finetune.analysis.attention import choose_layer, look, quadrants, to_grid, word_maps
from finetune.analysis.figures import Inapplicable, find_fonts, save
from finetune.analysis.parallel import Parallel
from finetune.analysis.words import Thing, find_tokens, find_word, name_in, read_scenes
from finetune.batches import encode_texts
from finetune.formats.examples import Example
from finetune.stores.images import ImageSource
from finetune.stores.records import stem
from raylib.errors import UserError
from raylib.finite import require_finite
from raylib.models.unified import UnifiedModel
from raylib.packed import Ragged
from raylib.tables import markdown_table, open_pyplot, percent
from raylib.text import Tokenizer

CHANCE = 0.25  # of the attention, on a quadrant


class Look(NamedTuple):
    """A word of an item in each language, the picture that it is sought in, and, where it is known, what it
    names there."""

    item: tuple[Example, ...]
    image: str
    words: Mapping[str, str]
    thing: Thing | None
    others: tuple[int, ...]  # quadrants of the picture's other things


def looks_of_words(parallel: Parallel, words: Mapping[str, str]) -> list[Look]:
    """The items whose texts have the given words.

    Raises:
        UserError: none has them all.
    """
    found = [
        Look(row, row[0].images[0], words, None, ())
        for row in parallel.items
        if all(find_word(words[code], e.texts[-1]) for code, e in zip(parallel.languages, row, strict=True))
    ]
    if not found:
        given = " ".join(f"{code}={word}" for code, word in words.items())
        raise UserError(
            f"--words {given}: in none of {len(parallel.items)} parallel items; give one that has them with "
            "--item"
        )
    return found


def looks_of_scenes(parallel: Parallel, path: Path) -> list[Look]:
    """The items of emoji scenes that name something in their picture, in every language. path: of
    scenes.jsonl.

    Raises:
        Inapplicable: there are none; no ground truth.
    """
    if not path.is_file():
        raise Inapplicable(
            "give a word in several languages with --words en=dog de=Hund, and maybe the item with --item ID"
        )
    scenes = read_scenes(path, {stem(name) for row in parallel.items for name in row[0].images})
    found = []
    for row in parallel.items:
        for image in row[0].images:
            things = scenes.get(stem(image), [])
            if named := name_in(row, parallel.languages, things):
                others = tuple(t.quadrant for t in things if t != named[0])
                found.append(Look(row, image, named[1], named[0], others))
                break
    if not found:
        raise Inapplicable(
            f"none of {len(parallel.items)} parallel items names a thing of its picture in every language"
        )
    return found


def measure(
    backbone: UnifiedModel,
    looks: Sequence[Look],
    languages: Sequence[str],
    pictures: ImageSource,
    tokenizer: Tokenizer,
    length: int,
    layer: str,
    drawn: int,
) -> dict[str, Any]:
    """The numbers of the figure.

    Returns:
        {"layer", "items", "on_patches": the attention that is not on the picture's CLS, "drawn": the first
        `drawn` different pictures, [{"id", "image", "word", "text", "map": {language: (g, g)}}]}; where it is
        known what the words name, also shares of the attention on patches, means over items: {"own_quadrant",
        "standard_error", "other_things": a quadrant with another thing in it, "own_by_layer", "chance"}.
    """
    device, windows = next(backbone.parameters()).device, backbone.num_windows
    shown, own, other, by_layer, patches = {}, [], [], [], []
    for item in looks:
        texts = [e.texts[-1] for e in item.item]
        places = [
            find_tokens(tokenizer, text, find_word(item.words[code], text), length)
            for code, text in zip(languages, texts, strict=True)
        ]
        if not all(places):
            continue  # cut off behind `length` tokens
        with torch.inference_mode():
            seen = backbone.encode_images(pictures.read([item.image])["images"].to(device))
        ids = encode_texts(texts, tokenizer, length)
        maps = word_maps(look(backbone, Ragged(ids.values.to(device), ids.lengths), seen), ids, places)
        require_finite(f"attention on {item.image}", maps)
        chosen = choose_layer(maps, layer)
        grids = to_grid(chosen, windows)
        patches.append(chosen[:, 1 + windows :].sum(1))
        if item.thing:
            shares = quadrants(grids)
            own.append(shares[:, item.thing.quadrant])
            by_layer.append(quadrants(to_grid(maps, windows))[:, :, item.thing.quadrant])
            if item.others:
                other.append(shares[:, list(item.others)].mean(1))
        if item.image not in shown and len(shown) < drawn:
            shown[item.image] = _record(item, languages, grids)
    if not patches:
        raise UserError(
            f"the word is behind the first {length} tokens of its sentence, which the model does not see"
        )
    values = {
        "layer": layer,
        "items": len(patches),
        "drawn": list(shown.values()),
        "on_patches": _means(patches, languages),
    }
    if own:
        error = np.std(own, 0, ddof=1) / len(own) ** 0.5 if len(own) > 1 else np.full(len(languages), np.nan)
        values |= {
            "chance": CHANCE,
            "own_quadrant": _means(own, languages),
            "own_by_layer": _means(by_layer, languages),
            "standard_error": {c: float(e) for c, e in zip(languages, error, strict=True) if not np.isnan(e)},
            "other_things": _means(other, languages) if other else {},
        }
    return values


def _means(rows: Sequence[np.ndarray], languages: Sequence[str]) -> dict[str, Any]:
    return dict(zip(languages, np.mean(rows, 0).tolist(), strict=True))


def _record(item: Look, languages: Sequence[str], grids: np.ndarray) -> dict[str, Any]:
    record = {
        "id": item.item[0].id,
        "image": item.image,
        "word": dict(item.words),
        "text": {code: e.texts[-1] for code, e in zip(languages, item.item, strict=True)},
        "map": dict(zip(languages, grids.tolist(), strict=True)),
    }
    if item.thing:
        shares = quadrants(grids)[:, item.thing.quadrant].tolist()
        record |= {"quadrant": item.thing.quadrant, "share": dict(zip(languages, shares, strict=True))}
    return record


def summary(values: dict[str, Any]) -> str:
    """Markdown: shares of the attention, where it is known what the words name."""
    if "own_quadrant" not in values:
        return []
    rows = [
        ["language", "on the quadrant of what is named, %", "± standard error", "on one of another thing, %"]
    ]
    for code, share in values["own_quadrant"].items():
        error, other = values["standard_error"].get(code), values["other_things"].get(code)
        rows.append([code, percent(share), percent(error), percent(other)])
    return markdown_table(rows)


def draw(values: dict[str, Any], pictures: ImageSource, called: str, path: Path) -> set[str]:
    """A row a picture, a column a language: the attention over the picture, from none (as it is) to its
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
        f"{called}: attention of a word to the picture, unified layer: {values['layer']}\n"
        f"darkest red: the greatest of each map{framed}",
        fontsize=9,
    )
    hidden = set()
    for row, record in zip(axes, values["drawn"], strict=True):
        picture = pictures.store.read(record["image"])
        box = (0, picture.shape[1], picture.shape[0], 0)
        for cell in row:
            cell.imshow(picture, extent=box)
            cell.set(xticks=[], yticks=[])
        if "quadrant" in record:
            down, right = divmod(record["quadrant"], 2)
            height, width = picture.shape[0] / 2, picture.shape[1] / 2
            frame = pyplot.Rectangle(
                (right * width, down * height), width, height, fill=False, linestyle="--", linewidth=1.5
            )
            row[0].add_patch(frame)
        row[0].set_title(record["image"], fontsize=8)
        for cell, code in zip(row[1:], languages, strict=True):
            grid = np.array(record["map"][code])
            shade = pyplot.get_cmap("Reds")(np.full(grid.shape, 0.85))
            shade[..., 3] = 0.85 * grid / grid.max()
            cell.imshow(shade, extent=box, interpolation="bilinear")
            word, text = record["word"][code], record["text"][code]
            drawable = word not in undrawable and text not in undrawable
            hidden |= set() if drawable else {code}
            head = f"{code}, {100 * record['share'][code]:.0f} %" if "share" in record else code
            # the word last: a number behind Arabic would change places with it
            cell.set_title(f"{head}: {word}" if drawable else head, fontsize=8, family=families)
            if drawable:
                cell.set_xlabel("\n".join(textwrap.wrap(text, 24)[:4]), fontsize=6.5, family=families)
    save(figure, values, path)
    return hidden
