"""The preprocessing that published image encoders come with: `preprocessor_config.json`, as `transformers`
reads it.

What the file leaves out is the default of the image processor that it names. Whatever in it changes pixels
and is not computed here is refused: read over, it would make other numbers without a word.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from raylib.errors import UserError
from raylib.fileio import read_json_object
from raylib.settings import CLIP_MEAN, CLIP_STD, PixelStats, PreprocessConfig, Resample

RESAMPLE: dict[int, Resample] = dict(
    enumerate(("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"))  # Pillow's numbers
)
# Image processors by the name that they share, with their defaults (transformers 5.23, the PIL ones)
SQUARE = {"height": 224, "width": 224}
PROCESSORS: dict[str, dict[str, Any]] = {
    "CLIP": {
        "size": {"shortest_edge": 224},
        "default_to_square": False,
        "crop_size": 224,
        "do_center_crop": True,
        "resample": 3,
        "image_mean": (0.48145466, 0.4578275, 0.40821073),
        "image_std": (0.26862954, 0.26130258, 0.27577711),
    },
    "Siglip": {"size": SQUARE, "default_to_square": False, "resample": 3},
    "ViT": {"size": SQUARE, "resample": 2},
    "DeiT": {
        "size": {"height": 256, "width": 256},
        "crop_size": 224,
        "do_center_crop": True,
        "resample": 3,
    },
    "Beit": {"size": SQUARE, "crop_size": 224, "resample": 3},
}
DEFAULTS = {
    "do_resize": True,
    "do_center_crop": False,
    "do_rescale": True,
    "do_normalize": True,
    "rescale_factor": 1 / 255,
    "default_to_square": True,
    "image_mean": 0.5,
    "image_std": 0.5,
    "crop_size": None,
}
# model types of config.json -> the processor of a folder that names none
MODEL_PROCESSORS = {"clip": "CLIP", "clip_vision_model": "CLIP", "siglip": "Siglip"}
MODEL_PROCESSORS |= {"deit": "DeiT", "beit": "Beit"}
# fields that change no pixel of an RGB image
OTHERS = frozenset(
    ("image_processor_type", "feature_extractor_type", "processor_class", "do_convert_rgb", "data_format")
    + ("_valid_processor_keys", "do_reduce_labels", "reduce_labels", "input_data_format", "device")
    + ("return_tensors", "disable_grouping", "_processor_class", "image_seq_length")
)
SWITCHES = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "default_to_square")
OF_YOUR_OWN = "give a backbone of your own that prepares images so: backbone=FILE.py"


class Preprocessing(NamedTuple):
    """Way of images to an image encoder's input. pixel_mean, pixel_std: of numbers from 0 to 255."""

    config: PreprocessConfig
    pixel_mean: PixelStats
    pixel_std: PixelStats


CLIP_PREPROCESSING = Preprocessing(
    PreprocessConfig(resize="shortest_edge", resample="bicubic"), CLIP_MEAN, CLIP_STD
)
# ALBEF's, CCLM's and mVLP's `test_transform`
ALBEF_PREPROCESSING = CLIP_PREPROCESSING._replace(config=PreprocessConfig(resample="bicubic"))


def read_preprocessing(folder: Path, image_size: int, default: Preprocessing | None) -> Preprocessing | None:
    """Read what a folder's `preprocessor_config.json` says, or return `default`. Before it comes a
    `processor_config.json` that says so, too: a processor of images and texts as `transformers` 5 writes it.

    image_size: pixels of the sides of images that its encoder takes.
    Raises:
        UserError: a file that is no such; images of another size; what changes pixels and is not computed.
    """
    # what is there is read, or is an error: a link to what no download has brought, a folder
    file = folder / "processor_config.json"
    values = read_json_object(file).get("image_processor") if os.path.lexists(file) else None
    if values is None:
        file = folder / "preprocessor_config.json"
        if not os.path.lexists(file):
            open_clip = folder / "open_clip_config.json"
            return _read_open_clip(open_clip, image_size) if os.path.lexists(open_clip) else default
        values = read_json_object(file)
    if not isinstance(values, dict):
        raise UserError(f"{file}: image_processor is {values!r:.60}, where settings are wanted")
    kind = _find_kind(values, folder, file)
    found = {**DEFAULTS, **PROCESSORS[kind], **values}
    # null and false mean, in all processors, that a step is left out
    found |= {name: False for name in SWITCHES if found[name] is None}
    for name, value in values.items():
        if name not in DEFAULTS and name not in OTHERS and name not in ("size", "resample") and value:
            raise UserError(
                f"{file}: {name:.40} is {value!r:.60}, which may change pixels, and is not computed here; "
                f"{OF_YOUR_OWN}"
            )
    config = _read_sizes(found, image_size, file)
    mean: tuple[float, ...] = (0.0,) * 3
    std: tuple[float, ...] = (1.0,) * 3
    if found["do_normalize"]:
        mean, std = (_read_colours(found, name, file) for name in ("image_mean", "image_std"))
    factor = _read_number(found, "rescale_factor", file) if found["do_rescale"] else 1.0
    # (x f - mean) / std of a pixel x is (x - mean / f) / (std / f)
    scale = 255 if math.isclose(factor, 1 / 255, rel_tol=1e-9) else 1 / factor
    return Preprocessing(config, _as_pixels(mean, scale), _as_pixels(std, scale))


def _read_open_clip(file: Path, image_size: int) -> Preprocessing:
    """Preprocessing of an open_clip_config.json; CLIP's where it says nothing."""
    values = read_json_object(file).get("preprocess_cfg") or {}
    computed = {
        "resize_mode": ("shortest", "squash"),
        "interpolation": ("bicubic", "bilinear"),
        "mode": ("RGB",),
        "size": (image_size, [image_size, image_size]),
    }
    if not isinstance(values, dict):
        raise UserError(f"{file}: preprocess_cfg is {values!r:.60}, where settings are wanted")
    for name, value in values.items():
        if name not in ("mean", "std", "fill_color") and value not in computed.get(name, ()):
            raise UserError(
                f"{file}: preprocess_cfg.{name:.40} is {value!r:.60}, which may change pixels, and is not "
                f"computed here; {OF_YOUR_OWN}"
            )
    config = PreprocessConfig(
        resize="square" if values.get("resize_mode") == "squash" else "shortest_edge",
        resample=values.get("interpolation", "bicubic"),
    )
    clip = PROCESSORS["CLIP"]
    colours = {
        "image_mean": values.get("mean", clip["image_mean"]),
        "image_std": values.get("std", clip["image_std"]),
    }
    mean, std = (_as_pixels(_read_colours(colours, name, file), 255) for name in colours)
    return Preprocessing(config, mean, std)


def _find_kind(values: Mapping[str, Any], folder: Path, file: Path) -> str:
    """Name the processor, a key of `PROCESSORS`."""
    # the oldest files call it a feature extractor, or leave it to config.json
    name = values.get("image_processor_type") or values.get("feature_extractor_type")
    if name is None:
        config = folder / "config.json"
        model_type = read_json_object(config).get("model_type") if os.path.lexists(config) else None
        return MODEL_PROCESSORS.get(str(model_type), "ViT")
    kind = str(name)
    for ending in ("Fast", "Pil", "ImageProcessor", "FeatureExtractor"):
        kind = kind.removesuffix(ending)
    if kind not in PROCESSORS or not str(name).startswith((f"{kind}ImageP", f"{kind}FeatureE")):
        raise UserError(
            f"{file}: image_processor_type {name!r:.60} is none of {', '.join(PROCESSORS)}; {OF_YOUR_OWN}"
        )
    return kind


def _read_sizes(found: Mapping[str, Any], image_size: int, file: Path) -> PreprocessConfig:
    """Resizing of images, so that they come to `image_size` on both sides."""
    for name in SWITCHES:
        if type(found[name]) is not bool:
            raise UserError(f"{file}: {name} is {found[name]!r:.40}, where true or false is wanted")
    if not found["do_resize"]:
        raise UserError(f"{file}: do_resize is false, and images come in all sizes; {OF_YOUR_OWN}")
    resample = found["resample"]
    if type(resample) is not int or resample not in RESAMPLE:
        raise UserError(f"{file}: resample is {resample!r:.40}, where a filter of Pillow's is wanted, 0 to 5")
    # a bare number is a square's side or the shorter edge, as the processor has it
    size = found["size"]
    if isinstance(size, dict) and set(size) == {"shortest_edge"}:
        is_square, side = False, size["shortest_edge"]
    else:
        is_square = isinstance(size, dict | list) or found["default_to_square"]
        side = _read_square(size, "size", file)
    if type(side) is not int or side < 1:
        raise UserError(f"{file}: size is {size!r:.60}, where pixels are wanted")
    crop = _read_square(found["crop_size"], "crop_size", file) if found["do_center_crop"] else None
    if not is_square and crop is None:
        raise UserError(f"{file}: size {size!r:.60} without a crop makes images of all shapes; {OF_YOUR_OWN}")
    if (crop or side) != image_size:
        raise UserError(
            f"{file}: it makes images of {crop or side} pixels, and the image encoder's config.json has "
            f"image_size={image_size}; take both files from the same place"
        )
    return PreprocessConfig(
        resize="square" if is_square else "shortest_edge",
        resize_to=None if side == image_size else side,
        resample=RESAMPLE[resample],
    )


def _read_square(value: Any, name: str, file: Path) -> int:
    """Pixels of a square's sides, as a number or {"height", "width"}."""
    side = value
    if isinstance(value, dict) and set(value) == {"height", "width"}:
        side = value["height"] if value["height"] == value["width"] else None
    elif isinstance(value, list) and len(value) == 2:
        side = value[0] if value[0] == value[1] else None
    if type(side) is not int or side < 1:
        raise UserError(f"{file}: {name} is {value!r:.60}, where a square of pixels is wanted; {OF_YOUR_OWN}")
    return side


def _read_number(found: Mapping[str, Any], name: str, file: Path) -> float:
    value = found[name]
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise UserError(f"{file}: {name} is {value!r:.40}, where a number above 0 is wanted")
    return float(value)


def _read_colours(found: Mapping[str, Any], name: str, file: Path) -> tuple[float, ...]:
    value = found[name]
    values = [value] * 3 if type(value) in (int, float) else value
    is_three = isinstance(values, list | tuple) and len(values) == 3
    if not is_three or any(type(v) not in (int, float) or not math.isfinite(v) for v in values):
        raise UserError(f"{file}: {name} is {value!r:.60}, where a number for each colour is wanted")
    if name == "image_std" and not all(v > 0 for v in values):
        raise UserError(f"{file}: image_std is {value!r:.60}, where numbers above 0 are wanted")
    return tuple(map(float, values))


def _as_pixels(colours: tuple[float, ...], scale: float) -> PixelStats:
    red, green, blue = (scale * value for value in colours)
    return red if red == green == blue else (red, green, blue)
