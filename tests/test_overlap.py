"""Overlap of train, dev, shots and test sets: compared before a run starts, by image and by item, on
hand-made files."""

import json
import shutil
import unicodedata

import pytest

from finetune import overlap
from finetune.config import FinetuneConfig
from finetune.overlap import check_overlap, image_name
from finetune.tasks.datasets import TASKS
from finetune.tasks.retrieval import merge_captions
from finetune.train import _parts
from raylib.errors import UserError
from tests import official


def write(path, value):
    """JSON, or JSON lines of a list where the file's name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.suffix == ".jsonl"
    path.write_text(
        "".join(json.dumps(v, ensure_ascii=False) + "\n" for v in value) if lines else json.dumps(value)
    )


def compared(task, data, **settings):
    config = FinetuneConfig(task=task, data=str(data), runs=str(data / "runs"), model="M", **settings)
    return check_overlap(config, {language: part for part, language in _parts(config)})


def gqa(*pairs):
    return {
        str(number): {"question": text, "answer": "yes", "imageId": image} for number, text, image in pairs
    }


def xgqa(data, language="de", **changes):
    """GQA and xGQA that share nothing, but for `changes`: {name of a set: its questions}."""
    sets = {
        "train": gqa((1, "Is it dark?", "1")),
        "dev": gqa((2, "Is it dark?", "2")),
        "test": gqa((3, "Ist es dunkel?", "n3")),
        "shots": gqa((4, "Ist es dunkel?", "n4")),
        "shots_dev": gqa((5, "Ist es dunkel?", "n5")),
        **changes,
    }
    for name, questions in sets.items():
        write(TASKS["xgqa"].paths(data, name, language, 5)[0], questions)
    return {"languages": (language,)}


def test_overlap_ignores_sets_that_share_only_texts(tmp_path):
    """ "Is it dark?" is asked about many images; the same question of each language is one item of its
    own."""
    assert compared("xgqa", tmp_path, **xgqa(tmp_path)) == []
    assert compared("xgqa", tmp_path, setting="few_shot", **xgqa(tmp_path)) == []


@pytest.mark.parametrize(
    ("setting", "changes", "words"),
    [
        (
            "few_shot",
            {"shots": gqa((3, "Ist es dunkel?", "n3"))},
            ("test.json (tested on)", "train_5.json (trained on)"),
        ),
        (
            "few_shot",
            {"shots_dev": gqa((3, "Ist es dunkel?", "n3"))},
            ("test.json (tested on)", "dev.json (chosen by)"),
        ),
        (
            "few_shot",
            {"shots": gqa((5, "Ist es dunkel?", "n5"))},
            ("dev.json (chosen by)", "train_5.json (trained on)"),
        ),
        (
            "zero_shot",
            {"train": gqa((3, "Is it dark?", "n3"))},
            ("test.json (tested on)", "train.json (trained on)"),
        ),
        (
            "zero_shot",
            {"dev": gqa((3, "Is it dark?", "n3"))},
            ("test.json (tested on)", "valid.json (chosen by)"),
        ),
        (
            "zero_shot",
            {"train": gqa((2, "Is it dark?", "2"))},
            ("valid.json (chosen by)", "train.json (trained on)"),
        ),
    ],
)
def test_overlap_shared_question_is_an_error_naming_both_files(tmp_path, setting, changes, words):
    """One number about one image is one question, in whatever language."""
    with pytest.raises(UserError) as refused:
        compared("xgqa", tmp_path, setting=setting, **xgqa(tmp_path, **changes))
    reported = str(refused.value)
    assert (
        all(word in reported for word in words)
        and "share 1 images and 1 items, such as item" in reported
        and "\n" not in reported
    )


def test_overlap_shared_image_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"share 1 images, such as image 'n3'"):
        compared(
            "xgqa", tmp_path, **xgqa(tmp_path, train=gqa((9, "Who is it?", "n3"), (1, "Is it dark?", "1")))
        )


def test_overlap_unused_sets_are_not_compared(tmp_path):
    """Zero-shot sees no shots; what chooses nothing with select=last; only the first so many items of a
    limit."""
    shared = gqa((3, "Ist es dunkel?", "n3"))
    train = gqa((1, "Is it dark?", "1"), (3, "Is it dark?", "n3"))
    sets = xgqa(tmp_path, shots=shared, shots_dev=shared, dev=shared, train=train)
    assert compared("xgqa", tmp_path, select="last", train_limit=1, **sets) == []
    with pytest.raises(UserError, match="valid.json"):
        compared("xgqa", tmp_path, train_limit=1, **sets)
    with pytest.raises(UserError, match="chosen by"):  # a search that chooses by the target's dev set
        compared("xgqa", tmp_path, select="last", train_limit=1, dev_languages=("de",), **sets)


@pytest.mark.parametrize(
    ("one", "other", "mscoco"),
    [
        ("123.jpg", "123", False),
        ("a/b/123.JPG", "123.png", False),
        ("N16.jpg", "n16", False),
        ("COCO_val2014_000000391895.jpg", "COCO_train2014_000000391895", False),
        ("COCO_val2014_000000391895.jpg", "000000391895", False),
        ("coco_val2014_000000391895.JPG", "COCO_val2014_000000391895", False),
        ("COCO_val2014_000000391895.jpg", "391895", True),
        (unicodedata.normalize("NFD", "café.jpg"), "café", False),
        ("zh/73-福建土楼/73-11.jpg", "zh/73-11.jpg", False),
    ],
)
def test_overlap_recognises_names_of_the_same_image(one, other, mscoco):
    assert image_name(one, mscoco) == image_name(other, mscoco)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("36979.jpg", "COCO_val2014_000000036979.jpg"),  # Flickr30K's, and MSCOCO's beside it in xFlickrCO
        ("id/39-1.jpg", "zh/39-1.jpg"),
        ("1.jpg", "10.jpg"),
    ],
)
def test_overlap_separates_names_of_different_images(one, other):
    assert image_name(one) != image_name(other)


def flickr(*images, caption="ein Hund"):
    return [{"sentences": [caption], "id": str(i), "img_path": image} for i, image in enumerate(images)]


def test_overlap_captions_are_compared_in_any_unicode_form(tmp_path):
    task, caption = TASKS["xflickrco"], "ein Café"
    other = unicodedata.normalize("NFD", caption)
    for name, language, records in (
        ("train", "en", flickr("1.jpg")),
        ("dev", "en", flickr("2.jpg", caption=other)),
        ("test", "de", flickr("2", caption=caption)),
    ):
        write(task.paths(tmp_path, name, language)[0], records)
    with pytest.raises(UserError, match="share 1 images and 1 items"):
        compared("xflickrco", tmp_path, languages=("de",))


def nlvr2(split, count, shared_urls=0, shared_texts=0):
    """Statements about two images each; the first ones' addresses, or texts, are alike in all splits."""
    for i in range(count):
        where = "http://same" if i < shared_urls else f"http://{split}"
        text = f"statement {i}" if i < shared_texts else f"{split} statement {i}"
        yield {
            "sentence": text,
            "identifier": f"{split}-{i}-0-0",
            "label": "True",
            "left_url": f"{where}/{i}.jpg",
            "right_url": f"http://{split}/right{i}.jpg",
        }


def marvl(data, urls, texts, count=60):
    for name, split in (("train", "train"), ("dev", "dev"), ("test", "test1")):
        shared = (0, 0) if name == "train" else (urls, texts)
        write(TASKS["marvl"].paths(data, name, "en")[0], list(nlvr2(split, count, *shared)))
    return {"languages": ("en",)}


def test_overlap_published_in_nlvr2_is_reported_and_more_is_an_error(tmp_path):
    """45 addresses and 25 statements of IGLUE's test are in its dev set."""
    found = compared("marvl", tmp_path, **marvl(tmp_path, 45, 25))
    assert [(f["images"], f["items"], f["first"]["file"], f["second"]["file"]) for f in found] == [
        (45, 25, "nlvr2/annotations/test.jsonl", "nlvr2/annotations/dev.jsonl")
    ]
    assert "counted in IGLUE's files" in found[0]["declared"]
    for urls, texts, words in (
        (46, 25, "share 46 images and 25 items"),
        (45, 26, "share 45 images and 26 items"),
    ):
        with pytest.raises(UserError, match=words):
            compared("marvl", tmp_path, **marvl(tmp_path, urls, texts))


@pytest.mark.parametrize("first", ["test", "dev"])
def test_overlap_nlvr2_test_record_in_training_file_is_an_error(tmp_path, first):
    """Images and statements that they share by other records nobody has counted: that is told."""
    settings = marvl(tmp_path, 0, 0)
    train, other = TASKS["marvl"].path(tmp_path, "train", "en"), TASKS["marvl"].path(tmp_path, first, "en")
    records = train.read_text().splitlines(keepends=True)
    copied = json.loads(other.read_text().splitlines()[0])
    for identifier, wrong in (("train-99-0-0", False), (copied["identifier"], True)):
        train.write_text("".join([*records, json.dumps({**copied, "identifier": identifier}) + "\n"]))
        if wrong:
            with pytest.raises(UserError, match="share 2 images and 1 items"):
                compared("marvl", tmp_path, **settings)
        else:
            (found,) = compared("marvl", tmp_path, **settings)
            assert (found["images"], found["items"], found["first"]["split"]) == (2, 1, first)


def test_overlap_marvl_chinese_shots_share_images_with_test(tmp_path):
    """Their paths have the concept's folder, the test's have not."""
    record = {
        "concept": "73-福建土楼",
        "language": "zh",
        "caption": "句子",
        "chapter": "",
        "id": "zh-0",
        "label": True,
    }
    write(
        tmp_path / "marvl/zero_shot/annotations/marvl-zh.jsonl",
        [{**record, "left_img": f"73-{i}.jpg", "right_img": "1-1.jpg", "id": f"zh-{i}"} for i in range(9)],
    )
    write(TASKS["marvl"].paths(tmp_path, "dev", "en")[0], list(nlvr2("dev", 3)))
    for count in (7, 8):
        write(
            tmp_path / "marvl/few_shot/annotations/marvl-zh_train10x2.jsonl",
            [
                {
                    **record,
                    "caption": "另",
                    "left_img": f"73-福建土楼/73-{i}.jpg",
                    "right_img": "73-福建土楼/73-n-1.jpg",
                }
                for i in range(count)
            ],
        )
        settings = {"languages": ("zh",), "setting": "few_shot", "shots": "10x2"}
        if count == 7:
            (found,) = compared("marvl", tmp_path, **settings)
            assert (found["images"], found["items"]) == (7, 0)
        else:
            with pytest.raises(UserError, match="share 8 images, such as image 'zh/73-0'"):
                compared("marvl", tmp_path, **settings)


def test_overlap_xtd_images_are_excluded_from_training(tmp_path):
    """Of the 1,000 images of XTD, 946 are in Karpathy's training set and 26 in his dev set."""
    official.xtd(tmp_path)
    assert compared("xtd", tmp_path) == []
    names = tmp_path / "xtd/test_image_names.txt"
    lines = names.read_text().splitlines()
    train, dev = official.COCO.format(0) + ".jpg", official.COCO.format(16) + ".jpg"
    names.write_text("".join(f"{line}\n" for line in [train, dev, *lines[2:]]))
    assert compared("xtd", tmp_path) == []
    task = TASKS["xtd"]
    for split, left, image in (("train", 15, train), ("dev", 5, dev)):
        images = [
            item.image for item in merge_captions(task.read(task.path(tmp_path, split, "en"), split, "en"))
        ]
        assert len(images) == left and image not in images


def test_overlap_xtd_in_its_own_folders_is_read(tmp_path):
    official.xtd(tmp_path)
    for folder, codes in (
        ("XTD10", ("en", "es", "it", "ko", "pl", "ru", "tr", "zh")),
        ("MIC", ("de", "fr")),
        ("STAIR", ("jp",)),
    ):
        (tmp_path / "xtd" / folder).mkdir()
        for code in codes:
            shutil.move(tmp_path / f"xtd/test_1kcaptions_{code}.txt", tmp_path / "xtd" / folder)
    shutil.move(tmp_path / "xtd/test_image_names.txt", tmp_path / "xtd/XTD10")
    task = TASKS["xtd"]
    for code in task.languages:
        assert len(list(task.read(task.path(tmp_path, "test", code), "test", code))) == 6
    assert compared("xtd", tmp_path) == []


def test_overlap_within_coco_cn_splits_is_reported(tmp_path):
    official.coco(tmp_path)
    (tmp_path / "coco-cn/coco-cn_test.txt").write_text(
        official.COCO.format(3) + "\n"
    )  # which Karpathy trains on
    (found,) = compared("coco", tmp_path)
    assert (found["first"]["language"], found["second"]["language"], found["images"]) == ("zh", "en", 1)


@pytest.mark.parametrize(
    "task", ["multi30k", "wit", "vqa_v2", "cvil_vqa", "fm_iqa", "ja_vqa", "xnli", "snli_xvnli", "xtd_few"]
)
def test_overlap_other_tasks_have_their_own_sets(tmp_path, task):
    getattr(official, {"xtd_few": "xtd"}.get(task, task))(tmp_path)
    if task == "xtd_few":
        (tmp_path / "xtd/test_image_names.txt").write_text(
            "".join(f"{official.COCO.format(i)}.jpg\n" for i in range(120))
        )
        for code in TASKS[task].languages:
            (tmp_path / f"xtd/test_1kcaptions_{code}.txt").write_text(
                "".join(f"{code} {i}\n" for i in range(120))
            )
    own = {"xtd_few": "single_language", "fm_iqa": "single_language", "ja_vqa": "single_language"}
    assert compared(task, tmp_path, setting=own.get(task, "zero_shot")) == []


def test_overlap_snli_pairs_are_matched_to_xvnli_by_number(tmp_path):
    """The test's premise is an image, and its sentence may be translated. Within SNLI words may repeat, but
    not numbers."""
    official.snli_xvnli(tmp_path)
    train = TASKS["snli_xvnli"].path(tmp_path, "train", "en")
    record = json.loads(train.read_text().splitlines()[0])
    test = json.loads(TASKS["snli_xvnli"].path(tmp_path, "test", "ar").read_text().splitlines()[2])
    for number, shared in (("999.jpg#0r1n", False), (test["pairID"], True)):
        train.write_text(json.dumps({**record, "pairID": number}) + "\n")
        if shared:
            with pytest.raises(UserError, match=r"share 1 items, such as item '24\.jpg#0r1n'"):
                compared("snli_xvnli", tmp_path)
        else:
            assert compared("snli_xvnli", tmp_path) == []
    dev = json.loads(TASKS["snli_xvnli"].path(tmp_path, "dev", "en").read_text().splitlines()[0])
    train.write_text(json.dumps({**dev, "pairID": "999.jpg#0r1n"}) + "\n")
    (found,) = compared("snli_xvnli", tmp_path)
    assert (found["items"], found["first"]["split"]) == (1, "dev")
    train.write_text(json.dumps({**dev, "sentence2": "other words"}) + "\n")
    with pytest.raises(UserError, match="share 1 items"):
        compared("snli_xvnli", tmp_path)


def test_overlap_sentence_pairs_are_items(tmp_path):
    official.xnli(tmp_path)
    (path,) = [p for p in TASKS["xnli"].paths(tmp_path, "test", "en") if p.is_file()]
    train = TASKS["xnli"].path(tmp_path, "train", "en").read_text().splitlines()[1].split("\t")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, f"en\tneutral\t{train[0]}\t{train[1]}\t99"]) + "\n")
    with pytest.raises(UserError, match="share 1 items"):
        compared("xnli", tmp_path)


def test_overlap_stops_run_before_folder_is_opened(finetune, scenes, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(scenes, data)
    dev, test = (data / f"XVNLI/annotations/en/{name}.jsonl" for name in ("dev", "test"))
    dev.write_text(dev.read_text() + test.read_text().splitlines(keepends=True)[0])
    code, printed = finetune("scenes_xvnli", "name=leaks", f"data={data}")
    assert (
        code == 2
        and "dev.jsonl (chosen by) share 1 images and 1 items" in printed
        and not (tmp_path / "leaks").exists()
    )
    code, printed = finetune(
        "scenes_xvnli", "name=last", f"data={data}", "select=last", "epochs=1"
    )  # nothing is chosen by it
    assert code == 0 and json.loads((tmp_path / "last/result.json").read_text())["overlap"] == [], printed


def test_overlap_published_is_stored_in_result(finetune, scenes, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(scenes, data)
    for name in ("dev", "test"):
        path = data / f"nlvr2/annotations/{name}.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()]
        for i, record in enumerate(records):
            record |= {
                side: f"http://{'same' if i < 3 else name}/{side}{i}" for side in ("left_url", "right_url")
            }
            record["sentence"] += f" {name} {i}"
        write(path, records)
    code, printed = finetune("scenes_marvl", "name=told", f"data={data}", "epochs=1")
    assert (
        code == 0 and "published overlap: nlvr2/annotations/test.jsonl shares 6 images and 0 items" in printed
    ), printed
    (found,) = json.loads((tmp_path / "told/result.json").read_text())["overlap"]
    assert found["images"] == 6 and found["second"]["split"] == "dev"


def test_overlap_result_is_cached_until_a_file_changes(tmp_path, monkeypatch):
    """Files of more than a second are read once; one that changes is read again."""
    sets, clock = xgqa(tmp_path), iter(range(0, 1000, 2))
    monkeypatch.setattr(overlap.time, "perf_counter", lambda: float(next(clock)))
    assert compared("xgqa", tmp_path, **sets) == [] and len(list((tmp_path / "runs/cache").iterdir())) == 1
    monkeypatch.setattr(overlap, "find_overlaps", lambda *_: pytest.fail("read again"))
    assert compared("xgqa", tmp_path, **sets) == []
    monkeypatch.undo()
    xgqa(tmp_path, train=gqa((3, "Is it dark?", "n3")))
    with pytest.raises(UserError, match="share 1 images and 1 items"):
        compared("xgqa", tmp_path, **sets)
