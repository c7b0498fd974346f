"""Draw the README's picture: names of things in several languages, and the drawings that a model finds.

    python -m benchmarks.gallery runs/sample [--out docs/images/gallery.png]

The drawings are of a style that training never saw. Which concepts are shown is decided by a hash,
whatever the model makes of them: the picture is a sample of what the table counts, its mistakes included.
"""

import argparse
import textwrap
from pathlib import Path

import cv2
import numpy as np
import polyglance

from benchmarks.results import ROOT
from raylib.display import open_pyplot, save_figure
from raylib.randomness import permutation
from raylib.sample import UNSEEN_VENDOR, is_held_out, read_concept_captions, read_images

LANGUAGES = ("de", "fr", "ru", "tr", "el", "sw")  # scripts that every matplotlib draws
SHOWN = 6  # drawings of a row
SEED = 0


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a run of `tiny`, or its export")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "gallery.png")
    given = parser.parse_args(arguments)
    drawings = read_images(UNSEEN_VENDOR)
    keys = [key for key in sorted(drawings) if not is_held_out(key)]
    names = {language: read_concept_captions(language) for language in LANGUAGES}
    named = [key for key in keys if all(key in captions for captions in names.values())]
    queries = [named[i] for i in permutation(len(named), SEED, "gallery")[: len(LANGUAGES)]]
    texts = [names[language][key].name for language, key in zip(LANGUAGES, queries, strict=True)]
    model = polyglance.load(given.model)
    cosines = model.similarity([drawings[key] for key in drawings], texts).T
    draw(given.out, list(drawings.items()), list(zip(LANGUAGES, queries, texts, strict=True)), cosines)


def draw(
    out: Path, drawings: list[tuple[str, bytes]], queries: list[tuple[str, str, str]], cosines: np.ndarray
) -> None:
    """Draw a row a query: its name, then the nearest drawings, the right one framed."""
    pyplot = open_pyplot()
    figure, axes = pyplot.subplots(
        len(queries), SHOWN + 1, figsize=(7, 4.6), gridspec_kw={"width_ratios": [3] + [1] * SHOWN}
    )
    english = read_concept_captions("en")
    for row, (language, key, text), scores in zip(axes, queries, cosines, strict=True):
        row[0].axis("off")
        row[0].text(0, 0.4, textwrap.fill(text, 21), fontsize=12, va="bottom")
        row[0].text(0, 0.3, f"{language}: {english[key].name}", fontsize=9, va="top", color="gray")
        for cell, index in zip(row[1:], np.argsort(-scores, kind="stable"), strict=False):
            found, data = drawings[index]
            cell.imshow(cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), 1), cv2.COLOR_BGR2RGB))
            cell.set(xticks=[], yticks=[])
            for spine in cell.spines.values():
                spine.set(edgecolor="tab:green" if found == key else "none", linewidth=3)
    figure.subplots_adjust(left=0.02, right=0.99, top=0.98, bottom=0.02, wspace=0.1, hspace=0.2)
    save_figure(figure, out)


if __name__ == "__main__":
    main()
