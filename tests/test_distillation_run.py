"""Distillation from the command line: what a student learns, resumed, with other methods, in two steps;
OSCAR; mistakes."""

import itertools
import json
import shutil
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from finetune.__main__ import main
from finetune.build import build_model
from finetune.recipes import RECIPES
from finetune.stores import stem
from finetune.strategies import STRATEGIES
from finetune.strategies.distillation.teacher import Teacher
from raylib.checkpoint import find_best
from raylib.config import override
from raylib.errors import UserError
from raylib.models.finetuned import FinetuneModel
from raylib.models.oscar import REGION_BOX_DIM, TINY, Oscar
from raylib.monitoring import read_metrics
from raylib.randomness import hash64
from raylib.sample import DATA
from raylib.search.trial import TuneReporter
from tests.conftest import QUICK
from tests.test_oscar import write_oscar_tsv
from tests.test_strategies_run import ANSWERS, REFUSED, SETTINGS
from tune_spaces.jobs import FinetuneSearchJob
from tune_spaces.spaces import SPACES


@pytest.fixture(scope="session")
def parallel(scenes, tmp_path_factory):
    """Questions of the scenes in English and Russian, as cViL has them: 30 to train on, 15 to choose by, 15
    to test."""
    folder = tmp_path_factory.mktemp("parallel")
    answers = json.loads((scenes / "gqa/annotations/trainval_label2ans.json").read_text())
    files = [
        json.loads((scenes / f"xGQA/annotations/few_shot/{code}/test.json").read_text())
        for code in ("en", "ru")
    ]
    (folder / "cvil").mkdir()
    (folder / "cvil/answers.json").write_text(json.dumps(answers))
    lines = []
    for key, item in files[0].items():
        texts = {"en": item["question"], "ru": files[1][key]["question"]}
        record = {
            "q_id": key,
            "img_id": item["imageId"],
            **texts,
            "an": [answers.index(item["answer"])],
            "s": [1.0],
        }
        lines.append(json.dumps(record) + "\n")
    for name, rows in (("train", lines[:30]), ("dev", lines[30:45]), ("test", lines[45:])):
        (folder / f"cvil/{name}.jsonl").write_text("".join(rows))
    for name in ("vectors.txt", "dictionaries", "images.tar"):
        (shutil.copytree if (scenes / name).is_dir() else shutil.copy2)(scenes / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def teacher(parallel, model, tmp_path_factory):
    """An English model of these questions."""
    runs = tmp_path_factory.mktemp("teacher")
    assert (
        main(
            [
                "scenes_xgqa",
                "task=cvil_vqa",
                "name=english",
                f"model={model}",
                f"data={parallel}",
                f"runs={runs}",
                "epochs=1",
                'languages=["en"]',
                *QUICK,
                "batch=10",
                "optim.lr=0.01",
                'freeze=["vision"]',
            ]
        )
        == 0
    )
    return runs / "english"


@pytest.fixture
def distil(finetune, parallel, teacher):
    """`distil(*settings)`: a student of Russian."""
    fixed = [
        "task=cvil_vqa",
        f"data={parallel}",
        'languages=["ru"]',
        "setting=single_language",
        "batch=10",
        f"strategies.distillation.teacher={teacher}",
        "select=last",
    ]
    return lambda *settings: finetune("scenes_xgqa", *fixed, *settings)


CLS = 'strategies.distillation.tokens=["cls"]'


def weights(folder, step=6):
    return load_file(folder / "ru" / "checkpoints" / f"step_{step:06d}" / "model.safetensors")


def test_distillation_with_every_cache_and_a_broken_image_resumes_to_the_bit(distil, parallel, tmp_path):
    """Image states of a frozen encoder, and the teacher's, of examples of which some are not trained on."""
    with tarfile.open(parallel / "images.tar") as tar:
        tar.extractall(tmp_path / "images", filter="data")
    broken = json.loads((parallel / "cvil/train.jsonl").read_text().splitlines()[0])["img_id"]
    (path,) = (tmp_path / "images").rglob(f"{stem(broken)}.*")
    path.write_bytes(b"no image")
    own = [CLS, 'freeze=["vision"]', "strategies.distillation.states=stored", "bad_limit=0.5"]
    own.append(f"images={tmp_path / 'images'}")
    for name, stops in (("whole", [[]]), ("parts", [["fit.stop_after=4"], []])):
        for stop in stops:
            code, printed = distil(f"name={name}", *own, *stop)
            assert code == 0, printed
    runs = [tmp_path / name / "ru" for name in ("whole", "parts")]
    lines = [[(r["step"], r["loss/cls"]) for r in read_metrics(run) if "loss/cls" in r] for run in runs]
    assert lines[0] == lines[1] and len(lines[0]) == 6
    assert all(
        value.equal(weights(tmp_path / "parts")[key]) for key, value in weights(tmp_path / "whole").items()
    )
    results = [json.loads((run.parent / "result.json").read_text())["items_skipped"] for run in runs]
    assert results[0] == results[1] and results[0]["train"] > 0


def test_distillation_run_lowers_distance_and_resumes(distil, tmp_path):
    """The distance to the teacher falls; a run stopped in its middle is the same."""
    code, printed = distil("name=whole", CLS, "epochs=4", "optim.lr=0.003")
    assert code == 0, printed
    losses = [line["loss/cls"] for line in read_metrics(tmp_path / "whole" / "ru") if "loss/cls" in line]
    assert len(losses) == 12 and losses[-1] < 0.7 * losses[0]
    for stop in (["fit.stop_after=5"], []):
        assert distil("name=parts", CLS, "epochs=4", "optim.lr=0.003", *stop)[0] == 0
    whole, parts = weights(tmp_path / "whole", 12), weights(tmp_path / "parts", 12)
    assert all(value.equal(parts[key]) for key, value in whole.items())
    found = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert found["accuracy"].keys() == {"ru"} and "distillation" in found["method"]


@pytest.mark.parametrize("frozen", [["vision"], []], ids=["encoded once", "pixels"])
def test_distillation_stored_states_give_same_losses(distil, tmp_path, frozen):
    """Made once into safetensors shards, read back; a resumed run reads the same ones."""
    runs = {}
    for name, stops in (("live", [[]]), ("stored", [[]]), ("parts", [["fit.stop_after=4"], []])):
        chosen = [
            f"strategies.distillation.states={'live' if name == 'live' else 'stored'}",
            f"freeze={json.dumps(frozen)}",
        ]
        for stop in stops:
            code, printed = distil(f"name={name}", CLS, *chosen, *stop)
            assert code == 0, printed
        runs[name] = [line["loss/cls"] for line in read_metrics(tmp_path / name / "ru") if "loss/cls" in line]
    assert runs["live"] == pytest.approx(runs["stored"], rel=1e-5) and len(runs["live"]) == 6
    assert all(
        value.equal(weights(tmp_path / "parts")[key]) for key, value in weights(tmp_path / "stored").items()
    )
    (folder,) = (tmp_path / "stored" / "teacher").iterdir()
    assert list(folder.glob("states-0-*.safetensors"))


@pytest.mark.parametrize(
    ("settings", "is_stored"),
    [
        ((), True),
        (("strategies.distillation.store_gb=0",), False),
        (("epochs=1",), False),
        (("augment.scale=[0.5,1]",), False),
    ],
    ids=["by default", "no room", "one epoch", "augmented"],
)
def test_distillation_teacher_reads_each_example_once_a_run(
    distil, tmp_path, monkeypatch, settings, is_stored
):
    states, read = Teacher.states, []

    def count(self, batch):
        read.append(len(batch["text"].lengths))
        return states(self, batch)

    monkeypatch.setattr(Teacher, "states", count)
    epochs = 1 if settings == ("epochs=1",) else 3
    code, printed = distil("name=auto", CLS, f"epochs={epochs}", *settings)
    assert code == 0, printed
    assert sum(read) == (30 if is_stored else 30 * epochs)
    assert (tmp_path / "auto" / "teacher").is_dir() == is_stored


def test_distillation_teacher_head_is_copied_and_frozen(distil, teacher, tmp_path):
    """It is copied and stands still, so the dev set can choose the best checkpoint."""
    code, printed = distil("name=headed", CLS, "strategies.distillation.classifier=teacher", "select=best")
    assert code == 0, printed
    trained = weights(tmp_path / "headed")
    there = load_file(find_best(teacher) / "model.safetensors")
    assert all(trained[name].equal(value) for name, value in there.items() if name.startswith("head."))
    before = (tmp_path / "headed" / "ru" / "predictions" / "ru.jsonl").read_text()
    assert main(["evaluate", str(tmp_path / "headed")]) == 0
    assert (tmp_path / "headed" / "ru" / "predictions" / "ru.jsonl").read_text() == before
    code, printed = distil("name=new", CLS, "select=best")
    assert code == 2 and "trains no head that could choose the best checkpoint" in printed


def test_distillation_with_answers_and_all_other_strategies(distil, tmp_path):
    """Everything that is no tuning at once, in English; resumed."""
    names = [name for name in ANSWERS if name not in ("lora", "adapter", "compacter", "soft_prompt")]
    chosen = [
        CLS,
        "strategies.distillation.task=1",
        "setting=zero_shot",
        'languages=["en","ru"]',
        *(setting for name in names for setting in SETTINGS[name]),
    ]
    for name, stops in (("whole", [[]]), ("parts", [["fit.stop_after=4"], []])):
        for stop in stops:
            code, printed = distil(f"name={name}", *chosen, *stop)
            assert code == 0, printed
    whole, parts = (
        load_file(tmp_path / name / "checkpoints/step_000006/model.safetensors")
        for name in ("whole", "parts")
    )
    assert all(value.equal(parts[key]) for key, value in whole.items())
    assert {"loss/cls", "loss/task", "loss/prior"} <= {
        key for line in read_metrics(tmp_path / "whole") for key in line
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ANSWERS)
def test_distillation_composes_with_each_other_strategy(distil, tmp_path, name):
    chosen = [
        CLS,
        "strategies.distillation.task=1",
        "setting=zero_shot",
        'languages=["en","ru"]',
        *SETTINGS[name],
    ]
    for run, stops in (("whole", [[]]), ("parts", [["fit.stop_after=4"], []])):
        for stop in stops:
            code, printed = distil(f"name={run}", *chosen, *stop)
            assert code == 0, printed
    whole, parts = (
        load_file(tmp_path / run / "checkpoints/step_000006/model.safetensors") for run in ("whole", "parts")
    )
    assert all(value.equal(parts[key]) for key, value in whole.items())


@pytest.fixture
def tagged(parallel, tmp_path):
    """The questions with tags, regions of their images and alignments, and a small OSCAR to start from."""
    data = tmp_path / "tagged"
    shutil.copytree(parallel, data)
    rng, images = np.random.default_rng(0), {}
    for split in ("train", "dev", "test"):
        records = [json.loads(line) for line in (data / f"cvil/{split}.jsonl").read_text().splitlines()]
        for i, record in enumerate(records):
            record["o"] = "dog;polar bear" if i % 3 else ""
            regions = rng.random((1 + i % 4, TINY.features + REGION_BOX_DIM))
            regions[:, TINY.features : TINY.features + 4].sort()  # x1, y1 below x2, y2
            images[record["img_id"]] = regions
        (data / f"cvil/{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        if split == "train":
            pairs = [(record["ru"].split(), record["en"].split()) for record in records]
    write_oscar_tsv(data / "regions.tsv", images)
    (data / "alignments").mkdir()
    (data / "alignments/ru.text").write_text("".join(f"{' '.join(a)} ||| {' '.join(b)}\n" for a, b in pairs))
    links = (" ".join(f"{i}-{i}" for i in range(min(map(len, pair)))) for pair in pairs)
    (data / "alignments/ru.align").write_text("".join(f"{line}\n" for line in links))
    torch.manual_seed(0)
    FinetuneModel(Oscar(TINY.model_copy(update={"layers": 4})), ("?",), 1, 0.1, TINY.features).save(
        tmp_path / "oscar"
    )
    shutil.copy2(DATA / "tokenizer.model", tmp_path / "oscar")
    return data


@pytest.mark.parametrize("normalise", ["paper", "public"])
def test_distillation_of_small_oscar_with_all_terms(finetune, tagged, tmp_path, normalise):
    """Words, tags, regions, slots without one: live, stored and resumed."""
    fixed = [
        "task=cvil_vqa",
        f"data={tagged}",
        f"regions={tagged}/regions.tsv",
        f"model={tmp_path / 'oscar'}",
        "image_size=null",
        "batch=10",
        "optim.lr=0.003",
        "setting=single_language",
    ]
    code, printed = finetune("scenes_xgqa", "name=english", *fixed, 'languages=["en"]')
    assert code == 0, printed
    settings = [
        *fixed,
        'languages=["ru"]',
        "select=last",
        f"strategies.distillation.teacher={tmp_path / 'english' / 'en'}",
        f"strategies.distillation.normalise={normalise}",
    ]
    if normalise == "public":
        settings.append("strategies.distillation.slots=5")
    runs, stored = {}, "strategies.distillation.states=stored"
    for name, more in (("live", [[]]), ("stored", [[stored]]), ("parts", [["fit.stop_after=4"], []])):
        for stop in more:
            code, printed = finetune("scenes_xgqa", f"name={name}", *settings, *stop)
            assert code == 0, printed
        runs[name] = [line for line in read_metrics(tmp_path / name / "ru") if "loss/cls" in line]
    for term in ("cls", "image", "tags", "mixed"):
        live, read = ([line[f"loss/{term}"] for line in runs[name]] for name in ("live", "stored"))
        assert live == pytest.approx(read, rel=1e-3) and live[0] > 0
    assert all(
        value.equal(weights(tmp_path / "parts")[key]) for key, value in weights(tmp_path / "live").items()
    )


@pytest.fixture
def cvil_data(tagged):
    """The tagged questions in Hindi and Japanese too, two answers that are one in Hindi, and Japanese VQA in
    the file that is published, about 25 images."""
    for split in ("train", "dev", "test"):
        file = tagged / f"cvil/{split}.jsonl"
        records = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text(
            "".join(json.dumps(r | {"hi": r["ru"], "ja": r["ru"]}) + "\n" for r in records), encoding="utf-8"
        )
    for language, kind in itertools.product(("hi", "ja"), ("text", "align")):
        shutil.copy2(tagged / f"alignments/ru.{kind}", tagged / f"alignments/{language}.{kind}")
    answers = json.loads((tagged / "cvil/answers.json").read_text())
    translations = [f"उत्तर {max(1, i)}" for i in range(len(answers))]
    (tagged / "cvil/answers_hi.json").write_text(json.dumps(translations))
    (tagged / "ja_vqa").mkdir()
    questions = ("何が見える？", "どこにいる？", "いくつある？")
    records = [
        {
            "id": i,
            "qas": [{"qa_id": i, "question": questions[i % 3], "answer": ("猫", "犬がいる", "二つ")[i % 3]}],
        }
        for i in range(25)
    ]
    with zipfile.ZipFile(tagged / "ja_vqa/question_answers.json.zip", "w") as archive:
        archive.writestr("question_answers.json", json.dumps(records))
    rng = np.random.default_rng(1)
    regions = {str(i): rng.random((3, TINY.features + REGION_BOX_DIM)) for i in range(25)}
    for rows in regions.values():
        rows[:, TINY.features : TINY.features + 4].sort()
    text = (tagged / "regions.tsv").read_text()
    write_oscar_tsv(tagged / "regions.tsv", regions)
    (tagged / "regions.tsv").write_text(text + (tagged / "regions.tsv").read_text())
    return tagged


def test_p3_recipes_from_teacher_to_tables(finetune, cvil_data, tmp_path):
    """Paper 3 as its recipes have it, on miniature data: a teacher, students of two languages, from each of
    which its own classifier starts, and Japanese VQA with BLEU and a column for each question word."""
    own = [
        *(f"data={cvil_data}", f"regions={cvil_data}/regions.tsv", "image_size=null", "runtime=local"),
        *("workers=1", "batch=10", "epochs=1", "fit.eval_every=0", "length=40", "max_regions=2"),
        *("strategies.head_first.epochs=1", f"model={tmp_path / 'oscar'}"),
    ]
    code, printed = finetune("p3_baseline", "name=teacher", *own, 'languages=["en"]')
    assert code == 0, printed
    distillation = [
        *(setting for setting in own if "head_first" not in setting),
        *('languages=["hi","ja"]', f"strategies.distillation.teacher={tmp_path / 'teacher/en'}"),
        "strategies.distillation.layers=null",
    ]
    code, printed = finetune("p3_kd", "name=students", *distillation)
    assert code == 0, printed
    students = [*own, 'languages=["hi","ja"]', f"model={tmp_path / 'students'}"]
    code, printed = finetune("p3_classify", "name=classified", *students)
    assert code == 0, printed

    for language in ("hi", "ja"):
        student, part = tmp_path / "students" / language, tmp_path / "classified" / language
        distilled = load_file(student / "checkpoints/step_000003/model.safetensors")
        first = load_file(find_best(part / "classifier") / "model.safetensors")
        last = load_file(part / "checkpoints/step_000003/model.safetensors")
        # the classifier alone, not the pooler either; then everything, from where it ended
        backbone = [name for name in distilled if name.startswith("backbone.")]
        assert all(first[name].equal(distilled[name]) for name in backbone)
        assert not any(
            last[name].equal(distilled[name]) for name in backbone if ".weight" in name and "pooler" in name
        )
        rates = [line["lr"] for line in read_metrics(part / "classifier") if "lr" in line]
        assert rates == pytest.approx([1e-4 * (3 - step) / 3 for step in range(3)])
        rates = [line["lr"] for line in read_metrics(part) if "lr" in line]
        assert rates == pytest.approx([5e-5 * (3 - step) / 3 for step in range(3)])
        stored = json.loads((part / "config.json").read_text())
        assert stored["model"] == str(student) and stored["dropout"] == 0.3
    num_answers = len(json.loads((cvil_data / "cvil/answers.json").read_text()))
    heads = {
        language: load_file(tmp_path / "classified" / language / "checkpoints/step_000003/model.safetensors")
        for language in ("hi", "ja")
    }
    assert [len(heads[language]["head.output.bias"]) for language in ("hi", "ja")] == [
        num_answers - 1,
        num_answers,
    ]
    assert {name for name in heads["hi"] if name.startswith("head.")} == {
        "head.output.weight",
        "head.output.bias",
    }
    result = json.loads((tmp_path / "classified/result.json").read_text())
    assert result["steps"] == 2 * (3 + 3) and set(result["by_type"]["hi"]) <= {"yes/no", "number", "other"}

    code, printed = finetune(
        "p3_ja_vqa", "name=japanese", *own, "answers=2", 'languages=["ja"]', f"model={tmp_path / 'students'}"
    )
    assert code == 0, printed
    result = json.loads((tmp_path / "japanese/result.json").read_text())
    assert set(result["by_type"]["ja"]) == {"nani (what)", "doko (where)", "ikutsu (how many)"}
    assert "ja" in result["bleu"] and 0 < result["coverage"]["ja"] < 1
    table = (tmp_path / "japanese/result.md").read_text()
    assert "doko (where)" in table and "BLEU" in table
    assert main(["evaluate", str(tmp_path / "classified")]) == 0
    code, printed = finetune("p3_classify", "name=third", *students, 'languages=["en"]')
    assert code == 2 and "none for 'en'; set languages=hi,ja" in printed


def test_p3_steps_on_scenes_as_documented(finetune, tmp_path):
    """Teacher, students, their classifiers, a table: as docs/methods.md has them, by the recipes' names."""
    own = ["epochs=1", 'languages=["ru"]', "train_limit=32", "test_limit=16"]
    code, printed = finetune("transfer_teacher", "epochs=1", "train_limit=32", "test_limit=16")
    assert code == 0, printed
    teacher = f"strategies.distillation.teacher={tmp_path / 'transfer_teacher'}"
    code, printed = finetune("transfer_students", *own, teacher)
    assert code == 0, printed
    code, printed = finetune("transfer_classified", *own, f"model={tmp_path / 'transfer_students'}")
    assert code == 0 and "| ru |" in printed, printed
    part = tmp_path / "transfer_classified/ru"
    assert (part / "classifier/part.json").is_file()
    assert json.loads((part / "config.json").read_text())["model"] == str(tmp_path / "transfer_students/ru")


def test_distillation_two_stages_as_separate_runs(finetune, distil, parallel, tmp_path):
    """Distilled, then on the answers: the classifier alone for an epoch, then all layers; the best checkpoint
    by validation. The variant without distillation is the second step by itself, on translations."""
    code, printed = distil("name=first", CLS, 'freeze=["vision"]')
    assert code == 0, printed
    second = [
        "task=cvil_vqa",
        f"data={parallel}",
        'languages=["ru"]',
        "setting=single_language",
        "batch=10",
        "epochs=3",
        f"model={tmp_path / 'first' / 'ru'}",
        "strategies.head_first.epochs=1",
        "answers=5",
        "fit.keep=9",
    ]
    code, printed = finetune("scenes_xgqa", "name=second", *second, 'freeze=["vision"]')
    assert code == 0, printed
    first, after, last = (
        weights(tmp_path / "first"),
        *(
            load_file(tmp_path / "second" / "ru" / "checkpoints" / f"step_{step:06d}" / "model.safetensors")
            for step in steps(tmp_path)
        ),
    )
    layers = [
        name
        for name in first
        if name.startswith(("backbone.text.", "backbone.fusion.", "backbone.embedding."))
    ]
    assert all(first[name].equal(after[name]) for name in layers) and not all(
        first[name].equal(last[name]) for name in layers
    )
    found = json.loads((tmp_path / "second" / "result.json").read_text())
    counts = found["counts"]["ru"]
    assert (
        found["coverage"]["ru"] == pytest.approx(1 - counts["unknown_answers"] / counts["n"])
        and found["coverage"]["ru"] < 1
    )
    assert found["unknown_training_answers"] > 0 and found["method"] == "head first (epochs 1)"
    assert find_best(tmp_path / "second" / "ru").is_dir()
    code, printed = finetune("scenes_xgqa", "name=bad", *second)
    assert code == 2 and "set freeze=vision" in printed


BOTH = [
    CLS,
    "strategies.distillation.epochs=2",
    "strategies.head_first.epochs=1",
    'freeze=["vision"]',
    "epochs=3",
    "select=best",
]


def test_distillation_two_stages_in_one_run_equal_separate_runs(distil, tmp_path):
    """RUN/distilled is the first step's run to the bit; the run's own training begins with its layers, and
    stands still in all but the head at first; also where either was interrupted."""
    code, printed = distil("name=whole", *BOTH, "fit.keep=9")
    assert code == 0, printed
    assert distil("name=first", CLS, 'freeze=["vision"]', "epochs=2")[0] == 0
    for stop in (["fit.stop_after=2"], ["fit.stop_after=7"], []):
        code, printed = distil("name=parts", *BOTH, *stop)
        assert code == 0, printed

    def at(folder, step):
        return load_file(tmp_path / folder / f"checkpoints/step_{step:06d}/model.safetensors")

    first, distilled, head_only, last = (
        at("first/ru", 6),
        at("whole/ru/distilled", 6),
        at("whole/ru", 3),
        at("whole/ru", 9),
    )
    assert all(value.equal(distilled[name]) for name, value in first.items())
    changed = {name for name, value in distilled.items() if not value.equal(head_only[name])}
    assert changed and all(name.startswith("head.") for name in changed)
    assert any(
        not value.equal(last[name])
        for name, value in head_only.items()
        if name.startswith("backbone.fusion.")
    )
    assert all(value.equal(at("parts/ru", 9)[name]) for name, value in last.items())
    found = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert found["steps"] == 2 * 3 + 3 * 3 and (tmp_path / "whole/ru/distilled/part.json").is_file()
    before = (tmp_path / "whole/ru/predictions/ru.jsonl").read_text()
    assert main(["evaluate", str(tmp_path / "whole")]) == 0
    assert (tmp_path / "whole/ru/predictions/ru.jsonl").read_text() == before


def searched(parallel, teacher, model, tmp_path, *settings):
    """(job, the config of a trial of the space `distillation`'s recipe, made small)."""
    own = [
        f"model={model}",
        f"data={parallel}",
        f"runs={tmp_path}",
        'languages=["ru"]',
        "batch=10",
        "length=40",
        "name=trial",
        "backbone=unified",
        "runtime=local",
        "workers=1",
        "image_size=16",
        "fit.loader_workers=0",
        "fit.bf16=false",
        "head_dropout=0.1",
        *("classifier.layers=2", "classifier.pooled_dropout=0", "classifier.init=scaled", "fit.eval_every=0"),
        f"strategies.distillation.teacher={teacher}",
        "strategies.distillation.backbone=unified",
        CLS,
        'freeze=["vision"]',
        *settings,
    ]
    recipe = SPACES["distillation"].recipe
    job = FinetuneSearchJob()
    config = override(
        RECIPES[recipe if "task" not in settings else "p3_kd"](), [s for s in own if s != "task"]
    )
    return job, job.trial_config(config, "target_dev")


def test_distillation_search_ranks_by_trained_head(parallel, teacher, model, tmp_path):
    """A score that is told while it distils counts for nothing; the last ones are of the second step, whose
    head learns, first alone."""
    small = ["epochs=2", "strategies.distillation.epochs=1", "strategies.head_first.epochs=1"]
    job, config = searched(parallel, teacher, model, tmp_path, *small)
    job.check_config(config)
    assert (job.epochs_per_run(config), job.stage_epochs(config), job.warmup_epochs(config)) == (4, 2, 3)
    reported = []
    scores = job.run(
        config,
        Recorder(
            lambda metrics, before: reported.append((before, *job.parse_report(config, metrics))), False
        ),
    )
    assert [(before + completed, list(found)) for before, completed, found in reported] == [
        (1, []),
        (2, ["target_dev", "dev/ru"]),
        (3, ["target_dev", "dev/ru"]),
        (4, ["target_dev", "dev/ru"]),
    ]
    assert (
        scores["target_dev"]
        == scores["dev/ru"]
        == max(found["target_dev"] for before, _, found in reported if before == 2)
    )
    run = tmp_path / "trial" / "ru"
    heads = [
        load_file(path / "model.safetensors")["head.output.weight"]
        for path in (
            run / "distilled/checkpoints/step_000003",
            run / "classifier/checkpoints/step_000003",
            find_best(run),
        )
    ]
    torch.manual_seed(int(hash64(0, "head")) >> 1)
    assert heads[0].equal(build_model(config).head.output.weight)  # as the seed drew it
    assert not heads[1].equal(heads[0]) and not heads[2].equal(heads[0])


class Recorder(TuneReporter):
    """Calls `to_report` without telling Tune."""

    def __call__(self, metrics, checkpoint):
        self._report(metrics)

    def after(self, epochs, num_epochs=None):
        return Recorder(self.to_report, self.keep, self.epochs_before + epochs, num_epochs)


def test_distillation_search_with_random_head_is_refused(parallel, teacher, model, tmp_path):
    job, config = searched(parallel, teacher, model, tmp_path, "task", "select=last")
    with pytest.raises(UserError, match="nothing trains the head, which trials are ranked by"):
        job.check_config(config)
    its_own = ["strategies.distillation.classifier=teacher", "image_size=null"]
    job, config = searched(parallel, teacher, model, tmp_path, "task", "select=last", *its_own)
    job.check_config(config)  # the teacher's is no random one
    assert all(space.recipe != "p3_kd" for space in SPACES.values())


def steps(runs) -> tuple[int, int]:
    """The first and the last checkpoint: after an epoch, and at the end."""
    found = sorted(
        int(path.name.removeprefix("step_"))
        for path in (runs / "second" / "ru" / "checkpoints").glob("step_*")
    )
    return found[0], found[-1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ([], "no such file; word alignments are made with"),
        (['strategies.distillation.tokens=["cls","image"]'], "unified has no tokens of images in its rows"),
        (['strategies.distillation.tokens=["cls","cls"]'], "name each once"),
        ([CLS, "strategies.distillation.teacher=none"], "teacher=none: no such model"),
        ([CLS, "strategies.distillation.layers=[9]"], "layers=[9]: the model has layers 1 to 4"),
        (
            [CLS, "strategies.prior.k=3"],
            "which strategies.distillation takes away; set strategies.distillation.task=1",
        ),
        ([CLS, "head=decoder"], "strategies.distillation needs the hidden states of a classifier"),
        ([CLS, "image_size=32"], "the teacher sees images of 16 pixels, the student of 32"),
        ([CLS, "answers=5", "strategies.distillation.classifier=teacher"], "the teacher's answers"),
        (['strategies.distillation.tokens=["mixed"]', "setting=zero_shot"], "training reads English alone"),
    ],
)
def test_distillation_wrong_settings_are_one_line_errors(distil, settings, words):
    code, printed = distil("name=wrong", *settings)
    assert code == 2 and words in printed and printed.strip().splitlines()[-1].startswith("error: ")


def test_distillation_few_shot_goes_on_from_english_with_teacher(finetune, tmp_path):
    """xGQA's few-shot files are parallel: a student goes on from English, its answers and the teacher's
    states together."""
    code, printed = finetune("scenes_xgqa", "name=english", "epochs=1")
    assert code == 0, printed
    english = tmp_path / "english"
    code, printed = finetune(
        "scenes_xgqa",
        "name=few",
        f"model={english}",
        "setting=few_shot",
        CLS,
        "batch=5",
        f"strategies.distillation.teacher={english}",
        "strategies.distillation.task=1",
    )
    assert code == 0, printed
    losses = {key for line in read_metrics(tmp_path / "few" / "ru") for key in line}
    assert {"loss/cls", "loss/task"} <= losses


def test_distillation_on_retrieval_is_refused(finetune, teacher):
    code, printed = finetune("scenes_xflickrco", f"strategies.distillation.teacher={teacher}", "select=last")
    assert code == 2 and "strategies.distillation needs a task with answers" in printed


def test_distillation_is_registered_before_text_changing_strategies():
    order = list(STRATEGIES)
    assert order.index("distillation") < order.index("code_mixing")
    assert not REFUSED & set(itertools.product(["distillation"], order))
