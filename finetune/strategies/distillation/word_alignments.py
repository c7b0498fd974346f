"""Words that translate each other: found by a multilingual encoder, kept in files, put into texts.

`WordAligner` is awesome-align (Dou and Neubig 2021): sub-words whose states pick each other out, in both
directions.

    P[i, j] = softmax_j(x_i y_j), Q[i, j] = softmax_i(x_i y_j); i and j are aligned if both are above the
    threshold

Words are aligned if any of their sub-words are. The states are those of a middle layer (the paper: the 8th of
mBERT's 12).

FOLDER/LANGUAGE.text     a line an example, in the order of the training file: words ||| English words
FOLDER/LANGUAGE.align    a line each, in Pharaoh's format: 0-0 1-2 3-1, word i of the first, word j of the
second, from 0
"""

import functools
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from finetune.formats.stream import stream_lines
from raylib.errors import UserError, require
from raylib.finite import require_finite_file
from raylib.randomness import Key, uniform
from raylib.text import Tokenizer

IDEOGRAPHS = ("CJK", "HIRAGANA", "KATAKANA")  # how the names of letters begin that are words by themselves


class WordAligner:
    """An encoder of `transformers`, from a folder with its tokenizer."""

    def __init__(self, folder: Path | str, layer: int = 8, threshold: float = 1e-3, device: str = "cpu"):
        """Raises UserError: no encoder there, or no such layer, or weights that are not finite."""
        transformers = require("transformers", "transfer")
        if not (Path(folder) / "config.json").is_file():
            raise UserError(f"{folder}: no config.json; give the folder of a multilingual encoder")
        self.tokenizer = Tokenizer.load(folder)
        self.model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).to(device).eval()
        require_finite_file(folder, self.model.state_dict())
        depth = self.model.config.num_hidden_layers
        if not 0 < layer <= depth:
            raise UserError(f"{folder}: layer={layer}, but it has layers 1 to {depth}")
        self.layer, self.threshold, self.device = layer, threshold, device
        self.most = getattr(self.model.config, "max_position_embeddings", 512) - 2

    def align(self, pairs: Sequence[tuple[Sequence[str], Sequence[str]]]) -> list[list[tuple[int, int]]]:
        """The links (word, English word) of each pair of sentences, given as words."""
        sides = [self._encode([pair[side] for pair in pairs]) for side in (0, 1)]
        found = []
        for (states, owners), (others, english) in zip(*sides, strict=True):
            links = align_subwords(states, others, self.threshold).nonzero().tolist()
            found.append(sorted({(owners[i], english[j]) for i, j in links}))
        return found

    @torch.inference_mode()
    def _encode(self, sentences: Sequence[Sequence[str]]) -> list[tuple[Tensor, list[int]]]:
        """For each sentence the states of its sub-words (T, d), without specials, and the word that each
        belongs to."""
        t, rows, owners = self.tokenizer, [], []
        for words in sentences:
            cut = t.encode(list(words)) if words else []
            owner = np.repeat(np.arange(len(cut)), [len(ids) for ids in cut])[: self.most - 2]
            rows.append(
                [
                    t.cls,
                    *np.concatenate([*cut, np.empty(0, np.int64)])[: self.most - 2].astype(int).tolist(),
                    t.sep,
                ]
            )
            owners.append(owner.tolist())
        longest = max(map(len, rows))
        ids = torch.tensor([row + [t.pad] * (longest - len(row)) for row in rows], device=self.device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=self.device)
        states = self.model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[
            self.layer
        ]
        return [(states[i, 1 : 1 + len(owner)].float(), owner) for i, owner in enumerate(owners)]


def align_subwords(states: Tensor, others: Tensor, threshold: float) -> Tensor:
    """(T, d), (U, d) -> (T, U) bool: pairs whose probability is above the threshold in both directions."""
    scores = states @ others.T
    if not scores.numel():
        return scores.bool()
    return (scores.softmax(1) > threshold) & (scores.softmax(0) > threshold)


def split_words(text: str) -> list[str]:
    """The words of a text, in any language: letters with their marks, numbers; each sign and each ideograph
    by itself."""
    words, going_on = [], False
    for character in text:
        kind = unicodedata.category(character)[0]
        alone = kind in "PS" or unicodedata.name(character, "").startswith(IDEOGRAPHS)
        if character.isspace():
            going_on = False
        elif alone or not going_on:
            words.append(character)
            going_on = not alone
        else:
            words[-1] += character
    return words


SEPARATOR = " ||| "
Span = tuple[int, int]  # first character, end
Link = tuple[Span, Span]  # characters of a word in the text, and of the one in the English text
Alignments = dict[tuple[str, str], tuple[Link, ...]]  # (id, text) -> words that may take each other's place


def read_alignments(
    folder: Path,
    language: str,
    examples: Iterable[tuple[str, str, str]],
    tokenizers: tuple[Tokenizer, Tokenizer],
) -> Alignments:
    """What the files of a language say about the training examples (id, text, English text): links of one
    word to one, whose English word both tokenizers, the student's and the teacher's, cut into the same
    sub-words (paper 3, section IV-C).

    Raises:
        UserError: no such files, more or fewer lines than examples, words that are not the example's, links
            that are no numbers or out of range; names file and line.
    """
    files = [folder / f"{language}.{kind}" for kind in ("text", "align")]
    lines = [list(_read(file)) for file in files]
    examples, same = list(examples), _same_pieces(tokenizers)
    for file, found in zip(files, lines, strict=True):
        if len(found) != len(examples):
            raise UserError(
                f"{file}: {len(found)} lines for {len(examples)} training examples in '{language}'"
            )
    found: Alignments = {}
    for number, ((key, text, english), words, links) in enumerate(zip(examples, *lines, strict=True), 1):
        sides = words.split(SEPARATOR)
        if len(sides) != 2:
            raise UserError(f"{files[0]}:{number}: wanted words{SEPARATOR}English words")
        spans = [
            locate_words(side.split(), whole, f"{files[0]}:{number}")
            for side, whole in zip(sides, (text, english), strict=True)
        ]
        pairs = parse_links(links, *map(len, spans), f"{files[1]}:{number}")
        found[key, text] = tuple(
            (spans[0][i], spans[1][j])
            for i, j in one_to_one_links(pairs)
            if same(english[slice(*spans[1][j])])
        )
    return found


def _read(file: Path) -> Iterable[str]:
    """All lines: one without a link is empty."""
    if not file.is_file():
        raise UserError(
            f"{file}: no such file; word alignments are made with "
            "`python -m finetune.strategies.distillation`"
        )
    next(iter(stream_lines(file)), None)  # says so if it is no text
    return file.read_text(encoding="utf-8").splitlines()


def parse_links(line: str, words: int, others: int, where: str) -> list[tuple[int, int]]:
    """The pairs of a line in Pharaoh's format, between so many words and so many others.

    Raises:
        UserError: no pair of numbers, or no such word.
    """
    pairs = []
    for link in line.split():
        first, dash, second = link.partition("-")
        if not (dash and first.isdecimal() and second.isdecimal()):
            raise UserError(f"{where}: '{link}' is no link of two words, such as 0-1")
        pairs.append((int(first), int(second)))
        if pairs[-1][0] >= words or pairs[-1][1] >= others:
            raise UserError(
                f"{where}: link {link} is out of range: there are {words} words and {others} English ones"
            )
    return pairs


def one_to_one_links(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The pairs of words that are in no other pair."""
    firsts, seconds = Counter(i for i, _ in set(pairs)), Counter(j for _, j in set(pairs))
    return sorted((i, j) for i, j in set(pairs) if firsts[i] == seconds[j] == 1)


def locate_words(words: Sequence[str], text: str, where: str) -> list[Span]:
    """Where the words are in the text, which they make up in this order, white space aside.

    Raises:
        UserError: they do not.
    """
    if "".join(words) != "".join(text.split()):
        raise UserError(f"{where}: the words '{' '.join(words)}' are not those of the example, '{text}'")
    spans, at = [], 0
    for word in words:
        first = at = at + len(text[at:]) - len(text[at:].lstrip())
        for character in word:  # a word may have white space within in the text
            at += len(text[at:]) - len(text[at:].lstrip())
            at += len(character)
        spans.append((first, at))
    return spans


def _same_pieces(tokenizers: tuple[Tokenizer, Tokenizer]) -> Callable[[str], bool]:
    """Whether both tokenizers cut a word into the same sub-words."""

    @functools.cache
    def same(word: str) -> bool:
        mine, theirs = (tokenizer.pieces(tokenizer.encode([word])[0]) for tokenizer in tokenizers)
        return mine == theirs

    return same


def mix_aligned(
    text: str, english: str, links: Sequence[Link], share: float, *keys: Key
) -> tuple[str, tuple[Link, ...]]:
    """`text` with some words replaced by the English ones that they are linked to, as the keys draw it.

    Args:
        links: the words that may be replaced, each once, from left to right.
        share: of the words between white space in the text; but at least one, and no more than there are
        links (as in cViL's
            code, which counts sub-words).
    Returns:
        (the text, where the English words are in it and in `english`). They stand between spaces, also where
        the language writes none.
    """
    count = min(max(1, round(share * len(text.split()))), len(links))
    order = np.argsort(uniform(*keys, np.arange(len(links))), kind="stable")
    mixed, at, placed = "", 0, []
    for i in sorted(order[:count].tolist()):
        (first, end), there = links[i]
        mixed += text[at:first]
        if mixed and not mixed[-1].isspace():
            mixed += " "
        start = len(mixed)
        mixed += english[slice(*there)]
        placed.append(((start, len(mixed)), there))
        if end < len(text) and not text[end].isspace():
            mixed += " "
        at = end
    return mixed + text[at:], tuple(placed)
