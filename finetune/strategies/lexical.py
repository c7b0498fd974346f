"""Lexical sources of English: WordNet's relations between answer labels (paper 0, section 3), by NLTK's
reader of WordNet's own files; and word vectors.

A label stands for all synsets that WordNet knows it by: every sense, every part of speech, inflected forms
too ("zebras" is in the synset of "zebra"). Two labels are synonyms if they share a synset; one is the other's
hypernym if one of its synsets is directly above one of the other's. Comparing synsets, and not the names in
them as the paper's public code does, makes "living room" and "women" find their relatives, and synonymy
symmetric: the paper counts "girls" right where "girl" is, and "girl" where "girls" is.

Word vectors are read from the files that they are published in; of gigabytes only the wanted words are kept:

    NAME.npy            (words, d) with the words in NAME.txt beside it, one a line
    GloVe text          `word x1 ... xd` a line
    word2vec text       the same under a line `words d` (fastText's .vec too)
    word2vec binary     a line `words d`, then each word, a space, d little-endian float32

Which of the last three a file is shows in its first bytes, whatever its name.
"""

import math
import re
from codecs import BOM_UTF8
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from raylib.data.index import NPY_HEADER, FileBytes, read_npy_header
from raylib.display import progress
from raylib.errors import UserError, reading
from raylib.textfile import open_bytes

# as in paper 0's table 3: what a prediction is to the true label
SYNONYM, HYPERNYM, HYPONYM, NONE = "syn", "hyp", "hpo", "none"
PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")
FILES = (
    "lexnames",
    *(f"{kind}.{part}" for part in PARTS_OF_SPEECH for kind in ("index", "data")),
    *(f"{part}.exc" for part in PARTS_OF_SPEECH),
)
Synsets = frozenset[tuple[str, int]]  # (part of speech, offset in its file)
HEAD_LINES = 100  # that tell how many numbers a word has
PEEK = 2**16  # bytes: more than the longest line that text vectors have
BLOCK = 2**22  # bytes of binary vectors read at a time


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

    def lemma_relatives(self, labels: Sequence[str]) -> Relatives:
        """Relatives as paper 0's public code finds them (CLG-VQA, volta/extract_wn_rel.py).

        Those of a label are the labels that are spelt, to the letter, as lemmas of its synsets, of those
        directly above, and of those directly below, in this order. Words of a lemma have `_` between them.
        Nothing is symmetric: an inflected label has synsets, and is the lemma of none.
        """
        places = {label: i for i, label in enumerate(labels)}
        found: tuple[list[frozenset[int]], ...] = ([], [], [])
        for i, label in enumerate(labels):
            synsets = self._synsets_of(label)
            groups = (
                synsets,
                [above for synset in synsets for above in synset.hypernyms()],
                [below for synset in synsets for below in synset.hyponyms()],
            )
            taken = {i}
            for group, related in zip(groups, found, strict=True):
                if None in group:
                    raise self._damage(label)
                names = {name for synset in group for name in synset.lemma_names()}
                related.append(frozenset(places[name] for name in names if name in places) - taken)
                taken |= related[-1]
        return Relatives(*map(tuple, found))

    def _synsets_of(self, label: str) -> list[Any]:
        """NLTK's synsets of a label."""
        # compounds are spelt either way: living_room, x-ray
        forms = dict.fromkeys(joiner.join(label.split()) for joiner in "_-")
        synsets: list[Any] = next(filter(None, map(self._reader.synsets, forms)), [])
        if None in synsets:
            raise self._damage(label)
        return synsets

    def _damage(self, label: str) -> UserError:
        return UserError(
            f"{self.folder}: '{label}' leads nowhere in data.*: not the files that index.* belongs to"
        )

    def _look_up(self, label: str) -> tuple[Synsets, Synsets]:
        """(a label's synsets, those directly above them)."""
        label = label.lower()
        if label not in self._known:
            synsets = self._synsets_of(label)
            above = [hypernym for synset in synsets for hypernym in synset.hypernyms()]
            if None in above:
                raise self._damage(label)
            self._known[label] = _keys(synsets), _keys(above)
        return self._known[label]


def _keys(synsets: list) -> Synsets:
    return frozenset((synset.pos(), synset.offset()) for synset in synsets)


def _open(folder: Path):
    """NLTK's reader of the folder."""
    try:
        import nltk
        from nltk.corpus.reader.wordnet import WordNetCorpusReader
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
    with reading(folder, "WordNet's files, as NLTK has them"):
        return Reader(root, omw_reader=False)  # None would warn that other languages' wordnets are missing


def label_words(label: str) -> list[str]:
    """The words of a label: "living room" and "living_room" are two."""
    return [word for word in re.split(r"[\s_]+", label) if word]


def label_vectors(path: Path, labels: Sequence[str]) -> tuple[np.ndarray, list[int]]:
    """A vector for each label: the mean over those of its words that have one, as written or else in lower
    case.

    Returns:
        (float32 (C, d), positions of the labels none of whose words has a vector: zeros).

    Raises:
        UserError: as `read_vectors`; no label has a vector.
    """
    spelt = [label_words(label) for label in labels]
    vectors = read_vectors(path, {form for words in spelt for word in words for form in (word, word.lower())})
    forms = [[word if word in vectors else word.lower() for word in words] for words in spelt]
    rows_of = [[vectors[form] for form in row if form in vectors] for row in forms]
    if not any(rows_of):
        raise UserError(
            f"{path}: has a vector for none of the {len(labels)} labels; are these English word vectors?"
        )
    width = len(next(filter(None, rows_of))[0])
    means = [np.mean(rows, 0) if rows else np.zeros(width) for rows in rows_of]
    return np.stack(means).astype(np.float32), [i for i, rows in enumerate(rows_of) if not rows]


def read_vectors(path: Path, words: Iterable[str]) -> dict[str, np.ndarray]:
    """{word: float32 (d,)} of those of `words` that the file has; of a word that comes twice, the first.

    Raises:
        UserError: no such file, in none of the formats, cut off, or a wanted line that is not d finite
            numbers.
    """
    vectors = _read_vectors(Path(path), {word.encode(): word for word in words})
    for word, vector in vectors.items():
        if not np.isfinite(vector).all():
            raise UserError(
                f"{path}: the vector of '{word}' is not finite (NaN or infinite); copy the file again"
            )
    return vectors


def _read_vectors(path: Path, words: dict[bytes, str]) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; give word vectors as GloVe or word2vec publish them")
    if path.suffix == ".npy":
        return _read_array(path, words)
    with open_bytes(path) as (file, _):
        first, rest, *more = (file.readline(PEEK) for _ in range(HEAD_LINES))
    header_bytes, first = len(first), first.removeprefix(BOM_UTF8)
    header = re.fullmatch(rb"(\d+) (\d+)\s*", first)
    if header and not _is_text(rest, int(header[2])):
        return _read_binary(path, words, int(header[1]), int(header[2]), header_bytes)
    width = int(header[2]) if header else _find_width([first, rest, *more])
    if width < 1:
        raise UserError(
            f"{path}: it begins neither with 'words dimensions' nor with words and numbers; not GloVe's or "
            "word2vec's"
        )
    return _read_text(path, words, width)


def _find_width(lines: list[bytes]) -> int:
    """Return how many numbers follow most words of the first lines, whatever the first of them says; 0 where
    fewer than half are a word and numbers."""
    lines = [line for line in lines if line.strip()]
    counts = Counter(len(line.split()) - 1 for line in lines if _is_text(line, len(line.split()) - 1))
    width = max(counts, key=counts.__getitem__, default=0)
    return width if 2 * counts[width] >= len(lines) else 0


def _read_array(path: Path, words: dict[bytes, str]) -> dict[str, np.ndarray]:
    names = path.with_suffix(".txt")
    if not names.is_file():
        raise UserError(f"{path}: its words are looked for in {names}, one a line; there is no such file")
    # of gigabytes only the rows of the words are read
    content = FileBytes(path)
    try:
        offset, shape, dtype = read_npy_header(content[:NPY_HEADER], len(content), "fui")
    except ValueError as e:
        raise UserError(f"{path}: not an array of numbers as NumPy saves it ({e})") from None
    vectors: dict[str, np.ndarray] = {}
    count, row_bytes = 0, dtype.itemsize * math.prod(shape[1:])
    with open_bytes(names, has_lines=True) as (file, _):
        for count, line in enumerate(file, 1):
            word = words.get((line if count > 1 else line.removeprefix(BOM_UTF8)).rstrip(b"\r\n"))
            if word is not None and len(shape) == 2 and count <= shape[0] and word not in vectors:
                row = content.read(row_bytes, offset + (count - 1) * row_bytes)
                vectors[word] = np.frombuffer(row, dtype).astype(np.float32)
    if len(shape) != 2 or count != shape[0]:
        raise UserError(
            f"{path}: an array of shape {shape}, with {count} words in {names}; one row a word is needed"
        )
    return vectors


def _is_text(line: bytes, width: int) -> bool:
    """A word, which may have spaces in it, and `width` numbers."""
    fields = line.split()
    return len(fields) > width and _numbers(fields[-width:]) is not None


def _read_text(path: Path, words: dict[bytes, str], width: int) -> dict[str, np.ndarray]:
    vectors = {}
    with open_bytes(path, has_lines=True) as (file, _):
        lines = progress(file, f"read {path.name}", path.stat().st_size, "B", len)
        for number, line in enumerate(lines, 1):
            if number == 1:
                line = line.removeprefix(BOM_UTF8)
            # of millions of lines a few hundred are wanted: only these are split
            word = words.get(line[: line.find(b" ")])
            if word is None or word in vectors:
                continue
            fields = line.split()
            if len(fields) > width + 1 or (number == 1 and len(fields) == 2 < width + 1):
                continue  # a word with a space in it, or the header
            values = _numbers(fields[1:])
            if values is None or len(values) != width:
                raise UserError(
                    f"{path}: line {number}: '{word}' is not followed by {width} numbers; is the file cut "
                    "off?"
                )
            vectors[word] = values
    return vectors


def _numbers(fields: list[bytes]) -> np.ndarray | None:
    try:
        with np.errstate(over="ignore"):  # infinite then, which is told with the word
            return np.array([float(field) for field in fields], np.float32)
    except ValueError:
        return None


def _read_binary(
    path: Path, words: dict[bytes, str], count: int, width: int, position: int
) -> dict[str, np.ndarray]:
    vectors = {}
    if count * (4 * width + 1) > path.stat().st_size:  # a word may be empty, the space behind it is there
        raise UserError(
            f"{path}: too small for {count} vectors of {width} numbers, as it says; copy it again"
        )
    with open(path, "rb") as file:
        file.seek(position)
        data, position = b"", 0  # what is in memory, and where the next word begins in it
        for row in range(count):
            while (space := data.find(b" ", position)) < 0 or space + 1 + 4 * width > len(data):
                more = file.read(BLOCK)
                if not more:
                    raise UserError(f"{path}: ends in the {row + 1}. of {count} vectors; copy it again")
                data, position = data[position:] + more, 0
            end = space + 1 + 4 * width
            word = words.get(data[position:space].lstrip(b"\n"))
            if word is not None and word not in vectors:
                vectors[word] = np.frombuffer(data, "<f4", width, space + 1).astype(np.float32)
            position = end
    return vectors
