"""Images: which files are some, decoding, and preparation for a model. RGB, uint8, (H, W, 3)."""

import functools
import io
import os
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from raylib.data.image_headers import MAX_BYTES, check_image, read_avif_depth, read_orientation
from raylib.errors import UserError, describe_error, error_line
from raylib.fileio import open_plain
from raylib.settings import MAX_PIXELS, SQUEEZED, PreprocessConfig, Resample

IMAGE_EXTENSIONS = frozenset(
    ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff", "avif")
)
cv2.setNumThreads(1)  # workers are processes; threads in each would only get in each other's way
cv2.utils.logging.setLogLevel(
    cv2.utils.logging.LOG_LEVEL_SILENT
)  # what does not decode is told by name, once


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
    try:
        file = open_plain(path)
    except (ValueError, IsADirectoryError):
        raise BadImage(f"{path}: no file") from None
    with file:
        if (size := os.fstat(file.fileno()).st_size) > MAX_BYTES:
            raise BadImage(f"{path}: {size:,} bytes, of which an image may have {MAX_BYTES:,}")
        return file.read()


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


def preprocess_image(image: np.ndarray, size: int, config: PreprocessConfig) -> np.ndarray:
    """The evaluation transform: (H, W, 3) -> (size, size, 3), as `transformers`' image processors on Pillow
    do it, before they rescale and normalise."""
    height, width = image.shape[:2]
    side = config.resize_to or size
    if config.resize == "square":
        new_width = new_height = side
    else:
        short, long = min(height, width), max(height, width)
        # cut off and not rounded, as torchvision does
        other = side * long // short
        new_width, new_height = (side, other) if width <= height else (other, side)
    if config.resample != "area":
        image = resize_pillow(image, new_width, new_height, config.resample)
    elif (height, width) != (new_height, new_width):
        # areas average all pixels where it shrinks; where it grows, cubic interpolation keeps edges
        interpolation = cv2.INTER_AREA if min(height, width) > side else cv2.INTER_CUBIC
        image = cv2.resize(image, (new_width, new_height), interpolation=interpolation)
    return crop_center(image, size)


def resize_image(image: np.ndarray, size: int) -> np.ndarray:
    """The whole image at (size, size), by OpenCV."""
    return preprocess_image(image, size, SQUEEZED)


def resize_pillow(image: np.ndarray, width: int, height: int, resample: Resample) -> np.ndarray:
    """(H, W, 3) -> (height, width, 3) by one of Pillow's filters."""
    from PIL import Image

    if image.shape[:2] == (height, width):
        return image
    method = Image.Resampling[resample.upper()]
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((width, height), method)).copy()


def crop_center(image: np.ndarray, size: int) -> np.ndarray:
    """The centre (size, size, 3); of a smaller image with black around it."""
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    if height < size or width < size:
        # rounded up, where a crop is rounded down: as `transformers` pads
        above, before = max(size - height + 1, 0) // 2, max(size - width + 1, 0) // 2
        padded = np.zeros((max(height, size), max(width, size), 3), np.uint8)
        padded[above : above + height, before : before + width] = image
        image, (height, width) = padded, padded.shape[:2]
    top, left = (height - size) // 2, (width - size) // 2
    return np.ascontiguousarray(image[top : top + size, left : left + size])


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
