"""Images and region features: read by id, in any order, from any process. Common to both: names of images
as stores compare them, and records of region features made into arrays.
"""

import os
import re
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np

from raylib.data.images import BadImage
from raylib.fileio import decode_base64, nfc
from raylib.finite import is_finite

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# what MSCOCO's names of 2014 have before the number that they share with those of 2017
COCO_PREFIX = re.compile(r"^COCO_[a-z]+\d{4}_(?=\d{12}$)", re.IGNORECASE)
MARVL = {"id", "sw", "ta", "tr", "zh"}  # languages whose images have the same names


class Regions(NamedTuple):
    """One image's regions: features (R, f), boxes (R, 4) as x1, y1, x2, y2 in pixels, the image's size, and
    the detector's names of what it sees, if these were kept."""

    features: np.ndarray
    boxes: np.ndarray
    height: float
    width: float
    tags: tuple[str, ...] = ()


def folders_of(name: str) -> set[str]:
    """The folders that an id, or a path, names."""
    return {*PurePosixPath(nfc(name)).parts[:-1]}


def may_hold(name: str, words: set[str]) -> bool:
    """Tell whether an image may be where `words` are in the path: MaRVL's images have the same names in each
    language, and the one that is there must not be another language's."""
    return not folders_of(name) & MARVL or words & MARVL <= folders_of(name)


def stem(name: str) -> str:
    """An image's name without folder, image ending and what MSCOCO's names of 2014 begin with, in NFC:
    macOS stores names in NFD, annotations have them in either."""
    base = os.path.basename(nfc(name))
    stripped, suffix = os.path.splitext(base)
    return COCO_PREFIX.sub("", stripped if suffix.lower() in SUFFIXES else base)


def normalise_boxes(boxes: np.ndarray, height: float, width: float) -> np.ndarray:
    """(R, 7): x1, y1, x2, y2, width, height and area, as shares of the image (UC2)."""
    x1, y1, x2, y2 = (boxes / [width, height, width, height]).T
    box_width, box_height = x2 - x1, y2 - y1
    columns = [x1, y1, x2, y2, box_width, box_height, box_width * box_height]
    return np.stack(columns, 1).astype(np.float32)


def to_regions(record: dict, where: str) -> Regions:
    """Make {"features", "boxes", "img_h", "img_w", and perhaps "tags": a list of names, ...} as `Regions`;
    arrays may be base64 of float32.

    Raises:
        BadImage: one of them is missing, or not finite; features and boxes do not fit each other; an image
            without size.
    """
    missing = [key for key in ("features", "boxes", "img_h", "img_w") if key not in record]
    if missing:
        raise BadImage(f"{where}: no {', '.join(missing)}; it has {', '.join(sorted(map(str, record)))}")
    boxes, features = (_array(record[name], f"{where}, {name}") for name in ("boxes", "features"))
    if boxes.size % 4:
        raise BadImage(f"{where}: {boxes.size} values of boxes, which have four each")
    boxes = boxes.reshape(-1, 4)
    if not len(boxes) or features.size % len(boxes) or not features.size:
        raise BadImage(f"{where}: {features.size} feature values for {len(boxes)} boxes")
    height, width = float(record["img_h"]), float(record["img_w"])
    for name, value in (("features", features), ("boxes", boxes), ("img_h", height), ("img_w", width)):
        if not is_finite(value):
            raise BadImage(
                f"{where}: {name} not finite (NaN or infinite); extract the regions of this image again"
            )
    if height <= 0 or width <= 0:
        raise BadImage(
            f"{where}: img_h {height:g}, img_w {width:g}: an image has a size, by which boxes are divided"
        )
    tags = tuple(tag.decode() if isinstance(tag, bytes) else str(tag) for tag in record.get("tags", ()))
    return Regions(features.reshape(len(boxes), -1), boxes, height, width, tags)


def _array(value, where: str) -> np.ndarray:
    """Make an array of one, or of base64 of float32."""
    return decode_floats(value, where) if isinstance(value, str | bytes) else np.asarray(value, np.float32)


def decode_floats(value: str | bytes, where: str) -> np.ndarray:
    """Decode float32 numbers in base64.

    Raises:
        BadImage: not base64, or of something else.
    """
    try:
        return np.frombuffer(decode_base64(value), np.float32)
    except ValueError as e:
        raise BadImage(f"{where}: no base64 of float32 ({e})") from None
