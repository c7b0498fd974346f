"""What region stores keep of a picture, made into arrays. Pickles are read by an unpickler that admits plain
values and arrays only."""

import io
import pickle
from typing import Any, NamedTuple

import numpy as np

from raylib.errors import UserError
from raylib.fileio import decode_base64
from raylib.finite import is_finite


class Regions(NamedTuple):
    """One picture's regions: features (R, f), boxes (R, 4) as x1, y1, x2, y2 in pixels, the picture's size,
    and what the detector calls what it sees, if that was kept."""

    features: np.ndarray
    boxes: np.ndarray
    height: float
    width: float
    tags: tuple[str, ...] = ()


def to_regions(record: dict, where: str) -> Regions:
    """{"features", "boxes", "img_h", "img_w", and perhaps "tags": a list of names, ...} as `Regions`; arrays
    may be base64 of float32.

    Raises:
        UserError: one of them is missing, or not finite; features and boxes do not fit each other; an image
            without size.
    """
    missing = [key for key in ("features", "boxes", "img_h", "img_w") if key not in record]
    if missing:
        raise UserError(f"{where}: no {', '.join(missing)}; it has {', '.join(sorted(map(str, record)))}")
    boxes, features = (_array(record[name], f"{where}, {name}") for name in ("boxes", "features"))
    if boxes.size % 4:
        raise UserError(f"{where}: {boxes.size} values of boxes, which have four each")
    boxes = boxes.reshape(-1, 4)
    if not len(boxes) or features.size % len(boxes) or not features.size:
        raise UserError(f"{where}: {features.size} feature values for {len(boxes)} boxes")
    height, width = float(record["img_h"]), float(record["img_w"])
    for name, value in (("features", features), ("boxes", boxes), ("img_h", height), ("img_w", width)):
        if not is_finite(value):
            raise UserError(
                f"{where}: {name} not finite (NaN or infinite); extract the regions of this image again"
            )
    if height <= 0 or width <= 0:
        raise UserError(
            f"{where}: img_h {height:g}, img_w {width:g}: an image has a size, by which boxes are divided"
        )
    tags = tuple(tag.decode() if isinstance(tag, bytes) else str(tag) for tag in record.get("tags", ()))
    return Regions(features.reshape(len(boxes), -1), boxes, height, width, tags)


def _array(value, where: str) -> np.ndarray:
    """An array, or base64 of float32."""
    return floats_of_base64(value, where) if isinstance(value, str | bytes) else np.asarray(value, np.float32)


def floats_of_base64(value: str | bytes, where: str) -> np.ndarray:
    """float32 numbers in base64.

    Raises:
        UserError: not base64, or of something else.
    """
    try:
        return np.frombuffer(decode_base64(value), np.float32)
    except ValueError as e:
        raise UserError(f"{where}: no base64 of float32 ({e})") from None


def unpickle(stream: io.BufferedIOBase, where: str) -> Any:
    """The value pickled in `stream`.

    Raises:
        UserError: no pickle, or one that wants more than plain values and arrays.
    """
    try:
        return _Arrays(stream).load()
    except Exception as e:  # what bytes that are no pickle raise is not specified
        raise UserError(f"{where}: not read ({e})") from None


class _Arrays(pickle.Unpickler):
    """Admits plain values and NumPy arrays, nothing else that could run."""

    ADMITTED = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")} | {
        (f"numpy.{core}.{module}", name)
        for core in ("core", "_core")
        for module, name in (
            ("multiarray", "_reconstruct"),
            ("multiarray", "scalar"),
            ("numeric", "_frombuffer"),
        )
    }

    def find_class(self, module: str, name: str):
        if (module, name) not in self.ADMITTED:
            raise pickle.UnpicklingError(
                f"it wants {module}.{name}, and only plain values and arrays are read"
            )
        return super().find_class(module, name)
