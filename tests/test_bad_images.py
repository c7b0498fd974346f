"""Images, and region features, that are missing or cannot be read: found by name before anything trains,
counted by set, and the same on every worker and at every start."""

import json
import shutil
import tarfile
from collections import Counter

import numpy as np
import pytest
from safetensors.torch import load_file

from finetune.batches import BatchOrder, CaptionBatches, ExampleBatches
from finetune.build import read_split
from finetune.predict import read_predictions
from finetune.recipes import RECIPES
from finetune.stores import stem
from finetune.stores.images import ImageSource, open_images
from finetune.stores.regions import open_regions
from raylib.checkpoint import find_best
from raylib.config import override
from raylib.data.augmentation import FLIP, augment_image
from raylib.data.images import BadImage
from raylib.errors import UserError
from raylib.monitoring import read_metrics
from raylib.randomness import uniform
from raylib.sample import DATA
from raylib.settings import AugmentConfig
from raylib.text import Tokenizer
from tests.test_finetune_models import regions_of, write_regions


@pytest.fixture
def images(tmp_path, scenes):
    """The scenes' images as files, which a test may damage."""
    folder = tmp_path / "images"
    with tarfile.open(scenes / "images.tar") as tar:
        tar.extractall(folder, filter="data")
    return folder


def items_of(scenes, split, code="en", recipe="scenes_xvnli"):
    return list(read_split(override(RECIPES[recipe](), [f"data={scenes}"]), split, code))


def damage(images, names, content=b"no image"):
    for name in names:
        (path,) = images.rglob(f"{stem(name)}.*")
        path.unlink() if content is None else path.write_bytes(content)


def names_of(items):
    return list(dict.fromkeys(name for item in items for name in item.images))


def result(folder):
    return json.loads((folder / "result.json").read_text())


def losses(run):
    return [(r["step"], r["loss/task"]) for r in read_metrics(run) if "loss/task" in r]


def make_batches(kind, scenes, images, model, rank=0, world=1, **more):
    tokenizer, source = Tokenizer.load(model), ImageSource(open_images(images), 16)
    order = BatchOrder(16, 7, rank, world, bad_limit=0.5, **more)
    if kind == "captions":
        return CaptionBatches(
            items_of(scenes, "train", recipe="scenes_xflickrco"), source, tokenizer, 20, order
        )
    labels = ("contradiction", "entailment", "neutral")
    return ExampleBatches(items_of(scenes, "train"), labels, source, tokenizer, 20, False, order)


@pytest.mark.parametrize("kind", ["examples", "captions"])
def test_broken_image_gives_place_to_the_same_example_everywhere(kind, scenes, images, model):
    """On any number of workers, in any process, whatever it has met before; and it is counted once."""
    recipe = "scenes_xvnli" if kind == "examples" else "scenes_xflickrco"
    broken = names_of(items_of(scenes, "train", recipe=recipe))[:4]
    damage(images, broken)
    batches = make_batches(kind, scenes, images, model)
    part, steps = ("examples" if kind == "examples" else "image_text"), range(3 * batches.epoch_steps)
    whole = [batches[step] for step in steps]
    assert not set(batches.faults) - {i for i, e in enumerate(batches.examples) if e.images[0] in broken}
    expected = sum(example.images[0] in broken for example in batches.examples)
    visited = {n for e in range(3) for s in range(batches.epoch_steps) for n in [*_numbers(batches, e, s)]}
    met = sum(i in visited for i, e in enumerate(batches.examples) if e.images[0] in broken)
    assert sum(batch["bad"] for batch in whole) == met <= expected and met
    # a fresh process for each step, and three workers
    for step in steps:
        parts = [make_batches(kind, scenes, images, model, rank, 3)[step] for rank in range(3)]
        ids = np.concatenate([p[part]["text"][0].numpy() for p in parts])
        assert (ids == whole[step][part]["text"][0].numpy()).all()
        assert sum(p["bad"] for p in parts) == whole[step]["bad"]


def _numbers(batches, epoch, step):
    return batches.rows(epoch * batches.epoch_steps + step)[2].tolist()


def test_run_with_broken_training_images_goes_on_to_the_bit(finetune, scenes, images, tmp_path):
    """Whatever the loaders, and after an interruption in the middle of an epoch."""
    broken = names_of(items_of(scenes, "train"))[:3]
    damage(images, broken)
    own = ["scenes_xvnli", f"images={images}", "bad_limit=0.2", "select=last", "run_test=true"]
    code, printed = finetune(*own, "name=whole")
    assert code == 0, printed
    finetune(*own, "name=parts", "fit.stop_after=4", "fit.loader_workers=2")
    assert finetune(*own, "name=parts", "fit.loader_workers=1")[0] == 0
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    weights = [
        load_file(next((tmp_path / name / "checkpoints").glob("step_*6")) / "model.safetensors")
        for name in ("whole", "parts")
    ]
    assert all(value.equal(weights[1][key]) for key, value in weights[0].items())
    count = sum(item.images[0] in broken for item in items_of(scenes, "train"))
    skipped = [result(tmp_path / name)["items_skipped"] for name in ("whole", "parts")]
    assert skipped[0] == skipped[1] and 0 < skipped[0]["train"] <= count


def test_too_many_broken_training_images_end_the_run(finetune, scenes, images, tmp_path):
    damage(images, names_of(items_of(scenes, "train"))[:3])
    for workers in (0, 1):
        code, printed = finetune(
            "scenes_xvnli", f"images={images}", f"fit.loader_workers={workers}", "name=a"
        )
        line = printed.splitlines()[-1]
        assert code == 2 and "training examples have an image that cannot be read (bad_limit=0.01" in line
        assert f"such as {images}" in line and not (tmp_path / "a" / "config.json").exists()


@pytest.mark.parametrize("recipe", ["scenes_xvnli", "scenes_marvl", "scenes_xflickrco"])
def test_broken_test_image_counts_as_wrong_and_is_told(recipe, finetune, scenes, images, tmp_path):
    tests = items_of(scenes, "test", "ru", recipe)
    name = names_of(tests)[1]
    others = names_of([item for item in tests if name not in item.images])
    damage(images, [name])
    assert others
    own = [f"images={images}", "epochs=1", 'languages=["ru"]', "name=tested"]
    code, printed = finetune(recipe, *own, "bad_limit=0.001")
    assert code == 2 and "items of the test set in 'ru' have an image that cannot be read" in printed
    assert "what is trained stays" in printed
    code, printed = finetune(recipe, *own, "bad_limit=0.5")  # goes on from there
    assert code == 0, printed
    found, count = result(tmp_path / "tested"), sum(name in item.images for item in tests)
    if recipe == "scenes_xflickrco":
        count = 1
    assert found["items_skipped"]["ru"] == found["bad_images"]["ru"] == count
    assert f"count as wrong because their image cannot be read: ru {count}" in printed
    if recipe != "scenes_xflickrco":
        lines = list(read_predictions(tmp_path / "tested" / "predictions" / "ru.jsonl"))
        errors = Counter(
            line["prediction"] == "" and "does not decode" in line["error"]
            for line in lines
            if "error" in line
        )
        assert errors == {True: count} and len(lines) == len(tests)
        right = sum(line["labels"].get(line["prediction"], 0) for line in lines)
        assert found["accuracy"]["ru"] == pytest.approx(right / len(tests))


def test_every_cache_of_a_frozen_model_resumes_to_the_bit(finetune, scenes, images, tmp_path):
    """Image states, and the states of a frozen text encoder, beside a broken image. (Those of a teacher:
    `test_distillation_run`.)"""
    damage(images, names_of(items_of(scenes, "train", recipe="scenes_xflickrco"))[:1])
    own = ["scenes_xflickrco", 'freeze=["embeddings","text","vision"]', f"images={images}", "bad_limit=0.1"]
    assert finetune(*own, "name=whole")[0] == 0
    steps, run = len(all_losses(tmp_path / "whole")), tmp_path / "parts"
    assert finetune(*own, "name=parts", f"fit.stop_after={steps // 2 + 1}")[0] == 0
    assert finetune(*own, "name=parts")[0] == 0
    assert all_losses(run) == all_losses(tmp_path / "whole") and len(all_losses(run)) == steps
    weights = [load_file(find_best(folder) / "model.safetensors") for folder in (tmp_path / "whole", run)]
    assert all(value.equal(weights[1][key]) for key, value in weights[0].items())
    assert result(run)["items_skipped"] == result(tmp_path / "whole")["items_skipped"]


def all_losses(run):
    lines = [{k: v for k, v in r.items() if k.startswith(("step", "loss/"))} for r in read_metrics(run)]
    return [line for line in lines if len(line) > 1]


def test_broken_dev_image_is_counted_by_its_set(finetune, scenes, images, tmp_path):
    dev = items_of(scenes, "dev")
    name = names_of(dev)[0]
    damage(images, [name])
    code, printed = finetune(
        "scenes_xvnli", f"images={images}", "name=dev", "bad_limit=0.3", 'freeze=["vision"]'
    )
    assert code == 0, printed
    assert result(tmp_path / "dev")["items_skipped"]["dev/en"] == sum(name in i.images for i in dev)


@pytest.mark.parametrize("role", ["train", "dev", "test"])
def test_verify_reads_every_image_before_anything_starts(role, finetune, scenes, images, tmp_path):
    name = names_of(items_of(scenes, role))[0]
    damage(images, [name], (next(images.rglob(f"{name}.*"))).read_bytes()[:40])
    code, printed = finetune("scenes_xvnli", f"images={images}", "name=verified", "verify=true")
    line = printed.splitlines()[-1]
    assert code == 2 and f"({role}, 'en') have an image that cannot be read" in line, printed
    assert f"{name}: does not decode" in line and not (tmp_path / "verified").exists()


def test_missing_images_are_counted_by_set_with_their_names(finetune, scenes, images, tmp_path):
    tests = items_of(scenes, "test", "ru")
    gone = names_of(tests)[:5]
    damage(images, gone, None)
    code, printed = finetune("scenes_xvnli", f"images={images}", "name=gone")
    count = sum(item.images[0] in gone for item in tests)
    names = ", ".join(f"'{name}'" for name in gone[:3])
    line = printed.splitlines()[-1]
    assert (
        code == 2
        and f"{count} of 60 items of " in line
        and f"(test, 'en') have no image in {images}: {names} and" in line
    )
    code, printed = finetune("scenes_xvnli", f"images={images}", "name=gone", "bad_limit=0.6", "epochs=1")
    assert code == 0 and f"note: {count} of 60 items" in printed
    assert result(tmp_path / "gone")["items_skipped"] == {"train": 0, "en": count, "ru": count}


def test_image_that_goes_while_a_run_trains_counts_as_one_that_cannot_be_read(images):
    """The store was opened when it was there."""
    store = open_images(images)
    name = sorted(path.name for path in images.iterdir())[0]
    assert store.read(name).ndim == 3
    (images / name).unlink()
    with pytest.raises(BadImage, match=f"{name}: gone since the run began"):
        store.read(name)


def test_missing_images_of_a_later_part_end_the_run_before_the_first(
    finetune, scenes, images, model, tmp_path
):
    code, printed = finetune("scenes_xvnli", f"images={images}", "name=english", "epochs=1")
    assert code == 0, printed
    data = tmp_path / "data"
    shutil.copytree(scenes, data)
    path = data / "XVNLI/annotations/ru/train_5.jsonl"
    lines = path.read_text().splitlines()
    path.write_text(
        "\n".join([json.dumps({**json.loads(lines[0]), "Flikr30kID": "gone"}), *lines[1:]]) + "\n"
    )
    few = [
        "setting=few_shot",
        "shots=5",
        f"model={tmp_path / 'english'}",
        'languages=["ar","ru"]',
        f"data={data}",
    ]
    code, printed = finetune("scenes_xvnli", *few, f"images={images}", "name=few")
    assert code == 2 and f"{path} (train, 'ru') have no image" in printed.splitlines()[-1]
    assert not (tmp_path / "few").exists()


@pytest.mark.parametrize("kind", ["lmdb", "h5", "npz"])
def test_broken_region_features_are_counted_like_images(kind, finetune, scenes, tmp_path):
    """One that is not finite of what is trained on, and one that is missing of the test."""
    records = regions_of(scenes, "xvnli")
    train, tests = items_of(scenes, "train"), items_of(scenes, "test")
    broken, gone = names_of(train)[0], names_of(tests)[0]
    records[broken]["features"][1, 2] = np.nan
    del records[gone]
    path = write_regions(tmp_path, kind, records)
    own = [f"regions={path}", "images=/nowhere", "epochs=1", "name=regions"]
    code, printed = finetune("scenes_xvnli", *own)
    assert code == 2 and f"have no regions in {path}: '{gone}'" in printed
    code, printed = finetune("scenes_xvnli", *own, "bad_limit=0.4", "verify=true")
    assert code == 0 and "features not finite" in printed, printed
    found = result(tmp_path / "regions")
    count = sum(item.images[0] == gone for item in tests)
    assert found["items_skipped"]["en"] == found["items_skipped"]["ru"] == count
    assert found["items_skipped"]["train"] > 0


def test_region_files_that_are_cut_off_are_named(tmp_path, scenes):
    """Before they are read, where LMDB would end the process, and while they are."""
    records = regions_of(scenes, "xvnli")
    for kind in ("lmdb", "h5"):
        (tmp_path / kind).mkdir()
        path = write_regions(tmp_path / kind, kind, records)
        file = path / "data.mdb" if kind == "lmdb" else path
        whole, store, (first, *_, last) = file.read_bytes(), open_regions(path), sorted(records)
        assert store.find(first)
        with open(file, "r+b") as opened:
            opened.truncate(len(whole) // 2)
        with pytest.raises(UserError, match=f"{file}: .*[0-9,]+ bytes, .*[0-9,]+ .*; restore it"):
            for name in records:
                store.find(name)
        with pytest.raises(UserError, match="again.*(cut off; copy it anew|is it whole)"):
            again = tmp_path / f"again{path.suffix}"
            (shutil.copytree if kind == "lmdb" else shutil.copy2)(path, again)
            open_regions(again).find(last)


def test_dangling_links_are_no_images(images):
    (path, *_) = sorted(images.rglob("*.webp"))
    path.unlink()
    path.symlink_to("nowhere.webp")
    store = open_images(images)
    assert not store.has(path.stem) and len(store.files)


def test_tar_that_is_cut_off_in_mid_run_is_named(scenes, tmp_path):
    path = tmp_path / "images.tar"
    shutil.copy2(scenes / "images.tar", path)
    store = open_images(path)
    store.read("gtrain0")
    with open(path, "r+b") as file:
        file.truncate(5000)
    last = names_of(items_of(scenes, "test"))[-1]
    with pytest.raises(UserError, match=f"{path}: cut off: it has 5,000 bytes"):
        store.read(last)


def test_augmented_batches_draw_for_each_image_and_heed_left_and_right(scenes, images):
    """What is read of an example is its images as ALBEF's code would augment them, by draws of (seed, epoch,
    example, image); of a question with a side in it the image is never flipped."""
    items = items_of(scenes, "train", recipe="scenes_marvl")[:24]
    config = AugmentConfig.albef(0.5, flip=1.0, flip_unless=("a",), operations=0)
    source = ImageSource(open_images(images), 24, config)
    tokenizer = Tokenizer.load(DATA / "tokenizer.model")
    batches = ExampleBatches(items, ("True", "False"), source, tokenizer, 20, False, BatchOrder(12, 3))
    for step in (1, 3):  # of the first epoch and the second
        epoch, _, numbers = batches.rows(step)
        pixels = batches[step]["examples"]["images"]
        draws = uniform(3, epoch, "augment", numbers[:, None, None], np.arange(2)[:, None], np.arange(27))
        for row, number in enumerate(numbers):
            said = [*items[number].texts, *items[number].labels]
            for side, name in enumerate(items[number].images):
                values = draws[row, side].copy()
                values[FLIP] = 1 if any("a" in text for text in said) else values[FLIP]
                expected = augment_image(source.store.read(name), 24, config, values)
                assert np.array_equal(pixels[2 * row + side].numpy(), expected)
    flips = ["a" in "".join([*item.texts, *item.labels]) for item in items]
    assert 0 < sum(flips) < len(items)
