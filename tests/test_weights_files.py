"""Files of weights that are damaged, foreign or hostile: one line, and no memory for what is not there."""

import json
import os
import random
from argparse import Namespace
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertModel

from raylib import weights
from raylib.errors import UserError
from raylib.models.hf_folders import WEIGHT_FILES, read_folder
from raylib.weights import limit_model, load_state, read_tensors
from tests.factories import make_model


@pytest.mark.parametrize("is_zip", [True, False])
def test_torch_file_equals_what_torch_reads(tmp_path, is_zip):
    x = torch.randn(4, 6)
    tensors = {"a": x, "tied": x.t(), "part": x[1:3, ::2], "none": torch.empty(0), "half": x.half()}
    path = tmp_path / "x.bin"
    saved = {"model": tensors, "epoch": 1, "optimizer": {"state": {0: x}}}
    torch.save(saved, path, _use_new_zipfile_serialization=is_zip)
    found = read_tensors(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[n], v) and found[n].dtype == v.dtype for n, v in tensors.items())


def test_safetensors_equals_what_safetensors_reads(tmp_path):
    """Every kind of numbers that the library knows, a scalar and no numbers at all among them."""
    tensors = {kind: torch.randint(0, 2, (2, 3)).to(dtype) for kind, dtype in weights.SAFETENSORS.items()}
    tensors |= {"scalar": torch.tensor(3.0), "none": torch.zeros(0, 3), "wide": torch.randn(5, 7)}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, {"a": "b"})
    (found, metadata), expected = weights.read_safetensors(path), load_file(path)
    assert metadata == {"a": "b"} and found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        bits = [each[name].flatten().view(torch.uint8) for each in (found, expected)]
        assert torch.equal(*bits), name


@pytest.mark.parametrize("left", [200_000, 100, 4, 0])
def test_safetensors_that_becomes_shorter_while_it_is_read_is_a_line(left, tmp_path, monkeypatch):
    """Written anew by a download, say: mapped into memory it would end the process by SIGBUS."""
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(100_000)}, path)
    first = weights.open_plain

    def open_later(file):
        os.truncate(file, left)
        return first(file)

    monkeypatch.setattr(weights, "open_plain", open_later)
    with pytest.raises(UserError, match=f"^{path}: not to be read as weights"):
        read_tensors(path)


def test_torch_file_that_claims_terabytes_is_refused(tmp_path):
    path = tmp_path / "x.bin"
    torch.save({"a": torch.zeros(77)}, path)
    data = path.read_bytes()
    assert data.count(b"K\x4d") >= 2  # 77, of the storage and of the tensor
    path.write_bytes(data.replace(b"K\x4dt", b"J\xff\xff\xff\x7ft", 1)[: len(data)])
    with pytest.raises(UserError, match="x.bin: not to be read as weights"):
        read_tensors(path)


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_what_published_checkpoints_have_beside_their_weights_is_passed_over(tmp_path, is_zip, protocol):
    """Arguments of a command, results as NumPy's numbers, states of random generators: none of it is made."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    checkpoint = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "args": Namespace(lr=1e-4, output=Path("/data/runs"), sizes=torch.Size([1, 2]), inner=Namespace(a=1)),
        "best": np.float64(0.5),
        "epoch": np.int64(3),
        "curve": np.arange(4.0),
        "counts": Counter("abba"),
        "results": defaultdict(list, {"de": [1]}),
        "totals": defaultdict(int, {"de": 1}),
        "random": (random.getstate(), np.random.get_state(), torch.get_rng_state()),
        "amp": {"dtype": torch.bfloat16, "device": torch.device("cuda:0"), "enabled": True},
        "languages": {"de", "ru"},
        "kept": frozenset(("de",)),
        "others": {0.5: 1, None: 2, (0, "de"): 3, True: 4, 1 << 70: 5, b"de": 6},
        "bytes": bytearray(b"de"),
        "number": 1 + 2j,
    }
    torch.save(
        checkpoint,
        tmp_path / "model.pth",
        _use_new_zipfile_serialization=is_zip,
        pickle_protocol=protocol,
    )
    tensors = read_tensors(tmp_path / "model.pth")
    assert tensors.keys() == model.state_dict().keys()
    assert all(torch.equal(tensors[name], value) for name, value in model.state_dict().items())


def test_index_of_shards_stays_in_its_folder_and_lacks_nothing(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.ones(2)}, tmp_path / "s.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    for places, words in (
        ({"a": "../s.safetensors"}, "no name of a file beside it"),
        ({"a": "s.safetensors", "b": "s.safetensors"}, "no tensor b, which the index says is in it"),
        ({"a": "t.safetensors"}, "1 of the 1 files that it names are not there: t.safetensors"),
    ):
        index.write_text(json.dumps({"weight_map": places}))
        with pytest.raises(UserError, match=words):
            read_folder(tmp_path)


def write_weights(folder: Path, value: float, names: set[str]) -> None:
    """Write a tiny BERT as the files `names` of `WEIGHT_FILES`, whose word embeddings are `value` and up: the
    nth name's `value` + n."""
    config = BertConfig(
        vocab_size=5, hidden_size=4, num_hidden_layers=0, num_attention_heads=1, intermediate_size=4
    )
    config.save_pretrained(folder)
    weights = {
        k: v.detach().clone() for k, v in BertModel(config, add_pooling_layer=False).state_dict().items()
    }
    for number, name in enumerate(WEIGHT_FILES):
        if name not in names:
            continue
        tensors = {k: torch.full_like(v, value + number) for k, v in weights.items()}
        is_safe = name.startswith("model.")
        write = save_file if is_safe else torch.save
        if not name.endswith(".json"):
            write(tensors, folder / name)
            continue
        ending, stem = (".safetensors", "model") if is_safe else (".bin", "pytorch_model")
        parts = [f"{stem}-0000{i}-of-00002{ending}" for i in (1, 2)]
        places = {k: parts[i % 2] for i, k in enumerate(tensors)}
        for part in parts:
            write({k: v for k, v in tensors.items() if places[k] == part}, folder / part)
        (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def test_files_of_weights_are_chosen_as_transformers_chooses(tmp_path):
    """All sets of the four files, beside variants, files of other frameworks and foreign indexes."""
    for number in range(16):
        names = {name for bit, name in enumerate(WEIGHT_FILES) if number >> bit & 1}
        folder = tmp_path / f"{number}"
        folder.mkdir()
        write_weights(folder, 1.0, names)
        for other in (
            "tf_model.h5",
            "flax_model.msgpack",
            "a.index.json",
            "model.fp16.safetensors.index.json",
        ):
            (folder / other).write_bytes(b"{}")
        save_file({"a": torch.zeros(1)}, folder / "model.fp16.safetensors")
        if not names:
            with pytest.raises(UserError, match=r"no model.safetensors or pytorch_model.bin; .*model\.fp16"):
                read_folder(folder)
            continue
        peer = BertModel.from_pretrained(folder, add_pooling_layer=False).embeddings.word_embeddings.weight
        assert torch.equal(read_folder(folder)[0]["embeddings.word_embeddings.weight"], peer), names
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "transformers_weights": "model.fp16.safetensors"})
    )
    assert read_folder(folder)[0].keys() == {"a"}
    (folder / "model-00001-of-00002.safetensors").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    assert read_folder(folder)  # whole: no part is asked for
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="1 of the 2 files that it names are not there: model-00001-of-00002"):
        read_folder(folder)


def test_model_much_larger_than_its_weights_is_refused(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="of a model many times as large"), limit_model("c.json", tmp_path):
        torch.nn.Linear(1 << 22, 1 << 22)


def test_misfits_name_both_shapes(tmp_path):
    model = make_model()
    weights = dict(model.state_dict())
    name = "text_projection.weight"
    weights[name] = torch.ones(3, 5)
    with pytest.raises(UserError, match=rf"{name} is \(3, 5\), wanted \(8, 16\)"):
        load_state(model, weights, tmp_path / "m")
