"""Images and region features: read by id, in any order, from any process. Common to both: names of images
as stores compare them, and records of region features made into arrays.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from raylib.data.images import BadImage
from raylib.errors import UserError, name_some, reading
from raylib.fileio import decode_base64, nfc
from raylib.finite import is_finite

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# what MSCOCO's names of 2014 have before the number that they share with those of 2017
COCO_PREFIX = re.compile(r"^COCO_[a-z]+\d{4}_(?=\d{12}$)", re.IGNORECASE)
BOX_DIM = 7  # numbers that a model reads of a box (`normalise_boxes`)
ADVICE = "extract the regions of this image again"
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
    return {*PurePosixPath(nfc(name)).parts[:-1]} if "/" in name else set()


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


@contextmanager
def reading_record(where: str, what: str = "region features") -> Iterator[None]:
    """As `raylib.errors.reading`, of one image's features: `where` is the file and the image.

    Raises:
        BadImage: the line. MachineError: a failure of the machine.
    """
    try:
        with reading(where, what, ADVICE):
            yield
    except UserError as error:
        raise error if isinstance(error, BadImage) else BadImage(str(error)) from None


def to_regions(record: Any, where: str) -> Regions:
    """Make {"features", "boxes", "img_h", "img_w", and perhaps "num_boxes", "tags": a list of names, ...} as
    `Regions`; arrays may be base64 of float32.

    Raises:
        BadImage: one of them is missing, of another kind, or not finite; features, boxes and their number do
            not fit each other; boxes that lie outside the image; an image without size.
    """
    if not isinstance(record, Mapping):
        raise BadImage(
            f"{where}: {type(record).__name__} in place of a dict of features, boxes, img_h, img_w"
        )
    missing = [key for key in ("features", "boxes", "img_h", "img_w") if key not in record]
    if missing:
        raise BadImage(f"{where}: no {', '.join(missing)}; it has {name_some(sorted(map(str, record)))}")
    boxes, features = (_to_floats(record[name], f"{where}, {name}") for name in ("boxes", "features"))
    if boxes.size % 4 or (boxes.ndim > 1 and boxes.shape[-1] != 4):
        raise BadImage(f"{where}: {boxes.size} values of boxes, which have four each")
    boxes = boxes.reshape(-1, 4)
    rows = features.size // features.shape[-1] if features.ndim > 1 and features.size else len(boxes)
    if not len(boxes) or features.size % len(boxes) or not features.size or rows != len(boxes):
        raise BadImage(f"{where}: {features.size} feature values for {len(boxes)} boxes")
    height, width = (_to_number(record[name], f"{where}, {name}") for name in ("img_h", "img_w"))
    for name, value in (("features", features), ("boxes", boxes), ("img_h", height), ("img_w", width)):
        if not is_finite(value):
            raise BadImage(f"{where}: {name} not finite (NaN or infinite); {ADVICE}")
    if "num_boxes" in record and (count := _to_number(record["num_boxes"], where)) != len(boxes):
        raise BadImage(f"{where}: num_boxes {count:g}, and {len(boxes)} boxes")
    if height <= 0 or width <= 0:
        raise BadImage(
            f"{where}: img_h {height:g}, img_w {width:g}: an image has a size, by which boxes are divided"
        )
    _require_inside(boxes, height, width, where)
    tags = _to_tags(record.get("tags", ()), f"{where}, tags")
    return Regions(features.reshape(len(boxes), -1), boxes, height, width, tags)


def _require_inside(boxes: np.ndarray, height: float, width: float, where: str) -> None:
    """Raise BadImage where a box ends before it begins, or lies outside its image by more than a pixel, which
    is how much detectors round, or by a hundredth, where boxes are shares of the image."""
    slack_x, slack_y = (1 if size > 1 else 0.01 for size in (width, height))
    lowest, ends = (-slack_x, -slack_y), (width + slack_x, height + slack_y)
    starts, stops = boxes[:, :2], boxes[:, 2:]
    is_inside = (lowest <= starts) & (starts <= stops) & (stops <= ends)
    if not is_inside.all():
        row = int(is_inside.all(1).argmin())
        box = ", ".join(f"{value:g}" for value in boxes[row])
        raise BadImage(
            f"{where}: box {row} ({box}) is not inside the image, {width:g} x {height:g}; give x1, y1, x2, y2"
        )


def _to_floats(value: Any, where: str) -> np.ndarray:
    """Make float32 of numbers, or of base64 of float32."""
    if isinstance(value, str | bytes):
        return decode_floats(value, where)
    if isinstance(value, np.ndarray) and value.dtype == np.float32:
        return value
    # what is too large for float32 is infinite, and refused as such
    with reading_record(where, "numbers"), np.errstate(over="ignore"):
        array = np.asarray(value)
        if array.dtype.kind not in "iuf":
            raise ValueError(f"dtype {array.dtype}")
        return array.astype(np.float32, copy=False)


def _to_number(value: Any, where: str) -> float:
    """Make a number of one, of its digits, or of an array of one."""
    if type(value) is float or (type(value) is int and abs(value) < 1 << 53):
        return float(value)
    with reading_record(where, "a number"):
        array = np.asarray(float(value) if isinstance(value, str | bytes) else value)
        if array.size != 1 or array.dtype.kind not in "iufSU":
            raise ValueError(f"{type(value).__name__} of {array.size} values")
        return float(array.reshape(()).item())


def _to_tags(value: Any, where: str) -> tuple[str, ...]:
    with reading_record(where, "a list of names"):
        if isinstance(value, str | bytes | Mapping):
            raise ValueError(type(value).__name__)
        tags = tuple(tag.decode() if isinstance(tag, bytes) else tag for tag in value)
        if not all(isinstance(tag, str) for tag in tags):
            raise ValueError(", ".join(sorted({type(tag).__name__ for tag in tags})))
        return tags


def decode_floats(value: str | bytes, where: str) -> np.ndarray:
    """Decode float32 numbers in base64.

    Raises:
        BadImage: not base64, or of something else.
    """
    try:
        return np.frombuffer(decode_base64(value), "<f4")
    except ValueError as e:
        raise BadImage(f"{where}: no base64 of float32 ({e})") from None
