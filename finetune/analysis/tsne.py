"""Words and regions of a few objects in one figure: a point a state, like ones near each other (paper 3,
figure 3).

A word names an object of its item's image, in each language: the mean of its tokens' states after the last
layer. A region is where such an object stands: the mean of the image's states there, by their weights. Of
emoji scenes these are the states of the patches that its box covers, each by how much of it; of region
features the regions that are called so, where each of an image's regions has a name.

In single-stream backbones, and with fusion=entangled, images pass the last layer in one row with words; a
region is taken from the row of the first language. With cross-attention they do not: texts alone have unified
states. A region is then what the last unified layer's cross-attention adds to a word that looks there alone,
that is the image encoder's state, mapped to values and by the output. In that sum the two are comparable;
before it they share no space.

Shape legend: T tokens, S states of an image: regions, or CLS states, then M patches, g x g; p
words, r regions, d width.
"""

import csv
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from finetune.analysis.attention import to_grid
from finetune.analysis.parallel import (
    Inapplicable,
    Mention,
    Parallel,
    SceneObject,
    find_named,
    find_tokens,
    find_word,
    read_scenes,
    write_figure,
)
from finetune.batches import encode_texts, read_inputs
from finetune.stores import stem
from finetune.stores.images import ImageSource, RegionFeatures
from raylib.data.loading import to_device
from raylib.display import markdown_table, open_pyplot, percent
from raylib.errors import UserError, require
from raylib.finite import require_finite
from raylib.models.base import Backbone, FusionBackbone, RetrievalBackbone
from raylib.models.finetuned import FinetuneModel
from raylib.sample.scenes import read_labels
from raylib.text import Tokenizer

POOL = 20  # parallel items among which one is chosen: few name the same objects
CLASSES = 6  # whose colours are told apart

# {image: {object: weights (S,) of the image's states, 1 in all}}
ObjectWeights = Mapping[str, Mapping[str, np.ndarray]]


def find_boxes(parallel: Parallel, path: Path, source: ImageSource, backbone: Backbone) -> ObjectWeights:
    """Find where objects stand in emoji scenes. path: of scenes.jsonl.

    Raises:
        Inapplicable: there is none.
    """
    scenes = read_scenes(path, {stem(image) for row in parallel.items for image in row[0].images})
    images = [image for row in parallel.items for image in row[0].images if stem(image) in scenes]
    if not images:
        return {}
    cells = find_patches(backbone, source.read(images[:1])["images"])
    weights = {}
    for image in dict.fromkeys(images):
        side = source.store.read(image).shape[0]
        weights[image] = {
            o.label: box_weights(cells, o.left / side, o.top / side, o.size / side)
            for o in scenes[stem(image)]
        }
    return weights


@torch.inference_mode()
def find_patches(backbone: Backbone, image: Tensor) -> np.ndarray:
    """(S, g, g): the position of the patch that each state is of, as a 1; a CLS has none. image: any, (1, H,
    W, 3)."""
    states = len(backbone.encode_images(image.to(next(backbone.parameters()).device)).values)
    windows = backbone.num_windows
    return np.pad(to_grid(np.eye(states)[1 + windows :], windows), ((1 + windows, 0), (0, 0), (0, 0)))


def box_weights(cells: np.ndarray, left: float, top: float, size: float) -> np.ndarray:
    """Weigh each state by how much of its patch a square box covers: (S, g, g) -> (S,), 1 in all. The box is
    in shares of the image's side."""
    # the overlap of the box with each patch, by rows and by columns
    edges = np.linspace(0, 1, cells.shape[-1] + 1)
    rows, columns = (
        np.clip(np.minimum(edges[1:], low + size) - np.maximum(edges[:-1], low), 0, None)
        for low in (top, left)
    )
    covered = (cells * np.outer(rows, columns)).sum((1, 2))
    return covered / covered.sum()


def find_regions(parallel: Parallel, source: RegionFeatures) -> ObjectWeights:
    """Find where objects stand by the names of regions: the store's tags, or else the annotation's.

    Raises:
        Inapplicable: no image has a name for each of its regions.
    """
    weights = {}
    for image, example in {image: row[0] for row in parallel.items for image in row[0].images}.items():
        regions = source.store.read(image)
        for names in (example.tags, regions.tags):
            if len(names) == len(regions.boxes):
                weights[image] = {name: np.equal(names, name) / names.count(name) for name in names}
    if not weights:
        raise Inapplicable(
            "nothing says where in an image an object stands: its regions have no name each (tags)"
        )
    return weights


def select_mentions(parallel: Parallel, weights: ObjectWeights, limit: int) -> list[Mention]:
    """Select up to `limit` items that name one of the few objects which are named in most images, in turn.

    Raises:
        Inapplicable: there are not two objects in two images each.
    """
    mentions: list[Mention] = []
    images: defaultdict[str, set[str]] = defaultdict(set)
    for row in parallel.items:
        for image in row[0].images:
            # a label is named in every language, other names of regions are not
            objects = [SceneObject(label) for label in weights.get(image, ()) if label in read_labels()]
            if named := find_named(row, parallel.languages, objects):
                mentions.append(Mention(row, image, named[1], named[0]))
                images[named[0].label].add(image)
                break
    repeated = [label for label in images if len(images[label]) > 1]
    frequent = sorted(repeated, key=lambda label: (-len(images[label]), label))[:CLASSES]
    # the first of each object, then the second of each, ...
    turns: list[tuple[int, Mention]] = []
    counts: Counter[str] = Counter()
    for mention in mentions:
        if mention.label in frequent:
            turns.append((counts[mention.label], mention))
            counts[mention.label] += 1
    selected = [mention for _, mention in sorted(turns, key=lambda turn: turn[0])[:limit]]
    if len({m.label for m in selected}) < 2 or len({m.image for m in selected}) < 2:
        raise Inapplicable(
            f"the {len(parallel.items)} parallel items do not name two objects in two images each"
        )
    return selected


BATCH = 16  # items in every language at a time
MARKERS = "os^vD<>PhdX"  # a language each


class Point(NamedTuple):
    """A state: of which object, in which language ("" of a region), item and image."""

    label: str
    language: str
    item: str
    image: str


@torch.inference_mode()
def collect_states(
    model: FinetuneModel | RetrievalBackbone,
    mentions: Sequence[Mention],
    weights: ObjectWeights,
    languages: Sequence[str],
    source: ImageSource | RegionFeatures,
    tokenizer: Tokenizer,
    length: int,
) -> tuple[list[Point], np.ndarray]:
    """Collect words, and once an image regions, of the objects that `mentions` name: (points, their states (p
    + r, d), float32)."""
    backbone, device = model.backbone, next(model.parameters()).device
    assert isinstance(backbone, FusionBackbone), "it reads texts together with images"
    classes = {mention.label for mention in mentions}
    images: set[str] = set()
    pairs: list[tuple[Point, Tensor]] = []
    for start in range(0, len(mentions), BATCH):
        batch, memory = mentions[start : start + BATCH], None
        for language, code in enumerate(languages):
            examples = [mention.item[language]._replace(images=(mention.image,)) for mention in batch]
            ids = encode_texts([e.texts[-1] for e in examples], tokenizer, length)
            text = to_device({"text": ids}, device)["text"]
            if memory is None:  # images are encoded once for all languages
                inputs = to_device(read_inputs(examples, source, tokenizer, length), device)
                if isinstance(model, FinetuneModel):
                    memory = model.memory(inputs)
                else:
                    memory = model.encode_images(inputs["images"])
            assert memory is not None, "every example has an image"
            rows = backbone.joint_states(text, memory)
            states = rows.values.float().cpu().split(rows.lengths.tolist())
            for mention, example, row, num_tokens in zip(
                batch, examples, states, text.lengths.tolist(), strict=True
            ):
                span = find_word(mention.words[code], example.texts[-1])
                words = row[:num_tokens] if backbone.is_text_first else row[-num_tokens:]
                tokens = find_tokens(tokenizer, example.texts[-1], span, length) if span else []
                if tokens:  # else cut off behind `length` tokens
                    point = Point(mention.label, code, example.id, mention.image)
                    pairs.append((point, words[tokens].mean(0)))
                if mention.image in images:
                    continue
                images.add(mention.image)
                for label in sorted(classes & weights[mention.image].keys()):
                    share = torch.from_numpy(weights[mention.image][label]).float()
                    region = row[-len(share) :] if backbone.is_text_first else row[: len(share)]
                    pairs.append((Point(label, "", mention.image, mention.image), share @ region))
    points, states = zip(*pairs, strict=True)
    require_finite("states of words and regions", torch.stack(states))
    return list(points), torch.stack(states).numpy()


def nearest_region_shares(points: Sequence[Point], states: np.ndarray) -> dict[str, dict[str, float]]:
    """Compute how often a word's nearest region, by cosine of `states` (p + r, d), is of its class. Regions
    of its own image, which it has seen, do not count.

    Returns:
        {language, or "all": {"share": of the words, "chance": were any region as near as any other}}.
    """
    units = states / np.linalg.norm(states, axis=1, keepdims=True)
    label, language, image = (
        np.array([getattr(p, name) for p in points]) for name in ("label", "language", "image")
    )
    word, region = np.flatnonzero(language != ""), np.flatnonzero(language == "")
    # (p, r): a word has seen the regions of its own image, which tell nothing of others
    others = image[word, None] != image[region]
    same_class = (label[word, None] == label[region]) & others
    best = np.where(others, units[word] @ units[region].T, -np.inf).argmax(1)
    hit, chance = same_class[np.arange(len(word)), best], same_class.sum(1) / others.sum(1)
    rows = {"all": word >= 0} | {
        code: language[word] == code for code in dict.fromkeys(language[word].tolist())
    }
    return {
        code: {"share": float(hit[row].mean()), "chance": float(chance[row].mean())}
        for code, row in rows.items()
    }


def project(states: np.ndarray) -> np.ndarray:
    """Map (n, d) to (n, 2) by t-SNE over cosines, the same each time.

    Raises:
        Inapplicable: scikit-learn is not installed.
    """
    try:
        manifold = require("sklearn.manifold", "analysis")
    except UserError as e:
        raise Inapplicable(str(e)) from None  # the other figures do without
    # neighbours that a point is to keep: fewer than there are points
    perplexity = min(30.0, (len(states) - 1) / 3)
    return manifold.TSNE(metric="cosine", init="pca", perplexity=perplexity, random_state=0).fit_transform(
        states
    )


def draw_tsne(points: Sequence[Point], states: np.ndarray, title: str, path: Path) -> dict[str, Any]:
    """Write `path`.png and, a line a point, `path`.csv. Returns the numbers, which are `path`.json too."""
    flat, near, regions = (
        project(states),
        nearest_region_shares(points, states),
        sum(not p.language for p in points),
    )
    with open(path.with_suffix(".csv"), "w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(("class", "kind", "language", "item", "x", "y"))
        for p, (x, y) in zip(points, flat.tolist(), strict=True):
            lines.writerow((p.label, "word" if p.language else "region", p.language, p.item, x, y))
    classes = list(dict.fromkeys(p.label for p in points))
    values = {"classes": classes, "words": len(points) - regions, "regions": regions, "nearest_region": near}
    pyplot = open_pyplot()
    figure, axes = pyplot.subplots(figsize=(8.6, 6.2), layout="constrained")
    colours = dict(zip(classes, pyplot.get_cmap("Dark2").colors, strict=False))
    styles = {
        code: {"marker": marker, "s": 26, "alpha": 0.6, "linewidth": 0}
        for code, marker in zip((code for code in near if code != "all"), cycle(MARKERS), strict=False)
    }
    styles[""] = {"marker": "*", "s": 60, "edgecolor": "black", "linewidth": 0.5}
    for code, style in styles.items():
        for label, colour in colours.items():
            at = [i for i, p in enumerate(points) if (p.language, p.label) == (code, label)]
            axes.scatter(*flat[at].T, color=colour, **style)
    axes.set(xticks=[], yticks=[])
    named = {label: axes.scatter([], [], color=colour, s=50) for label, colour in colours.items()}
    named |= {
        f"word, {code}" if code else "region": axes.scatter([], [], color="grey", **style)
        for code, style in styles.items()
    }
    figure.legend(named.values(), named.keys(), loc="outside right upper", fontsize=9, frameon=False)
    share, chance = (percent(near["all"][name]) for name in ("share", "chance"))
    axes.set_title(
        f"{title}: words and regions, t-SNE\n"
        f"nearest region of another image is of the word's class: {share} % (by chance {chance} %)",
        fontsize=10,
    )
    write_figure(figure, values, path)
    return values


def tsne_summary(values: dict[str, Any], backbone: Backbone) -> list[str]:
    """Markdown of the numbers, and of which states they are."""
    rows = [["language", "nearest region is of the word's class, %", "by chance, %"]]
    rows += [
        [code, percent(one["share"]), percent(one["chance"])]
        for code, one in values["nearest_region"].items()
    ]
    which = "States of both after the last layer, which they pass in one row"
    if backbone.has_cross_attention:
        which = (
            "States of words after the last unified layer; of regions, which do not pass it, what its "
            "cross-attention adds to a word that looks there alone"
        )
    return [
        f"{values['words']} words of {', '.join(values['classes'])}; {values['regions']} regions. {which}. "
        "Nearest by cosine of these states, not in the figure, among regions of other images than the "
        "word's own.",
        "",
        markdown_table(rows),
    ]
