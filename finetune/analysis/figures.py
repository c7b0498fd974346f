"""What the figures of an analysis share: how they are written, which text the fonts of this machine can
draw."""

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from raylib.fileio import write_json
from raylib.finite import require_finite_values
from raylib.tables import save_figure

FONT = "DejaVu Sans"  # comes with matplotlib
BOXES = "Last Resort"  # a font that has a box for every character


class Inapplicable(Exception):
    """Why a figure cannot be made of this run, in a line; the others still are."""


def save(figure, values: dict[str, Any], path: Path) -> None:
    """The figure as `path`.png, the numbers behind it as `path`.json.

    Raises:
        NotFinite: one of them is not finite; neither is written.
    """
    require_finite_values(f"{path}.json", values)
    save_figure(figure, path.with_suffix(".png"), dpi=130)
    write_json(path.with_suffix(".json"), values)


def find_fonts(texts: Iterable[str]) -> tuple[list[str], set[str]]:
    """(font families that draw `texts` between them, best first; those of the texts that no font here can
    draw)."""
    from matplotlib import font_manager

    texts = set(texts)
    missing = {ord(c) for text in texts for c in text if not c.isspace()} - _characters(
        font_manager.findfont(FONT)
    )
    families = [FONT]
    for font in font_manager.fontManager.ttflist:
        if (
            missing
            and font.style == "normal"
            and not font.name.startswith(BOXES)
            and missing & _characters(font.fname)
        ):
            families.append(font.name)
            missing -= _characters(font.fname)
    return families, {text for text in texts if any(ord(c) in missing for c in text)}


@cache
def _characters(path: str) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(path).get_charmap())
