"""Further test sets of a run, and test sets whose images are shuffled."""

import json
import shutil
import zipfile

import pytest

from finetune.__main__ import main
from finetune.evaluation import ShuffledImages, derange
from finetune.formats import Captioned, Example, stream_jsonl
from raylib import cache
from raylib.errors import UserError
from tests.test_finetune_run import result

TESTS = (
    "xGQA/annotations/few_shot",
    "XVNLI/annotations",
    "xFlickrCO/annotations",
    "marvl",
    "nlvr2/annotations",
)


@pytest.fixture(scope="module")
def scenes_and_more(tmp_path_factory, scenes):
    """The scenes, with two folders of their test files below: `again` has the images too, `textless` has
    Russian alone and no images."""
    data = tmp_path_factory.mktemp("tests") / "scenes"
    shutil.copytree(scenes, data)
    for name in ("again", "textless"):
        for folder in TESTS:
            shutil.copytree(
                scenes / folder, data / name / folder, ignore=shutil.ignore_patterns("train*", "dev*")
            )
    for path in [*(data / "textless").rglob("en"), data / "textless/nlvr2"]:
        shutil.rmtree(path)
    shutil.copy2(scenes / "images.tar", data / "again")
    return data


@pytest.mark.parametrize(
    ("task", "settings"),
    [("xgqa", ()), ("marvl", ()), ("xflickrco", ()), ("xflickrco", ("head=pairs", "test_limit=8"))],
)
def test_extra_tests_are_evaluated_as_the_test_set(finetune, tmp_path, scenes_and_more, task, settings):
    more = ['extra_tests={"again": "again", "textless": "textless"}', "shuffled_images=true"]
    own = ["name=run", "epochs=1", f"data={scenes_and_more}", *settings]
    code, printed = finetune(f"scenes_{task}", *own, *more)
    assert code == 0, printed
    found = result(tmp_path, "run")
    key = "mean_recall" if task == "xflickrco" else "accuracy"
    scores = found.get("accuracy") or {c: f["mean_recall"] for c, f in found["retrieval"].items()}
    extra = {name: {c: f[key] for c, f in figures.items()} for name, figures in found["extra_tests"].items()}
    assert extra["again"] == scores and extra["textless"] == {"ru": scores["ru"]}  # the same files
    assert extra["shuffled_images"].keys() == scores.keys()
    again = found["extra_tests"]["again"]["ru"]
    assert again["interval"] == found["interval"]["ru"] and again["n"] > 0
    assert f"note: extra_tests.textless: {scenes_and_more / 'textless'} has no test set in en" in printed
    assert "| shuffled images | again | textless |" in printed
    read = json.loads((tmp_path / "run/identity.json").read_text())["data"]
    assert str(scenes_and_more / "again/images.tar") in read
    assert any(name.startswith(str(scenes_and_more / "textless")) for name in read)
    assert found["training_precision"] == found["evaluation_precision"] == "float32"
    before = found["extra_tests"]
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    again = result(tmp_path, "run")
    assert again["extra_tests"] == before and again["training_precision"] == "float32"


def test_extra_tests_images_are_encoded_once(finetune, tmp_path, scenes_and_more, monkeypatch):
    encoded = []
    original = cache.write_encoder_states

    def count(folder, names, *arguments, **more):
        encoded.append((folder.name, len(names)))
        return original(folder, names, *arguments, **more)

    monkeypatch.setattr(cache, "write_encoder_states", count)
    own = ["epochs=1", f"data={scenes_and_more}", 'extra_tests={"again": "again"}']
    for freeze in ("freeze=[]", 'freeze=["vision"]'):  # what is frozen is encoded with the training images
        finetune("scenes_xgqa", "name=plain", freeze, *own)
        plain, encoded[:] = list(encoded), []
        finetune("scenes_xgqa", "name=shuffled", freeze, "shuffled_images=true", *own)
        assert len(plain) == 3 and [count for _, count in encoded] == [count for _, count in plain]
        found = [result(tmp_path, name) for name in ("plain", "shuffled")]
        assert found[0]["accuracy"] == found[1]["accuracy"] and found[0]["interval"] == found[1]["interval"]
        assert found[0]["extra_tests"]["again"] == found[1]["extra_tests"]["again"]
        encoded.clear()
        for name in ("plain", "shuffled"):
            shutil.rmtree(tmp_path / name)


def test_shuffled_images_predictions_name_other_images_the_same_in_all_languages(finetune, tmp_path):
    own = ["languages=en,de,ru", 'held_out_languages=["ru"]', "epochs=1", "shuffled_images=true"]
    code, printed = finetune("scenes_xgqa", "name=run", *own)
    assert code == 0, printed
    found = result(tmp_path, "run")
    assert found["mean_targets"] == found["accuracy"]["de"] and found["held_out_languages"] == ["ru"]
    assert found["gap"] == found["accuracy"]["en"] - found["accuracy"]["de"]
    assert found["disparity"]["range"] == pytest.approx(abs(found["gap"]))
    mean = next(line for line in printed.splitlines() if "mean of the targets |" in line).split("|")
    shuffled = found["extra_tests"]["shuffled_images"]["de"]["accuracy"]
    assert [mean[2].strip(), mean[4].strip()] == [
        f"{100 * found['mean_targets']:.1f}",
        f"{100 * shuffled:.1f}",
    ]
    assert "held out of pretraining, and of the mean of the targets: ru" in printed
    lines = {
        (folder, language): [
            line for _, line in stream_jsonl(tmp_path / "run/predictions" / folder / f"{language}.jsonl")
        ]
        for folder in ("", "shuffled_images")
        for language in ("en", "ru")
    }
    donors = {}
    for language in ("en", "ru"):
        for own, other in zip(lines["", language], lines["shuffled_images", language], strict=True):
            assert own["id"] == other["id"] and own["labels"] == other["labels"]
            assert own["images"] != other["images"]
            assert donors.setdefault(own["images"][0], other["images"][0]) == other["images"][0]
    assert sorted(donors) == sorted(donors.values())


def test_extra_tests_mistakes_are_one_line(finetune, tmp_path, scenes_and_more):
    for settings, line in (
        (
            ['extra_tests={"far": "nowhere"}'],
            f"extra_tests.far=nowhere: no such folder: {scenes_and_more / 'nowhere'}",
        ),
        (['extra_tests={"far": "wordnet"}'], "extra_tests.far=wordnet: no test set in it"),
        (['extra_tests={"shuffled_images": "again"}'], "'shuffled_images' is a name of the run's own"),
        (['extra_tests={"mean_recall": "again"}'], "'mean_recall' is a name of the run's own"),
        (['extra_tests={".states": "again"}'], "extra_tests"),
        (["shuffled_images=true", "test_limit=1"], "two different images at least"),
        (['held_out_languages=["xx"]'], "held_out_languages=xx: xgqa has no test set in it"),
    ):
        code, printed = finetune("scenes_xgqa", "name=run", f"data={scenes_and_more}", *settings)
        assert code == 2 and line in printed and len(printed.strip().splitlines()) == 1, printed
        assert not (tmp_path / "run").exists()
    code, printed = finetune("scenes_xvnli", "task=xnli", "name=run", "shuffled_images=true")
    assert code == 2


def test_missing_translations_name_the_command_that_makes_them(finetune, scenes, tmp_path):
    data = tmp_path / "scenes"
    shutil.copytree(scenes, data)
    shutil.rmtree(data / "XVNLI/annotations_machine-translate")
    code, printed = finetune(
        "scenes_xvnli", "name=run", f"data={data}", "setting=translate_test", "model=runs/none"
    )
    assert code == 2 and "make translations (polyglance data translate)" in printed, printed


def test_extra_tests_overlap_with_training_is_refused(finetune, scenes_and_more, tmp_path):
    data = tmp_path / "scenes"
    shutil.copytree(scenes_and_more, data)
    shutil.copytree(data / "again", data / "known")
    train = data / "XVNLI/annotations/en/train.jsonl.zip"
    (data / "known/XVNLI/annotations/ru/test.jsonl").write_bytes(b"")
    text = zipfile.ZipFile(train).read("train.jsonl")
    (data / "known/XVNLI/annotations/ru/test.jsonl").write_bytes(text)
    code, printed = finetune("scenes_xvnli", "name=run", f"data={data}", 'extra_tests={"known": "known"}')
    assert code == 2 and "what is tested on must be new" in printed and "known/XVNLI" in printed


def test_extra_tests_missing_images_are_told(finetune, scenes_and_more, tmp_path):
    data = tmp_path / "scenes"
    shutil.copytree(scenes_and_more, data)
    (data / "again/images.tar").unlink()
    (data / "again/images").mkdir()
    (data / "again/images/one.webp").write_bytes(b"")
    code, printed = finetune("scenes_xvnli", "name=run", f"data={data}", 'extra_tests={"again": "again"}')
    assert code == 2 and f"no image in {data / 'again/images'}" in printed


def test_derange_gives_no_group_an_image_of_its_own():
    groups = [(f"{i}.png", f"{i + 1}.png") for i in range(40)]
    found = derange(groups, "")
    assert set(found) == set(groups) == set(found.values())
    assert all(set(own).isdisjoint(other) for own, other in found.items())
    assert derange(groups[::-1], "") == found
    renamed = {
        tuple(n.replace("png", "jpg") for n in a): tuple(n.replace("png", "jpg") for n in b)
        for a, b in found.items()
    }
    assert derange(list(renamed), "") == renamed
    assert derange([("a", "b"), ("a", "c")], "") == {("a", "b"): ("a", "c"), ("a", "c"): ("a", "b")}
    with pytest.raises(UserError, match="two different images"):
        derange([("a",)], "FILE")


def test_shuffled_images_bring_what_is_known_of_them():
    items = [
        Example("1", ("one",), ("a",), {"x": 1.0}, tags=("cat",), sources=("http://a",)),
        Example("2", ("two",), ("b",), {"y": 1.0}, tags=("dog",)),
        Example("3", ("three",), ("a",), {"z": 1.0}, tags=("cat",), sources=("http://a",)),
    ]
    first, second, third = ShuffledImages(items, "")
    assert (first.images, first.tags, first.sources, first.labels) == (("b",), ("dog",), (), {"x": 1.0})
    assert (second.images, second.tags, second.sources) == (("a",), ("cat",), ("http://a",))
    assert third.images == ("b",) and third.texts == ("three",)
    captions = ShuffledImages(
        [Captioned("a", ("one",)), Captioned("b", ("two",)), Captioned("a", ("more",))], ""
    )
    assert [item.image for item in captions] == ["b", "a", "b"] == [item.image for item in captions]
