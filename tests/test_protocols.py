"""Files that tasks are read from, against the listing of IGLUE's own repository; test sets and few-shot by
its protocol."""

import json
import re
import shutil
import zipfile
from pathlib import Path

import pytest

from finetune.__main__ import main
from finetune.batches import BatchOrder, CaptionBatches, ExampleBatches
from finetune.build import dev_split
from finetune.build import test_split as split_of_test
from finetune.formats import Captioned, Example, answers, stream_jsonl, stream_members
from finetune.recipes import FEW_SHOT_RATES, RECIPES
from finetune.tasks.datasets import TASKS
from raylib.checkpoint import find_best
from raylib.config import override
from raylib.errors import UserError
from raylib.text import Tokenizer
from tests.test_finetune import TOKENIZER
from tune_spaces.jobs import FinetuneSearchJob
from tune_spaces.spaces import SPACES

TREE = [
    line
    for line in (Path(__file__).parent / "iglue_tree.txt").read_text().splitlines()
    if not line.startswith("#")
]
PUBLISHED = ("xgqa", "xvnli", "marvl", "xflickrco", "wit")  # IGLUE's
OURS = {"target_dev_to_en", "shots_to_en", "shots_from_en"}  # made by `finetune.translation`
SHOTS = {
    "xgqa": {"1", "5", "10", "20", "25", "48"},
    "xvnli": {"1", "5", "10", "20", "25", "48"},
    "marvl": {"1", "2", "4", "10", "10x2"},
    "xflickrco": {"1", "5", "10", "25", "50", "100"},
}
WITHOUT_SHOTS = {("marvl", "sw"), ("marvl", "ta"), ("marvl", "en"), ("xflickrco", "en")}


def languages_of(task, split):
    """Those in which IGLUE has a split: English has no translation, the target dev sets no English."""
    only = ["en"] if split in ("train", "dev") else [c for c in TASKS[task].languages if c != "en"]
    return (
        only
        if split in ("train", "dev") or split.startswith(("translated", "target_dev"))
        else TASKS[task].languages
    )


SPLITS = [
    (task, split)
    for task in PUBLISHED
    for split in TASKS[task].splits
    if split not in OURS and "." not in split
]


@pytest.mark.parametrize(("task", "split"), SPLITS)
def test_tasks_name_files_of_iglue_repository(task, split):
    record, tree = TASKS[task], set(TREE)
    for language in languages_of(task, split):
        if split != "shots":
            paths = [str(path) for path in record.paths(Path(), split, language)]
            assert tree & set(paths), (language, paths)
            continue
        pattern = re.escape(str(record.paths(Path(), split, language, "SIZE")[0])).replace("SIZE", r"(\d\w*)")
        sizes = {found[1] for path in TREE if (found := re.fullmatch(pattern, path))}
        assert sizes >= SHOTS[task] if (task, language) not in WITHOUT_SHOTS else not sizes
        for size in sizes:
            assert tree & {str(path) for path in record.paths(Path(), split, language, size)}


def test_tasks_look_for_iglue_names_first():
    """Or that file unzipped: names that only we, or the data's authors, have come after them."""
    for task in PUBLISHED:
        for split in TASKS[task].splits.keys() - OURS - {"shots"}:
            name, _, code = split.partition(".")
            language = code or languages_of(task, name)[-1]
            first = str(TASKS[task].paths(Path(), name, language)[0])
            assert {first, f"{first}.zip"} & set(TREE), first


def put(path, name, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, text)
    return path


LXMERT = [
    {"img_id": "2354786", "label": {"yes": 1.0}, "question_id": "02930152", "sent": "Is the sky dark?"},
    {
        "img_id": "2375429",
        "label": {"pipe": 1.0},
        "question_id": "07333408",
        "sent": "What is on the white wall?",
    },
]


def test_zipped_annotations_are_read_directly(tmp_path):
    """One JSON file in it, whatever macOS has added; the same file unzipped beside is read instead."""
    task = TASKS["xgqa"]
    path = put(tmp_path / "gqa/annotations/train.json.zip", "train.json", json.dumps(LXMERT))
    put(path, "__MACOSX/._train.json", "\0\5\26")
    put(path, ".DS_Store", "")
    expected = [
        Example("02930152", ("Is the sky dark?",), ("2354786",), {"yes": 1.0}),
        Example("07333408", ("What is on the white wall?",), ("2375429",), {"pipe": 1.0}),
    ]
    assert task.path(tmp_path, "train", "en") == path and list(task.read(path, "train", "en")) == expected
    (tmp_path / "gqa/annotations/train.json").write_text(json.dumps(LXMERT[:1]))
    assert task.path(tmp_path, "train", "en").name == "train.json"
    assert list(task.read(task.path(tmp_path, "train", "en"), "train", "en")) == expected[:1]
    line = {
        "gold_label": "neutral",
        "sentence1": "p",
        "sentence2": "h",
        "captionID": "1.jpg#0",
        "pairID": "1.jpg#0r1n",
        "Flikr30kID": "1",
    }
    path = put(tmp_path / "XVNLI/annotations/en/train.jsonl.zip", "data/train.jsonl", json.dumps(line) + "\n")
    assert list(answers.read_xvnli(path)) == [Example("1.jpg#0r1n", ("h",), ("1",), {"neutral": 1.0})]


def test_zipped_annotations_that_are_ambiguous_or_broken_are_named(tmp_path):
    several = put(put(tmp_path / "several.json.zip", "a.json", "[]"), "b.json", "[]")
    none = put(tmp_path / "n.zip", "n.txt", "")
    for path, words in (
        (several, r"2 JSON files \('a.json', 'b.json'\) in it"),
        (none, "no JSON file in it"),
    ):
        with pytest.raises(UserError, match=words):
            list(stream_members(path))
    broken = tmp_path / "broken.json.zip"
    broken.write_bytes(b"PK no zip")
    with pytest.raises(UserError, match=r"broken\.json\.zip: not to be read as a zip"):
        list(answers.read_gqa(broken))
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(UserError, match=r"folder\.json: a folder, where a file is needed"):
        list(stream_members(tmp_path / "folder.json"))
    changed = tmp_path / "changed.jsonl.zip"
    with zipfile.ZipFile(
        changed, "w"
    ) as archive:  # stored as it is: a digit that changes breaks its checksum alone
        archive.writestr("changed.jsonl", '{"n": 1}\n')
    changed.write_bytes(changed.read_bytes().replace(b'{"n": 1}', b'{"n": 2}'))
    with pytest.raises(UserError, match=r"changed\.jsonl\.zip: not to be read as a zip"):
        list(stream_jsonl(changed))


def test_tasks_missing_split_names_every_candidate_path(tmp_path):
    task = TASKS["xgqa"]
    with pytest.raises(UserError) as refused:
        list(task.read(task.path(tmp_path, "train", "en"), "train", "en"))
    for name in ("train.json:", "train.json.zip", "train_balanced_questions.json"):
        assert f"gqa/annotations/{name}" in str(refused.value)


def test_gqa_original_files_are_read_without_iglue_files(tmp_path):
    path = tmp_path / "gqa/annotations/val_balanced_questions.json"
    path.parent.mkdir(parents=True)
    path.write_text(
        json.dumps(
            {"1": {"question": "q", "answer": "yes", "imageId": "2", "types": {"structural": "verify"}}}
        )
    )
    task = TASKS["xgqa"]
    assert [e.kind for e in task.read(task.path(tmp_path, "dev", "en"), "dev", "en")] == ["verify"]


def test_target_dev_uses_translated_dev_sets(tmp_path):
    """IGLUE translated the first of Flickr30K's five captions, and left the others in English."""
    path = tmp_path / "flickr30k/annotations_machine-translate/valid-ru_gmt.jsonl"
    path.parent.mkdir(parents=True)
    texts = ["Группа людей стоит в кузове грузовика.", "Men are standing on a truck."]
    record = {"sentences": texts, "id": "10", "img_path": "10.jpg"}
    path.write_text(json.dumps(record, ensure_ascii=False) + "\n")
    task = TASKS["xflickrco"]
    items = list(task.read(task.path(tmp_path, "target_dev", "ru"), "target_dev", "ru"))
    assert items == [Captioned("10.jpg", ("Группа людей стоит в кузове грузовика.",))]


def test_target_dev_of_task_without_dev_sets_is_an_error():
    with pytest.raises(UserError, match="wit has no development set in 'ja'"):
        dev_split(RECIPES["iglue_wit"](), "ja")
    assert (
        dev_split(RECIPES["iglue_marvl"](), "sw") == dev_split(RECIPES["iglue_xvnli"](), "ar") == "target_dev"
    )
    assert dev_split(RECIPES["iglue_xgqa"](), "de") == "shots_dev"


def test_iglue_empty_captions_count_in_test_and_fail_in_training(tmp_path):
    """Its German and Indonesian tests have one each; in training one is an error."""
    task, record = (
        TASKS["xflickrco"],
        {"sentences": [""], "id": 122239, "img_path": "COCO_val2014_000000122239.jpg"},
    )
    for name, path in (
        ("test", "xFlickrCO/annotations/de/test.jsonl"),
        ("shots", "xFlickrCO/annotations/de/train_5.jsonl"),
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(json.dumps(record) + "\n")
        read = task.read(tmp_path / path, name, "de")
        if name == "test":
            assert list(read) == [Captioned("COCO_val2014_000000122239.jpg", ("",))]
        else:
            with pytest.raises(UserError, match="no empty one"):
                list(read)


def test_xgqa_is_tested_on_iglue_9666_questions():
    xgqa = [name for name in RECIPES if RECIPES[name]().task in ("xgqa", "xgqa_translated")]
    recipes = [name for name in xgqa if RECIPES[name]().setting != "translate_test"]
    assert {"iglue_xgqa", "p0_uc2_baseline", "p1_uc2_suf_xgqa", "p2_xgqa", "iglue_few_shot_xgqa"} < set(
        recipes
    )
    for name in recipes:
        config = RECIPES[name]()
        for language in TASKS[config.task].languages:
            for split in ("test", "few_shot_test"):  # runs of before have either in their settings
                config = override(config, [f"split={split}"])
                path = TASKS[config.task].path(Path(), split_of_test(config, language), language)
                assert str(path) == f"xGQA/annotations/few_shot/{language}/test.json"
    config = override(RECIPES["iglue_xgqa"](), ["setting=translate_test"])
    for split, path in (
        ("test", "few_shot/de/test.json"),
        ("testdev", "zero_shot/testdev_balanced_questions_de.json"),
    ):
        changed = override(config, [f"split={split}"])
        found = TASKS["xgqa"].path(Path(), split_of_test(changed, "de"), "de")
        assert str(found) == f"xGQA/annotations_machine-translate/{path}"


def test_xgqa_testdev_is_for_runs_without_few_shot_files(finetune, tmp_path):
    """Zero-shot and translate-test, and of models that saw none; results say which split they are of."""
    code, printed = finetune("scenes_xgqa", "name=english", "epochs=1")
    found = json.loads((tmp_path / "english/result.json").read_text())
    assert code == 0 and found["split"] == "few_shot_test" and found["counts"]["ru"]["n"] == 60, printed
    for setting in ("zero_shot", "translate_test"):
        code, printed = finetune(
            "scenes_xgqa",
            f"name={setting}",
            f"setting={setting}",
            "split=testdev",
            "epochs=1",
            *([f"model={tmp_path / 'english'}"] if setting == "translate_test" else []),
        )
        found = json.loads((tmp_path / setting / "result.json").read_text())
        assert code == 0 and found["split"] == "testdev" and found["counts"]["ru"]["n"] == 80, printed
    english, few = f"model={tmp_path / 'english'}", f"model={tmp_path / 'few/ru'}"
    code, printed = finetune("scenes_xgqa", "name=few", "setting=few_shot", english, "epochs=1", "batch=4")
    assert code == 0, printed
    for settings in (
        ["setting=few_shot", english],
        ['dev_languages=["ru"]'],
        ["setting=untrained", few],
        ["setting=translate_test", few],
        ["setting=untrained", f"{few}/best"],
    ):
        code, printed = finetune("scenes_xgqa", "name=refused", "split=testdev", *settings)
        assert code == 2 and "split=testdev holds every question of the few-shot files" in printed, printed
        assert printed.strip().count("\n") == 0 and not (tmp_path / "refused").exists()
    taught = [
        "strategies.distillation.task=1",
        'strategies.distillation.tokens=["cls"]',
    ]  # by one that saw them
    code, printed = finetune(
        "scenes_xgqa",
        "name=refused",
        "split=testdev",
        *taught,
        f"strategies.distillation.teacher={tmp_path / 'few/ru'}",
    )
    assert code == 2 and f"{tmp_path / 'few/ru'} trains on some" in printed, printed
    code, printed = finetune("scenes_xgqa", "name=refused", "task=xgqa_translated", "split=testdev")
    assert code == 2 and "no split 'testdev'" in printed


def test_evaluate_older_run_names_its_split(finetune, tmp_path, capsys):
    assert finetune("scenes_xgqa", "name=old", "epochs=1")[0] == 0
    path = tmp_path / "old/result.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "split": "test"})
    )  # as it was written, of 12,578 questions
    config = json.loads((tmp_path / "old/config.json").read_text())
    for new in ("last_batch", "select_metric", "select_ties"):
        del config[new]
    (tmp_path / "old/config.json").write_text(json.dumps(config))
    assert main(["evaluate", str(tmp_path / "old")]) == 0
    printed = capsys.readouterr().out
    assert (
        "on the few_shot_test split" in printed
        and "few_shot/en/test.json" in printed
        and "then called 'test'" in printed
    )
    assert json.loads(path.read_text())["split"] == "few_shot_test"


def examples(count):
    return [Example(str(i), (f"question {i}", "premise"), (), {"yes": 1.0}) for i in range(count)]


@pytest.mark.parametrize(("count", "steps"), [(1490, 480), (27, 20), (64, 20), (65, 40)])
@pytest.mark.parametrize("name", ["iglue_few_shot_xgqa", "p1_uc2_few_shot_xgqa"])
def test_few_shot_xgqa_has_iglue_step_count(name, count, steps):
    """1,490 questions of 48 images in batches of 64: 24 an epoch, the last of them smaller; 20 epochs. Paper
    1 follows it."""
    config = RECIPES[name]()
    decay = {"iglue_few_shot_xgqa": 1e-4, "p1_uc2_few_shot_xgqa": 0.01}[name]
    assert (
        config.shots == 48
        and config.optim.weight_decay == decay
        and config.optim.warmup == 0.1
        and config.optim.schedule_factor == 1
    )
    assert config.optim.lr in FEW_SHOT_RATES
    keep = config.last_batch == "keep"
    batches = ExampleBatches(
        examples(count), ("yes",), None, None, 9, False, BatchOrder(config.batch, 0, keep_last=keep)
    )
    assert config.epochs * batches.epoch_steps == steps


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
def test_example_batches_keep_last_batch_and_every_example(world):
    tokenizer = Tokenizer.load(TOKENIZER)
    parts = [
        ExampleBatches(
            examples(22),
            ("yes", "no"),
            None,
            tokenizer,
            9,
            False,
            BatchOrder(8, 3, rank, world, keep_last=True),
        )
        for rank in range(world)
    ]
    for epoch in range(2):
        taken = [int(n) for place in range(3) for part in parts for n in part.rows(epoch * 3 + place)[2]]
        assert parts[0].epoch_steps == 3 and sorted(taken) == list(range(22))
    last = [part[2] for part in parts]
    assert all(part["samples"] == part["examples"]["size"] == 6 for part in last)
    counts = [len(part["examples"]["answer"]) for part in last]
    assert sum(counts) == 6 and max(counts) - min(counts) <= 1
    dropped = ExampleBatches(examples(22), ("yes", "no"), None, tokenizer, 9, False, BatchOrder(8, 3))
    assert dropped.epoch_steps == 2 and all(dropped.rows(step)[2].tolist() for step in range(2))
    with pytest.raises(
        UserError, match=r"last batch of an epoch has 1 examples, fewer than workers=2; set workers=1"
    ):
        CaptionBatches(
            [Captioned(str(i), ("c",)) for i in range(9)],
            None,
            tokenizer,
            9,
            BatchOrder(8, 0, 0, 2, keep_last=True),
        )
    with pytest.raises(UserError, match="batch of 2 examples is smaller than workers=3; set workers=2"):
        ExampleBatches(examples(22), ("yes", "no"), None, tokenizer, 9, False, BatchOrder(2, 3, 0, 3))


@pytest.mark.parametrize(
    ("task", "shots"), [("xgqa", 5), ("xvnli", 1), ("marvl", 2), ("xflickrco", 1), ("xflickrco", 5)]
)
def test_few_shot_recipes_start_from_english(finetune, tmp_path, task, shots):
    """Each language from the English checkpoint, its best on the dev set that IGLUE uses."""
    assert finetune(f"scenes_{task}", "name=english", "epochs=1", "candidates=3")[0] == 0
    small = ["runtime=local", "backbone=unified", 'languages=["ru"]', "batch=4", "loss=ce", "candidates=3"]
    code, printed = finetune(
        f"iglue_few_shot_{task}", "name=few", f"model={tmp_path / 'english'}", f"shots={shots}", *small
    )
    assert code == 0, printed
    evaluated = json.loads((find_best(tmp_path / "few/ru") / "meta.json").read_text())["evaluation"]
    assert list(evaluated) == (["dev/ru", "score"] if task == "xgqa" else ["dev/en", "score"])
    found = json.loads((tmp_path / "few/result.json").read_text())
    counts = {"xgqa": 0, "xvnli": 3, "marvl": 4, "xflickrco": shots}
    assert task == "xgqa" or found["steps"] == 2 * -(-counts[task] // 4)


@pytest.mark.parametrize(
    ("task", "language", "words"),
    [
        ("xgqa", "ru", "shots= can be 1, 5"),
        ("marvl", "ru", "shots= can be 1, 2, 4"),
        ("xflickrco", "ru", "shots= can be 1, 5"),
        ("marvl", "xx", "this language has no few-shot file"),
    ],
)
def test_few_shot_unavailable_number_of_shots_names_available_ones(scenes, task, language, words):
    record = TASKS[task]
    with pytest.raises(UserError, match=words):
        list(record.read(record.path(scenes, "shots", language, 7), "shots", language))


def test_recipes_of_iglue_have_its_losses():
    """`loss: BCEWithLogitLoss` of XVNLI, NLVR2 and GQA in its task files; VOLTA's `ForwardModelsTrain`
    multiplies its mean by the number of labels for GQA alone."""
    for task, loss in (("xgqa", "bce"), ("xvnli", "bce_mean"), ("marvl", "bce_mean")):
        assert RECIPES[f"iglue_{task}"]().loss == RECIPES[f"iglue_few_shot_{task}"]().loss == loss
    for row in ("standard", "suf"):
        assert RECIPES[f"p1_uc2_{row}_xgqa"]().loss == "bce"
        assert RECIPES[f"p1_uc2_{row}_xvnli"]().loss == "bce_mean"
    assert RECIPES["p0_uc2_baseline"]().loss == "ce"


def test_few_shot_space_is_iglue_grid():
    space = SPACES["few_shot"]
    assert space.grid_settings() == [
        {"optim.lr": rate} for rate in (1e-4, 5e-5, 1e-5)
    ] and FEW_SHOT_RATES == (
        1e-4,
        5e-5,
        1e-5,
    )
    for task in ("xgqa", "xvnli", "xflickrco", "marvl"):
        config = override(RECIPES[f"iglue_few_shot_{task}"](), ["model=M", "data=D", 'languages=["id"]'])
        assert (
            config.epochs == 20
            and config.batch == (64 if task in ("xgqa", "xvnli") else 32)
            and config.optim.lr in FEW_SHOT_RATES
            and config.select == "best"
        )
        job = FinetuneSearchJob()
        if task == "xgqa":  # the target's own dev set
            with pytest.raises(UserError, match="set dev_sets=target_dev"):
                job.trial_config(config, "english_dev")
            searched = job.trial_config(config, "target_dev")
            assert job.metric_names(searched, "target_dev") == ("target_dev", "dev/id")
        else:  # the English one
            searched = job.trial_config(config, "english_dev")
            assert job.parse_report(searched, {"step": 10, "steps": 20, "dev/en": 0.5, "score": 0.5}) == (
                10,
                {"english_dev": 0.5},
            )
    config = override(RECIPES["p3_aug"](), ["model=M", "data=D"])
    with pytest.raises(UserError, match="set dev_sets=target_dev"):
        FinetuneSearchJob().trial_config(config, "english_dev")


def test_scenes_of_older_versions_are_read_or_must_be_rewritten(scenes, tmp_path, finetune):
    """Their training files had GQA's own names; a translated test that they lack is told."""
    folder = tmp_path / "old"
    shutil.copytree(scenes, folder)
    items = json.loads(zipfile.ZipFile(folder / "gqa/annotations/train.json.zip").read("train.json"))
    (folder / "gqa/annotations/train.json.zip").unlink()
    own = {
        i["question_id"]: {"question": i["sent"], "answer": next(iter(i["label"])), "imageId": i["img_id"]}
        for i in items
    }
    (folder / "gqa/annotations/train_balanced_questions.json").write_text(json.dumps(own))
    (folder / "nlvr2/annotations/test.jsonl").rename(folder / "nlvr2/annotations/test1.jsonl")
    shutil.rmtree(folder / "xGQA/annotations_machine-translate")
    assert [
        e.id for e in TASKS["xgqa"].read(TASKS["xgqa"].path(folder, "train", "en"), "train", "en")
    ] == list(own)
    assert TASKS["marvl"].path(folder, "test", "en").name == "test1.jsonl"
    assert finetune("scenes_xgqa", "name=english", f"data={folder}", "epochs=1")[0] == 0
    code, printed = finetune(
        "scenes_xgqa", f"data={folder}", f"model={tmp_path / 'english'}", "setting=translate_test"
    )
    assert code == 2 and "few_shot/ru/test.json: no such file" in printed and "make them anew" in printed
    code, printed = finetune("scenes_xflickrco", f"data={folder}", 'languages=["en","ja"]')
    assert code == 2 and printed.strip().endswith("; it is there in en, de, es, id, ru, zh")
