"""The linguistic prior (paper 0): answers that are near the right one in meaning cost less.

L = CE + alpha sum_c p(c) d(c, y) over the k most probable labels c; d from WordNet or from word vectors.

`distance[c, y]` = d(y_c, y*), predicted c, true y (section 3). A matrix is made once and kept under the hash
of all that it depends on: the labels and their order, d1 and d2, every byte of the source files (a file that
changed under its old name, size and date is noticed; 1 GB takes about a second).
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from finetune.strategies.base import Context, Outputs, Strategy, StrategyConfig, Term
from finetune.strategies.lexical import FILES, WordNet, label_vectors
from raylib.errors import UserError, reading
from raylib.fileio import atomic_file, sha256_file
from raylib.strict_json import check_shape, parse_json

if TYPE_CHECKING:  # settings of strategies are read without PyTorch (`raylib.settings`)
    from torch import Tensor

AGAIN = "delete it, and it is made again"
VERSION = 1  # of how distances are computed: older matrices are made again


class LinguisticPriorConfig(StrategyConfig):
    """Linguistic prior (paper 0, section 3): L = CE + alpha sum_c p(c) d(c, y) over the k most probable
    answers c. Defaults are the paper's."""

    needs = frozenset({"labels", "logits"})
    display_fields = ("source",)
    file_fields = ("vectors",)
    mutable_fields = ("alpha", "k")

    follow: Literal["paper", "code"] = "paper"
    """Section 3, or the public code, which matches lemmas by their names (`relatives`) and multiplies the
    loss by the number of labels before it clips (`loss=ce_labels`)."""
    source: Literal["wordnet", "vectors"] = "vectors"
    """Source of distances: the run's `wordnet=`, or word vectors."""
    alpha: NonNegativeFloat = 10.0
    """Weight of the expected distance in the loss."""
    k: PositiveInt = 10
    """Most probable answers whose distance counts."""
    d1: float = Field(0.8, gt=0, lt=1)
    """Distance of a hyponym of the answer, of WordNet."""
    d2: float = Field(0.8, gt=0, lt=1)
    """Distance of a hypernym of the answer, of WordNet."""
    relatives: Literal["synsets", "lemmas"] = "synsets"
    """Labels that WordNet relates: those that share a synset, or have one directly above the other's; or
    those that are spelt as lemmas of these, whose words have `_` between them, so that labels of several
    words are no one's relatives."""
    vectors: str | None = None
    """GloVe or word2vec file; null: vectors.txt in the data folder."""

    @classmethod
    def derived_defaults(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"relatives": "lemmas" if values.get("follow") == "code" else "synsets"}

    def files(self, data: Path) -> tuple[Path, ...]:
        return (Path(self.vectors or data / "vectors.txt"),) if self.source == "vectors" else ()

    def build(self, context: Context) -> "LinguisticPrior":
        """Make the label x label matrix, or read it from the cache; logs which labels the source lacks.

        Raises:
            UserError: k larger than the number of answers; what the source finds wrong.
        """
        from raylib.cache import cached, file_fingerprint

        labels = context.labels
        if self.k > len(labels):
            raise UserError(
                f"strategies.prior.k={self.k}, but there are {len(labels)} answers; give at most so many"
            )
        if self.source == "wordnet":
            distances, unknown = wordnet_distances(
                labels, context.wordnet, self.d1, self.d2, context.cache, self.relatives == "lemmas"
            )
        else:
            (file,) = self.files(context.data)
            distances, unknown = cached(
                "distances",
                (labels, file_fingerprint(file)),
                lambda: vector_distances(labels, file, context.cache),
            )
        context.log(f"strategies.prior: {unknown}")
        return LinguisticPrior(distances, self.alpha, self.k)


class LinguisticPrior(Strategy):
    """distances: (C, C), [c, y] = d(y_c, y*)."""

    def __init__(self, distances: "Tensor", alpha: float, k: int):
        self.distances, self.alpha, self.k = distances, alpha, k

    def terms(self, model: Any) -> dict[str, Term]:
        # once on the model's device, not once a step
        distances = self.distances.to(next(model.parameters()).device)

        def values(outputs: Outputs, part: dict) -> "Tensor":
            return linguistic_prior(outputs.logits, part["answer"], distances, self.k)

        return {"prior": Term(self.alpha, values)}


def linguistic_prior(logits: "Tensor", answer: "Tensor", distance: "Tensor", k: int) -> "Tensor":
    """The expected distance of the prediction from the true answer (paper 0, section 3, L_prior): sum over c
    of p(y_c) d(y_c, y*), where c runs over the k most probable labels only.

    p is the softmax over all C labels; those k are not made to sum to 1. The gradient flows through p alone.

    Args:
        logits: (b, C).
        answer: (b,) int64, the true labels.
        distance: (C, C), [c, y] = d(y_c, y*): the predicted label first; in its precision all is computed,
            also under autocast.
        k: how many labels; all where there are fewer.
    Returns:
        (b,).
    """
    import torch

    # in bf16 the k-th and the next label tie
    with torch.autocast(logits.device.type, enabled=False):
        probability, label = (
            logits.to(distance.dtype).softmax(1).topk(min(k, logits.shape[1]), sorted=False)
        )  # (b, k) both
        return (probability * distance[label, answer[:, None]]).sum(1)


class UnknownLabels(NamedTuple):
    """The labels that the source does not know; `print` it."""

    what: str  # "synset", "vector"
    unknown: tuple[str, ...]
    labels: int

    def __str__(self) -> str:
        named = ", ".join(self.unknown[:5]) + (", ..." if len(self.unknown) > 5 else "")
        return f"{len(self.unknown)} of {self.labels} labels have no {self.what}" + (
            f": {named}" if named else ""
        )


def wordnet_distances(
    labels: Sequence[str],
    folder: Path,
    hyponym: float,
    hypernym: float,
    cache: Path | None = None,
    by_lemma: bool = False,
) -> "tuple[Tensor, UnknownLabels]":
    """0 where the labels are the same or synonyms; d1 (`hyponym`) where the predicted one is a hyponym of the
    true one; d2 (`hypernym`) where it is a hypernym; else 1. A label without synset is at 1 from all others.

    Args:
        labels: C different strings.
        folder: WordNet's files.
        hyponym, hypernym: d1, d2, between 0 and 1; 0.8 in the paper.
        cache: a folder, made where there is none; None keeps nothing.
        by_lemma: relatives as `WordNet.lemma_relatives` finds them.
    Returns:
        (float32 (C, C); not symmetric where d1 is not d2, labels without synset).

    Raises:
        UserError: as `WordNet`; d1 or d2 is not between 0 and 1; a label comes twice.
    """
    import torch

    folder = Path(folder)
    if not (0 < hyponym < 1 and 0 < hypernym < 1):
        raise UserError(
            f"distances of hyponyms and hypernyms are {hyponym} and {hypernym}; both must lie between 0 and 1"
        )

    def compute() -> "tuple[Tensor, list[int]]":
        wordnet = WordNet(folder)
        distance = torch.ones(len(labels), len(labels)).fill_diagonal_(0)
        relatives = wordnet.lemma_relatives(labels) if by_lemma else wordnet.relatives(labels)
        for value, related in zip((0.0, hypernym, hyponym), relatives, strict=True):
            for true, predicted in enumerate(related):
                distance[sorted(predicted), true] = value
        return distance, [i for i, label in enumerate(labels) if not wordnet.synsets(label)]

    numbers = [hyponym, hypernym, 1.0] if by_lemma else [hyponym, hypernym]
    return _cached(labels, "synset", numbers, [folder / name for name in FILES], cache, compute)


def vector_distances(
    labels: Sequence[str], path: Path, cache: Path | None = None
) -> "tuple[Tensor, UnknownLabels]":
    """1 - cosine of the labels' vectors, from 0 to 2 (cosines below 0 stay what they are). A label without a
    vector is at 1 from all others, at 0 from itself.

    Args:
        labels: C different strings.
        path: vectors in a format of `finetune.strategies.lexical`.
        cache: a folder, made where there is none; None keeps nothing.
    Returns:
        (float32 (C, C), symmetric, labels without a vector).

    Raises:
        UserError: as `label_vectors`; a label comes twice.
    """
    import torch

    path = Path(path)

    def compute() -> "tuple[Tensor, list[int]]":
        rows, unknown = label_vectors(path, labels)
        # in float64: of two labels that are nearly alike, 1 - cosine is lost in float32's last digits
        lengths = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
        unit = rows / np.where(lengths > 0, lengths, 1)
        distance = torch.from_numpy(1 - unit @ unit.T).clamp(min=0)  # rounding makes -1e-16
        return distance.fill_diagonal_(0).float(), unknown

    sources = [path, path.with_suffix(".txt")] if path.suffix == ".npy" else [path]
    return _cached(labels, "vector", [], sources, cache, compute)


def _cached(
    labels: Sequence[str],
    what: str,
    numbers: list[float],
    sources: list[Path],
    cache: Path | None,
    compute: "Callable[[], tuple[Tensor, list[int]]]",
) -> "tuple[Tensor, UnknownLabels]":
    """Return what `compute` returns, from the cache if it is there."""
    from raylib.weights import read_safetensors

    repeated = (
        sorted({label for label in labels if labels.count(label) > 1})
        if len(set(labels)) < len(labels)
        else []
    )
    if repeated:
        raise UserError(f"the label '{repeated[0]}' comes twice; each class needs a name of its own")
    # what is missing is an error of `compute`
    if cache is None or not all(map(Path.is_file, sources)):
        distance, unknown = compute()
        return distance, UnknownLabels(what, tuple(labels[i] for i in unknown), len(labels))
    key = json.dumps([VERSION, what, list(labels), numbers, [sha256_file(source) for source in sources]])
    file = Path(cache) / f"{what}-{hashlib.blake2b(key.encode(), digest_size=12).hexdigest()}.safetensors"
    if not file.is_file():
        _save(file, *compute())
    stored, metadata = read_safetensors(file, "distances of labels (safetensors)", AGAIN)
    with reading(file, "distances of labels (safetensors)", AGAIN):
        distance, unknown = stored["distance"], parse_json(metadata["unknown"])
        check_shape(unknown, list[NonNegativeInt])
        is_square = distance.shape == (len(labels), len(labels)) and str(distance.dtype) == "torch.float32"
        if not is_square or max(unknown, default=0) >= len(labels):
            raise ValueError(f"not of {len(labels)} labels")
    return distance, UnknownLabels(what, tuple(labels[i] for i in unknown), len(labels))


def _save(file: Path, distance: "Tensor", unknown: list[int]) -> None:
    """Whole or not at all: workers that make the same matrix at once each rename one of their own."""
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as temporary:
        save_file({"distance": distance.contiguous()}, temporary, {"unknown": json.dumps(unknown)})
