"""Our tokenizers as files of `transformers`: `tokenizer.json`, `tokenizer_config.json`, with the ids that
`raylib.text` gives.

Converting a SentencePiece model (`raylib.text` says which kinds there are) as `transformers` does it gives
other ids in three places, which are mended here:

  * Text that is not composed (NFD, as macOS writes names): `tokenizers` looks rules of normalisation up by
    grapheme, and loses marks of Vietnamese, Bengali, Tamil, Korean, Japanese, or what a mark stands on. Text
    is composed before, as Unicode does it, but for marks that the model's own rules would not compose.
  * White space at the ends, which SentencePiece drops.
  * The names of special tokens in a text, "<mask>": no text can name them (`split_special_tokens`), and
    nowhere does the vocabulary's piece of that name stand for the word.

What is written is compared with ours before it is kept.
"""

import collections
import functools
import itertools
import json
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from raylib.errors import UserError, reading
from raylib.text import SPECIALS, PromptedTokenizer, Tokenizer, load_sentencepiece, load_tokenizer_json
from raylib.words import NormalizedTokenizer

SEPARATOR = "\uffff"  # no character: stands for a moment where nothing may be composed
FINALS = frozenset(map(chr, range(0x11A8, 0x11C3)))  # consonants that end a syllable of Korean
COMPARED = 20_000  # pieces of the vocabulary at most that are encoded by both
UNIGRAM, NORMAL, UNKNOWN, CONTROL, UNUSED = 1, 1, 2, 3, 5  # of SentencePiece's files


class NotConvertible(UserError):
    """A tokenizer that `transformers` cannot have with the same ids; says why."""


def write_tokenizer(tokenizer: Tokenizer, max_length: int, folder: Path) -> None:
    """Write what `AutoTokenizer` reads.

    Args:
        tokenizer: as the model reads texts; a prompt before every text becomes part of the file.
        max_length: most tokens of a text, specials included.
    Raises:
        NotConvertible: it cannot give the same ids.
    """
    prompt = tokenizer if isinstance(tokenizer, PromptedTokenizer) else None
    plain = tokenizer.without_prompt
    if isinstance(plain, NormalizedTokenizer):
        # `tokenizers` lowers letters one by one: a Greek final sigma is another in Python
        raise NotConvertible("texts are normalised before it (text_normalization)")
    if type(tokenizer) not in (Tokenizer, PromptedTokenizer) or type(plain) is not Tokenizer:
        raise NotConvertible(f"{type(tokenizer).__name__}, a tokenizer of a user's strategy")
    if prompt and prompt.by_language:
        raise NotConvertible("its prompt has words of its own in each language")
    converted = tokenizers.Tokenizer.from_str(_convert(plain.path, plain.sha256))
    names = {name: str(converted.id_to_token(vars(plain)[name])) for name in SPECIALS}
    if prompt and prompt.words:
        before = [normalizers.Prepend(f"{prompt.words} ")]
        converted.normalizer = normalizers.Sequence(before + [n for n in [converted.normalizer] if n])
    inserted = [(f"<prompt_{i}>", number) for i, number in enumerate(prompt.ids if prompt else ())]
    start = " ".join([names["cls"], *(name for name, _ in inserted)])
    converted.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {names['sep']}",
        pair=f"{start} $A {names['sep']} {names['sep']} $B {names['sep']}",
        special_tokens=[(names["cls"], plain.cls), (names["sep"], plain.sep), *inserted],
    )
    converted.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "right",
        "truncation_side": "right",
        "clean_up_tokenization_spaces": False,
        # what stands in a text is text
        "split_special_tokens": plain.path.suffix != ".json",
        "bos_token": names["cls"],
        "eos_token": names["sep"],
        **{f"{name}_token": token for name, token in names.items()},
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


@functools.cache
def _convert(path: Path, sha256: str) -> str:
    """The JSON of the tokenizer at `path`, whose hash is `sha256`, once it has been compared with ours."""
    if path.suffix == ".json":
        converted = load_tokenizer_json(path)
        converted.no_truncation()
        converted.no_padding()
    else:
        converted = convert_sentencepiece(path)
    _compare(converted, Tokenizer.load(path))
    return converted.to_str()


def convert_sentencepiece(path: Path) -> tokenizers.Tokenizer:
    """A `tokenizers.Tokenizer` that gives the ids of `raylib.text` for the SentencePiece model at `path`.

    Raises:
        NotConvertible: no unigram model, or one with symbols of the user's own or pieces of bytes.
    """
    load_sentencepiece(path)  # it checks more than what parses its parts here
    with reading(path, "a SentencePiece model"):
        return _convert_parts(path)


def _convert_parts(path: Path) -> tokenizers.Tokenizer:
    from sentencepiece import sentencepiece_model_pb2 as files

    proto = files.ModelProto()  # type: ignore[attr-defined]  # made when it is imported
    proto.ParseFromString(path.read_bytes())
    kinds = {piece.type for piece in proto.pieces}
    if proto.trainer_spec.model_type != UNIGRAM or not kinds <= {NORMAL, UNKNOWN, CONTROL, UNUSED}:
        raise NotConvertible(f"{path.name}: no unigram model of plain pieces")
    # to a piece that is not used, which the library knows nothing of, goes a name that no text has
    pieces = [
        (f"{SEPARATOR}{i}" if piece.type == UNUSED else piece.piece, piece.score)
        for i, piece in enumerate(proto.pieces)
    ]
    if pieces[0][0] == "<unk>":  # XLM-R's kind, by fairseq's ids
        special = [(name, 0.0) for name in ("<s>", "<pad>", "</s>", "<unk>")]
        pieces = [*special, *pieces[3:], ("<mask>", 0.0)]
    converted = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=3, byte_fallback=False))
    spec = proto.normalizer_spec
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps = [
            normalizers.Replace(SEPARATOR, "\ufffe"),  # no character either: unknown, whichever it is
            # two marks in one, which nothing is composed with
            normalizers.Replace("\u0344", f"{SEPARATOR}\u0308\u0301"),
            normalizers.Replace(Regex(_uncomposed_pairs(spec.precompiled_charsmap)), SEPARATOR),
            normalizers.NFKC(),
            normalizers.Precompiled(spec.precompiled_charsmap),
            normalizers.Replace(SEPARATOR, ""),
        ]
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex("^ | $"), "")]
    converted.normalizer = normalizers.Sequence(steps)
    scheme: Any = "always" if spec.add_dummy_prefix else "never"
    names = "|".join(name.strip("<>/") for name in ("<s>", "<pad>", "<unk>", "<mask>"))
    converted.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme),
            # a special token's piece has a score, so that it would be taken for its name in a text: cut it
            pre_tokenizers.Split(Regex(f"</?(?=(?:{names})>)"), "merged_with_previous"),
        ]
    )
    converted.decoder = decoders.Metaspace(replacement="▁", prepend_scheme=scheme)
    converted.add_special_tokens(
        [
            AddedToken(name, normalized=False, special=True)
            for name in ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
        ]
    )
    return converted


def _uncomposed_pairs(charsmap: bytes) -> str:
    """A regular expression that finds the place before a mark, or a final consonant of Korean, where no rule
    of `charsmap` composes it with what stands before: a mark, or a character that has one, or that a rule
    replaces, or a Korean syllable."""
    keys = read_charsmap(charsmap)
    marked = {
        c for c in map(chr, range(sys.maxunicode + 1)) if _is_mark(unicodedata.normalize("NFKD", c)[-1])
    }
    replaced = marked | {key for key in keys if len(key) == 1} | set(map(chr, range(0xAC00, 0xD7A4, 28)))
    after: dict[str, set[str]] = collections.defaultdict(set)
    plain = {SEPARATOR}
    for key in keys:
        for left, right in itertools.pairwise(key):
            if _is_mark(right) or right in FINALS:
                after[left].add(right) if left in replaced else plain.add(left)
    groups: dict[frozenset[str], set[str]] = collections.defaultdict(set)
    for left, rights in after.items():
        groups[frozenset(rights)].add(left)
    composed = "|".join(f"(?<=[{_ranges(lefts)}])(?=[{_ranges(rights)}])" for rights, lefts in groups.items())
    # letters that are composed with marks, and few; behind what is neither, a place more changes nothing
    place = rf"(?<=[^{_ranges(plain)}])(?=[\p{{M}}{_ranges(FINALS)}])"
    return place + (f"(?!{composed})" if composed else "")


def _is_mark(character: str) -> bool:
    return unicodedata.category(character)[0] == "M"


def _ranges(characters: frozenset[str] | set[str]) -> str:
    """The inside of a character class."""
    codes = np.array(sorted(map(ord, characters)))
    runs = np.split(codes, np.flatnonzero(np.diff(codes) > 1) + 1) if len(codes) else []
    return "".join(
        rf"\x{{{run[0]:x}}}" if len(run) == 1 else rf"\x{{{run[0]:x}}}-\x{{{run[-1]:x}}}" for run in runs
    )


def read_charsmap(data: bytes) -> list[str]:
    """The sequences of characters that a SentencePiece model's normalisation replaces: the keys of its
    double-array trie (darts-clone), which comes first in `data`, after its size."""
    units = np.frombuffer(data, "<u4", int.from_bytes(data[:4], "little") // 4, 4)
    index, label = np.arange(len(units)), units & 0xFF
    # a unit with a label lies at the place of its parent's children, xor the label
    found = index[(units >> 31 == 0) & (label > 0)]
    places = found ^ label[found]
    order = places.argsort(kind="stable")
    starts = dict(zip(*np.unique(places[order], return_index=True), strict=True))
    below = (index ^ ((units >> 10) << ((units & 0x200) >> 6))).tolist()
    is_end, children, place = ((units >> 8) & 1).tolist(), found[order].tolist(), places[order].tolist()
    keys, nodes = [], [(0, b"")]
    while nodes:
        node, key = nodes.pop()
        i = starts.get(below[node], len(children))
        while i < len(children) and place[i] == below[node]:
            child, longer = children[i], key + bytes([children[i] ^ place[i]])
            if is_end[child]:
                keys.append(longer.decode())
            nodes.append((child, longer))
            i += 1
    return keys


def _compare(converted: tokenizers.Tokenizer, ours: Tokenizer) -> None:
    """Encode pieces of the vocabulary, and names of special tokens, by both."""
    chosen = np.unique(np.linspace(0, ours.vocabulary - 1, COMPARED).astype(int))
    texts = [piece.replace("▁", " ") for piece in ours.pieces(chosen.tolist())]
    texts += [f"a {name}b" for names in SPECIALS.values() for name in names if ours.path.suffix != ".json"]
    converted.encode_special_tokens = ours.path.suffix != ".json"
    theirs = converted.encode_batch(texts, add_special_tokens=False)
    for text, encoding, ids in zip(texts, theirs, ours.encode(texts), strict=True):
        if encoding.ids != ids.tolist():
            raise NotConvertible(
                f"{ours.path.name}: {text!r} is {encoding.ids} there, and {ids.tolist()} here"
            )
