"""Scenes for pretraining: pictures of one to four concepts of the sample, and what English says of them.

The wordings have nothing to do with those of the fine-tuning tasks; there is no sentence in another language.
"""

from collections.abc import Iterator, Mapping

import cv2
import numpy as np

from pretrain.corpora import ImageText
from raylib.data.images import AugmentConfig, augment
from raylib.randomness import integers, permutation, uniform
from raylib.sample.canvas import Placed, decode_drawings, draw, place
from raylib.sample.concepts import TRAINING_VENDORS, UNSEEN_VENDOR, training_captions

COUNT, SIZE = 24_000, 64  # pictures; pixels a side
# of each thing before it is placed: two vendors draw each, and a third is to be recognised
VARIED = AugmentConfig(scale=(0.7, 1.0), magnitude=4)
PLACES = ("top left", "top right", "bottom left", "bottom right")
ABSTRACT = (
    "face",
    "hand",
    "button",
    "sign",
    "clock",
    "arrow",
    "square",
    "circle",
    "symbol",
    "mark",
    "person",
    "man",
    "woman",
    "people",
    "o’clock",
    "moon",
    "heart",
    "finger",
    "input",
    "cat with",
    "japanese",
    "squared",
    "triangle",
)


def plain_concepts() -> dict[str, str]:
    """Key -> English name of the training concepts that are called by one or two words and are things, not
    signs."""
    return {
        key: caption.name
        for key, caption in training_captions("en").items()
        if len(caption.name.split()) <= 2 and not any(word in caption.name.lower() for word in ABSTRACT)
    }


def training_scenes() -> Iterator[ImageText]:
    """`COUNT` scenes, most of a single thing, each drawn by one vendor, varied, with up to three captions."""
    names = plain_concepts()
    keys = list(names)
    for i in range(COUNT):
        count = max(
            1, int(integers(8, "scene", i, "count")) - 3
        )  # one in five of eight: what a thing is called comes first
        chosen = [
            keys[k] for k in dict.fromkeys(integers(len(keys), "scene", i, "keys", np.arange(count)).tolist())
        ]
        drawings = decode_drawings(
            TRAINING_VENDORS[int(integers(len(TRAINING_VENDORS), "scene", i, "vendor"))]
        )
        placed = place(chosen, SIZE, "scene", i)
        draws = uniform("scene", i, "varied", np.arange(len(chosen))[:, None], np.arange(VARIED.draws))
        varied = {key: augment(drawings[key], SIZE, VARIED, d) for key, d in zip(chosen, draws, strict=True)}
        yield ImageText(
            f"scene{i:05d}", {"webp": _picture(placed, varied)}, {"en": _captions(placed, names, i)}
        )


def unseen_scenes() -> dict[str, bytes]:
    """Key -> picture of each concept alone, drawn by the unseen vendor as large as in the scenes."""
    drawings = decode_drawings(UNSEEN_VENDOR)
    return {key: _picture(place([key], SIZE, "unseen", key), drawings) for key in drawings}


def _picture(placed: list[Placed], drawings: Mapping[str, np.ndarray]) -> bytes:
    picture = cv2.cvtColor(draw(placed, drawings, SIZE), cv2.COLOR_RGB2BGR)
    return cv2.imencode(".webp", picture, [cv2.IMWRITE_WEBP_QUALITY, 90])[1].tobytes()


def _captions(placed: list[Placed], names: dict[str, str], i: int) -> list[str]:
    """All things by name; all with their places; and their sizes, or how two of them stand to each other. Of
    one thing alone only its name: places and sizes are told apart long before things are, and would be all
    that is learnt."""
    if len(placed) == 1:
        return [names[placed[0].key]]
    order = [placed[k] for k in permutation(len(placed), "scene", i, "order")]
    listed = [names[p.key] for p in order]
    everything = ", ".join(listed[:-1]) + " and " + listed[-1] if len(listed) > 1 else listed[0]
    places = ", ".join(f"{names[p.key]} {PLACES[p.quadrant]}" for p in order)
    sizes = ", ".join(f"{'big' if p.large else 'little'} {names[p.key]}" for p in order)
    relations = [
        f"{names[a.key]} {'beside' if a.quadrant // 2 == b.quadrant // 2 else 'above'} {names[b.key]}"
        for a in order
        for b in order
        if b.quadrant - a.quadrant in (1, 2) and (a.quadrant, b.quadrant) != (1, 2)
    ]
    last = relations[0] if relations and uniform("scene", i, "which") < 0.5 else sizes
    return [everything, places, last]
