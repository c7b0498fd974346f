"""Text: tokenizers behind one face, sentences with their specials, and masking.

`Tokenizer.load` reads
  * our SentencePiece models (`<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, `<mask>` 4, a control symbol);
  * XLM-R's kind (`sentencepiece.bpe.model`: `<unk>` 0, `<s>` 1, `</s>` 2 in the file), whose ids move to
    fairseq's: `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, piece i at i + 1, `<mask>` last (250,001 at full
    size);
  * any `tokenizer.json` with the usual special tokens, through `tokenizers` (six times slower).
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from raylib.cache import cached
from raylib.errors import UserError
from raylib.fileio import sha256_file
from raylib.packed import Sentences
from raylib.randomness import hash64, integers, uniform

FILES = (
    "sentencepiece.bpe.model",
    "tokenizer.model",
    "tokenizer.json",
)  # what is looked for in a folder, in order
SPECIALS = {
    "cls": ("<s>", "[CLS]", "<|startoftext|>"),
    "pad": ("<pad>", "[PAD]", "<|endoftext|>"),
    "sep": ("</s>", "[SEP]", "<|endoftext|>"),
    "unk": ("<unk>", "[UNK]", "<|endoftext|>"),
    "mask": ("<mask>", "[MASK]", "<|endoftext|>"),  # CLIP's has none, and nothing of it is ever masked
}


class Tokenizer:
    """Text to ids. `cls`, `sep`, `pad`, `mask`, `unk`: special ids; `sha256`: of the file; `ordinary`: all
    other ids."""

    def __init__(self, path: Path, encode, vocabulary: int, specials: dict[str, int], piece):
        self.path, self._encode, self.vocabulary, self._piece = path, encode, vocabulary, piece
        self._known: dict[str, np.ndarray] = {}
        self.sha256 = sha256_file(path)
        self.cls, self.sep, self.pad, self.mask, self.unk = (
            specials[n] for n in ("cls", "sep", "pad", "mask", "unk")
        )
        self.ordinary = np.setdiff1d(np.arange(vocabulary), list(specials.values()))

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """A tokenizer from its file, or from the model folder that holds it.

        Raises UserError: no such file, none in the folder, neither of the kinds above, a special token is
        missing.
        """
        path = Path(path)
        if path.is_dir():
            found = [path / name for name in FILES if (path / name).is_file()]
            if not found:
                raise UserError(f"{path}: no tokenizer here; one of {', '.join(FILES)} is looked for")
            path = found[0]
        if not path.is_file():
            raise UserError(f"{path}: no such tokenizer file")
        return cls(path, *(_load_json(path) if path.suffix == ".json" else _load_sentencepiece(path)))

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text (int64), without specials."""
        new = [text for text in texts if text not in self._known] if self._known else list(texts)
        rows = iter([np.asarray(ids, np.int64) for ids in self._encode(new)])
        return [self._known[text] if text in self._known else next(rows) for text in texts]

    def remember(self, texts: Sequence[str]) -> None:
        """Encode these texts now, or take what another trial of a search has made of them
        (`raylib.cache`)."""
        texts = sorted(set(texts))

        def make() -> tuple[np.ndarray, np.ndarray]:
            rows = self.encode(texts)
            return np.concatenate([np.empty(0, np.int64), *rows]), np.cumsum([len(row) for row in rows])

        digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
        values, ends = cached("tokens", (self.sha256, digest), make)
        self._known = dict(zip(texts, np.split(values, ends[:-1]), strict=True))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The sub-words behind ids, those that begin a word with ▁ before them: alike for all kinds of
        tokenizers."""
        return [self._piece(int(i)) for i in ids]

    def __reduce__(self):
        return Tokenizer.load, (self.path,)


class Prompted(Tokenizer):
    """A tokenizer that puts a prompt before every text: `words`, or, where a model has embeddings of its own
    for it, `ids`."""

    def __init__(self, tokenizer: Tokenizer, words: str = "", ids: tuple[int, ...] = ()):
        self.__dict__.update(tokenizer.__dict__)
        self.plain, self.words, self.ids = tokenizer, words, ids

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        rows = self.plain.encode([f"{self.words} {text}" for text in texts] if self.words else texts)
        return [np.concatenate([np.asarray(self.ids, np.int64), row]) for row in rows]

    def __reduce__(self):
        return Prompted, (self.plain, self.words, self.ids)


def _load_sentencepiece(path: Path):
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path}: no SentencePiece model ({' '.join(str(error).split())})") from error
    size = model.get_piece_size()
    mask = model.piece_to_id("<mask>")
    places = (model.bos_id(), model.pad_id(), model.eos_id(), model.unk_id())
    if places == (0, 1, 2, 3) and mask == 4 and model.is_control(mask):
        return (
            lambda texts: model.encode(texts, num_threads=1),
            size,
            {"cls": 0, "pad": 1, "sep": 2, "unk": 3, "mask": 4},
            model.id_to_piece,
        )
    if places == (1, -1, 2, 0) and mask == 0:

        def encode(texts: list[str]) -> list[list[int]]:
            return [
                [piece + 1 if piece else 3 for piece in ids] for ids in model.encode(texts, num_threads=1)
            ]

        specials = {"cls": 0, "pad": 1, "sep": 2, "unk": 3, "mask": size + 1}
        known = dict(zip(specials.values(), specials, strict=True))
        return encode, size + 2, specials, lambda i: known[i] if i in known else model.id_to_piece(i - 1)
    raise UserError(
        f"{path}: <s>, <pad>, </s>, <unk>, <mask> have ids {(*places, mask)}; known are ours (0, 1, 2, 3, 4) "
        "and XLM-R's (1, none, 2, 0, none): convert it to a tokenizer.json"
    )


def _load_json(path: Path):
    os.environ.setdefault(
        "TOKENIZERS_PARALLELISM", "false"
    )  # its threads do not survive the fork of loader workers
    import tokenizers

    try:
        model = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise UserError(f"{path}: no tokenizer.json ({error})") from error
    model.no_truncation()
    model.no_padding()
    specials = {}
    for special, names in SPECIALS.items():
        ids = [number for name in names if (number := model.token_to_id(name)) is not None]
        if not ids:
            raise UserError(f"{path}: no special token {' or '.join(names)}; add it to the tokenizer")
        specials[special] = ids[0]

    def encode(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in model.encode_batch(texts, add_special_tokens=False)]

    vocabulary = model.get_vocab()
    parts = any(
        token.startswith("##") for token in vocabulary
    )  # WordPiece marks what goes on, others what begins

    def piece(i: int) -> str:
        token = model.id_to_token(i)
        if parts:
            return token[2:] if token.startswith("##") else "▁" + token
        return token.replace("Ġ", "▁")

    return encode, max(vocabulary.values()) + 1, specials, piece


class Tokens(NamedTuple):
    """Sentences end to end, as NumPy arrays: `values` (T,) ids with specials, `lengths` (n,)."""

    values: np.ndarray
    lengths: np.ndarray


def add_specials(rows: Sequence[np.ndarray], tokenizer: Tokenizer, length: int) -> Tokens:
    """`<s> ids </s>` for each row, cut to `length` tokens in all."""
    rows = [row[: length - 2] for row in rows]
    lengths = np.array([len(row) for row in rows], np.int64) + 2
    ends = np.cumsum(lengths)
    values = np.empty(int(ends[-1]) if len(rows) else 0, np.int64)
    inner = np.ones(len(values), bool)
    inner[ends - lengths] = inner[ends - 1] = False
    values[ends - lengths] = tokenizer.cls
    values[ends - 1] = tokenizer.sep
    if rows:
        values[inner] = np.concatenate(rows)
    return Tokens(values, lengths)


def mask_tokens(
    tokens: Tokens, index: np.ndarray, tokenizer: Tokenizer, keys: tuple, probability=0.15
) -> Sentences:
    """Choose tokens to predict and hide them (BERT; Devlin et al. 2019, section 3.1).

    Each token that is no special is chosen with `probability`; a chosen one becomes `<mask>` (80 %), a random
    ordinary id (10 %) or stays (10 %). Draws come from (*keys, index of the sentence in the global batch,
    place in it).
    """
    values, lengths = tokens
    starts = np.cumsum(lengths) - lengths
    place = np.arange(len(values)) - np.repeat(starts, lengths)
    sentence = np.repeat(index, lengths)
    special = np.isin(values, [tokenizer.cls, tokenizer.sep, tokenizer.pad, tokenizer.mask, tokenizer.unk])
    positions = np.flatnonzero((uniform(*keys, "choose", sentence, place) < probability) & ~special)
    labels = values[positions]
    where = (sentence[positions], place[positions])
    fate = uniform(*keys, "fate", *where)
    other = tokenizer.ordinary[integers(len(tokenizer.ordinary), *keys, "other", *where)]
    masked = values.copy()
    masked[positions] = np.where(fate < 0.8, tokenizer.mask, np.where(fate < 0.9, other, labels))
    arrays = (values, masked, lengths, positions, labels, text_ids(tokens))
    return Sentences(*(torch.from_numpy(array) for array in arrays))


def text_ids(tokens: Tokens) -> np.ndarray:
    """(n,) int64 >= 0: a stable hash of each sentence's ids, equal for equal sentences."""
    values, lengths = tokens
    if not len(lengths):
        return np.zeros(0, np.int64)
    starts = np.cumsum(lengths) - lengths
    place = np.arange(len(values)) - np.repeat(starts, lengths)
    sums = np.add.reduceat(hash64(values, place), starts)
    return (hash64(sums, lengths) >> np.uint64(1)).astype(np.int64)
