"""Scores of predictions, streamed. A line of their file is {"id", "prediction", "labels", "kind",
"images"}."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from raylib.errors import UserError
from raylib.metrics import MILLION, ItemClusters
from raylib.randomness import Key

ORDERS = 4  # n-grams of BLEU


def read_predictions(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a predictions file, one at a time."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def score(
    predictions: Iterable[dict[str, Any]],
    labels: frozenset[str],
    bleu: str | None = None,
    key: tuple[Key, ...] = (),
) -> dict[str, Any]:
    """Accuracy over the examples that have a label: the mean of what each prediction scores in its labels.

    Returns:
        {"accuracy", "interval": its 95 % bootstrap interval, "n", "by_type": {kind: accuracy}, "n_by_type":
        {kind: examples}, "unlabelled": left out of it, "unknown_answers": none of whose answers are among
        `labels`: these count as wrong, "bleu": where asked for}.

    The bootstrap, seeded by `key`, draws images with all of their questions, which are not independent (xGQA
    asks 12,578 of 398 images). Items about two images are drawn with those about the same two, items about
    none alone.
    """
    gained: Counter[str] = Counter()  # in millionths: integers add up to the same in any order
    seen: Counter[str] = Counter()
    unlabelled, unknown, clusters = 0, 0, ItemClusters()
    precision = Bleu(bleu) if bleu else None
    for number, line in enumerate(predictions):
        answers = line["labels"]
        if not answers:
            unlabelled += 1
            continue
        unknown += labels.isdisjoint(answers)
        seen[line["kind"]] += 1
        worth = round(MILLION * answers.get(line["prediction"], 0.0))
        gained[line["kind"]] += worth
        clusters.add(line.get("images") or [f"line {number}"], worth)  # earlier versions wrote no images
        if precision:
            precision.add(line["prediction"], list(answers))
    n = sum(seen.values())
    result = {
        "accuracy": sum(gained.values()) / MILLION / n if n else 0.0,
        "interval": clusters.interval("bootstrap", *key),
        "n": n,
        "by_type": {kind: gained[kind] / MILLION / seen[kind] for kind in sorted(seen) if kind},
        "n_by_type": {kind: seen[kind] for kind in sorted(seen) if kind},
        "unlabelled": unlabelled,
        "unknown_answers": unknown,
    }
    return {**result, "bleu": precision.value()} if precision else result


class Bleu:
    """Corpus BLEU-4 (Papineni et al. 2002), a sentence at a time: NLTK's clipped counts and brevity penalty,
    summed.

    language: "ja" is cut into words by MeCab (`fugashi`, `unidic-lite`), "zh" into characters, others at
    white space.
    """

    def __init__(self, language: str):
        self.cut = _cutter(language)
        self.hits, self.counts = [0] * ORDERS, [0] * ORDERS
        self.length = self.reference_length = 0

    def add(self, sentence: str, references: list[str]) -> None:
        """A predicted sentence and what it might have been."""
        from nltk.translate.bleu_score import closest_ref_length, modified_precision

        words, wanted = self.cut(sentence), [self.cut(reference) for reference in references]
        for order in range(ORDERS):
            precision = modified_precision(wanted, words, order + 1)
            self.hits[order] += precision.numerator
            self.counts[order] += precision.denominator
        self.length += len(words)
        self.reference_length += closest_ref_length(wanted, len(words))

    def value(self) -> float:
        """BLEU in [0, 1]; 0 if an order has no match at all."""
        from nltk.translate.bleu_score import brevity_penalty

        if not all(self.hits):
            return 0.0
        mean = (
            sum(math.log(hits / count) for hits, count in zip(self.hits, self.counts, strict=True)) / ORDERS
        )
        return brevity_penalty(self.reference_length, self.length) * math.exp(mean)


def _cutter(language: str) -> Callable[[str], list[str]]:
    if language == "zh":
        return lambda text: list("".join(text.split()))
    if language != "ja":
        return str.split
    try:
        import fugashi
    except ImportError:
        raise UserError(
            "BLEU of Japanese needs fugashi and unidic-lite; `pip install fugashi unidic-lite`"
        ) from None
    tagger = fugashi.Tagger()
    return lambda text: [word.surface for word in tagger(text)]
