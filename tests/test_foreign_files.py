"""Files that are larger than memory, and names that are no UTF-8, at the level of commands."""

import os
import shutil

import pytest

from finetune.__main__ import main as finetune
from pretrain.__main__ import main as pretrain
from raylib.api.predict import main as predict
from raylib.data.images import BadImage, decode_image
from tests.fuzz.contract import find_in

NAME = os.fsdecode(b"caf\xe9")


def line_of(code, capsys):
    captured = capsys.readouterr()
    assert code == 2 and captured.err.count("\n") == 1 and captured.err.startswith("error: "), captured.err
    return captured.err


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_tokenizer_larger_than_memory_is_one_line(tmp_path, model, capsys, name):
    """Its library would read it whole; the file takes no room on the disk."""
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    (folder / "tokenizer.model").rename(folder / name)
    os.truncate(folder / name, 1 << 40)
    (tmp_path / "texts").write_text("a cat\n")
    code = predict([str(folder), "--texts", str(tmp_path / "texts")])
    assert "1,099,511,627,776 bytes, of which 268,435,456 may be" in line_of(code, capsys)


def test_image_larger_than_memory_is_one_line(tmp_path, model, retrieval_set, corpus, capsys):
    data = tmp_path / "data"
    shutil.copytree(retrieval_set, data)
    os.truncate(next(data.glob("*.png")), 1 << 40)
    for code in (
        pretrain(["evaluate", str(model), str(data)]),
        pretrain(["overlap", str(corpus), str(data)]),
    ):
        assert code == 2
    err = capsys.readouterr().err
    assert err.count("1,099,511,627,776 bytes, of which an image may have") == 2 and err.count("\n") == 2


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9, 40, 60, -20])
@pytest.mark.parametrize("cut", [True, False])
def test_damaged_png_is_one_line_and_none_of_libpng(retrieval_set, capfd, cut, place):
    data = bytearray(max(retrieval_set.glob("*.png"), key=lambda path: path.stat().st_size).read_bytes())
    at = int(place * len(data)) if isinstance(place, float) else place % len(data)
    data[at] ^= 0x10
    with pytest.raises(BadImage, match="cut off|damaged|pixels"):
        decode_image(bytes(data[:at] if cut else data), "x.png")
    assert capfd.readouterr() == ("", "")


def test_names_that_are_no_utf8_are_one_line(tmp_path, model, retrieval_set, corpus, scenes, capsys):
    data, texts = tmp_path / NAME, tmp_path / f"{NAME}.txt"
    shutil.copytree(retrieval_set, data)
    shutil.copytree(retrieval_set, tmp_path / "data")
    next((tmp_path / "data").glob("*.png")).rename(tmp_path / "data" / f"{NAME}.png")
    texts.write_text("a cat\n")
    own = ["runtime=local", f"runs={tmp_path}/runs"]
    for main, arguments in (
        (predict, [str(model), "--images", str(data)]),
        (predict, [str(model), "--images", f"{tmp_path}/data"]),
        (predict, [str(model), "--texts", str(texts)]),
        (predict, [str(model), "--images", f"{tmp_path}/data", "--out", f"{tmp_path}/{NAME}.jsonl"]),
        (pretrain, ["evaluate", str(model), str(data)]),
        (pretrain, ["overlap", str(corpus), f"{tmp_path}/data"]),
        (pretrain, ["tiny", f"corpus={data}", *own]),
        (finetune, ["scenes_xvnli", f"model={model}", f"data={data}", *own]),
        (finetune, ["scenes_xvnli", f"model={data}", f"data={scenes}", *own]),
        (finetune, ["--config", str(data)]),
    ):
        assert "not in UTF-8; rename it" in line_of(main(arguments), capsys)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "source",
    [
        "import json as j\ndef f(p):\n    j.loads(p)",
        "from json import loads\ndef f(p):\n    loads(p)",
        "from torch import load as get\ndef f(p):\n    get(p)",
        "import numpy\ndef f(p):\n    numpy.load(p)",
        "def f(p):\n    read = open\n    read(p)",
        "import json\ndef f(p):\n    return map(json.loads, p)",
        "def f(p):\n    from raylib.strict_json import parse_json as parse\n    return [*map(parse, p)]",
    ],
)
def test_contract_finds_what_opens_under_another_name(source):
    assert list(find_in(source, "m")) == ["m:f"]


def test_contract_leaves_what_opens_nothing():
    source = "import h5py\nclass A:\n    def f(self, p):\n        return self.open, isinstance(p, h5py.File)"
    assert find_in(source, "m") == {}
