"""Figures of what a run has stored: scores after each epoch, by language and by question type (paper 1,
figures 2 and 3), of a run with `eval_each_epoch=true`; accuracy with synonyms counted right, and the labels
that are taken for each other (paper 0, section 6, tables 2 and 3)."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.analysis.parallel import Inapplicable, write_figure
from finetune.predict import read_predictions
from finetune.strategies.wordnet import HYPERNYM, HYPONYM, NONE, PAIRS, SYNONYM, WordNet, confusions
from raylib.metrics import mean_or_zero
from raylib.tables import markdown_table, open_pyplot, percent
from raylib.track import read_metrics

PREFIX = "eval/test/"  # what `finetune.evaluate` records with `eval_each_epoch`: LANGUAGE, or LANGUAGE/TYPE
RELATION_NAMES = {SYNONYM: "a synonym", HYPERNYM: "a hypernym", HYPONYM: "a hyponym", NONE: "unrelated"}
COLOURS = {SYNONYM: "tab:green", HYPERNYM: "tab:olive", HYPONYM: "tab:cyan", NONE: "lightgray"}


def read_curves(folders: Sequence[Path]) -> dict[str, Any]:
    """{"score": {language: a value an epoch}, "by_type": {type: {language: ...}}, "by_type_mean": {type: mean
    over the targets}}, from metrics.jsonl of each of the folders of a run.

    Raises:
        Inapplicable: nothing was recorded.
    """
    scores: dict[str, list[float]] = defaultdict(list)
    kinds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for folder in folders:
        for record in read_metrics(folder):
            for key, value in record.items():
                if key.startswith(PREFIX):
                    code, _, kind = key.removeprefix(PREFIX).partition("/")
                    (kinds[kind][code] if kind else scores[code]).append(value)
    if not scores:
        raise Inapplicable("nothing was recorded after each epoch; train with eval_each_epoch=true")
    means = {
        kind: [
            mean_or_zero(values)
            for values in zip(*(v for code, v in by.items() if code != "en"), strict=True)
        ]
        for kind, by in sorted(kinds.items())
    }
    return {
        "score": dict(scores),
        "by_type": {kind: dict(by) for kind, by in sorted(kinds.items())},
        "by_type_mean": {kind: values for kind, values in means.items() if values},
    }


def draw_curves(values: dict[str, Any], title: str, measure: str, path: Path) -> None:
    """Left a line a language, English and the mean of the targets apart; right, where there are types, a line
    a type."""
    pyplot = open_pyplot()
    scores, kinds = values["score"], values["by_type_mean"]
    figure, axes = pyplot.subplots(
        1,
        1 + bool(kinds),
        figsize=(5.2 * (1 + bool(kinds)), 3.9),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    figure.suptitle(f"{title}: test set after each epoch", fontsize=10)
    targets = [code for code in scores if code != "en"]
    colours = pyplot.get_cmap("tab10" if len(targets) <= 10 else "tab20")
    lines = {"en": (scores["en"], {"color": "black", "linewidth": 2})} if "en" in scores else {}
    lines |= {code: (scores[code], {"color": colours(i), "linewidth": 1}) for i, code in enumerate(targets)}
    if len(targets) > 1:
        average = [mean_or_zero(each) for each in zip(*(scores[code] for code in targets), strict=True)]
        lines["mean of\nthe targets"] = average, {"color": "gray", "linewidth": 2, "linestyle": "--"}
    _lines(axes[0, 0], lines, "by language")
    axes[0, 0].set_ylabel(f"{measure}, %")
    if kinds:
        styled = {
            kind: (points, {"color": colours(i), "linewidth": 1.5})
            for i, (kind, points) in enumerate(kinds.items())
        }
        _lines(axes[0, 1], styled, "by question type, mean of the targets")
    write_figure(figure, values, path)


def curve_table(values: dict[str, Any]) -> str:
    """Markdown: each language after the first epoch, at its best, after the last."""
    rows = [["language", "first epoch", "best epoch", "last epoch"]]
    for code, points in values["score"].items():
        best = max(points)
        rows.append(
            [code, percent(points[0]), f"{percent(best)} ({points.index(best) + 1}.)", percent(points[-1])]
        )
    return markdown_table(rows)


def _lines(axes, lines: dict[str, tuple[list[float], dict]], title: str) -> None:
    for label, (points, style) in lines.items():
        axes.plot(range(1, len(points) + 1), [100 * p for p in points], marker=".", label=label, **style)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def count_confusions(files: dict[str, Path], folder: Path) -> dict[str, Any]:
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


def draw_confusions(values: dict[str, Any], title: str, path: Path) -> None:
    """A bar a language: its accuracy, and above it what its wrong predictions are to the true label."""
    pyplot = open_pyplot()
    figure, axes = pyplot.subplots(figsize=(3 + 0.6 * len(values), 3.8), layout="constrained")
    codes, base = list(values), [100 * v["accuracy"] for v in values.values()]
    axes.bar(codes, base, color="tab:blue", label="right")
    for relation, colour in COLOURS.items():
        heights = [100 * v["wrong"].get(relation, 0) / max(1, v["n"]) for v in values.values()]
        axes.bar(codes, heights, bottom=base, color=colour, label=RELATION_NAMES[relation])
        base = [low + high for low, high in zip(base, heights, strict=True)]
    axes.set(ylabel="test examples, %", ylim=(0, 100))
    axes.set_title(f"{title}: what predictions are to the true label", fontsize=9)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, reverse=True)
    write_figure(figure, values, path)


def confusion_table(values: dict[str, Any]) -> str:
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
    for code, counts in values.items():
        strict, kind = counts["accuracy"], counts["accuracy_with_synonyms"]
        first.append(
            [
                code,
                percent(strict),
                percent(kind),
                f"+{percent(kind - strict)}",
                *(str(counts["wrong"].get(relation, 0)) for relation in kinds),
            ]
        )
        second.append([code, _pairs(counts["confused_related"]), _pairs(counts["confused"])])
    return f"{markdown_table(first)}\n\n{markdown_table(second, words=3)}"


def _pairs(pairs: list[dict[str, Any]]) -> str:
    return (
        "; ".join(f"{p['label']}:{p['prediction']} ({p['relation']}) {p['count']}" for p in pairs) or "none"
    )
