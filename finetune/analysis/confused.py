"""Accuracy with synonyms counted right, and the labels that are taken for each other (paper 0, section 6,
tables 2 and 3)."""

from pathlib import Path
from typing import Any

from finetune.analysis.figures import Inapplicable, save
from finetune.predict import read_predictions
from finetune.strategies.wordnet import HYPERNYM, HYPONYM, NONE, PAIRS, SYNONYM, WordNet, confusions
from raylib.tables import markdown_table, open_pyplot, percent

CALLED = {SYNONYM: "a synonym", HYPERNYM: "a hypernym", HYPONYM: "a hyponym", NONE: "unrelated"}
COLOURS = {SYNONYM: "tab:green", HYPERNYM: "tab:olive", HYPONYM: "tab:cyan", NONE: "lightgray"}


def count(files: dict[str, Path], folder: Path) -> dict[str, Any]:
    """{language: `confusions` of its predictions}. files: {language: predictions}. folder: of WordNet.

    Raises:
        Inapplicable: no WordNet there, or no predictions.
    """
    if not folder.is_dir():
        raise Inapplicable(f"no WordNet at {folder}; train with wordnet=FOLDER (nltk_data/corpora/wordnet)")
    missing = [str(path) for path in files.values() if not path.is_file()]
    if missing:
        raise Inapplicable(f"{missing[0]}: no such file; `python -m finetune evaluate RUN` writes it")
    wordnet = WordNet(folder)
    return {code: confusions(read_predictions(path), wordnet) for code, path in files.items()}


def draw(values: dict[str, Any], called: str, path: Path) -> None:
    """A bar a language: its accuracy, and above it what its wrong predictions are to the true label."""
    pyplot = open_pyplot()
    figure, axes = pyplot.subplots(figsize=(3 + 0.6 * len(values), 3.8), layout="constrained")
    codes, base = list(values), [100 * v["accuracy"] for v in values.values()]
    axes.bar(codes, base, color="tab:blue", label="right")
    for relation, colour in COLOURS.items():
        heights = [100 * v["wrong"].get(relation, 0) / max(1, v["n"]) for v in values.values()]
        axes.bar(codes, heights, bottom=base, color=colour, label=CALLED[relation])
        base = [low + high for low, high in zip(base, heights, strict=True)]
    axes.set(ylabel="test examples, %", ylim=(0, 100))
    axes.set_title(f"{called}: what predictions are to the true label", fontsize=9)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, reverse=True)
    save(figure, values, path)


def summary(values: dict[str, Any]) -> str:
    """Markdown: paper 0's tables 2 and 3."""
    kinds = (SYNONYM, HYPERNYM, HYPONYM, NONE)
    first = [["language", "accuracy", "with synonyms", "more", *(f"wrong: {kind}" for kind in kinds)]]
    second = [
        [
            "language",
            f"{PAIRS} most confused related labels: label:prediction (relation) count",
            f"{PAIRS} of all",
        ]
    ]
    for code, found in values.items():
        strict, kind = found["accuracy"], found["accuracy_with_synonyms"]
        first.append(
            [
                code,
                percent(strict),
                percent(kind),
                f"+{percent(kind - strict)}",
                *(str(found["wrong"].get(relation, 0)) for relation in kinds),
            ]
        )
        second.append([code, _pairs(found["confused_related"]), _pairs(found["confused"])])
    return f"{markdown_table(first)}\n\n{markdown_table(second, words=3)}"


def _pairs(pairs: list[dict[str, Any]]) -> str:
    return (
        "; ".join(f"{p['label']}:{p['prediction']} ({p['relation']}) {p['count']}" for p in pairs) or "none"
    )
