"""Where objects stand in pictures, and the items that name them.

Of emoji scenes an object's states are those of the patches that its box covers, each by how much of it. Of
region features they are the regions that are called so, where each of a picture's regions has a name.

Shape legend: S states of a picture: regions, or CLS states, then M patches, g x g.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from finetune.analysis.attention import to_grid
from finetune.analysis.figures import Inapplicable
from finetune.analysis.parallel import Parallel
from finetune.analysis.words import Thing, name_in
from finetune.formats.examples import Example
from finetune.stores.images import ImageSource, RegionFeatures
from finetune.stores.records import stem
from raylib.models.base import Backbone
from raylib.sample.scenes.labels import read_labels

POOL = 20  # parallel items among which one is chosen: few name the same objects
CLASSES = 6  # whose colours are told apart

Where = Mapping[
    str, Mapping[str, np.ndarray]
]  # {picture: {object: weights (S,) of the picture's states, 1 in all}}


class Named(NamedTuple):
    """An item that names an object of its picture, by `words` in each language."""

    item: tuple[Example, ...]
    image: str
    label: str
    words: Mapping[str, str]


def find_boxes(parallel: Parallel, path: Path, pictures: ImageSource, backbone: nn.Module) -> Where:
    """Where objects stand in emoji scenes. path: of scenes.jsonl.

    Raises:
        Inapplicable: there is none.
    """
    if not path.is_file():
        raise Inapplicable(
            f"nothing says where in a picture an object stands: {path} is not there, as with emoji scenes"
        )
    with open(path, encoding="utf-8") as file:
        scenes = {scene["id"]: scene["objects"] for scene in map(json.loads, file)}
    images = [image for row in parallel.items for image in row[0].images if stem(image) in scenes]
    cells = find_patches(backbone, pictures.read(images[:1])["images"]) if images else None
    found = {}
    for image in dict.fromkeys(images):
        side = pictures.store.read(image).shape[0]
        boxes = {
            o["label"]: [o[name] / side for name in ("left", "top", "size")] for o in scenes[stem(image)]
        }
        found[image] = {label: cover(cells, *box) for label, box in boxes.items()}
    return found


@torch.inference_mode()
def find_patches(backbone: Backbone, picture: Tensor) -> np.ndarray:
    """(S, g, g): the place of the patch that each state is of, as a 1; a CLS has none. picture: any, (1, H,
    W, 3)."""
    states = len(backbone.encode_images(picture.to(next(backbone.parameters()).device)).values)
    windows = backbone.num_windows
    return np.pad(to_grid(np.eye(states)[1 + windows :], windows), ((1 + windows, 0), (0, 0), (0, 0)))


def cover(cells: np.ndarray, left: float, top: float, size: float) -> np.ndarray:
    """How much of each patch a square box covers: (S, g, g) -> (S,), 1 in all. The box is in shares of the
    picture's side."""
    edges = np.linspace(0, 1, cells.shape[-1] + 1)
    rows, columns = (
        np.clip(np.minimum(edges[1:], low + size) - np.maximum(edges[:-1], low), 0, None)
        for low in (top, left)
    )
    covered = (cells * np.outer(rows, columns)).sum((1, 2))
    return covered / covered.sum()


def find_regions(parallel: Parallel, pictures: RegionFeatures) -> Where:
    """Where objects stand by the names of regions: the store's tags, or else the annotation's.

    Raises:
        Inapplicable: no picture has a name for each of its regions.
    """
    found = {}
    for example, image in {
        image: (row[0], image) for row in parallel.items for image in row[0].images
    }.values():
        regions = pictures.store.read(image)
        for names in (example.tags, regions.tags):
            if len(names) == len(regions.boxes):
                found[image] = {name: np.equal(names, name) / names.count(name) for name in names}
    if not found:
        raise Inapplicable(
            "nothing says where in a picture an object stands: its regions have no name each (tags)"
        )
    return found


def choose(parallel: Parallel, where: Where, limit: int) -> list[Named]:
    """Up to `limit` items that name one of the few objects which are named in most pictures, in turn.

    Raises:
        Inapplicable: there are not two objects in two pictures each.
    """
    named, pictures, nth = [], defaultdict(set), Counter()
    for row in parallel.items:
        for image in row[0].images:
            things = [
                Thing(label, 0) for label in where.get(image, ()) if label in read_labels()
            ]  # named in every language
            if found := name_in(row, parallel.languages, things):
                named.append(Named(row, image, found[0].label, found[1]))
                pictures[found[0].label].add(image)
                break
    often = sorted(
        (label for label in pictures if len(pictures[label]) > 1),
        key=lambda label: (-len(pictures[label]), label),
    )
    turns = []
    for item in named:
        if item.label in often[:CLASSES]:
            turns.append((nth[item.label], item))
            nth[item.label] += 1
    chosen = [item for _, item in sorted(turns, key=lambda turn: turn[0])[:limit]]
    if len({item.label for item in chosen}) < 2 or len({item.image for item in chosen}) < 2:
        raise Inapplicable(
            f"the {len(parallel.items)} parallel items do not name two objects in two pictures each"
        )
    return chosen
