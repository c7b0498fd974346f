"""Text: tokenizers behind one face, sentences with their specials, masking; language codes; captions.

`Tokenizer.load` reads
  * our SentencePiece models (`<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, `<mask>` 4, a control symbol);
  * XLM-R's kind (`sentencepiece.bpe.model`: `<unk>` 0, `<s>` 1, `</s>` 2 in the file), whose ids move to
    fairseq's: `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, piece i at i + 1, `<mask>` last (250,001 at full
    size);
  * any `tokenizer.json` with the usual special tokens, through `tokenizers` (six times slower).

A language code is two or three letters, perhaps with a script, a region or a variant: "de", "zh-Hans",
"pt-BR", "bn_rom". Whoever names a language may name any such code. Guessing is another matter:
"cc3m-train-0000.tar" or "wit-000.tar" (Wintu, by ISO 639-3) name data sets, so a name is believed only if it
begins with one of `KNOWN_CODES`.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from raylib.errors import UserError, hub_hint, reading
from raylib.fileio import read_bytes, sha256_file
from raylib.patterns import check_patterns
from raylib.randomness import hash64, integers, uniform
from raylib.strict_json import parse_json

if TYPE_CHECKING:  # texts are read, and corpora written, without PyTorch
    from raylib.packed import Sentences

# what is looked for in a folder, in order
TOKENIZER_FILES = ("sentencepiece.bpe.model", "tokenizer.model", "tokenizer.json")
# Before a name, in an export: `transformers` does not know the file, which it would read otherwise than ours.
HIDDEN = "polyglance_"
JSON_TOKENIZER = "a tokenizer.json of `tokenizers`"
MAX_BYTES = 1 << 28  # of a tokenizer's file, which its library reads whole
MAX_VOCABULARY = 1 << 24  # ids: an array has one for each
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

    @property
    def without_prompt(self) -> "Tokenizer":
        """The tokenizer that puts nothing before a text: itself, but of a `PromptedTokenizer`."""
        return self

    @property
    def for_training(self) -> "Tokenizer":
        """The tokenizer of training texts: itself, but where these are cut (`raylib.words`)."""
        return self

    def for_language(self, code: str) -> "Tokenizer":
        """The tokenizer of texts in a language: itself, but where a prompt has words of its own there."""
        return self

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """A tokenizer from its file, or from the model folder that holds it.

        Raises UserError: no such file, none in the folder, neither of the kinds above, a special token is
        missing.
        """
        path = Path(path)
        if path.is_dir():
            found = tokenizer_file(path)
            if found is None:
                raise UserError(
                    f"{path}: no tokenizer here; one of {', '.join(TOKENIZER_FILES)} is looked for"
                    f"{hub_hint(path)}"
                )
            path = found
        if not path.is_file():
            raise UserError(f"{path}: no such tokenizer file{hub_hint(path)}")
        return cls(path, *(_load_json(path) if path.suffix == ".json" else _load_sentencepiece(path)))

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text (int64), without specials."""
        new = [text for text in texts if text not in self._known] if self._known else list(texts)
        rows = iter([np.asarray(ids, np.int64) for ids in self._encode(new)])
        return [self._known[text] if text in self._known else next(rows) for text in texts]

    def remember(self, texts: Sequence[str]) -> None:
        """Encode these texts now, or take what another trial of a search has made of them
        (`raylib.cache`)."""
        from raylib.cache import cached

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


def tokenizer_file(folder: Path) -> Path | None:
    """The file of the tokenizer in `folder`; None: there is none."""
    # where an export has both, the hidden one is the run's own
    names = (*(f"{HIDDEN}{name}" for name in TOKENIZER_FILES), *TOKENIZER_FILES)
    return next((folder / name for name in names if (folder / name).is_file()), None)


class PromptedTokenizer(Tokenizer):
    """A tokenizer that puts a prompt before every text: `words`, or, where a model has embeddings of its own
    for it, `ids`; before texts in the languages of `by_language` those words (`for_language`)."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        words: str = "",
        ids: tuple[int, ...] = (),
        by_language: Mapping[str, str] | None = None,
    ):
        self.__dict__.update(tokenizer.__dict__)
        self.plain, self.words, self.ids, self.by_language = tokenizer, words, ids, by_language or {}

    @property
    def without_prompt(self) -> Tokenizer:
        return self.plain

    @property
    def for_training(self) -> Tokenizer:
        return PromptedTokenizer(self.plain.for_training, self.words, self.ids, self.by_language)

    def for_language(self, code: str) -> Tokenizer:
        words = self.by_language.get(code, self.words)
        return PromptedTokenizer(self.plain.for_language(code), words, self.ids)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        rows = self.plain.encode([f"{self.words} {text}" for text in texts] if self.words else texts)
        return [np.concatenate([np.asarray(self.ids, np.int64), row]) for row in rows]

    def __reduce__(self):
        return PromptedTokenizer, (self.plain, self.words, self.ids, self.by_language)


def load_sentencepiece(path: Path) -> Any:
    """Load a SentencePiece model.

    Raises:
        UserError: it is none, or damaged.
    """
    import sentencepiece

    if not path.is_file():
        raise UserError(f"{path}: no such tokenizer file{hub_hint(path)}")
    with reading(path, "a SentencePiece model"):
        _check_size(path)
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        model.id_to_piece(list(range(model.get_piece_size())))  # each is UTF-8, or this is an error
    return model


def _check_size(path: Path) -> None:
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{size:,} bytes, of which {MAX_BYTES:,} may be")


def load_tokenizer_json(path: Path) -> Any:
    """Load a tokenizer.json.

    Raises:
        UserError: it is none, or damaged.
    """
    # its threads do not survive the fork of loader workers
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import tokenizers

    with reading(path, JSON_TOKENIZER):
        values = parse_json(read_bytes(path, MAX_BYTES))
        check_patterns(values)
        model = tokenizers.Tokenizer.from_file(str(path))
        if (largest := max(model.get_vocab().values(), default=-1)) >= MAX_VOCABULARY:
            raise ValueError(f"id {largest:,}, where {MAX_VOCABULARY:,} may be at most")
        # the library gives a token that the vocabulary lacks another id than the file says, without a word
        for token in values["added_tokens"]:
            if model.token_to_id(token["content"]) != token["id"]:
                raise ValueError(f"its token {token['content']!r:.40} has not the id {token['id']}")
    return model


def _load_sentencepiece(path: Path):
    model = load_sentencepiece(path)
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
    model = load_tokenizer_json(path)
    model.no_truncation()
    model.no_padding()
    specials = {}
    for special, names in SPECIALS.items():
        ids = [number for name in names if (number := model.token_to_id(name)) is not None]
        if not ids:
            raise UserError(f"{path}: no special token {' or '.join(names)}; add it to the tokenizer")
        specials[special] = ids[0]

    def encode(texts: list[str]) -> list[list[int]]:
        with reading(path, JSON_TOKENIZER):  # what is wrong with it may show at a text alone
            return [encoding.ids for encoding in model.encode_batch(texts, add_special_tokens=False)]

    vocabulary = model.get_vocab()
    # WordPiece marks what goes on within a word, others what begins one
    is_wordpiece = any(token.startswith("##") for token in vocabulary)

    def piece(i: int) -> str:
        token = model.id_to_token(i)
        assert token is not None, f"id {i} is none of the vocabulary"
        if is_wordpiece:
            return token[2:] if token.startswith("##") else "▁" + token
        return token.replace("Ġ", "▁")

    return encode, max(vocabulary.values()) + 1, specials, piece


class Tokens(NamedTuple):
    """Sentences end to end, as NumPy arrays: `values` (T,) ids with specials, `lengths` (n,)."""

    values: np.ndarray
    lengths: np.ndarray

    @property
    def starts(self) -> np.ndarray:
        """(n,) offset of each sentence's first token."""
        return np.cumsum(self.lengths) - self.lengths

    @property
    def places(self) -> np.ndarray:
        """(T,) place of each token in its sentence."""
        return np.arange(len(self.values)) - np.repeat(self.starts, self.lengths)


def add_specials(rows: Sequence[np.ndarray], tokenizer: Tokenizer, length: int) -> Tokens:
    """Put `<s>` and `</s>` around each row, cut to `length` tokens in all."""
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
    tokens: Tokens,
    index: np.ndarray,
    tokenizer: Tokenizer,
    keys: tuple,
    probability=0.15,
    mask_separator: bool = False,
) -> "Sentences":
    """Choose tokens to predict and hide them (BERT; Devlin et al. 2019, section 3.1).

    Each token that is no special, or with `mask_separator` is the `</s>`, is chosen with `probability`; a
    chosen one becomes `<mask>` (80 %), a random ordinary id (10 %) or stays (10 %). Draws come from (*keys,
    index of the sentence in the global batch, place in it).
    """
    values, place = tokens.values, tokens.places
    sentence = np.repeat(index, tokens.lengths)
    specials = [tokenizer.cls, tokenizer.pad, tokenizer.mask, tokenizer.unk]
    special = np.isin(values, specials if mask_separator else [*specials, tokenizer.sep])
    positions = np.flatnonzero((uniform(*keys, "choose", sentence, place) < probability) & ~special)
    labels = values[positions]
    where = (sentence[positions], place[positions])
    # drawn for every position, and used for one in ten: a draw that depended on another would not be the same
    # on any number of workers
    fate = uniform(*keys, "fate", *where)
    other = tokenizer.ordinary[integers(len(tokenizer.ordinary), *keys, "other", *where)]
    masked = values.copy()
    masked[positions] = np.where(fate < 0.8, tokenizer.mask, np.where(fate < 0.9, other, labels))
    import torch

    from raylib.packed import Sentences

    arrays = (values, masked, tokens.lengths, positions, labels, text_ids(tokens))
    return Sentences(*(torch.from_numpy(array) for array in arrays))


def text_ids(tokens: Tokens) -> np.ndarray:
    """Return (n,) int64 >= 0: a stable hash of each sentence's ids, equal for equal sentences."""
    if not len(tokens.lengths):
        return np.zeros(0, np.int64)
    sums = np.add.reduceat(hash64(tokens.values, tokens.places), tokens.starts)
    return (hash64(sums, tokens.lengths) >> np.uint64(1)).astype(np.int64)


LANGUAGE_CODE = re.compile(r"[a-z]{2,3}(?:[-_][A-Za-z0-9]{2,8})*")
# ISO 639-1; of the three-letter codes, those of large corpora that are no common word or data set: "mul" is
# many languages
CODES = (
    "aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de "
    "dv dz ee el en eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id "
    "ie ig ii ik io is it iu ja jv ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu "
    "lv mg mh mi mk ml mn mr ms mt my na nb nd ne ng nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu "
    "rm rn ro ru rw sa sc sd se sg si sk sl sm sn so sq sr ss st su sv sw ta te tg th ti tk tl tn to tr "
    "ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu arz ast ceb ckb fil nds nso yue mul"
)
KNOWN_CODES = frozenset(CODES.split())
# ShardWriter's own names, "zh-Hans-000017.tar"
NUMBERED = re.compile(r"([a-z]{2,3}(?:-[A-Z][a-z]{3})?(?:-[A-Z]{2})?(?:_[a-z]{3})?)-\d+\.tar")


def is_language_code(word: str) -> bool:
    """True for what may be a language's code, "en" or "zh-Hans"; not for "00000", "cc3m", "train",
    "English"."""
    return LANGUAGE_CODE.fullmatch(word) is not None


def language_of(name: str, loose: bool) -> str | None:
    """The language that the name of a shard says: that of LANGUAGE-NUMBER.tar; if `loose`, also what stands
    before the first "-" of any other name, or the whole name. None if that is no known code."""
    if (numbered := NUMBERED.fullmatch(name)) and re.split("[-_]", numbered[1])[0] in KNOWN_CODES:
        return numbered[1]
    first = name.removesuffix(".tar").split("-")[0]
    return first if loose and first in KNOWN_CODES else None


CAPTION_MEMBERS = ("txt", "outputs.txt", "output.txt")
CAPTION_FIELDS = ("captions", "caption", "text")
SURROGATE = re.compile("[\ud800-\udfff]")
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class BadCaption(Exception):
    """A sample, or one of its languages, has no usable caption; the message, a noun, says what it has
    instead."""


class EmptyCaption(BadCaption):
    """There are captions, but nothing in them."""


def parse_captions(record: Any, language: str | None) -> dict[str, Any]:
    """{language: string or list} of a JSON record, not cleaned yet; {} if it has no captions. `language`
    (None: unknown) is that of captions which do not say theirs. A language whose captions are null has
    none."""
    value = (
        next((v for v in map(record.get, CAPTION_FIELDS) if v is not None), None)
        if isinstance(record, dict)
        else None
    )
    if isinstance(value, dict) or value is None:
        return {code: captions for code, captions in (value or {}).items() if captions is not None}
    if language is None:
        raise BadCaption("captions that do not say their language")
    return {language: value}


def clean_captions(captions: Any) -> list[str]:
    """Captions of one language, a string or a list of them, without blank ones and surplus white space.

    Raises:
        EmptyCaption: nothing but blanks.
        BadCaption: not text, or half a surrogate pair, which is not UTF-8.
    """
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise BadCaption("captions that are no text")
    if any(map(SURROGATE.search, captions)):
        raise BadCaption("captions that are not UTF-8")
    if cleaned := [text for text in (" ".join(caption.split()) for caption in captions) if text]:
        return cleaned
    raise EmptyCaption("empty captions")


def has_captions(extensions: Iterable[str]) -> bool:
    """True if there is a member that may hold captions."""
    return any(extension in ("json", *CAPTION_MEMBERS) for extension in extensions)


def escape(text: str) -> str:
    """Return `text` in one line, with what controls a terminal escaped."""
    return CONTROL.sub(lambda found: repr(found[0])[1:-1], text)
