"""Images: decoding, the evaluation transform, augmentation. uint8 in, uint8 out, RGB, (H, W, 3).

Augmentation is RandAugment (Cubuk et al. 2020) on a random resized crop, built for speed: crop, flip,
rotation, shears and shifts are one affine warp, tone operations are look-up tables. It is not pixel-identical
to PIL's: pixels that a rotation brings into view are the image's own where it has some, white elsewhere.
All chance comes in as `uniforms`.
"""

import functools
import io
import math
import os
import stat
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from raylib.data.image_headers import MAX_BYTES, check_image, read_avif_depth, read_orientation
from raylib.errors import UserError, describe_error, error_line
from raylib.settings import MAX_PIXELS, AugmentConfig

IMAGE_EXTENSIONS = frozenset(
    ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff", "avif")
)
cv2.setNumThreads(1)  # workers are processes; threads in each would only get in each other's way
cv2.utils.logging.setLogLevel(
    cv2.utils.logging.LOG_LEVEL_SILENT
)  # what does not decode is told by name, once

WHITE = (255, 255, 255)


class BadImage(UserError):
    """An image, or its region features, that cannot be used; the message names it."""


def decode_image(data: bytes, name: str = "image", max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Bytes of a JPEG, PNG, WebP, GIF, BMP or AVIF (`check_image`) to RGB uint8 (H, W, 3), upright as its
    EXIF says (`read_orientation`); the first image of several; transparency over white; of 16 bits the upper
    eight; colour profiles are not applied.

    Raises BadImage, which says `name`.
    """
    jpeg = data[:2] == b"\xff\xd8"
    try:
        check_image(data, max_pixels)
        if data.startswith(b"RIFF"):  # the decoder would take what lies behind a WebP's end for pixels
            data = data[: 8 + int.from_bytes(data[4:8], "little")]
        # OpenCV turns some kinds by itself, and then drops transparency and 16 bits: all are turned here
        image: np.ndarray | None = cv2.imdecode(
            np.frombuffer(data, np.uint8),
            cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION if jpeg else cv2.IMREAD_UNCHANGED,
        )
    except (ValueError, cv2.error) as error:
        reason = error.err if isinstance(error, cv2.error) else error
        raise BadImage(f"{name}: does not decode ({reason})") from error
    if image is None:
        raise BadImage(f"{name}: does not decode ({len(data)} bytes: it is damaged, or cut off)")
    if not jpeg:
        image = _to_rgb(image, data, name)
    return turn_upright(image, read_orientation(data))


def _to_rgb(image: np.ndarray, data: bytes, name: str) -> np.ndarray:
    """RGB uint8 (H, W, 3) of what OpenCV decodes unchanged; transparency over white."""
    if image.dtype == np.uint16:
        depth = read_avif_depth(data) if data.startswith(b"ftyp", 4) else 16
        image = (image >> (depth - 8)).astype(np.uint8)
    if image.dtype != np.uint8 or (image.ndim == 3 and image.shape[2] not in (3, 4)):
        raise BadImage(f"{name}: does not decode (pixels of {image.dtype} {image.shape[2:]}: make it RGB)")
    if image.ndim == 2:
        return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
    if image.shape[2] == 3:
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    # transparency shows what lies below, and pages are white
    alpha = image[..., 3:].astype(np.uint16)
    over = image[..., 2::-1] * alpha + 255 * (255 - alpha)
    return ((over + 127) // 255).astype(np.uint8)


def turn_upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """Turn and mirror (H, W, 3) as EXIF's orientation, 1 to 8, wants it."""
    if orientation == 1:
        return image
    if orientation >= 5:
        image = image.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return np.ascontiguousarray(image)


def load_image(image: Any, name: str = "image", max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Upright RGB uint8 (H, W, 3) of whatever a user calls an image: a path, a URL that `fsspec` knows, an
    open binary file, its bytes, a PIL image, or such an array, which is taken as it is.

    Raises:
        BadImage: none of these, no such file, or it does not decode; it is named, or by `name`.
    """
    if isinstance(image, str | Path):
        return decode_image(_read_bytes(image), str(image), max_pixels)
    if isinstance(image, io.RawIOBase | io.BufferedIOBase):
        image = image.read()
    if isinstance(image, bytes | bytearray | memoryview):
        return decode_image(bytes(image), name, max_pixels)
    # whoever has a PIL image has imported PIL
    if (pil := sys.modules.get("PIL.Image")) and isinstance(image, pil.Image):
        return _decode_pil(image, name, max_pixels)
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
        numbers = f" of {array.dtype} {array.shape}" if array.dtype.kind in "biuf" and array.ndim else ""
        raise BadImage(
            f"{name}: {type(image).__name__}{numbers} is no image; give a path, a URL, a binary file, its "
            "bytes, a PIL image or an array of uint8 (height, width, 3)"
        )
    return array


def _read_bytes(path: Path | str) -> bytes:
    try:
        if "://" in str(path):
            import fsspec

            with fsspec.open(str(path)) as file:
                data = file.read(MAX_BYTES + 1)
                if len(data) > MAX_BYTES:
                    raise BadImage(f"{path}: more than {MAX_BYTES:,} bytes: no image")
                return data
        return read_image_file(path)
    except OSError as error:
        # of a URL the error says no more than the URL, and its cause why
        reason = error.strerror or " ".join(str(error.__cause__ or error).split())
        raise BadImage(f"{path}: {reason}") from error
    except (ImportError, ValueError) as error:  # no package for the URL's scheme, or no such scheme
        raise BadImage(f"{path}: {error}") from error


def read_image_file(path: Path | str) -> bytes:
    """Read the file of an image.

    Raises:
        BadImage: no file, or too large a one. OSError: as of `open`.
    """
    # a pipe is not waited for
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb", buffering=0) as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise BadImage(f"{path}: no file")
        if status.st_size > MAX_BYTES:
            raise BadImage(f"{path}: {status.st_size:,} bytes, of which an image may have {MAX_BYTES:,}")
        return file.readall()


def _decode_pil(image: Any, name: str, max_pixels: int) -> np.ndarray:
    """The pixels of a PIL image as those of its file: turned as its EXIF says, over white."""
    from PIL import ImageOps

    if image.width * image.height > max_pixels:
        raise BadImage(
            f"{name}: {image.width} x {image.height} pixels, of which {max_pixels:,} may be (max_pixels)"
        )
    stream = io.BytesIO()
    try:  # its file is read only now, and may be damaged
        image = ImageOps.exif_transpose(image)
        if image.mode in ("RGB", "CMYK", "YCbCr", "HSV", "LAB"):
            return np.asarray(image.convert("RGB"))
        image.save(stream, "PNG", compress_level=0)
    except Exception as error:
        raise error_line(error) or BadImage(f"{name}: does not decode ({describe_error(error)})") from error
    return decode_image(stream.getvalue(), name, max_pixels)


def resize_image(image: np.ndarray, size: int) -> np.ndarray:
    """The evaluation transform: the whole image at (size, size)."""
    if image.shape[:2] == (size, size):
        return image
    # areas average all pixels where it shrinks; where it grows, cubic interpolation keeps edges
    interpolation = cv2.INTER_AREA if min(image.shape[:2]) > size else cv2.INTER_CUBIC
    return cv2.resize(image, (size, size), interpolation=interpolation)


FIXED_UNIFORMS = 9  # area, aspect, left, top, flip, grayscale, cutout, its left, its top


def count_uniforms(config: AugmentConfig) -> int:
    """Return how many uniforms `augment_image` takes."""
    return FIXED_UNIFORMS + 2 * config.operations


def augment_image(image: np.ndarray, size: int, config: AugmentConfig, uniforms: np.ndarray) -> np.ndarray:
    """The training transform: (H, W, 3) to (size, size, 3). `uniforms`: `count_uniforms`, in [0, 1)."""
    area, aspect, left, top, flip, gray, cutout, cut_left, cut_top, *choices = uniforms.tolist()
    operations = []
    for choice, strength in zip(choices[::2], choices[1::2], strict=True):
        name = config.choices[int(choice * len(config.choices))]
        operations.append((name, (2 * strength - 1) * config.magnitude / 10))
    # everything that moves pixels is one matrix, so that the image is interpolated once
    matrix = _crop(image, config, area, aspect, left, top)
    for name, strength in operations:
        if name in WARPS:
            matrix = matrix @ np.array([*WARPS[name](strength), [0, 0, 1]], dtype=float)
    if flip < config.flip:
        matrix[:, 0] *= -1
    image = _warp(image, size, matrix[:2])
    for name, strength in operations:
        if name in TONES:
            image = TONES[name](image, strength)
    if gray < config.grayscale:
        image = _saturate(image, 0.0)
    if cutout < config.cutout:
        side = size // 4
        left, top = (int(uniform * (size - side + 1)) for uniform in (cut_left, cut_top))
        image[top : top + side, left : left + side] = 127
    return image


def _crop(
    image: np.ndarray, config: AugmentConfig, area: float, aspect: float, left: float, top: float
) -> np.ndarray:
    """(3, 3) of a random crop, from four uniforms: output coordinates in [-1/2, 1/2] to pixels of the input,
    both from their centres."""
    height, width = image.shape[:2]
    share = config.scale[0] + (config.scale[1] - config.scale[0]) * area
    low, high = (math.log(ratio) for ratio in config.ratio)
    stretch = math.sqrt(math.exp(low + (high - low) * aspect))
    side = math.sqrt(share * width * height)
    # a crop that is longer than the image is as long as it
    crop_width, crop_height = min(width, side * stretch), min(height, side / stretch)
    left, top = (width - crop_width) * left, (height - crop_height) * top
    return np.array(
        [[crop_width, 0, left + crop_width / 2], [0, crop_height, top + crop_height / 2], [0, 0, 1]]
    )


def _warp(image: np.ndarray, size: int, matrix: np.ndarray) -> np.ndarray:
    """Sample `image` at matrix @ (u, v, 1) for every output pixel; shrunk by areas first where it would
    alias."""
    # an affine warp reads four pixels for each of its own: where it shrinks more than twofold it would skip
    # some, and alias
    shrink = int(min(np.hypot(*matrix[:, 0]), np.hypot(*matrix[:, 1])) / size)
    if shrink > 1:
        height, width = image.shape[:2]
        new = (max(width // shrink, 1), max(height // shrink, 1))
        image = cv2.resize(image, new, interpolation=cv2.INTER_AREA)
        matrix = matrix * [[new[0] / width], [new[1] / height]]
    linear = matrix[:, :2] / size  # OpenCV's pixel i has its centre at i, ours at i + 1/2
    offset = matrix[:, 2] + linear.sum(1) * (0.5 - size / 2) - 0.5
    return cv2.warpAffine(
        image,
        np.column_stack([linear, offset]),
        (size, size),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=WHITE,
    )


def _rotate(strength: float):
    angle = math.radians(30 * strength)
    return [math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]


# Geometric operations: strength in [-1, 1] to the two rows of an affine map. Ranges as in RandAugment.
WARPS = {
    "rotate": _rotate,
    "shear_x": lambda strength: ([1, 0.3 * strength, 0], [0, 1, 0]),
    "shear_y": lambda strength: ([1, 0, 0], [0.3 * strength, 1, 0]),
    "translate_x": lambda strength: ([1, 0, 0.3 * strength], [0, 1, 0]),
    "translate_y": lambda strength: ([1, 0, 0], [0, 1, 0.3 * strength]),
}

# a tone operation of one pixel at a time is a table of 256 levels, looked up by OpenCV
LEVELS = np.arange(256, dtype=np.float32)


def _table(image: np.ndarray, levels: np.ndarray) -> np.ndarray:
    return cv2.LUT(image, np.clip(np.rint(levels), 0, 255).astype(np.uint8))


def _factor(strength: float) -> float:
    return 1 + 0.9 * strength


def _contrast(image: np.ndarray, strength: float) -> np.ndarray:
    mean = round(cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0])
    return _table(image, mean + (LEVELS - mean) * _factor(strength))


def _posterize(image: np.ndarray, strength: float) -> np.ndarray:
    step = 1 << round(4 * abs(strength))
    return _table(image, LEVELS // step * step)


def _solarize(image: np.ndarray, strength: float) -> np.ndarray:
    return _table(image, np.where(256 * (1 - abs(strength)) > LEVELS, LEVELS, 255 - LEVELS))


def _autocontrast(image: np.ndarray, strength: float) -> np.ndarray:
    channels = []
    for channel in cv2.split(image):
        low, high, _, _ = cv2.minMaxLoc(channel)
        channels.append(_table(channel, (LEVELS - low) * (255 / (high - low))) if high > low else channel)
    return cv2.merge(channels)


SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13


def _sharpness(image: np.ndarray, strength: float) -> np.ndarray:
    smooth = cv2.filter2D(image, -1, SMOOTH)
    return cv2.addWeighted(image, _factor(strength), smooth, 1 - _factor(strength), 0)


def _saturate(image: np.ndarray, factor: float) -> np.ndarray:
    gray = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(image, factor, gray, 1 - factor, 0)


def _hue(image: np.ndarray, strength: float) -> np.ndarray:
    hue, saturation, value = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV))
    hue = _table(hue, (LEVELS + round(90 * strength)) % 180)
    return cv2.cvtColor(cv2.merge([hue, saturation, value]), cv2.COLOR_HSV2RGB)


# Tone operations: image and strength in [-1, 1] to image.
TONES = {
    "brightness": lambda image, strength: _table(image, LEVELS * _factor(strength)),
    "contrast": _contrast,
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": _autocontrast,
    "equalize": lambda image, strength: cv2.merge(list(map(cv2.equalizeHist, cv2.split(image)))),
    "sharpness": _sharpness,
    "saturation": lambda image, strength: _saturate(image, _factor(strength)),
    "hue": _hue,
    "blur": lambda image, strength: cv2.GaussianBlur(
        image, (0, 0), 0.1 + abs(strength) * image.shape[0] / 32
    ),
}


def is_image(extension: str) -> bool:
    """True if a member of this extension ("jpg", "seg.png") is an image file."""
    return extension.rpartition(".")[2] in IMAGE_EXTENSIONS


def is_plain_image(extension: str) -> bool:
    """True if it is one that nobody has to ask for: "jpg", "input.jpg"."""
    return extension.removeprefix("input.") in IMAGE_EXTENSIONS


@functools.lru_cache(1024)  # the same few kinds of samples, millions of times
def find_images(extensions: tuple[str, ...], listed: tuple[str, ...] | None) -> tuple[str, ...]:
    """Extensions of a sample's images, sorted: those of `listed`. A manifest of before there was such a list
    (None) stands for the plain ones, or, where a sample has none, for whatever is an image file."""
    if listed is not None:
        return tuple(sorted(extension for extension in extensions if extension in listed))
    images = tuple(sorted(filter(is_image, extensions)))
    return tuple(filter(is_plain_image, images)) or images
