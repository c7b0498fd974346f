"""Augmentation of drawings that stand on white: other styles of drawing. uint8 RGB (H, W, 3) in and out; all
chance comes in as uniforms."""

import cv2
import numpy as np

from raylib.settings import AugmentConfig

RESTYLE_UNIFORMS = 6  # which style, its threshold, its tone; whether colours change, hue, saturation
GRID = 4  # points a side of an elastic deformation
ELASTIC_UNIFORMS = 2 * GRID**2
PAPER = 243  # a pixel with a darker channel is of the drawing
WHITE = 255


def restyle(image: np.ndarray, config: AugmentConfig, uniforms: list[float]) -> np.ndarray:
    """Return the image as contours or as a silhouette, or in other colours, as often as `config` says.
    uniforms: `RESTYLE_UNIFORMS`, in [0, 1)."""
    style, threshold, tone, colour, hue, saturation = uniforms
    if style < config.outline + config.silhouette:
        contours = find_contours(image, 25 + 100 * threshold)
        dark = contours if style < config.outline else cut_out(image, contours)
        return cv2.cvtColor(np.where(dark, np.uint8(100 * tone), np.uint8(WHITE)), cv2.COLOR_GRAY2RGB)
    if colour < config.color_jitter:
        return jitter_colors(image, hue, saturation)
    return image


def find_contours(image: np.ndarray, threshold: float) -> np.ndarray:
    """Mask (H, W) of the pixels around which a channel varies by more than `threshold` levels."""
    kernel = _square(2 * _line_scale(image) + 1)
    return cv2.morphologyEx(image, cv2.MORPH_GRADIENT, kernel).max(-1) > threshold


def cut_out(image: np.ndarray, contours: np.ndarray) -> np.ndarray:
    """Mask (H, W) of the drawing without the contours inside it."""
    drawing = (image.min(-1) < PAPER).astype(np.uint8)
    inside = cv2.erode(drawing, _square(4 * _line_scale(image) + 1))
    return (drawing > 0) & ~(contours & (inside > 0))


def _line_scale(image: np.ndarray) -> int:
    """Lines grow with images; those of small ones are no thinner, for a pixel has no neighbours in itself."""
    return max(1, image.shape[0] // 64)


def _square(side: int) -> np.ndarray:
    return np.ones((side, side), np.uint8)


def jitter_colors(image: np.ndarray, hue: float, saturation: float) -> np.ndarray:
    """Turn the hues by any angle, and scale the saturation by up to 1."""
    hues, strengths, values = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV))
    hues = ((hues.astype(np.uint16) + int(180 * hue)) % 180).astype(np.uint8)
    strengths = cv2.convertScaleAbs(strengths, alpha=0.3 + 0.7 * saturation)
    return cv2.cvtColor(cv2.merge([hues, strengths, values]), cv2.COLOR_HSV2RGB)


def elastic_shifts(size: int, strength: float, uniforms: list[float]) -> np.ndarray:
    """(size, size, 2) of smooth random shifts, up to `strength` of the side, from `ELASTIC_UNIFORMS`."""
    grid = np.array(uniforms, np.float32).reshape(GRID, GRID, 2) * 2 - 1
    return cv2.resize(grid * np.float32(strength), (size, size), interpolation=cv2.INTER_CUBIC)
