"""Fine-tuning runs on region features, from Hugging Face folders, and interrupted from the keyboard."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from finetune.__main__ import main
from finetune.build import read_split
from finetune.recipes import RECIPES
from finetune.stores.images import open_visual
from raylib import checkpoint
from raylib.config import override
from raylib.monitoring import read_metrics
from raylib.sample import DATA
from tests.test_stores import b64, write_lmdb

QUICK = [
    "batch=16",
    "image_size=16",
    "epochs=1",
    'languages=["en","ru"]',
    "fit.bf16=false",
    "fit.loader_workers=0",
    "freeze=[]",
    "extra_tests={}",
    "shuffled_images=false",
]
WIDTH = 6  # of region features


@pytest.fixture
def finetune(tmp_path, model, scenes, capsys):
    """`finetune(recipe, *settings)` -> (result.json or None, what was printed)."""

    def run(recipe, *settings):
        own = [f"model={model}", f"data={scenes}", f"runs={tmp_path}", "name=run"]
        code = main([recipe, *own, *QUICK, *settings])
        captured = capsys.readouterr()
        assert code in (0, 2)
        result = json.loads((tmp_path / "run" / "result.json").read_text()) if code == 0 else None
        return result, captured.out + captured.err

    return run


def error(printed: str) -> str:
    """The one line of a mistake."""
    line = printed.strip().splitlines()[-1]
    assert line.startswith("error: ") and "Traceback" not in printed
    return line


def regions_of(scenes: Path, task: str, more=(), *settings: str) -> dict[str, dict]:
    """Made-up detections for every image of a task, two to five each, by id; `more`: of further splits."""
    config = override(RECIPES[f"scenes_{task}"](), [f"data={scenes}", *settings])
    places = [("train", "en"), ("dev", "en"), ("test", "en"), ("test", "ru"), *more]
    names = sorted(
        {image for place in places for example in read_split(config, *place) for image in example.images}
    )
    made = {}
    for i, name in enumerate(names):
        draw, count = np.random.default_rng(i), 2 + i % 4
        corners = draw.uniform(0, 30, (count, 2))
        made[name] = {
            "features": draw.normal(size=(count, WIDTH)).astype(np.float32),
            "img_h": 64,
            "img_w": 64,
            "boxes": np.concatenate([corners, corners + 20], 1).astype(np.float32),
        }
    return made


def write_regions(folder: Path, kind: str, records: dict[str, dict]) -> Path:
    if kind == "lmdb":
        encoded = {
            name: {**r, "features": b64(r["features"]), "boxes": b64(r["boxes"])}
            for name, r in records.items()
        }
        return write_lmdb(
            folder / "regions", {name: pickle.dumps(record) for name, record in encoded.items()}
        )
    if kind == "h5":
        import h5py

        with h5py.File(folder / "regions.h5", "w") as file:
            for name, record in records.items():
                file.create_group(name).update(record)
        return folder / "regions.h5"
    (folder / "regions").mkdir()
    for name, record in records.items():
        np.savez(folder / "regions" / f"{name}.npz", **record)
    return folder / "regions"


@pytest.mark.parametrize(("task", "kind"), [("xgqa", "lmdb"), ("xvnli", "h5"), ("marvl", "npz")])
def test_finetune_on_region_features_runs_end_to_end(finetune, tmp_path, scenes, task, kind):
    path = write_regions(tmp_path, kind, {Path(name).name: r for name, r in regions_of(scenes, task).items()})
    found, printed = finetune(
        f"scenes_{task}", f"regions={path}", "epochs=2", "images=/nowhere", "fit.loader_workers=1"
    )
    assert found, printed
    assert set(found["accuracy"]) == {"en", "ru"} and all(
        c["predictions"] == c["n"] > 0 for c in found["counts"].values()
    )
    weights = load_file(checkpoint.find_best(tmp_path / "run") / "model.safetensors")
    assert weights["regions.feature.weight"].shape[1] == WIDTH
    before = found["accuracy"]
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["accuracy"] == before


def test_region_features_reach_the_model_unchanged(tmp_path, scenes):
    records = regions_of(scenes, "xvnli")
    config = override(RECIPES["scenes_xvnli"](), [f"regions={write_regions(tmp_path, 'npz', records)}"])
    names = list(records)[:3]
    read = open_visual(config, 0).read(names)["regions"]
    assert read.lengths.tolist() == [len(records[name]["boxes"]) for name in names]
    assert np.allclose(read.values[:, :WIDTH], np.concatenate([records[name]["features"] for name in names]))
    assert np.allclose(
        read.values[:, WIDTH:][:, :4] * 64,
        np.concatenate([records[name]["boxes"] for name in names]),
        atol=1e-4,
    )


@pytest.mark.parametrize("split", ["train", "test"])
def test_finetune_image_without_regions_is_named(finetune, tmp_path, scenes, split):
    records = regions_of(scenes, "xvnli")
    config = override(RECIPES["scenes_xvnli"](), [f"data={scenes}"])
    gone = list(read_split(config, split, "en"))[-1].images[0]
    del records[gone]
    path = write_regions(tmp_path, "lmdb", records)
    found, printed = finetune("scenes_xvnli", f"regions={path}", "fit.loader_workers=1")
    assert found is None and f"have no regions in {path}: '{gone}' (bad_limit=0.01" in error(printed)


def test_retrieval_on_regions_is_refused(finetune, tmp_path, scenes):
    _, printed = finetune(
        "scenes_xflickrco", f"regions={write_regions(tmp_path, 'npz', regions_of(scenes, 'xvnli'))}"
    )
    assert "retrieval wants images" in error(printed)


def text_folder(folder: Path, kind: str) -> Path:
    """A tiny XLM-R or BERT in Hugging Face format, four layers, with the sample's tokenizer."""
    from transformers import BertConfig, BertForMaskedLM, XLMRobertaConfig, XLMRobertaForMaskedLM

    config, peer = (
        (XLMRobertaConfig, XLMRobertaForMaskedLM) if kind == "xlmr" else (BertConfig, BertForMaskedLM)
    )
    sizes = dict(
        vocab_size=12000, hidden_size=16, num_attention_heads=2, intermediate_size=24, num_hidden_layers=4
    )
    peer(config(**sizes, max_position_embeddings=66)).save_pretrained(folder)
    shutil.copy2(DATA / "tokenizer.model", folder)
    return folder


def vision_folder(folder: Path, layers: int = 2, patch: int = 16) -> Path:
    """A tiny ViT in Hugging Face format."""
    from transformers import ViTConfig, ViTModel

    sizes = dict(hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=24)
    ViTModel(ViTConfig(**sizes, image_size=32, patch_size=patch)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "task", "layers", "patch"), [("xlmr", "xvnli", 2, 16), ("bert", "xflickrco", 5, 8)]
)
def test_finetune_from_hugging_face_folders(finetune, tmp_path, kind, task, layers, patch):
    text, vision = text_folder(tmp_path / "text", kind), vision_folder(tmp_path / "vision", layers, patch)
    found, printed = finetune(
        f"scenes_{task}", f"model={text}", f"vision={vision}", "image_size=32", 'freeze=["vision"]'
    )
    assert found, printed
    assert set(found.get("accuracy") or found["retrieval"]) == {"en", "ru"}
    ours, peer_weights = (
        load_file(checkpoint.find_best(tmp_path / "run") / "model.safetensors"),
        load_file(vision / "model.safetensors"),
    )
    kernels = [value for name, value in ours.items() if name.endswith("vision.patch_embedding.bias")]
    assert kernels[0].equal(
        peer_weights["embeddings.patch_embeddings.projection.bias"]
    )  # frozen: as it was read
    assert main(["evaluate", str(tmp_path / "run")]) == 0


def test_hugging_face_folder_without_vision_gets_new_image_encoder(finetune, tmp_path):
    found, printed = finetune("scenes_xvnli", f"model={text_folder(tmp_path / 'text', 'xlmr')}")
    assert found, printed


@pytest.mark.parametrize("which", ["text", "vision"])
def test_hugging_face_unmatched_key_is_named(finetune, tmp_path, which):
    folders = {"text": text_folder(tmp_path / "text", "xlmr"), "vision": vision_folder(tmp_path / "vision")}
    file = folders[which] / "model.safetensors"
    weights = load_file(file)
    name = next(n for n in weights if n.endswith("layer.1.output.dense.bias"))
    weights["encoder.adapter.weight"] = weights.pop(name)
    save_file(weights, file, {"format": "pt"})
    _, printed = finetune(
        "scenes_xvnli", f"model={folders['text']}", f"vision={folders['vision']}", "image_size=32"
    )
    line = error(printed)
    assert str(folders[which]) in line and "unused encoder.adapter.weight" in line
    assert f"missing {name.removeprefix('roberta.')}" in line


def test_hugging_face_folder_without_encoder_is_named(finetune, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text('{"model_type": "clip"}')
    shutil.copy2(DATA / "tokenizer.model", tmp_path / "text")
    _, printed = finetune("scenes_xvnli", f"model={tmp_path / 'text'}")
    assert "text: model_type 'clip' is none of bert," in error(printed) and "backbone=FILE.py" in printed


@pytest.mark.parametrize(("task", "shots"), [("xgqa", 5), ("marvl", 4), ("xflickrco", 5)])
def test_finetune_settings_that_go_on_from_english(finetune, tmp_path, task, shots):
    """As test_finetune_run has it for XVNLI; and evaluated once more, each language by its own model."""
    found, printed = finetune(f"scenes_{task}")
    assert found, printed
    (tmp_path / "run").rename(tmp_path / "english")
    for setting, more in (
        ("translate_test", ()),
        ("few_shot", (f"shots={shots}", "batch=4", 'languages=["de","ru"]')),
    ):
        found, printed = finetune(
            f"scenes_{task}", f"model={tmp_path / 'english'}", f"setting={setting}", *more
        )
        assert found, printed
        before = found.get("accuracy") or found["retrieval"]
        assert set(before) == ({"de", "ru"} if more else {"en", "ru"}) and (found["steps"] > 0) == bool(more)
        assert main(["evaluate", str(tmp_path / "run")]) == 0
        again = json.loads((tmp_path / "run" / "result.json").read_text())
        assert (again.get("accuracy") or again["retrieval"]) == before and again["steps"] == found["steps"]
        shutil.rmtree(tmp_path / "run")


def _listen() -> None:
    """Ctrl-C counts, even if these tests run in the background of a shell, where it is ignored and inherited
    so."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_finetune_interrupt_is_one_line_and_same_command_resumes(tmp_path, model, scenes):
    """Ctrl-C reaches every process of the terminal's group, loaders too."""
    settings = [
        f"model={model}",
        f"data={scenes}",
        f"runs={tmp_path}",
        "name=run",
        *QUICK,
        "epochs=8",
        "fit.log_every=1",
    ]
    command = [sys.executable, "-m", "finetune", "scenes_xvnli", *settings, "fit.loader_workers=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    begun = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        preexec_fn=_listen,
    )
    deadline = time.monotonic() + 120
    while not (begun.poll() is not None or checkpoint.find_newest(tmp_path / "run")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(begun.pid, signal.SIGINT)
    printed, complaint = begun.communicate(timeout=60)
    assert begun.returncode == 130, complaint
    line = r"stopped by Ctrl-C at step \d+ of 24; saved; the same command goes on from there"
    assert re.fullmatch(line, complaint.strip().splitlines()[-1]), complaint
    assert "Traceback" not in printed + complaint and not (tmp_path / "run" / "result.json").exists()
    with pytest.raises(ProcessLookupError):
        os.killpg(begun.pid, 0)  # nothing of it is left
    reached = checkpoint.read_meta(checkpoint.find_newest(tmp_path / "run"))["step"]
    again = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert again.returncode == 0, again.stderr[-2000:]
    assert (tmp_path / "run" / "result.json").is_file() and 0 < reached < 24
    assert [r["step"] for r in read_metrics(tmp_path / "run") if "loss/task" in r] == list(range(1, 25))
