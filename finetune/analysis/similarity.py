"""Similarity of the states of parallel items between languages (paper 1, section 5.1, figure 4).

The state is the one that the head reads: [CLS] after the unified encoder (a decoder reads the other tokens
too). Of retrieval, the unit vector of a caption.

Shape legend: L languages, n items, D width of a state.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.analysis.parallel import Parallel, write_figure
from finetune.batches import encode_texts, read_inputs
from finetune.model import FinetuneModel
from finetune.stores.images import VisualSource
from raylib.data.loading import to_device
from raylib.finite import require_finite
from raylib.models.base import RetrievalBackbone
from raylib.tables import open_pyplot
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
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            for language, column in enumerate(columns):
                examples = [row[language] for row in rows]
                ids = encode_texts([e.texts[-1] for e in examples], tokenizer, length)
                text = to_device({"text": ids}, device)["text"]
                if not isinstance(model, FinetuneModel):
                    states = model.embed_text(text, normalize=False)
                else:
                    if memory is None or not examples[0].images:  # a premise is another in each language
                        inputs = read_inputs(examples, source, tokenizer, length)
                        memory = model.memory(to_device(inputs, device))
                    states = model.fused_cls(text, memory)
                column.append(F.normalize(states.float(), dim=-1).cpu())
    for code, column in zip(parallel.languages, columns, strict=True):
        require_finite(f"states of texts in '{code}'", torch.cat(column))
    return torch.stack([torch.cat(column) for column in columns])


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
    english = codes.index("en") if "en" in codes else None
    similarity = (
        {}
        if english is None
        else {code: float(matrix[english, i]) for i, code in enumerate(codes) if i != english}
    )
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
    pearson = "not defined" if values["pearson"] is None else f"{values['pearson']:.2f}"
    right.set_title(
        f"similarity and zero-shot transfer\nPearson's r over {_count(points, 'language')}: {pearson}",
        fontsize=9,
    )
    right.set(xlabel=f"{states} similarity to English, cosine × 100", ylabel=f"{measure}, %")
    right.margins(0.12)
    write_figure(figure, values, path)


def _count(things: Sequence | dict, noun: str) -> str:
    return f"{len(things)} {noun}{'s' if len(things) != 1 else ''}"


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
