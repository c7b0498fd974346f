"""`import polyglance`: what a loaded model computes is what evaluation computed, of real stored runs."""

import io
import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import raylib.api as polyglance
from finetune.stores.images import open_images
from pretrain.embeddings import image_vectors, sentence_vectors
from pretrain.evaluate import ZeroShotRetrieval
from raylib.data.images import load_image
from raylib.errors import UserError
from raylib.models.unified import UnifiedModel
from raylib.text import Tokenizer

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def export(stored):
    return polyglance.load(stored / "model", "cpu")


@pytest.fixture(scope="module")
def images(retrieval_set):
    return sorted(retrieval_set.glob("*.png"))[:7]


def test_vectors_equal_those_of_zero_shot_evaluation(export, stored, retrieval_set):
    model = UnifiedModel.from_pretrained(stored / "model").eval()
    tokenizer = Tokenizer.load(stored / "model")
    retrieval = ZeroShotRetrieval(retrieval_set, tokenizer, model.config.image_size, model.config.positions)
    records = json.loads((retrieval_set / "captions.json").read_text(encoding="utf-8"))
    with torch.inference_mode():
        expected_images = image_vectors(model, retrieval.images, False)
        expected_texts = sentence_vectors(model, retrieval.ids["zh"], False)
    paths = (retrieval_set / record["image"] for record in records)  # a generator
    np.testing.assert_allclose(export.encode_image(paths, batch_size=3), expected_images, atol=1e-6)
    texts = [record["captions"]["zh"] for record in records]
    np.testing.assert_allclose(export.encode_text(texts), expected_texts, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_batch_size_changes_no_result(export, images, batch_size):
    texts = [f"a drawing {'of it ' * n}" for n in range(7)]
    for found, expected in (
        (export.encode_image(images, batch_size=batch_size), export.encode_image(images)),
        (export.encode_text(texts, batch_size=batch_size), export.encode_text(texts)),
    ):
        np.testing.assert_allclose(found, expected, atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    ranked = export.rerank(images[0], texts, batch_size=batch_size)
    assert [match.position for match in ranked] == [m.position for m in export.rerank(images[0], texts)]
    assert [texts[match.position] for match in ranked] == [match.text for match in ranked]


def test_image_is_the_same_however_it_is_given(export, images):
    path, data = images[0], images[0].read_bytes()
    expected = export.encode_image([path])[0]
    stream = io.BytesIO(data)
    for given in (path, str(path), data, stream, Image.open(path), load_image(path), f"file://{path}"):
        assert np.array_equal(export.encode_image(given), expected), type(given)


def test_pil_image_is_turned_as_its_file_would_be(export):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    stream, exif = io.BytesIO(), Image.Exif()
    exif[0x112] = 6  # a quarter turn
    Image.fromarray(pixels).save(stream, "JPEG", exif=exif, quality=95)
    turned = export.encode_image([stream.getvalue(), Image.open(stream), Image.fromarray(pixels)])
    assert turned[0] @ turned[1] > 0.99999 and turned[0] @ turned[2] < turned[0] @ turned[1]


def test_similarity_takes_inputs_and_vectors(export, images):
    texts = ["ein Hund", "一只狗"]
    found = export.similarity(images, texts)
    assert found.shape == (7, 2)
    vectors = export.encode_image(images, as_tensor=True), export.encode_text(texts)
    assert isinstance(vectors[0], torch.Tensor)
    np.testing.assert_allclose(export.similarity(*vectors), found, atol=1e-6)
    assert export.similarity(images[0], "ein Hund").shape == (1, 1)
    assert export.encode_image([]).shape == (0, vectors[0].shape[1])


def predictions(stored, run, language):
    lines = (stored / "runs" / run / "predictions" / f"{language}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in lines.splitlines()]


@pytest.mark.parametrize(("run", "part", "language"), [("classified", None, "en"), ("classified", None, "ru"),
                                                        ("few_shot", "ru", "ru")])  # fmt: skip
def test_classes_equal_stored_predictions(stored, run, part, language):
    from finetune.formats.answers import read_xvnli

    model, scenes = polyglance.load(stored / "runs" / run, "cpu", language=part), stored / "scenes"
    lines = predictions(stored, f"{run}/{part}" if part else run, language)
    examples = {e.id: e for e in read_xvnli(scenes / f"XVNLI/annotations/{language}/test.jsonl")}
    store = open_images(scenes / "images.tar")
    pixels = [store.read(line["images"][0]) for line in lines]
    texts = [examples[line["id"]].texts[-1] for line in lines]
    relations = model.entails(pixels, None, texts, batch_size=7)
    assert [max(found, key=found.get) for found in relations] == [line["prediction"] for line in lines]
    assert all(sum(found.values()) == pytest.approx(1) for found in relations)
    one = model.classify(texts[0], pixels[0], top=1)
    assert one[0].text == lines[0]["prediction"]
    assert one[0].probability == pytest.approx(relations[0][one[0].text], abs=1e-6)


@pytest.mark.parametrize("name", ["xgqa", "decoder", "marvl"])
def test_answers_equal_those_of_evaluation(library, tmp_path, name):
    from finetune.formats import Example
    from finetune.predict import predict, read_predictions
    from finetune.stores.images import ImageSource

    model = polyglance.load(library / "runs" / f"sample_{name}", "cpu")
    store = open_images(library / "images")
    names = sorted(path.stem for path in (library / "images").iterdir())
    pairs = [tuple(names[i : i + model.network.num_images]) for i in range(5)]
    texts = [f"was ist {'das ' * (i % 3)}{i}" for i in range(5)]
    examples = [Example(str(i), (text,), pairs[i], {}) for i, text in enumerate(texts)]
    source = ImageSource(store, model.backbone.image_size)
    predict(model.network, examples, source, model.tokenizer, model.length, tmp_path / "out.jsonl")
    expected = [line["prediction"] for line in read_predictions(tmp_path / "out.jsonl")]
    given = [tuple(map(store.read, pair)) if len(pair) > 1 else store.read(*pair) for pair in pairs]
    found = model.answer(given, texts, top=len(model.labels), batch_size=2)
    assert [answers[0].text for answers in found] == expected
    again = model.answer(given, texts, top=len(model.labels))
    for answers, others in zip(found, again, strict=True):
        assert {a.text: a.probability for a in answers} == pytest.approx(
            {a.text: a.probability for a in others}, abs=1e-6
        )
        assert sorted((a.probability for a in answers), reverse=True) == [a.probability for a in answers]
    if name != "decoder":
        assert all(sum(a.probability for a in answers) == pytest.approx(1) for answers in found)
    assert model.answer(given[0], texts[:2]) == model.answer([given[0]] * 2, texts[:2])


def test_two_images_are_asked_for(library):
    model = polyglance.load(library / "runs/sample_marvl", "cpu")
    with pytest.raises(UserError, match=r"reads a text with 2 images: give them as \(left, right\)"):
        model.answer([library / "cat.png"], ["a cat"])
    pair = str(library / "cat.png"), str(library / "dog.png")
    for given in (pair[0], list(pair), (*pair, pair[0])):
        with pytest.raises(UserError, match="reads a text with 2 images"):
            model.answer(given, "a cat")
    with pytest.raises(UserError, match="2 texts and 1 pairs of images"):
        model.answer([pair], ["a cat", "a dog"])
    assert model.answer([list(pair)], ["a cat"]) == [model.answer(pair, "a cat")]


def test_question_without_an_image_is_refused(library):
    model = polyglance.load(library / "runs/sample_xgqa", "cpu")
    with pytest.raises(UserError, match="reads a text about an image or a premise: give one of them"):
        model.answer(None, "what is it?")


def test_region_models_say_what_they_read(tmp_path, model):
    from raylib.models import BACKBONES
    from raylib.models.finetuned import FinetuneModel

    torch.manual_seed(0)
    uc2 = BACKBONES["uc2"](BACKBONES["uc2"].sizes["tiny"])
    uc2.set_region_dim(6)
    FinetuneModel(uc2, ("yes", "no"), 1, 0.1, regions=6).save(tmp_path / "uc2")
    (tmp_path / "uc2" / "tokenizer.model").write_bytes((model / "tokenizer.model").read_bytes())
    loaded = polyglance.load(tmp_path / "uc2", "cpu")
    with pytest.raises(UserError, match="uc2 reads region features of a detector, not images"):
        loaded.answer("cat.png", "is it a cat?")
    regions = {"features": np.ones((3, 6)), "boxes": np.ones((3, 4)), "img_h": 8, "img_w": 8}
    answers = loaded.answer(regions, "is it a cat?")
    assert {answer.text for answer in answers} == {"yes", "no"}
    with pytest.raises(UserError, match="regions of 6 features each, and these have 5"):
        loaded.answer({**regions, "features": np.ones((3, 5))}, "is it a cat?")


def test_vectors_and_rerank_equal_those_of_fine_tuned_evaluation(model, scenes, tmp_path):
    from finetune.stores.images import ImageSource
    from finetune.tasks.datasets import TASKS
    from finetune.tasks.ranking import _Ranker
    from raylib.cache import precompute_features

    split = TASKS["xflickrco"].path(scenes, "test", "ru", 5)
    items = list(TASKS["xflickrco"].read(split, "test", "ru"))[:9]
    loaded, store = polyglance.load(model, "cpu"), open_images(scenes / "images.tar")
    source = ImageSource(store, loaded.backbone.image_size)
    names = [item.image for item in items]
    states = precompute_features(loaded.network, source, names, tmp_path / "images")
    arguments = (loaded.network, items, states, loaded.tokenizer, loaded.length, tmp_path, False, True)
    ranker = _Ranker(*arguments)
    pixels = [store.read(item.image) for item in items]
    texts = [caption for item in items for caption in item.captions]
    np.testing.assert_allclose(loaded.encode_image(pixels), ranker.image_vectors, atol=1e-6)
    np.testing.assert_allclose(loaded.encode_text(texts), ranker.text_vectors, atol=1e-6)
    every = torch.cartesian_prod(torch.arange(len(items)), torch.arange(len(texts)))
    expected = ranker.match(*every.unbind(1)).view(len(items), -1)
    for image, row in zip(pixels, expected, strict=True):
        found = loaded.rerank(image, texts, batch_size=4)
        assert [match.position for match in found] == row.argsort(descending=True, stable=True).tolist()
        np.testing.assert_allclose([match.score for match in found], row.sort(descending=True)[0], atol=1e-5)


@pytest.mark.parametrize(
    "strategies",
    [
        ("strategies.lora.rank=2", "strategies.soft_prompt.tokens=3", 'strategies.soft_prompt.words=""'),
        ('strategies.hard_prompt.words="a photo of"',),
    ],
    ids=["small modules", "words"],
)
def test_prompts_and_small_modules_of_a_run_are_loaded(finetune, tmp_path, scenes, strategies):
    from finetune.formats.answers import read_xvnli

    limits = ("epochs=1", "train_limit=16", "test_limit=12", "languages=ru", "name=tuned")
    code, printed = finetune("scenes_xvnli", *limits, *strategies)
    assert code == 0, printed
    model = polyglance.load(tmp_path / "tuned", "cpu")
    examples = list(read_xvnli(scenes / "XVNLI/annotations/ru/test.jsonl"))[:12]
    store = open_images(scenes / "images.tar")
    found = model.classify(
        [e.texts[-1] for e in examples], [store.read(e.images[0]) for e in examples], top=3
    )
    lines = (tmp_path / "tuned/predictions/ru.jsonl").read_text(encoding="utf-8").splitlines()
    assert [answers[0].text for answers in found] == [json.loads(line)["prediction"] for line in lines]
    plain = model.tokenizer.without_prompt
    assert len(model.tokenizer.encode(["x"])[0]) > len(plain.encode(["x"])[0])


def test_normalised_texts_of_a_run_and_its_export_are_those_it_was_tested_on(finetune, tmp_path, scenes):
    """`text_normalization`: in training, in tests, in what is loaded and what is exported."""
    from finetune.formats.answers import read_xvnli
    from raylib.api.export import export_model

    limits = ("epochs=1", "train_limit=16", "test_limit=12", "languages=ru", "name=tuned")
    code, printed = finetune("scenes_xvnli", *limits, "text_normalization=caption", "training_words=20")
    assert code == 0, printed
    export_model(tmp_path / "tuned", tmp_path / "export")
    example = next(iter(read_xvnli(scenes / "XVNLI/annotations/ru/test.jsonl")))
    image = open_images(scenes / "images.tar").read(example.images[0])
    line = json.loads((tmp_path / "tuned/predictions/ru.jsonl").read_text(encoding="utf-8").splitlines()[0])
    for folder in ("tuned", "export"):
        model = polyglance.load(tmp_path / folder, "cpu")
        spelt = [example.texts[-1], f"{example.texts[-1].upper()}!", f"({example.texts[-1]}): ?"]
        found = [model.classify(text, image, top=3) for text in spelt]
        assert found[0] == found[1] == found[2] and found[0][0].text == line["prediction"]


def test_published_weights_do_what_they_were_trained_for(tmp_path, images, model):
    import transformers

    from tests.factories import make_clip, xlmr_config

    torch.manual_seed(0)
    clip = make_clip(12000)
    clip.save_pretrained(tmp_path / "clip")
    transformers.XLMRobertaForMaskedLM(xlmr_config(vocab_size=12000)).save_pretrained(tmp_path / "xlmr")
    for name in ("clip", "xlmr"):
        (tmp_path / name / "tokenizer.model").write_bytes((model / "tokenizer.model").read_bytes())
    loaded = polyglance.load(tmp_path / "clip", "cpu", backbone="clip")
    assert loaded.capabilities == {"encode_image", "encode_text", "similarity"} and loaded.length == 77
    processor = transformers.CLIPImageProcessorPil(size=16, crop_size=16)
    pixels = processor([Image.fromarray(load_image(path)) for path in images], return_tensors="pt")
    with torch.no_grad():
        states = clip.vision_model(**pixels).pooler_output
        expected = torch.nn.functional.normalize(clip.visual_projection(states), dim=1)
    np.testing.assert_allclose(loaded.encode_image(images, batch_size=3), expected, atol=1e-6)
    loaded = polyglance.load(tmp_path / "xlmr", "cpu")
    assert not loaded.capabilities
    with pytest.raises(UserError, match="published weights for unified without what encode_text needs"):
        loaded.encode_text("a dog")


def test_methods_without_weights_are_refused_in_one_line(stored, export, images):
    with pytest.raises(UserError, match="a pretrained unified, cannot answer; it can encode_image"):
        export.answer(images[0], "what is it?")
    classified = polyglance.load(stored / "runs/classified", "cpu")
    assert classified.capabilities == {"classify", "entails"}
    with pytest.raises(UserError, match="fine-tuned on xvnli, cannot encode_text; it can classify, entails"):
        classified.encode_text(["a"])
    with pytest.raises(UserError, match="about an image or about a premise"):
        classified.entails(images[0], "a cat", "an animal")
    assert polyglance.load(stored / "runs/retrieved", "cpu").capabilities == export.capabilities


def test_wrong_input_is_named(export, images, tmp_path, stored):
    (tmp_path / "broken.png").write_bytes(images[0].read_bytes()[:60])
    for given, line in (
        (tmp_path / "none.jpg", "none.jpg: No such file"),
        (tmp_path / "broken.png", "broken.png: does not decode"),
        (np.zeros((4, 4)), "float64 .* is no image; give a path"),
    ):
        with pytest.raises(UserError, match=line):
            export.encode_image([images[0], given])
    with pytest.raises(UserError, match="text 1 is no str but int"):
        export.encode_text(["a", 3])
    with pytest.raises(UserError, match="give language=, one of ru"):
        polyglance.load(stored / "runs/few_shot")
    with pytest.raises(UserError, match="no model for language=de: it has ru"):
        polyglance.load(stored / "runs/few_shot", language="de")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text('{"fit": {}, "setting": "untrained", "model": "runs/x"}')
    with pytest.raises(UserError, match="trained nothing; load the model that it evaluated, runs/x"):
        polyglance.load(tmp_path / "run")
    with pytest.raises(UserError, match="neither a model folder nor a run"):
        polyglance.load(tmp_path / "nothing")
    with pytest.raises(UserError, match="nothing://x.png: Protocol not known"):
        export.encode_image("nothing://x.png")
    with pytest.raises(UserError, match="device=mps: "):
        polyglance.load(stored / "model", "mps")
    with pytest.raises(UserError, match="dtype=int8"):
        polyglance.load(stored / "model", dtype="int8")


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda m, i: m.encode_image([i], batch_size=0), "batch_size=0: give a whole number, 1 or more"),
        (lambda m, i: m.encode_text(["a"], batch_size=None), "batch_size=None: give a whole"),
        (lambda m, i: m.rerank(i, ["a"], batch_size=-1), "batch_size=-1: give a whole"),
        (lambda m, i: m.rerank(i, ["a"], top=-1), "top=-1: give a whole"),
        (lambda m, i: m.encode_text(None), "NoneType is no text; give a str, or a list"),
        (lambda m, i: m.encode_text(["a", "\ud83d"]), r"text 1 is no Unicode, it .* '\\ud83d'"),
        (lambda m, i: m.encode_image([i] * 70 + [None]), "image 70: NoneType is no image"),
        (lambda m, i: m.encode_text(["a"] * 300 + [7]), "text 300 is no str but int"),
        (lambda m, i: m.encode_image(b""), r"image 0: does not decode \(an empty file\)"),
        (lambda m, i: m.similarity(np.zeros((2, 3)), "a"), "vectors of 3 and of 4 numbers"),
        (lambda m, i: m.encode_image("http://127.0.0.1:1/a.png"), "a.png: .*127.0.0.1:1 "),
    ],
)
def test_odd_arguments_are_one_line(export, images, call, line):
    with pytest.raises(UserError, match=line) as caught:
        call(export, images[0])
    assert "\n" not in str(caught.value)


def test_one_text_or_one_vector_is_a_list_of_one(export, images):
    assert [match.text for match in export.rerank(images[0], "a cat")] == ["a cat"]
    assert len(export.rerank(images[0], iter(["a", "b"]))) == 2
    vectors, texts = export.encode_image(images[:2]), export.encode_text(["a", "b"])
    expected = export.similarity(vectors, texts)
    for given in (list(vectors), vectors.astype(np.float64), export.encode_image(images[:2], as_tensor=True)):
        assert np.array_equal(export.similarity(given, list(texts)), expected)
    assert np.array_equal(export.similarity(vectors[0], texts), expected[:1])


def run_python(code: str, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=False, env=environment
    )


def test_import_is_light_and_one_package_has_both_names():
    code = """
import sys
import raylib.api
import polyglance
assert polyglance is raylib.api and "torch" not in sys.modules
assert polyglance.Model.__module__ == "raylib.api.model" and polyglance.__version__
import polyglance.model
import raylib.api.model
assert polyglance.model is raylib.api.model and polyglance.model.__spec__.name == "raylib.api.model"
assert polyglance.Model is raylib.api.model.Model
heavy = {"ray", "deepspeed", "optuna", "matplotlib", "tensorboard", "transformers"} & sys.modules.keys()
assert not heavy, heavy
"""
    done = run_python(code, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr


def test_other_raylib_is_told_in_one_line(tmp_path):
    for name, text in (("raylib", "Color = tuple"), ("polyglance", Path(polyglance.__file__).read_text())):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
    done = run_python("import polyglance", PYTHONPATH=str(tmp_path))
    assert done.returncode and done.stderr.splitlines()[-1].startswith(
        "ImportError: polyglance has a package"
    )
    assert str(tmp_path / "raylib" / "__init__.py") in done.stderr.splitlines()[-1]


def test_every_package_is_distributed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    rooms = ("raylib", "pretrain", "finetune", "tune_spaces", "cluster")
    found = {
        ".".join(p.parent.relative_to(ROOT).parts)
        for room in rooms
        for p in (ROOT / room).rglob("__init__.py")
    }
    assert set(settings["packages"]) == found | {"polyglance"}
    assert settings["package-dir"] == {"polyglance": "raylib/api"}


@pytest.mark.parametrize("form", ["{file}", "{file}:Any", {"file": "{file}"}, {"file": "{file}:Any", "a": 1}])
def test_load_runs_no_code_that_an_export_names(library, tmp_path, form):
    """It may be a stranger's; a run of one's own has copies of one's own files."""
    folder = shutil.copytree(library / "runs" / "sample_xgqa", tmp_path / "export")
    code, settings = folder / "mine.py", json.loads((folder / "config.json").read_text())
    code.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    value = json.loads(json.dumps(form).replace("{file}", str(code)))
    settings["polyglance_run"] = {"task": "xgqa", "strategies": {"mine": value}}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"strategies.mine(.file)? names code \(.*mine.py"):
        polyglance.load(folder)
    assert not (tmp_path / "ran").exists()
