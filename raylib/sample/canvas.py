"""Draw one to four emoji in the quadrants of a square white image, each large or small, and caption them.

The captions are for pretraining: their wordings have nothing to do with those of the fine-tuning tasks
(`raylib.sample.scenes`), and there is no sentence in another language.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import cv2
import numpy as np

from raylib.data.images import AugmentConfig, augment_image, decode_image, resize_image
from raylib.randomness import Key, integers, permutation, uniform
from raylib.sample.concepts import TRAINING_VENDORS, UNSEEN_VENDOR, read_images, read_training_captions

LARGE, SMALL = 0.94, 0.6  # shares of a quadrant's side
NUM_SCENES, SIZE = 24_000, 64  # of pretraining; pixels a side
# of each thing before it is placed: two vendors draw each, and a third is to be recognised
AUGMENTATION = AugmentConfig(scale=(0.7, 1.0), magnitude=4)
PLACES = ("top left", "top right", "bottom left", "bottom right")
ABSTRACT = (
    *("face", "hand", "button", "sign", "clock", "arrow", "square", "circle", "symbol", "mark"),
    *("person", "man", "woman", "people", "o’clock", "moon", "heart", "finger", "input", "cat with"),
    *("japanese", "squared", "triangle"),
)


class Placement(NamedTuple):
    """Position of a concept's drawing on the canvas: its key, its top left corner and its side in pixels, its
    quadrant (0 top left, 1 top right, 2 bottom left, 3 bottom right) and whether it is drawn large."""

    key: str
    left: int
    top: int
    size: int
    quadrant: int
    large: bool


class CaptionedScene(NamedTuple):
    """A scene of pretraining: its name, the image as a WebP file, English captions."""

    name: str
    image: bytes
    captions: list[str]


def place_concepts(keys: Sequence[str], size: int, *seeds: Key) -> list[Placement]:
    """Place up to four concepts in different quadrants of an image of `size` pixels, at random by `seeds`."""
    cell = size // 2
    quadrants = permutation(4, *seeds, "quadrant")
    placements = []
    for i, key in enumerate(keys):
        large, x, y = uniform(*seeds, "place", i, np.arange(3)).tolist()
        side = round(cell * (LARGE if large < 0.5 else SMALL))
        # half of the free room, in the middle of the quadrant: drawings do not touch, and none is centred
        quadrant, room = int(quadrants[i]), (cell - side) // 2 + 1
        left, top = ((cell - side - room + 1) // 2 + int(share * room) for share in (x, y))
        left, top = cell * (quadrant % 2) + left, cell * (quadrant // 2) + top
        placements.append(Placement(key, left, top, side, quadrant, large < 0.5))
    return placements


def draw_webp(placements: Sequence[Placement], drawings: Mapping[str, np.ndarray], size: int) -> bytes:
    """Draw the scene, `size` pixels a side, as a WebP file. drawings: {key: uint8 RGB (H, H, 3)}."""
    canvas = np.full((size, size, 3), 255, np.uint8)
    for p in placements:
        canvas[p.top : p.top + p.size, p.left : p.left + p.size] = resize_image(drawings[p.key], p.size)
    bgr = cv2.cvtColor(canvas, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".webp", bgr, [cv2.IMWRITE_WEBP_QUALITY, 90])[1].tobytes()


@cache
def decode_drawings(vendor: str) -> dict[str, np.ndarray]:
    """Key -> uint8 RGB (64, 64, 3) of every concept that `vendor` draws here."""
    return {key: decode_image(data, f"{vendor} {key}") for key, data in read_images(vendor).items()}


def read_plain_concepts() -> dict[str, str]:
    """Key -> English name of the training concepts that are called by one or two words and are things, not
    signs."""
    return {
        key: caption.name
        for key, caption in read_training_captions("en").items()
        if len(caption.name.split()) <= 2 and not any(word in caption.name.lower() for word in ABSTRACT)
    }


def draw_training_scenes() -> Iterator[CaptionedScene]:
    """`NUM_SCENES` scenes, most of a single thing, each drawn by one vendor, augmented, with up to three
    captions."""
    names = read_plain_concepts()
    keys = list(names)
    for i in range(NUM_SCENES):
        # five in eight show a single thing: what a thing is called comes first
        count = max(1, int(integers(8, "scene", i, "count")) - 3)
        picks = integers(len(keys), "scene", i, "keys", np.arange(count)).tolist()
        scene_keys = [keys[k] for k in dict.fromkeys(picks)]
        vendor = TRAINING_VENDORS[int(integers(len(TRAINING_VENDORS), "scene", i, "vendor"))]
        drawings = decode_drawings(vendor)
        placements = place_concepts(scene_keys, SIZE, "scene", i)
        draws = uniform(
            "scene", i, "varied", np.arange(len(scene_keys))[:, None], np.arange(AUGMENTATION.num_uniforms)
        )
        augmented = {
            key: augment_image(drawings[key], SIZE, AUGMENTATION, row)
            for key, row in zip(scene_keys, draws, strict=True)
        }
        image = draw_webp(placements, augmented, SIZE)
        yield CaptionedScene(f"scene{i:05d}", image, caption_scene(placements, names, i))


def draw_unseen_scenes() -> dict[str, bytes]:
    """Key -> WebP file of each concept alone, drawn by the unseen vendor as large as in the scenes."""
    drawings = decode_drawings(UNSEEN_VENDOR)
    return {key: draw_webp(place_concepts([key], SIZE, "unseen", key), drawings, SIZE) for key in drawings}


def caption_scene(placements: Sequence[Placement], names: Mapping[str, str], i: int) -> list[str]:
    """Caption scene `i`: all things by name; all with their places; and their sizes, or the relation of two.

    One thing alone gets only its name: places and sizes are told apart long before things are, and would be
    all that is learnt.
    """
    if len(placements) == 1:
        return [names[placements[0].key]]
    order = [placements[k] for k in permutation(len(placements), "scene", i, "order")]
    *first, last = (names[p.key] for p in order)
    everything = f"{', '.join(first)} and {last}"
    places = ", ".join(f"{names[p.key]} {PLACES[p.quadrant]}" for p in order)
    sizes = ", ".join(f"{'big' if p.large else 'little'} {names[p.key]}" for p in order)
    # neighbours: one quadrant to the right (1) or below (2), but not from top right to bottom left
    relations = [
        f"{names[a.key]} {'beside' if a.quadrant // 2 == b.quadrant // 2 else 'above'} {names[b.key]}"
        for a in order
        for b in order
        if b.quadrant - a.quadrant in (1, 2) and (a.quadrant, b.quadrant) != (1, 2)
    ]
    tells_relation = relations and uniform("scene", i, "which") < 0.5
    return [everything, places, relations[0] if tells_relation else sizes]
