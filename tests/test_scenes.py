"""The miniature IGLUE: sentences, answers against the scenes' ground truth, balance, formats."""

import json
import re
import shutil
import zipfile
from collections import Counter

import numpy as np
import pytest

from finetune.recipes import SCENES_LANGUAGES
from finetune.stores.images import open_images
from finetune.strategies.lexical import WordNet
from finetune.tasks.datasets import TASKS
from raylib.sample import is_held_out
from raylib.sample.scenes import (
    DATA,
    LANGUAGES,
    fill_template,
    read_categories,
    read_labels,
    read_templates,
    related_labels,
    translate_name,
)
from raylib.sample.scenes.__main__ import main
from raylib.sample.scenes.frozen import check_frozen
from raylib.sample.scenes.frozen import main as check
from raylib.sample.scenes.statements import Dice, Statement
from raylib.sample.scenes.subset import cut_vectors, cut_wordnet
from raylib.sample.scenes.translators import mistranslate
from raylib.sample.scenes.tree import ERRORS, STYLE
from raylib.sample.scenes.writer import XGQA, XVNLI, ScenesConfig, write_scenes

SMALL = ScenesConfig(train=60, dev=12, test=60, shots=5)


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_zip(path):
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read(path.stem))


def read_truth(folder):
    """{scene: {label: its objects}}."""
    found = {}
    for scene in read_lines(folder / "scenes.jsonl"):
        labels = {o["label"] for o in scene["objects"]}
        found[scene["id"]] = {name: [o for o in scene["objects"] if o["label"] == name] for name in labels}
    return found


@pytest.fixture(scope="module")
def truth(scenes):
    return read_truth(scenes)


@pytest.fixture(scope="module")
def hardest(tmp_path_factory):
    """A miniature IGLUE, as difficult as it gets."""
    folder = tmp_path_factory.mktemp("hardest") / "scenes"
    write_scenes(folder, ScenesConfig(train=90, dev=3, test=30, shots=1, difficulty=1))
    return folder


@pytest.mark.parametrize(
    ("language", "template", "names", "text"),
    [
        ("ko", "verify", ["owl"], "그림에 부엉이가 있습니까?"),  # ends in a vowel
        ("ko", "verify", ["tiger"], "그림에 호랑이가 있습니까?"),
        ("ko", "s_neutral", ["pencil"], "연필은 선물입니다."),  # ends in a consonant
        ("ko", "and", ["pencil", "owl"], "그림에 연필과 부엉이가 모두 있습니까?"),
        ("ko", "or", ["pencil", "owl"], "그림에 연필이나 부엉이가 있습니까?"),
        ("es", "choose", ["cat", "bear"], "¿Qué aparece en la imagen: gato u oso?"),
        ("es", "choose", ["bear", "cat"], "¿Qué aparece en la imagen: oso o gato?"),
        ("en", "compare", ["cat", "dog"], "Which is drawn larger: cat or dog?"),
        ("sw", "verify", ["cat"], "Je, kuna kitu hiki kwenye picha: paka?"),
        ("sw", "two_lr", ["cat", "dog"], "Picha ya kushoto inaonyesha paka, na ya kulia inaonyesha mbwa."),
    ],
)
def test_scenes_names_fit_into_sentences(language, template, names, text):
    slots = dict(zip("AB", (translate_name(name, language) for name in names), strict=False))
    assert fill_template(template, language, slots) == text


def test_scenes_templates_and_categories_exist_in_every_language():
    for texts in (
        *read_templates()["templates"].values(),
        *read_templates()["positions"].values(),
        *read_categories().values(),
    ):
        assert texts if isinstance(texts, list) else set(texts) == set(LANGUAGES)
    assert all(len(phrases) == 4 for phrases in read_templates()["positions"].values())


def test_scenes_labels_are_drawn_in_training_and_named_everywhere():
    assert len(read_labels()) >= 140
    for label in read_labels().values():
        assert not is_held_out(label.key)
        assert set(label.ancestors) >= set(label.hypernyms)
        assert all(translate_name(label.name, language) for language in LANGUAGES)


def test_scenes_relations_equal_worked_example():
    assert (
        {"dog", "poodle"} <= related_labels("poodle")
        and "poodle" in related_labels("dog")
        and "cat" not in related_labels("dog")
    )
    assert {"purse", "handbag", "clutch bag"} <= related_labels("purse")  # a synonym, and what is below both


def read_questions(folder):
    """(image, question, answer, type) of the English test and training sets, and of the few-shot sets."""
    text = (folder / "xGQA/annotations/zero_shot/testdev_balanced_questions_en.json").read_text("utf-8")
    for item in json.loads(text).values():
        yield item["imageId"], item["question"], item["answer"], item["types"]["structural"]
    for item in read_zip(folder / "gqa/annotations/train.json.zip"):
        yield item["img_id"], item["sent"], next(iter(item["label"])), ""


@pytest.mark.parametrize(("folder", "count"), [("scenes", 60 + 20 + 60), ("hardest", 30 + 4 + 90)])
def test_scenes_answers_follow_from_the_scenes(request, folder, count):
    """Each question again, by what its English sentence says: of the test, training and few-shot sets."""
    scenes = request.getfixturevalue(folder)
    truth, kinds, texts = read_truth(scenes), Counter(), []
    for image, text, answer, kind in read_questions(scenes):
        objects = truth[image]
        kinds[kind] += 1
        texts.append(text)
        named = text.rstrip("?").split(": ")[-1]
        yes = {True: "yes", False: "no"}

        def only(name, objects=objects):
            (one,) = objects[name]  # what is spoken of by its size or place is there once
            return one

        if text.startswith("Is this"):
            assert answer == yes[named in objects]
        elif text.startswith("Are both"):
            assert answer == yes[all(n in objects for n in named.split(" and "))]
        elif text.startswith("Is at least"):
            assert answer == yes[any(n in objects for n in named.split(" or "))]
        elif text.startswith("What is in the picture"):
            assert [n for n in named.split(" or ") if n in objects] == [answer]
        elif text.startswith("How many times"):
            assert answer == str(len(objects.get(named, [])))
        elif text.startswith("Which is drawn larger"):
            one, other = named.split(" or ")
            assert answer == (one if only(one)["size"] > only(other)["size"] else other)
        elif text.startswith("What is at the"):
            phrase = text.removeprefix("What is at the ").rstrip("?")
            quadrant = read_templates()["positions"]["en"].index(phrase)
            assert quadrant in [o["quadrant"] for o in objects[answer]]
        elif text.startswith("What is to the right"):
            left = only(text.split("“")[1].split("”")[0])
            assert left["quadrant"] % 2 == 0
            assert left["quadrant"] + 1 in [o["quadrant"] for o in objects[answer]]
        else:
            right, left = (only(part.split("”")[0]) for part in text.split("“")[1:])
            assert right["quadrant"] // 2 == left["quadrant"] // 2 and text.startswith("Is the “")
            assert answer == yes[right["quadrant"] > left["quadrant"]]
    assert len(texts) == count
    assert set(kinds) - {""} == {"verify", "query", "choose", "logical", "compare", "count"}
    assert any(text.startswith("Is the “") for text in texts) == (folder == "hardest")
    assert folder == "scenes" or max(map(len, truth.values())) == 4


def test_scenes_relations_never_mention_absent_objects(scenes, truth):
    items = read_zip(scenes / "gqa/annotations/train.json.zip")
    asked = [i for i in items if i["sent"].startswith(("Is this in", "What is in the picture"))]
    assert len(items) == 60 and len(asked) > 15
    for item in asked:
        named = item["sent"].rstrip("?").split(": ")[1].split(" or ")
        for absent in set(named) - set(truth[item["img_id"]]):
            assert not any(absent in related_labels(name) for name in truth[item["img_id"]])


def test_scenes_entailment_follows_from_the_scenes(scenes, truth):
    for record in read_lines(scenes / "XVNLI/annotations/en/test.jsonl"):
        there, text = truth[record["Flikr30kID"]], record["sentence2"]
        if text.endswith("is a gift."):
            assert record["gold_label"] == "neutral"
            continue
        named, denied = text.rstrip(".").split(": ")[1], "does not" in text
        true = named in there or any(
            named in map(lambda c: translate_name(c, "en"), read_labels()[name].categories) for name in there
        )
        if (
            named in read_labels()
            and not true
            and any(name in read_labels()[named].ancestors for name in there)
        ):
            assert record["gold_label"] == "neutral"  # a poodle, where a dog is
        else:
            assert record["gold_label"] == ("entailment" if true != denied else "contradiction")


def test_scenes_two_image_statements_follow_from_the_scenes(scenes, truth):
    numbers = set()
    for record in read_lines(scenes / "nlvr2/annotations/test.jsonl"):
        stem = record["identifier"].rsplit("-", 1)[0]
        left, right = truth[f"{stem}-img0"], truth[f"{stem}-img1"]
        if record["sentence"].startswith("Both"):
            named = record["sentence"].rstrip(".").split(": ")[1]
            true = named in left and named in right
        elif found := re.fullmatch(r"The two .* show this (\d) times: (.*)\.", record["sentence"]):
            numbers.add(int(found[1]))
            true = int(found[1]) == sum(len(side.get(found[2], [])) for side in (left, right))
        else:
            sides = record["sentence"].removeprefix("The left picture shows ").rstrip(".")
            first, second = sides.split(", the right one ")
            true = first in left and second in right
        assert record["label"] == str(true)
    assert numbers == {2, 3, 4}


def test_scenes_other_style_has_the_same_tests_by_an_unseen_vendor(scenes):
    """The same annotations and scenes in other drawings; training, dev and test sets are in the same ones."""
    vendors = Counter((("test" in s["id"]), s["vendor"]) for s in read_lines(scenes / "scenes.jsonl"))
    assert set(vendors) == {(is_test, v) for is_test in (False, True) for v in ("noto", "twemoji")}
    usual = {s["id"]: s for s in read_lines(scenes / "scenes.jsonl")}
    style = {s["id"]: s for s in read_lines(scenes / STYLE / "scenes.jsonl")}
    assert style == {name: {**s, "vendor": "fluent"} for name, s in usual.items() if "test" in name}
    stores = [open_images(scenes / folder / "images.tar") for folder in ("", STYLE)]
    for name in list(style)[::7]:
        one, other = (store.read(name).astype(int) for store in stores)
        assert one.shape == other.shape and np.abs(one - other).mean() > 1


@pytest.mark.parametrize("name", SCENES_LANGUAGES)
def test_scenes_trees_hold_every_test_set_in_every_language(scenes, name):
    """In the other style the same files; translations with errors beside all that is as it was."""
    task, languages = TASKS[name], SCENES_LANGUAGES[name]
    for language in languages:
        usual = list(task.read(task.path(scenes, "test", language), "test", language))
        for folder in (STYLE, *ERRORS):
            assert usual == list(task.read(task.path(scenes / folder, "test", language), "test", language))
        if language != "en":
            task.path(scenes / STYLE, "translated", language).read_bytes()
    for folder in ERRORS:
        assert (scenes / folder / "images.tar").samefile(scenes / "images.tar")
        assert task.path(scenes / folder, "train", "en").exists()


@pytest.mark.parametrize(("split", "share"), [("errors10", 0.1), ("errors30", 0.3)])
def test_scenes_translations_with_errors_are_wrong_so_often(scenes, split, share):
    """In both directions, of every task; the wrong ones of 10 % among those of 30 %, with the same error."""
    wrong = total = 0
    for path in sorted((scenes / split).rglob("*")):
        if not path.is_file() or path.is_symlink() or path.resolve() != path:
            continue
        name = path.relative_to(scenes / split)
        right, here, most = (read_texts(scenes / folder / name) for folder in ("", split, "errors30"))
        assert len(right) == len(here) == len(most)
        wrong += sum(a != b for a, b in zip(right, here, strict=True))
        total += len(right)
        for a, b, c in zip(right, here, most, strict=True):
            assert b in (a, c)
    assert total > 3000 and abs(wrong / total - share) < 0.02


def read_texts(path):
    """The sentences of a file of translations, in its order."""
    if path.suffix == ".json":
        return [item["question"] for item in json.loads(path.read_text(encoding="utf-8")).values()]
    lines = read_lines(path)
    return [line.get("sentence2") or line.get("caption") or line["sentences"][0] for line in lines]


def test_mistranslate_makes_each_kind_of_error():
    def errors(template, names=(), position=None):
        statement = Statement(template, names, "", position=position)
        return {mistranslate(statement, Dice("error", i)).text("en") for i in range(200)}

    denied = errors("s_not", ("poodle",))
    assert "The picture shows this: poodle." in denied  # the negation dropped
    assert "The picture does not show this: zebra." in denied  # another animal
    # no relative, nothing of another category
    assert not any(word in text for text in denied for word in (": dog", ": banana"))
    assert errors("query_pos", position=0) == {"What is at the top right?", "What is at the bottom left?"}
    both = errors("and", ("cat", "banana"))
    assert "Is at least one of these in the picture: cat or banana?" in both
    assert {"Is this in the picture: cat?", "Is this in the picture: banana?"} < both
    assert "The left picture shows banana, the right one cat." in errors("two_lr", ("cat", "banana"))
    assert not any("food" in text for text in errors("s_has", ("fruit",)))
    # all that its category has: something of another one
    assert all(
        text.startswith("A picture with these things: ") and text.endswith(" and bed.")
        for text in errors("cap2", ("chair", "bed"))
    )


def test_scenes_languages_are_parallel_and_answers_english(scenes):
    folder = scenes / "xGQA/annotations/zero_shot"
    sets = {
        code: json.loads((folder / f"testdev_balanced_questions_{code}.json").read_text()) for code in XGQA
    }
    for code, items in sets.items():
        assert {q: (i["answer"], i["imageId"]) for q, i in items.items()} == {
            q: (i["answer"], i["imageId"]) for q, i in sets["en"].items()
        }
        assert code == "en" or any(items[q]["question"] != sets["en"][q]["question"] for q in items)


def test_scenes_languages_are_those_of_the_recipes():
    assert set(SCENES_LANGUAGES["xgqa"]) == set(XGQA) and set(SCENES_LANGUAGES["xvnli"]) == set(XVNLI)
    assert set(SCENES_LANGUAGES["marvl"]) == set(SCENES_LANGUAGES["xflickrco"]) == set(LANGUAGES)


def test_scenes_test_captions_are_true_of_one_image_alone(scenes, truth):
    test = read_lines(scenes / "xFlickrCO/annotations/en/test.jsonl")
    for item in test:
        named = item["sentences"][0].rstrip(".").split(": ")[1].split(" and ")
        shown = [other["img_path"] for other in test if set(named) <= set(truth[other["img_path"][:-5]])]
        assert shown == [item["img_path"]]


def test_scenes_labels_are_balanced(scenes):
    golds = Counter(r["gold_label"] for r in read_lines(scenes / "XVNLI/annotations/en/test.jsonl"))
    assert golds == {"entailment": 20, "neutral": 20, "contradiction": 20}
    assert Counter(r["label"] for r in read_lines(scenes / "nlvr2/annotations/test.jsonl")) == {
        "True": 30,
        "False": 30,
    }


def test_scenes_translations_are_english_and_imperfect(scenes):
    english = read_lines(scenes / "XVNLI/annotations/en/test.jsonl")
    translated = read_lines(scenes / "XVNLI/annotations_machine-translate/ru/test.jsonl")
    assert all(t["sentence2"].isascii() or "“" in t["sentence2"] for t in translated)
    different = [t for e, t in zip(english, translated, strict=True) if e["sentence2"] != t["sentence2"]]
    assert 0 < len(different) < len(english)


def test_scenes_small_set_is_small_and_reproducible(scenes, tmp_path):
    write_scenes(tmp_path / "again", SMALL)
    files = {path.relative_to(scenes): path.read_bytes() for path in scenes.rglob("*") if path.is_file()}
    own = sum(path.lstat().st_size for path in scenes.rglob("*") if path.is_file())
    assert own <= 5.5e6
    assert all((tmp_path / "again" / name).read_bytes() == data for name, data in files.items())


def test_scenes_are_those_that_were_frozen(scenes):
    check_frozen(scenes)


@pytest.mark.slow  # as large as the benchmark is
def test_scenes_benchmark_is_the_one_that_was_frozen(tmp_path):
    write_scenes(tmp_path / "scenes", ScenesConfig())
    check_frozen(tmp_path / "scenes")


def test_scenes_that_differ_from_the_frozen_ones_are_an_error(scenes, tmp_path, capsys):
    assert check([str(scenes)]) == 0 and "are those that were frozen" in capsys.readouterr().out
    folder = tmp_path / "scenes"
    shutil.copytree(scenes, folder, symlinks=True, ignore=shutil.ignore_patterns("*.tar"))
    path = folder / "errors30/XVNLI/annotations_machine-translate/ru/test.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("picture", "image", 1), encoding="utf-8")
    assert check([str(folder)]) == 2
    assert "not the benchmark's tests (errors30/XVNLI)" in capsys.readouterr().err
    (folder / "settings.json").write_text('{"train": 5}')
    assert check([str(folder)]) == 2 and "leave them at the default" in capsys.readouterr().err
    assert check([str(tmp_path)]) == 2 and "no emoji scenes" in capsys.readouterr().err


def test_scenes_cut_wordnet_and_vectors_can_be_cut_again(tmp_path):
    """The small ones are cut further: offsets, pointers and senses hold, vectors stay the same to the bit."""
    cut_wordnet(DATA / "wordnet", tmp_path / "wordnet", ["poodle.n.01"], ["yes"])
    wordnet = WordNet(tmp_path / "wordnet")
    assert (
        wordnet.relation("poodle dog", "dog") == "hyp"
        and wordnet.synsets("yes")
        and not wordnet.synsets("cat")
    )
    for synset in wordnet._reader.all_synsets():
        assert {path[0].name() for path in synset.hypernym_paths()} == {"entity.n.01"}
        assert all(synset in other.hyponyms() for other in synset.hypernyms())
    lines = (DATA / "vectors.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    fields = [line.split() for line in lines]
    np.save(tmp_path / "glove.npy", np.array([row[1:] for row in fields], np.float32))
    (tmp_path / "glove.txt").write_text("".join(f"{row[0]}\n" for row in fields), encoding="utf-8")
    cut_vectors(tmp_path / "glove.npy", tmp_path / "vectors.txt", ["guide dog", "glorp"])
    kept = [line for line in lines if line.startswith(("dog ", "guide "))]
    assert (tmp_path / "vectors.txt").read_text(encoding="utf-8") == "".join(kept) and len(kept) == 2


def test_scenes_wrong_arguments_are_one_line_errors(scenes, capsys, tmp_path):
    assert main([str(scenes)]) == 2 and "not empty" in capsys.readouterr().err
    assert main([str(tmp_path / "new"), "trian=3"]) == 2 and "did you mean train" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
