"""Augmentation of training images: a random crop, a flip, RandAugment (Cubuk et al. 2020). uint8 in, uint8
out, RGB, (H, W, 3). All chance comes in as `uniforms`. `AugmentConfig.randaugment` says which:

    fused   Built for speed: crop, flip, rotation, shears and shifts are one affine warp, tone operations are
            look-up tables. It is not pixel-identical to PIL's: pixels that a rotation brings into view are
            the image's own where it has some, white elsewhere.
    albef   ALBEF's (Li et al. 2021), which CCLM's and mVLP's public code share: torchvision's random resized
            crop, a flip, then the operations one after the other, each applied to half of the images. They
            equal that code's (`randaugment.py`) to the byte, with what overflows in it: its autocontrast
            makes a channel white that has no black pixel, its sharpness wraps around at 0 and 255.
    pil     The same without these two overflows, which is what Pillow computes.
"""

import math
from collections.abc import Callable, Sequence

import cv2
import numpy as np

from raylib.data.images import resize_pillow
from raylib.data.restyle import ELASTIC_UNIFORMS, RESTYLE_UNIFORMS, elastic_shifts, restyle
from raylib.settings import AugmentConfig

WHITE = (255, 255, 255)
FIXED_UNIFORMS = 9  # area, aspect, left, top, flip, grayscale, cutout, its left, its top
FLIP = 4  # which of them flips


def count_uniforms(config: AugmentConfig) -> int:
    """Return how many uniforms `augment_image` takes."""
    if config.randaugment == "fused":
        count = FIXED_UNIFORMS + 2 * config.operations
    else:
        count = FIXED_UNIFORMS + MORE_ATTEMPTS + DRAWS_PER_OPERATION * config.operations
    # behind the others, which stay those of a run that changes no styles
    return count + RESTYLE_UNIFORMS * _restyles(config) + ELASTIC_UNIFORMS * (config.elastic > 0)


def _restyles(config: AugmentConfig) -> bool:
    """Return whether some images get another style or other colours."""
    return config.outline + config.silhouette + config.color_jitter > 0


def forbid_flips(config: AugmentConfig, uniforms: np.ndarray, texts: Sequence[Sequence[str]]) -> None:
    """Change `uniforms` (n, `count_uniforms`) so that no image is flipped whose texts have one of
    `config.flip_unless` in them."""
    for row, said in enumerate(texts):
        if any(word in text for text in said for word in config.flip_unless):
            uniforms[row, FLIP] = 1.0


def augment_image(image: np.ndarray, size: int, config: AugmentConfig, uniforms: np.ndarray) -> np.ndarray:
    """The training transform: (H, W, 3) to (size, size, 3). `uniforms`: `count_uniforms`, in [0, 1)."""
    draws, shifts = uniforms.tolist(), None
    if config.elastic:
        draws, more = draws[:-ELASTIC_UNIFORMS], draws[-ELASTIC_UNIFORMS:]
        shifts = elastic_shifts(size, config.elastic, more)
    if _restyles(config):
        draws, more = draws[:-RESTYLE_UNIFORMS], draws[-RESTYLE_UNIFORMS:]
        image = restyle(image, config, more)
    if config.randaugment == "fused":
        image = _augment_fused(image, size, config, draws, shifts)
    else:
        image = _augment_in_turn(image, size, config, draws)
    gray, cutout, cut_left, cut_top = draws[FLIP + 1 : FIXED_UNIFORMS]
    if gray < config.grayscale:
        image = _saturate(image, 0.0)
    if cutout < config.cutout:
        side = size // 4
        left, top = (int(uniform * (size - side + 1)) for uniform in (cut_left, cut_top))
        image[top : top + side, left : left + side] = 127
    return image


# ---- fused


def _augment_fused(
    image: np.ndarray, size: int, config: AugmentConfig, draws: list[float], shifts: np.ndarray | None
) -> np.ndarray:
    area, aspect, left, top, flip = draws[: FLIP + 1]
    choices = draws[FIXED_UNIFORMS:]
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
    image = _warp(image, size, matrix[:2], shifts)
    for name, strength in operations:
        if name in TONES:
            image = TONES[name](image, strength)
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
    crop_width, crop_height = side * stretch, side / stretch
    # a crop that is longer than the image is as long as it; where the config zooms out, white surrounds it
    if config.scale[1] <= 1:
        crop_width, crop_height = min(width, crop_width), min(height, crop_height)
    left, top = (width - crop_width) * left, (height - crop_height) * top
    return np.array(
        [[crop_width, 0, left + crop_width / 2], [0, crop_height, top + crop_height / 2], [0, 0, 1]]
    )


def _warp(image: np.ndarray, size: int, matrix: np.ndarray, shifts: np.ndarray | None = None) -> np.ndarray:
    """Sample `image` at matrix @ (u, v, 1) for every output pixel, (u, v) moved by `shifts` (size, size, 2);
    shrunk by areas first where it would alias."""
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
    if shifts is not None:
        steps = np.arange(size, dtype=np.float32)
        points = np.stack(np.meshgrid(steps, steps), -1) + shifts * np.float32(size)
        x, y = cv2.split(points @ linear.T.astype(np.float32) + offset.astype(np.float32))
        return cv2.remap(image, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=WHITE)
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


# ---- one after the other

GRAY = (128, 128, 128)  # what a move brings into view
ATTEMPTS = 10  # at a box that fits, after which the centre is taken (torchvision)
SHIFT = 10  # pixels of a translation at magnitude 10, whatever the image's size
MORE_ATTEMPTS = 2 * (ATTEMPTS - 1)  # uniforms of the attempts after the first
DRAWS_PER_OPERATION = 3  # which, whether it is applied, in which direction
BYTES = np.arange(256, dtype=np.uint8)


def _augment_in_turn(image: np.ndarray, size: int, config: AugmentConfig, draws: list[float]) -> np.ndarray:
    area, aspect, left, top, flip = draws[: FLIP + 1]
    attempts, choices = draws[FIXED_UNIFORMS:][:MORE_ATTEMPTS], draws[FIXED_UNIFORMS + MORE_ATTEMPTS :]
    height, width, _ = image.shape
    box = crop_box(height, width, config, [area, aspect, *attempts], left, top)
    image = resized_crop(image, box, size)
    if flip < config.flip:
        image = np.ascontiguousarray(image[:, ::-1])
    return apply_operations(image, config, choices)


def crop_box(
    height: int, width: int, config: AugmentConfig, attempts: Sequence[float], left: float, top: float
) -> tuple[int, int, int, int]:
    """(left, top, width, height) of torchvision's `RandomResizedCrop`. attempts: uniforms, for each attempt
    one of the area and one of the aspect."""
    lowest, highest = config.ratio
    for area, aspect in zip(attempts[::2], attempts[1::2], strict=True):
        share = config.scale[0] + (config.scale[1] - config.scale[0]) * area
        ratio = math.exp(math.log(lowest) + (math.log(highest) - math.log(lowest)) * aspect)
        w, h = (round(math.sqrt(height * width * share * side)) for side in (ratio, 1 / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int((width - w + 1) * left), int((height - h + 1) * top), w, h
    # the whole image, or as much of its centre as the aspects allow
    w, h = width, height
    if width / height < lowest:
        h = round(w / lowest)
    elif width / height > highest:
        w = round(h * highest)
    return (width - w) // 2, (height - h) // 2, w, h


def resized_crop(image: np.ndarray, box: tuple[int, int, int, int], size: int) -> np.ndarray:
    """The part `box` of an image (H, W, 3) at (size, size), bicubic."""
    left, top, width, height = box
    part = np.ascontiguousarray(image[top : top + height, left : left + width])
    return resize_pillow(part, size, size, "bicubic")


def apply_operations(image: np.ndarray, config: AugmentConfig, draws: Sequence[float]) -> np.ndarray:
    """Apply RandAugment's operations to (H, W, 3). draws: `DRAWS_PER_OPERATION` an operation."""
    for choice, chance, direction in zip(draws[::3], draws[1::3], draws[2::3], strict=True):
        if chance < 0.5:
            name = config.choices[int(choice * len(config.choices))]
            image = apply_operation(image, name, config, -1 if direction > 0.5 else 1)
    return image


def apply_operation(image: np.ndarray, name: str, config: AugmentConfig, sign: int) -> np.ndarray:
    """Apply one operation at the config's magnitude. sign: -1 or 1, of those that have a direction."""
    strength, wraps = config.magnitude / 10, config.randaugment == "albef"
    if name in MOVES:
        return _move(image, MOVES[name](sign * strength, image.shape[1], image.shape[0]))
    factor = strength * 1.8 + 0.1  # from 0.1 at magnitude 0 to 1.9 at 10
    if name == "brightness":
        return _look_up(image, [_to_bytes(LEVELS * np.float32(factor))] * 3)
    if name == "sharpness":
        return _sharpen(image, factor, wraps)
    if name == "autocontrast":
        return _look_up(image, [_stretch(channel, wraps) for channel in cv2.split(image)])
    if name == "equalize":
        return _look_up(image, [_equalize(channel) for channel in cv2.split(image)])
    assert name == "identity", name
    return image


# Moves: strength with its sign, width, height -> (2, 3) of an affine map forward, as OpenCV takes it.
MOVES: dict[str, Callable[[float, int, int], np.ndarray]] = {
    "rotate": lambda s, w, h: cv2.getRotationMatrix2D((w / 2, h / 2), 30 * s, 1),
    "shear_x": lambda s, w, h: np.array([[1, 0.3 * s, 0], [0, 1, 0]], np.float32),
    "shear_y": lambda s, w, h: np.array([[1, 0, 0], [0.3 * s, 1, 0]], np.float32),
    "translate_x": lambda s, w, h: np.array([[1, 0, -SHIFT * s], [0, 1, 0]], np.float32),
    "translate_y": lambda s, w, h: np.array([[1, 0, 0], [0, 1, -SHIFT * s]], np.float32),
}


def _move(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    return cv2.warpAffine(image, matrix, (width, height), borderValue=GRAY, flags=cv2.INTER_LINEAR)


def _to_bytes(values: np.ndarray) -> np.ndarray:
    """The levels (256,) that a table gives, cut off at the ends and rounded down."""
    return values.clip(0, 255).astype(np.uint8)


def _look_up(image: np.ndarray, tables: Sequence[np.ndarray]) -> np.ndarray:
    """Replace the levels of each channel by those of its table (256,)."""
    return cv2.LUT(image, np.stack(tables, -1)[None])


def _stretch(channel: np.ndarray, wraps: bool) -> np.ndarray:
    """Table that leads the darkest level to 0 and the brightest to 255."""
    low, high = int(channel.min()), int(channel.max())
    if high <= low:
        return BYTES
    scale = 255 / (high - low)
    # that code negates the darkest level as a byte, so that 1 becomes 255
    offset = (-low % 256 if wraps else -low) * scale
    return _to_bytes(np.arange(256) * scale + offset)


def _equalize(channel: np.ndarray) -> np.ndarray:
    """Table that makes levels equally frequent, as Pillow does (OpenCV's differs)."""
    counts = np.bincount(channel.ravel(), minlength=256)
    step = int(counts[counts > 0][:-1].sum()) // 255
    if not step:
        return BYTES
    below = np.concatenate([[0], np.cumsum(counts)[:-1]])
    return _to_bytes((below + step // 2) // step)


def _sharpen(image: np.ndarray, factor: float, wraps: bool) -> np.ndarray:
    """Away from the smoothed image, but for the border."""
    kernel = np.ones((3, 3), np.float32)
    kernel[1, 1] = 5
    smooth = cv2.filter2D(image, -1, kernel / np.float32(13))[1:-1, 1:-1].astype(np.float32)
    sharp = smooth + factor * (image[1:-1, 1:-1].astype(np.float32) - smooth)
    result = image.copy()
    # numbers beyond a byte keep their lowest bits there
    result[1:-1, 1:-1] = sharp.astype(np.int32).astype(np.uint8) if wraps else _to_bytes(sharp)
    return result
