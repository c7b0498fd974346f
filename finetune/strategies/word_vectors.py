"""Word vectors from the files that they are published in; of a file of gigabytes only the wanted words are
kept.

    NAME.npy            (words, d) with the words in NAME.txt beside it, one a line
    GloVe text          `word x1 ... xd` a line
    word2vec text       the same under a line `words d` (fastText's .vec too)
    word2vec binary     a line `words d`, then each word, a space, d little-endian float32

Which of the last three a file is shows in its first bytes, whatever its name.
"""

import mmap
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from raylib.errors import UserError
from raylib.finite import is_finite

PEEK = 2**16  # bytes: more than the longest line that text vectors have


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
        if not is_finite(vector):
            raise UserError(
                f"{path}: the vector of '{word}' is not finite (NaN or infinite); copy the file again"
            )
    return vectors


def _read_vectors(path: Path, words: dict[bytes, str]) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; give word vectors as GloVe or word2vec publish them")
    if path.suffix == ".npy":
        return _read_array(path, words)
    with open(path, "rb") as file:
        first, rest = file.readline(PEEK), file.readline(PEEK)
    header = re.fullmatch(rb"(\d+) (\d+)\s*", first)
    if header and not _is_text(rest, int(header[2])):
        return _read_binary(path, words, int(header[1]), int(header[2]), len(first))
    width = int(header[2]) if header else len(first.split()) - 1
    if width < 1 or not (header or _is_text(first, width)):
        raise UserError(
            f"{path}: its first line is neither 'words dimensions' nor a word and numbers; not GloVe's or "
            "word2vec's"
        )
    return _read_text(path, words, width)


def _read_array(path: Path, words: dict[bytes, str]) -> dict[str, np.ndarray]:
    names = path.with_suffix(".txt")
    if not names.is_file():
        raise UserError(f"{path}: its words are looked for in {names}, one a line; there is no such file")
    try:
        rows = np.load(path, mmap_mode="r")
    except ValueError as e:
        raise UserError(f"{path}: not an array of numbers as NumPy saves it ({e})") from None
    vectors: dict[str, np.ndarray] = {}
    count = 0
    with open(names, "rb") as file:
        for count, line in enumerate(file, 1):
            word = words.get(line.rstrip(b"\r\n"))
            if word is not None and rows.ndim == 2 and count <= len(rows):
                vectors.setdefault(word, rows[count - 1].astype(np.float32))
    if rows.ndim != 2 or count != len(rows):
        raise UserError(
            f"{path}: an array of shape {rows.shape}, with {count} words in {names}; one row a word is needed"
        )
    return vectors


def _is_text(line: bytes, width: int) -> bool:
    """A word, which may have spaces in it, and `width` numbers."""
    fields = line.split()
    return len(fields) > width and _numbers(fields[-width:]) is not None


def _read_text(path: Path, words: dict[bytes, str], width: int) -> dict[str, np.ndarray]:
    vectors = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
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
    # mapped, and not read: of gigabytes only the rows of the words are copied
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for row in range(count):
            space = data.find(b" ", position)
            end = space + 1 + 4 * width
            if space < 0 or end > len(data):
                raise UserError(f"{path}: ends in the {row + 1}. of {count} vectors; copy it again")
            word = words.get(data[position:space].lstrip(b"\n"))
            if word is not None and word not in vectors:
                vectors[word] = np.frombuffer(data[space + 1 : end], "<f4").astype(np.float32)
            position = end
    return vectors
