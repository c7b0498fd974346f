"""Find where objects stand in images, and the items that name them.

Of emoji scenes an object's states are those of the patches that its box covers, each by how much of it. Of
region features they are the regions that are called so, where each of an image's regions has a name.

Shape legend: S states of an image: regions, or CLS states, then M patches, g x g.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from finetune.analysis.attention import to_grid
from finetune.analysis.parallel import Inapplicable, Mention, Parallel, SceneObject, find_named, read_scenes
from finetune.stores.images import ImageSource, RegionFeatures
from finetune.stores.records import stem
from raylib.models.base import Backbone
from raylib.sample.scenes.labels import read_labels

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
    for example, image in {
        image: (row[0], image) for row in parallel.items for image in row[0].images
    }.values():
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
