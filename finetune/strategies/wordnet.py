"""WordNet's relations between answer labels (paper 0, section 3), by NLTK's reader of WordNet's own files;
and which answers a model takes for which (section 6: tables 2 and 3).

A label stands for all synsets that WordNet knows it by: every sense, every part of speech, inflected forms
too ("zebras" is in the synset of "zebra"). Two labels are synonyms if they share a synset; one is the other's
hypernym if one of its synsets is directly above one of the other's. Comparing synsets, and not the names in
them as the paper's public code does, makes "living room" and "women" find their relatives, and synonymy
symmetric: the paper counts "girls" right where "girl" is, and "girl" where "girls" is.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from raylib.errors import UserError
from raylib.metrics import MILLION

# as in paper 0's table 3: what a prediction is to the true label
SYNONYM, HYPERNYM, HYPONYM, NONE = "syn", "hyp", "hpo", "none"
PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")
FILES = (
    "lexnames",
    *(f"{kind}.{part}" for part in PARTS_OF_SPEECH for kind in ("index", "data")),
    *(f"{part}.exc" for part in PARTS_OF_SPEECH),
)

Synsets = frozenset[tuple[str, int]]  # (part of speech, offset in its file)


class Relatives(NamedTuple):
    """For each label, the positions of the labels that are its synonyms, its hypernyms, its hyponyms;
    disjoint sets."""

    synonyms: tuple[frozenset[int], ...]
    hypernyms: tuple[frozenset[int], ...]
    hyponyms: tuple[frozenset[int], ...]


class WordNet:
    """A folder of WordNet's files (`nltk_data/corpora/wordnet`).

    Raises:
        UserError: a file is missing or none of WordNet's (offsets are noticed at look-up); NLTK is not
            installed.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self._reader = _open(self.folder)
        self._known: dict[str, tuple[Synsets, Synsets]] = {}

    def synsets(self, label: str) -> Synsets:
        """The synsets of a label, in any case; none where WordNet does not know it."""
        return self._look_up(label)[0]

    def relation(self, truth: str, predicted: str) -> str:
        """Return what `predicted` is to `truth`: the first of SYNONYM (a label is its own), HYPERNYM, HYPONYM
        that holds; NONE."""
        (synsets, above), (other_synsets, above_other) = self._look_up(truth), self._look_up(predicted)
        if truth.lower() == predicted.lower() or synsets & other_synsets:
            return SYNONYM
        if above & other_synsets:
            return HYPERNYM
        return HYPONYM if synsets & above_other else NONE

    def relatives(self, labels: Sequence[str]) -> Relatives:
        """`relation` of all labels to all others, through an index of synsets: the time grows with C and not
        with C x C."""
        # synset, or label -> positions of the labels that it is a synset of
        holders: defaultdict[Any, set[int]] = defaultdict(set)
        for i, label in enumerate(labels):
            for synset in self._look_up(label)[0]:
                holders[synset].add(i)
            holders[label.lower()].add(i)
        synonyms: list[set[int]] = []
        above: list[set[int]] = []
        below: list[set[int]] = [set() for _ in labels]
        for i, label in enumerate(labels):
            synsets, hypernyms = self._look_up(label)
            synonyms.append({j for key in (*synsets, label.lower()) for j in holders.get(key, ())} - {i})
            above.append({j for synset in hypernyms for j in holders.get(synset, ())} - {i} - synonyms[i])
            for j in above[i]:
                below[j].add(i)
        # synonymy is symmetric: none is among them
        hyponyms = [lower - above[i] for i, lower in enumerate(below)]
        return Relatives(*(tuple(map(frozenset, sets)) for sets in (synonyms, above, hyponyms)))

    def _look_up(self, label: str) -> tuple[Synsets, Synsets]:
        """(a label's synsets, those directly above them)."""
        label = label.lower()
        if label not in self._known:
            # compounds are spelt either way: living_room, x-ray
            forms = dict.fromkeys(joiner.join(label.split()) for joiner in "_-")
            synsets: list[Any] = next(filter(None, map(self._reader.synsets, forms)), [])
            above = [hypernym for synset in synsets if synset for hypernym in synset.hypernyms()]
            if None in synsets or None in above:
                raise UserError(
                    f"{self.folder}: '{label}' leads nowhere in data.*: not the files that index.* belongs to"
                )
            self._known[label] = _keys(synsets), _keys(above)
        return self._known[label]


def _keys(synsets: list) -> Synsets:
    return frozenset((synset.pos(), synset.offset()) for synset in synsets)


def _open(folder: Path):
    """NLTK's reader of the folder."""
    try:
        import nltk
        from nltk.corpus.reader.wordnet import WordNetCorpusReader, WordNetError
    except ImportError:
        raise UserError("WordNet is read by NLTK, which is not installed; `pip install nltk`") from None

    class Reader(WordNetCorpusReader):
        def map_wn(self, version="wordnet"):
            """NLTK's own looks for a second WordNet in its data folders, to map other languages' wordnets
            onto this one."""

    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder}: no WordNet: '{missing[0]}' is missing; give a folder like nltk_data/corpora/wordnet"
        )
    root = str(folder.resolve())
    if root not in nltk.data.path:
        nltk.data.path.append(root)  # NLTK opens nothing elsewhere
    try:
        return Reader(root, omw_reader=False)  # None would warn that other languages' wordnets are missing
    except (WordNetError, AssertionError, ValueError, IndexError) as e:
        raise UserError(f"{folder}: not WordNet's files as NLTK reads them ({e})") from None


PAIRS = 5  # that paper 0's table 3 names


def confusions(predictions: Iterable[dict[str, Any]], wordnet: WordNet, pairs: int = PAIRS) -> dict[str, Any]:
    """Of the predictions in one language; memory grows with the different pairs of labels alone.

    Args:
        predictions: {"id", "prediction", "labels", "kind"} each, as `finetune.predict.read_predictions`
            yields them. The true label is the answer with the highest score; an example without answers is
            left out, as in `metrics.score`.
    Returns:
        {"n": examples, "accuracy": as `metrics.score` has it, "accuracy_with_synonyms": a synonym of an
        answer scores as that answer does (table 2), "wrong": {relation: wrong predictions that are this to
        the true label}, "confused": the most frequent pairs of true label and wrong prediction,
        "confused_related": of those with a relation (table 3)}; a pair: {"label", "prediction", "relation":
        "syn", "hyp", "hpo" or "none", "count"}, equal counts by alphabet.
    """
    examples = strict = with_synonyms = 0  # scores in millionths: integers add up to the same in any order
    wrong: Counter[tuple[str, str]] = Counter()
    for line in predictions:
        answers, prediction = line["labels"], line["prediction"]
        if not answers:
            continue
        examples += 1
        score = answers.get(prediction, 0.0)
        strict += round(MILLION * score)
        if not score:
            wrong[max(answers, key=answers.get), prediction] += 1
        synonyms = (
            value for answer, value in answers.items() if wordnet.relation(answer, prediction) == SYNONYM
        )
        with_synonyms += round(MILLION * max(score, *synonyms, 0.0))
    by_count = sorted(wrong.items(), key=lambda item: (-item[1], item[0]))
    confused: list[dict[str, Any]] = [
        {
            "label": label,
            "prediction": prediction,
            "relation": wordnet.relation(label, prediction),
            "count": count,
        }
        for (label, prediction), count in by_count
    ]
    relations: Counter[str] = Counter()
    for pair in confused:
        relations[pair["relation"]] += pair["count"]
    return {
        "n": examples,
        "accuracy": strict / MILLION / examples if examples else 0.0,
        "accuracy_with_synonyms": with_synonyms / MILLION / examples if examples else 0.0,
        "wrong": dict(sorted(relations.items())),
        "confused": confused[:pairs],
        "confused_related": [pair for pair in confused if pair["relation"] != NONE][:pairs],
    }
