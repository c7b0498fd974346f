"""Words that translate each other: found by a multilingual encoder, kept in files, put into texts.

`WordAligner` is awesome-align (Dou and Neubig 2021): sub-words whose states pick each other out, in both
directions.

    P[i, j] = softmax_j(x_i y_j), Q[i, j] = softmax_i(x_i y_j)

i and j are aligned if both are above the threshold.

Words are aligned if any of their sub-words are. The states are those of a middle layer (the paper: the 8th of
mBERT's 12).

Words of languages without spaces are those of a segmenter (`raylib.words`).

FOLDER/LANGUAGE.text     a line an example, in the order of the training file: words ||| English words
FOLDER/LANGUAGE.align    a line each, in Pharaoh's format: 0-0 1-2 3-1, word i of the first, word j of the
                         second, from 0
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from finetune.formats import shorten
from raylib.errors import UserError, hub_hint, require
from raylib.finite import require_finite_file
from raylib.models.hf_folders import load_by_library
from raylib.randomness import Key, uniform
from raylib.text import Tokenizer
from raylib.textfile import open_text
from raylib.weights import limit_model, require_no_misfits


class WordAligner:
    """An encoder of `transformers`, from a folder with its tokenizer."""

    def __init__(self, folder: Path | str, layer: int = 8, threshold: float = 1e-3, device: str = "cpu"):
        """Raises UserError: no encoder there, or no such layer, or weights that are not finite."""
        transformers = require("transformers", "transfer")
        if not (Path(folder) / "config.json").is_file():
            raise UserError(
                f"{folder}: no config.json; give the folder of a multilingual encoder{hub_hint(folder)}"
            )
        self.tokenizer = Tokenizer.load(folder)
        with limit_model(Path(folder) / "config.json", folder):
            model, report = load_by_library(
                Path(folder), transformers.AutoConfig, transformers.AutoModel, "an encoder's folder"
            )
        missing = [f"missing {name}" for name in report["missing_keys"] if "pooler." not in name]
        require_no_misfits(folder, missing)  # the library would take random numbers
        self.model = model.to(device).eval()
        require_finite_file(folder, self.model.state_dict())
        depth = self.model.config.num_hidden_layers
        if not 0 < layer <= depth:
            raise UserError(f"{folder}: layer={layer}, but it has layers 1 to {depth}")
        self.layer, self.threshold, self.device = layer, threshold, device
        self.max_tokens = self.model.config.max_position_embeddings - 4  # XLM-R has 2 unused; CLS and SEP

    def align(self, pairs: Sequence[tuple[Sequence[str], Sequence[str]]]) -> list[list[tuple[int, int]]]:
        """The links (word, English word) of each pair of sentences, given as words."""
        sides = [self._encode([pair[side] for pair in pairs]) for side in (0, 1)]
        links = []
        for (states, owners), (others, english) in zip(*sides, strict=True):
            subwords = align_subwords(states, others, self.threshold).nonzero().tolist()
            links.append(sorted({(owners[i], english[j]) for i, j in subwords}))
        return links

    @torch.inference_mode()
    def _encode(self, sentences: Sequence[Sequence[str]]) -> list[tuple[Tensor, list[int]]]:
        """For each sentence the states of its sub-words (T, d), without specials, and the word that each
        belongs to."""
        t = self.tokenizer
        rows: list[list[int]] = []
        owners: list[list[int]] = []
        for words in sentences:
            subwords = [ids.tolist() for ids in t.encode(list(words))] if words else []
            rows.append([t.cls, *[i for ids in subwords for i in ids][: self.max_tokens], t.sep])
            owners.append([word for word, ids in enumerate(subwords) for _ in ids][: self.max_tokens])
        longest = max(map(len, rows))
        ids = torch.tensor([row + [t.pad] * (longest - len(row)) for row in rows], device=self.device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=self.device)
        outputs = self.model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        states = outputs.hidden_states[self.layer]
        return [(states[i, 1 : 1 + len(owner)].float(), owner) for i, owner in enumerate(owners)]


def align_subwords(states: Tensor, others: Tensor, threshold: float) -> Tensor:
    """(T, d), (U, d) -> (T, U) bool: pairs whose probability is above the threshold in both directions."""
    scores = states @ others.T
    if not scores.numel():
        return scores.bool()
    return (scores.softmax(1) > threshold) & (scores.softmax(0) > threshold)


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
    """The links that the files of a language have for the training examples (id, text, English text), of one
    word to one, whose English word both tokenizers, the student's and the teacher's, cut into the same
    sub-words (paper 3, section IV-C).

    Raises:
        UserError: no such files, more or fewer lines than examples, words that are not the example's, links
            that are no numbers or out of range; names file and line.
    """
    files = [folder / f"{language}.{kind}" for kind in ("text", "align")]
    lines = [_read_file(file) for file in files]
    examples, same = list(examples), _same_pieces(tokenizers)
    for file, rows in zip(files, lines, strict=True):
        if len(rows) != len(examples):
            raise UserError(
                f"{file}: {len(rows)} lines for {len(examples)} training examples in '{language}'"
            )
    alignments: Alignments = {}
    for number, ((key, text, english), words, links) in enumerate(zip(examples, *lines, strict=True), 1):
        sides = words.split(SEPARATOR)
        if len(sides) != 2:
            raise UserError(f"{files[0]}:{number}: expected words{SEPARATOR}English words")
        # files have words, training mixes characters: each word is found in its text again
        word_spans = locate_words(sides[0].split(), text, f"{files[0]}:{number}")
        english_spans = locate_words(sides[1].split(), english, f"{files[0]}:{number}")
        pairs = one_to_one_links(
            parse_links(links, len(word_spans), len(english_spans), f"{files[1]}:{number}")
        )
        # states of a mixed word are compared token by token: both must cut it alike
        replaceable = [
            (word_spans[i], english_spans[j]) for i, j in pairs if same(english[slice(*english_spans[j])])
        ]
        alignments[key, text] = tuple(replaceable)
    return alignments


def _read_file(file: Path) -> list[str]:
    """All lines: one without a link is empty."""
    if not file.is_file():
        raise UserError(
            f"{file}: no such file; word alignments are made with "
            "`python -m finetune.strategies.distillation`"
        )
    with open_text(file, has_lines=True) as lines:
        return [line.rstrip("\n") for line in lines]


def parse_links(line: str, words: int, others: int, where: str) -> list[tuple[int, int]]:
    """The pairs of a line in Pharaoh's format, between so many words and so many others.

    Raises:
        UserError: no pair of numbers, or no such word.
    """
    pairs = []
    for link in line.split():
        first, dash, second = link.partition("-")
        if not (dash and first.isdecimal() and second.isdecimal()):
            raise UserError(f"{where}: {shorten(link)} is no link of two words, such as 0-1")
        pairs.append((int(first), int(second)))
        if pairs[-1][0] >= words or pairs[-1][1] >= others:
            raise UserError(
                f"{where}: link {link:.40} is out of range: there are {words} words and {others} English ones"
            )
    return pairs


def one_to_one_links(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The pairs of words that are in no other pair."""
    firsts, seconds = Counter(i for i, _ in set(pairs)), Counter(j for _, j in set(pairs))
    return sorted((i, j) for i, j in set(pairs) if firsts[i] == seconds[j] == 1)


def locate_words(words: Sequence[str], text: str, where: str) -> list[Span]:
    """Spans of the words in the text, which they make up in this order, white space aside.

    Raises:
        UserError: they do not.
    """
    if "".join(words) != "".join(text.split()):
        raise UserError(
            f"{where}: the words {shorten(' '.join(words))} are not those of the example, {shorten(text)}"
        )
    spans, end = [], 0
    for word in words:
        first = end = end + len(text[end:]) - len(text[end:].lstrip())
        for character in word:  # a word may have white space within in the text
            end += len(text[end:]) - len(text[end:].lstrip())
            end += len(character)
        spans.append((first, end))
    return spans


def _same_pieces(tokenizers: tuple[Tokenizer, Tokenizer]) -> Callable[[str], bool]:
    """Return a test: do both tokenizers cut a word into the same sub-words?"""

    @functools.cache
    def same(word: str) -> bool:
        left, right = (tokenizer.pieces(tokenizer.encode([word])[0].tolist()) for tokenizer in tokenizers)
        return left == right

    return same


def mix_aligned(
    text: str, english: str, links: Sequence[Link], share: float, *keys: Key, num_words: int = 0
) -> tuple[str, tuple[Link, ...]]:
    """`text` with some words replaced by the English ones that they are linked to, as the keys draw it.

    Args:
        links: the words that may be replaced, each once, from left to right.
        share: of the `num_words` of the text, 0: of those between spaces; but at least one, and no more than
            there are links (as in cViL's code, which counts sub-words).
    Returns:
        (the text, spans of the English words in it and in `english`). They stand between spaces, also where
        the language writes none.
    """
    count = min(max(1, round(share * (num_words or len(text.split())))), len(links))
    order = np.argsort(uniform(*keys, np.arange(len(links))), kind="stable")
    mixed, position = "", 0
    replaced: list[Link] = []
    for i in sorted(order[:count].tolist()):
        (first, end), source = links[i]
        mixed += text[position:first]
        # an English word is a word of its own, else its sub-words would be others
        if mixed and not mixed[-1].isspace():
            mixed += " "
        start = len(mixed)
        mixed += english[slice(*source)]
        replaced.append(((start, len(mixed)), source))
        if end < len(text) and not text[end].isspace():
            mixed += " "
        position = end
    return mixed + text[position:], tuple(replaced)
