"""Which answers a model takes for which (paper 0, section 6: tables 2 and 3), from its predictions as they
stream by."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from finetune.lexicon.wordnet import NONE, SYNONYM, WordNet
from finetune.metrics import MILLION

PAIRS = 5  # that paper 0's table 3 names


def confusions(predictions: Iterable[dict[str, Any]], wordnet: WordNet, pairs: int = PAIRS) -> dict[str, Any]:
    """Of the predictions in one language; memory grows with the different pairs of labels alone.

    Args:
        predictions: {"id", "prediction", "labels", "kind"} each, as `finetune.metrics.read_predictions`
            yields them. The true label is the answer with the highest score; an example without answers is
            left out, as in `metrics.score`.
    Returns:
        {"n": examples, "accuracy": as `metrics.score` has it, "accuracy_with_synonyms": a synonym of an
        answer scores as that answer does (table 2), "wrong": {relation: wrong predictions that are this to
        the true label}, "confused": the most frequent pairs of true label and wrong prediction,
        "confused_related": of those with a relation (table 3)}; a pair: {"label", "prediction", "relation":
        "syn", "hyp", "hpo" or "none", "count"}, equal counts by alphabet.
    """
    n = strict = kind = 0  # scores in millionths: integers add up to the same in any order
    wrong: Counter[tuple[str, str]] = Counter()
    for line in predictions:
        answers, prediction = line["labels"], line["prediction"]
        if not answers:
            continue
        n += 1
        score = answers.get(prediction, 0.0)
        strict += round(MILLION * score)
        if not score:
            wrong[max(answers, key=answers.get), prediction] += 1
        synonyms = (
            value for answer, value in answers.items() if wordnet.relation(answer, prediction) == SYNONYM
        )
        kind += round(MILLION * max(score, *synonyms, 0.0))
    order = sorted(wrong.items(), key=lambda item: (-item[1], item[0]))
    found = [
        {
            "label": label,
            "prediction": prediction,
            "relation": wordnet.relation(label, prediction),
            "count": count,
        }
        for (label, prediction), count in order
    ]
    relations: Counter[str] = Counter()
    for pair in found:
        relations[pair["relation"]] += pair["count"]
    return {
        "n": n,
        "accuracy": strict / MILLION / n if n else 0.0,
        "accuracy_with_synonyms": kind / MILLION / n if n else 0.0,
        "wrong": dict(sorted(relations.items())),
        "confused": found[:pairs],
        "confused_related": [pair for pair in found if pair["relation"] != NONE][:pairs],
    }
