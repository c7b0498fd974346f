"""Files of weights that are damaged, foreign or hostile: one line, and no memory for what is not there."""

import json
import random
from argparse import Namespace
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from raylib.errors import UserError
from raylib.models.hf_weights import read_folder
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
        ({"a": "t.safetensors"}, "no t.safetensors"),
    ):
        index.write_text(json.dumps({"weight_map": places}))
        with pytest.raises(UserError, match=words):
            read_folder(tmp_path)


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
