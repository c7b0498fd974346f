"""Figures that compare languages: similarity of the states of parallel items (paper 1, section 5.1, figure
4); scores after each epoch, by language and by question type (paper 1, figures 2 and 3), of a run with
`eval_each_epoch=true`; accuracy with synonyms counted right, and the labels that are taken for each other
(paper 0, section 6, tables 2 and 3).

The state is the one that the head reads: [CLS] after the unified encoder (a decoder reads the other tokens
too). Of retrieval, the unit vector of a caption.

Shape legend: L languages, n items, D width of a state.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.analysis.parallel import Inapplicable, Parallel, write_figure
from finetune.batches import encode_texts, read_inputs
from finetune.one_answer import Answers
from finetune.predict import CONFUSED_PAIRS, confusions, read_predictions
from finetune.report import marked
from finetune.stores.images import VisualSource
from finetune.strategies.lexical import HYPERNYM, HYPONYM, NONE, SYNONYM, WordNet
from raylib.data.loading import to_device
from raylib.display import markdown_table, open_pyplot, percent
from raylib.finite import require_finite
from raylib.metrics import mean_or_zero
from raylib.models.base import RetrievalBackbone
from raylib.models.finetuned import FinetuneModel
from raylib.monitoring import read_metrics
from raylib.precision import autocast
from raylib.text import Tokenizer

BATCH = 16  # items in every language at a time


@torch.inference_mode()
def parallel_states(
    model: FinetuneModel | RetrievalBackbone,
    parallel: Parallel,
    source: VisualSource | None,
    tokenizer: Tokenizer,
    length: int,
    bf16: bool = False,
) -> Tensor:
    """Compute unit vectors (L, n, D) of the items, float32 on the CPU. An image is encoded once for all
    languages."""
    device = next(model.parameters()).device
    columns: list[list[Tensor]] = [[] for _ in parallel.languages]
    for start in range(0, len(parallel.items), BATCH):
        rows, memory = parallel.items[start : start + BATCH], None
        with autocast(device, bf16):
            for language, column in enumerate(columns):
                examples = [row[language] for row in rows]
                spoken = tokenizer.for_language(parallel.languages[language])
                ids = encode_texts([e.texts[-1] for e in examples], spoken, length)
                text = to_device({"text": ids}, device)["text"]
                if not isinstance(model, FinetuneModel):
                    states = model.embed_text(text, normalize=False)
                else:
                    if memory is None or not examples[0].images:  # a premise is another in each language
                        inputs = read_inputs(examples, source, spoken, length)
                        memory = model.memory(to_device(inputs, device))
                    states = model.fused_cls(text, memory)
                column.append(F.normalize(states.float(), dim=-1))
    found = torch.stack([torch.cat(column) for column in columns]).cpu()
    for code, states in zip(parallel.languages, found, strict=True):
        require_finite(f"states of texts in '{code}'", states)
    return found


def compare_states(states: Tensor) -> tuple[np.ndarray, float | None]:
    """Compute of unit vectors (L, n, D): (mean cosine of parallel items (L, L), mean cosine of all pairs of
    different items, over all languages; None where there is but one item)."""
    states = states.double()
    languages, n, _ = states.shape
    matrix = torch.einsum("aid,bid->ab", states, states) / n
    if n < 2:
        return matrix.numpy(), None
    # the sum over all pairs is the square of the sum; pairs of one item are taken off: no (L n)^2 matrix
    every = states.sum((0, 1)).square().sum()
    same_item = states.sum(0).square().sum()
    return matrix.numpy(), float((every - same_item) / (languages**2 * n * (n - 1)))


def correlate(similarity: dict[str, float], scores: dict[str, float]) -> float | None:
    """Compute Pearson's r over languages between similarity to English and score; None of fewer than three,
    or where either is the same in all."""
    both = [(similarity[code], scores[code]) for code in similarity if code in scores]
    x, y = np.array(both, float).reshape(-1, 2).T
    if len(both) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def measure_similarity(parallel: Parallel, states: Tensor, scores: dict[str, float]) -> dict[str, Any]:
    """Compute the numbers of the figure."""
    codes = parallel.languages
    matrix, unpaired = compare_states(states)
    # no row of English, no similarity to it
    english = matrix[codes.index("en")].tolist() if "en" in codes else []
    similarity = {code: cosine for code, cosine in zip(codes, english, strict=False) if code != "en"}
    off = matrix[~np.eye(len(codes), dtype=bool)]
    return {
        "languages": list(codes),
        "items": len(parallel.items),
        "in_all_languages": parallel.num_common,
        "not_in_all": parallel.num_missing,
        "similarity": matrix.tolist(),
        "mean": float(off.mean()),
        "unpaired": unpaired,
        "to_english": similarity,
        "score": {code: scores[code] for code in codes if code in scores},
        "pearson": correlate(similarity, scores),
    }


def draw_similarity(values: dict[str, Any], title: str, measure: str, states: str, path: Path) -> None:
    """Draw a heat map, and beside it the score of each language over its similarity to English. states: kind
    of the states that are compared."""
    pyplot = open_pyplot()
    codes, similarity = values["languages"], values["to_english"]
    side = max(3.6, 1.6 + 0.45 * len(codes))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(2 * side + 0.4, side), layout="constrained")
    figure.suptitle(f"{title}: {values['items']} parallel test items", fontsize=10)
    _heat(left, 100 * np.array(values["similarity"]), codes)
    unpaired = "" if values["unpaired"] is None else f"; unpaired {100 * values['unpaired']:.1f}"
    left.set_title(
        f"{states} similarity, cosine × 100\nmean {100 * values['mean']:.1f}{unpaired}", fontsize=9
    )
    points = {
        code: (100 * similarity[code], 100 * values["score"][code])
        for code in similarity
        if code in values["score"]
    }
    # neighbours have their names above and below by turns
    for i, (code, (x, y)) in enumerate(sorted(points.items(), key=lambda point: point[1])):
        right.scatter(x, y, color="tab:blue", s=18)
        right.annotate(
            code, (x, y), (3, 3 if i % 2 else -10), textcoords="offset points", fontsize=8
        )  # neighbours apart
    num_languages = f"{len(points)} language{'s' if len(points) != 1 else ''}"
    pearson = "not defined" if values["pearson"] is None else f"{values['pearson']:.2f}"
    right.set_title(
        f"similarity and zero-shot transfer\nPearson's r over {num_languages}: {pearson}",
        fontsize=9,
    )
    right.set(xlabel=f"{states} similarity to English, cosine × 100", ylabel=f"{measure}, %")
    right.margins(0.12)
    write_figure(figure, values, path)


def _heat(axes, cells: np.ndarray, codes: Sequence[str]) -> None:
    """A cell a pair of languages; the diagonal, which says nothing, stays empty."""
    off_diagonal = np.where(np.eye(len(codes), dtype=bool), np.nan, cells)
    low, high = np.nanmin(off_diagonal), np.nanmax(off_diagonal)
    axes.imshow(off_diagonal, cmap="viridis", vmin=low, vmax=max(high, low + 1))
    axes.set_xticks(range(len(codes)), codes)
    axes.set_yticks(range(len(codes)), codes)
    axes.tick_params(length=0)
    for (row, column), value in np.ndenumerate(off_diagonal):
        if row != column:
            dark = value < low + 0.6 * max(high - low, 1)
            axes.text(
                column,
                row,
                f"{value:.1f}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if dark else "black",
            )


PREFIX = "eval/test/"  # what `finetune.worker` records with `eval_each_epoch`: LANGUAGE, or LANGUAGE/TYPE
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


def confusion_table(values: dict[str, Any], answers: Mapping[str, Answers]) -> str:
    """Markdown: paper 0's tables 2 and 3; accuracy with the marks of `finetune.one_answer`."""
    kinds = (SYNONYM, HYPERNYM, HYPONYM, NONE)
    first = [["language", "accuracy", "with synonyms", "more", *(f"wrong: {kind}" for kind in kinds)]]
    second = [
        [
            "language",
            f"{CONFUSED_PAIRS} most confused related labels: label:prediction (relation) count",
            f"{CONFUSED_PAIRS} of all",
        ]
    ]
    for code, counts in values.items():
        strict, kind = counts["accuracy"], counts["accuracy_with_synonyms"]
        first.append(
            [
                code,
                marked(strict, answers.get(code)),
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
