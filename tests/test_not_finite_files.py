"""Every reader of weights, states, features and vectors names file and tensor of what is not finite."""

import json
import math
import pickle
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from finetune.formats import Example
from finetune.formats.answers import read_cvil, read_gqa
from finetune.stores.regions import open_regions
from finetune.strategies.distillation.teacher import StoredStates, store_states
from finetune.strategies.lexical import read_vectors
from finetune.strategies.prior import vector_distances
from finetune.strategies.pruning import prune_mask
from raylib.api.export import export_model
from raylib.cache import EncoderStates, write_encoder_states
from raylib.errors import NotFinite, UserError
from raylib.models import peft
from raylib.models.dual_encoder import Clip, MClip
from raylib.models.finetuned import FinetuneModel, load_backbone
from raylib.models.hf_weights import load_text, load_vision
from raylib.models.unified import UnifiedModel
from raylib.packed import Ragged
from raylib.sample import DATA
from raylib.weights import read_tensors
from tests import published, test_cclm_load, test_load, test_mclip, test_oscar, test_stores
from tests.factories import SMALL, make_model
from tests.test_single_stream import FORMATS
from tests.workers import run_workers

folders = test_mclip.folders  # a fixture
NAN, INF = math.nan, math.inf


def poison(path, name, value=NAN):
    """Set one element of a tensor in a file of weights."""
    safe = path.suffix == ".safetensors"
    weights = load_file(path) if safe else torch.load(path, weights_only=True)
    inner = weights.get("model", weights)
    inner[name] = inner[name].clone()
    inner[name].view(-1)[-1] = value
    (save_file if safe else torch.save)(weights, path)


def refuses(read, *words):
    """`read()` is an error of one line with `words` in it."""
    with pytest.raises(UserError) as error:
        read()
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), str(error.value)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_non_finite_unified_model_folder_names_the_tensor(tmp_path, value):
    make_model().float().save(tmp_path)
    poison(tmp_path / "model.safetensors", "fusion.blocks.1.output.weight", value)
    named = (f"{tmp_path}/model.safetensors", "tensor fusion.blocks.1.output.weight is not finite")
    refuses(lambda: UnifiedModel.from_pretrained(tmp_path), *named)
    refuses(lambda: load_backbone(tmp_path), *named)


def test_non_finite_finetune_model_names_the_tensor(tmp_path):
    FinetuneModel(make_model().float(), ("no", "yes"), 1, 0.0).save(tmp_path)
    poison(tmp_path / "model.safetensors", "head.output.bias")
    refuses(
        lambda: FinetuneModel.from_pretrained(tmp_path),
        "model.safetensors",
        "tensor head.output.bias is not finite",
    )


def test_non_finite_model_is_not_exported(tmp_path):
    make_model(vocabulary=12000).float().save(tmp_path / "model")
    shutil.copy2(DATA / "tokenizer.model", tmp_path / "model")
    export_model(tmp_path / "model", tmp_path / "good")
    poison(tmp_path / "model" / "model.safetensors", "temperature")
    refuses(
        lambda: export_model(tmp_path / "model", tmp_path / "bad"),
        "model/model.safetensors: tensor temperature is not finite",
    )
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "shards"])
def test_non_finite_hugging_face_text_folder_names_the_tensor(tmp_path, file):
    peer = test_load.peer_text("bert", 4, 16)
    peer.save_pretrained(tmp_path, **({"max_shard_size": "20KB"} if file == "shards" else {}))
    name = "bert.encoder.layer.2.attention.self.key.weight"
    where = tmp_path / file
    if file == "pytorch_model.bin":
        torch.save(load_file(tmp_path / "model.safetensors"), where)
        (tmp_path / "model.safetensors").unlink()
    elif file == "shards":
        where = (
            tmp_path / json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"][name]
        )
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
    poison(where, name)
    refuses(lambda: load_text(UnifiedModel(SMALL), tmp_path), str(where), f"tensor {name} is not finite")
    refuses(lambda: load_backbone(tmp_path, "oscar"), str(where), name)
    refuses(lambda: load_backbone(tmp_path, "uc2"), str(where), name)


def test_non_finite_vision_folder_names_the_tensor(tmp_path):
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=16,
        patch_size=8,
    )
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    poison(tmp_path / "vit" / "model.safetensors", "layernorm.bias")
    refuses(
        lambda: load_vision(UnifiedModel(SMALL), tmp_path / "vit"), "vit/model.safetensors", "layernorm.bias"
    )
    swin = test_cclm_load.wide_swin()
    swin.save_pretrained(tmp_path / "swin")
    name = next(iter(load_file(tmp_path / "swin" / "model.safetensors")))
    poison(tmp_path / "swin" / "model.safetensors", name)
    test_cclm_load.text_folder(tmp_path / "text", 12)
    refuses(
        lambda: load_backbone(tmp_path / "text", "cclm_swin", str(tmp_path / "swin")),
        str(tmp_path / "swin"),
        name,
    )


@pytest.mark.parametrize("form", FORMATS)
def test_non_finite_single_stream_file_names_the_tensor(tmp_path, form):
    layout, save, _ = FORMATS[form]
    path = published.write(tmp_path, save(published.make_parts(layout)))
    name = list(torch.load(path, weights_only=True).get("model", torch.load(path, weights_only=True)))[5]
    poison(path, name)
    refuses(lambda: load_backbone(path, layout), f"{path}: tensor {name} is not finite")


def test_non_finite_oscar_folder_names_the_tensor(tmp_path):
    test_oscar.write(tmp_path, {k: v.float() for k, v in test_oscar.make_weights().items()})
    poison(tmp_path / "pytorch_model.bin", "bert.img_embedding.weight", INF)
    refuses(
        lambda: load_backbone(tmp_path, "oscar"),
        "pytorch_model.bin: tensor bert.img_embedding.weight is not finite",
    )


def test_non_finite_cclm_file_names_the_tensor(tmp_path):
    test_cclm_load.cclm_file(tmp_path / "cclm.th", test_cclm_load.wide_swin())
    poison(tmp_path / "cclm.th", "vision_proj.weight")
    refuses(
        lambda: load_backbone(tmp_path / "cclm.th", "cclm_swin"),
        "cclm.th: tensor vision_proj.weight is not finite",
    )


@pytest.mark.parametrize(
    ("part", "file", "name"),
    [
        ("clip", "model.safetensors", "visual_projection.weight"),
        ("text", "pytorch_model.bin", "LinearTransformation.bias"),
    ],
)
def test_non_finite_clip_and_mclip_folders_name_the_tensor(folders, tmp_path, part, file, name):
    for kind, source in zip(("text", "clip"), folders, strict=False):
        shutil.copytree(source, tmp_path / kind)
    poison(tmp_path / part / file, name)
    words = (f"{part}/{file}", f"tensor {name} is not finite")
    refuses(lambda: MClip.import_weights(tmp_path / "text", tmp_path / "clip"), *words)
    if part == "clip":
        refuses(lambda: Clip.import_weights(tmp_path / "clip", None), *words)


def test_non_finite_tuned_weights_name_the_tensor(tmp_path):
    model = make_model().float()
    peft.insert(model, "adapter", {"bottleneck": 4})
    names = [name for name, _ in model.named_parameters() if peft.is_inserted(name)]
    peft.save_tuned(model, names, tmp_path / "tuned.safetensors")
    peft.load_tuned(model, tmp_path / "tuned.safetensors")
    from safetensors import safe_open

    with safe_open(tmp_path / "tuned.safetensors", "pt") as file:
        described = file.metadata()
    weights = load_file(tmp_path / "tuned.safetensors")
    weights[names[0]].view(-1)[0] = NAN
    save_file(weights, tmp_path / "tuned.safetensors", described)
    refuses(
        lambda: peft.load_tuned(model, tmp_path / "tuned.safetensors"),
        "tuned.safetensors",
        f"tensor {names[0]} is not finite",
    )


def test_non_finite_weights_give_no_pruning_mask():
    with pytest.raises(NotFinite, match="weights of b: not finite"):
        prune_mask({"a": torch.ones(3), "b": torch.tensor([1.0, NAN])}, None, 0.5)


# ---- features of regions


@pytest.mark.parametrize("kind", ["lmdb", "h5", "flat.h5", "tsv", "npz", "npy"])
@pytest.mark.parametrize("what", ["features", "boxes"])
def test_non_finite_region_features_name_the_image(tmp_path, monkeypatch, kind, what):
    bad = test_stores.FEATURES.copy() if what == "features" else test_stores.BOXES.copy()
    bad[1, 1] = NAN
    monkeypatch.setattr(test_stores, what.upper(), bad)
    path = test_stores.write_store(kind, tmp_path)
    refuses(lambda: open_regions(path).read("8"), f"{path}, 8: {what} not finite")


def test_non_finite_boxes_of_flat_h5_name_the_image(tmp_path):
    wh = np.array([[40, 20], [NAN, 20]])
    refuses(
        lambda: open_regions(test_stores.write_flat_h5(tmp_path / "f.h5", wh=wh)).read("8.jpg"),
        "f.h5, 8: img_w not finite",
    )


@pytest.mark.parametrize(
    ("size", "words"), [(NAN, "img_h not finite"), (0, "img_h 0, img_w 40: an image has a size")]
)
def test_region_boxes_of_image_without_size_are_refused(tmp_path, size, words):
    store = open_regions(
        test_stores.write_lmdb(tmp_path / "l", {"7": pickle.dumps(test_stores.record(img_h=size))})
    )
    refuses(lambda: store.read("7"), f"{tmp_path}/l, 7: {words}")


def test_non_finite_oscar_region_features_name_the_image(tmp_path):
    rows = np.ones((2, 9), np.float32)
    rows[0, 2] = INF
    line = f"42\t2\t{test_stores.b64(rows).decode()}\n"
    (tmp_path / "r.tsv").write_text(line)
    refuses(lambda: open_regions(tmp_path / "r.tsv").read("42"), f"{tmp_path}/r.tsv, 42: features not finite")


# ---- states on disk


def states_of(bad, value):
    """An encoder of two tokens an item, one of them not finite for the item `bad`."""

    def encode(names):
        values = torch.ones(2 * len(names), 3)
        if bad in names:
            values[2 * list(names).index(bad) + 1, 2] = value
        return Ragged(values, torch.full((len(names),), 2))

    return encode


@pytest.mark.parametrize(("dtype", "value"), [(torch.float32, NAN), (torch.float16, 1e6)])
def test_non_finite_states_are_not_cached(tmp_path, dtype, value):
    """1e6 is finite, but not in float16, in which states of bf16 are kept."""
    with pytest.raises(NotFinite, match="states of c: not finite"):
        write_encoder_states(tmp_path / "s", ["a", "b", "c"], list, states_of("c", value), 2, dtype)
    assert not (tmp_path / "s").exists()


def on_states(rank, world, folder):
    """Return what each worker hears, of which one alone has the item that is not finite."""
    try:
        write_encoder_states(folder, ["a", "b", "c", "d"], list, states_of("d", NAN), 2)
    except NotFinite as e:
        return str(e)
    return None


def test_non_finite_states_on_one_worker_stop_all_workers(tmp_path):
    heard = run_workers(on_states, 2, tmp_path / "s")
    assert (
        heard == ["states of d: not finite (NaN or infinite) in float32"] * 2
        and not (tmp_path / "s").exists()
    )


def test_non_finite_cached_states_name_file_and_item(tmp_path):
    write_encoder_states(tmp_path / "s", ["a", "b", "c"], list, states_of(None, NAN), 2)
    values = np.memmap(tmp_path / "s" / "states-0.bin", np.float32, "r+", shape=(6, 3))
    values[3, 1] = NAN
    values.flush()
    assert len(EncoderStates(tmp_path / "s").read(["a", "c"]).values) == 4
    refuses(
        lambda: EncoderStates(tmp_path / "s").read(["a", "b"]), "s/states-0.bin: states of b are not finite"
    )


def teach(bad):
    def states(chunk):
        values = torch.ones(2, len(chunk), 4)
        for i, example in enumerate(chunk):
            values[1, i, 0] = NAN if example.id == bad else 1
        return values, [1] * len(chunk)

    return states


def test_non_finite_teacher_states_name_file_and_example(tmp_path):
    examples = [Example(str(i), ("a",), ("b",), {}) for i in range(4)]
    with pytest.raises(NotFinite, match="the teacher's states of 2: not finite"):
        store_states(tmp_path / "bad", examples, teach("2"), 3)
    assert not (tmp_path / "bad").exists()
    store_states(tmp_path / "s", examples, teach(None), 3)
    poison(tmp_path / "s" / "states-0-0.safetensors", "states")
    assert StoredStates(tmp_path / "s").read(["0", "1"]).shape == (2, 2, 4)
    refuses(
        lambda: StoredStates(tmp_path / "s").read(["1", "3"]),
        "states-0-0.safetensors: the teacher's states of 3 are not finite",
    )


# ---- scores of answers


@pytest.mark.parametrize("score", ["NaN", "Infinity", '"1.0"', "true"])
def test_non_finite_answer_scores_name_the_item(tmp_path, score):
    """Python reads NaN, a stream of JSON refuses it; `min(1.0, nan)` is 1.0, and so a right answer."""
    lxmert = tmp_path / "valid.json"
    lxmert.write_text(
        f'[{{"question_id": 1, "sent": "q", "img_id": "7", "label": {{"yes": 1.0, "no": {score}}}}}]'
    )
    words = (
        ("broken JSON",)
        if score in ("NaN", "Infinity")
        else (", item 0: the score", "wanted a finite number")
    )
    refuses(lambda: list(read_gqa(lxmert)), str(lxmert), *words)
    (tmp_path / "answers.json").write_text('["yes", "no"]')
    cvil = tmp_path / "val.jsonl"
    cvil.write_text(f'{{"en": "q", "an": [0, 1], "s": [1.0, {score}], "img_id": 7, "q_id": 1}}\n')
    refuses(lambda: list(read_cvil(cvil, "en", "answers.json")), f"{cvil}:1: the score")


# ---- words


@pytest.mark.parametrize("word", ["nan", "inf", "1e60"])  # the last is finite in text, not in float32
def test_non_finite_word_vectors_name_the_word(tmp_path, word):
    path = tmp_path / "v.txt"
    path.write_text(f"the 1 2 3\ndog 1 {word} 3\ncat 1 1 1\n")
    assert set(read_vectors(path, ["the", "cat"])) == {"the", "cat"}
    refuses(lambda: read_vectors(path, ["the", "dog"]), f"{path}: the vector of 'dog' is not finite")
    row = (
        np.array([1, float(word), 3]).astype("<f4", casting="unsafe")
        if word != "1e60"
        else np.array([1, INF, 3], "<f4")
    )
    (tmp_path / "v.bin").write_bytes(b"1 3\ndog " + row.tobytes())
    refuses(lambda: read_vectors(tmp_path / "v.bin", ["dog"]), "v.bin: the vector of 'dog' is not finite")
    np.save(tmp_path / "w.npy", row[None])
    (tmp_path / "w.txt").write_text("dog\n")
    refuses(lambda: read_vectors(tmp_path / "w.npy", ["dog"]), "w.npy: the vector of 'dog' is not finite")


def test_non_finite_cached_distances_name_the_file(tmp_path):
    (tmp_path / "v.txt").write_text("dog 1 2 3\ncat 1 1 1\n")
    vector_distances(["dog", "cat"], tmp_path / "v.txt", tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    from safetensors import safe_open

    with safe_open(file, "pt") as stored:
        known = stored.metadata()
    save_file({"distance": torch.tensor([[0.0, NAN], [NAN, 0.0]])}, file, known)
    refuses(
        lambda: vector_distances(["dog", "cat"], tmp_path / "v.txt", tmp_path / "cache"),
        str(file),
        "tensor distance is not",
    )


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("content", [b"", b"garbage " * 9, "cut off"])
def test_damaged_weights_are_one_line_that_names_the_file(tmp_path, name, content):
    path = tmp_path / name
    save = save_file if name == "model.safetensors" else torch.save
    save({"weight": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:200] if content == "cut off" else content)
    with pytest.raises(UserError, match=rf"{name}: not to be read as weights \(.*\); (take|restore)"):
        read_tensors(path)
