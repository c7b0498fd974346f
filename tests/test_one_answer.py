"""Signs that a language is not read: in the figures of constructed predictions, and in every table."""

import json
import shutil

import pytest

from finetune.compare import compare_runs, to_markdown, write_latex
from finetune.one_answer import footnotes, marks_of
from finetune.predict import AnswerCounts, score
from finetune.report import marked, table
from raylib.sample.scenes import writer
from raylib.sample.scenes.writer import ScenesConfig
from tests.test_compare import runs, shown  # noqa: F401 - a fixture


def figures(*items: tuple[str, str, int]) -> dict:
    """Figures of so many items each with (right answer, prediction)."""
    counts = AnswerCounts()
    for right, prediction, count in items:
        for _ in range(count):
            counts.add({right: 1.0}, prediction)
    return counts.figures()


LIVELY = figures(
    *(("yes", "yes", 30), ("yes", "no", 20), ("no", "yes", 25), ("no", "no", 25), ("cat", "dog", 50))
)
ONE = figures(("yes", "no", 49), ("no", "no", 46), ("no", "yes", 5))
ONE_OF_YES_NO = figures(
    *(("yes", "no", 48), ("no", "no", 48), ("no", "yes", 4), ("cat", "dog", 150), ("dog", "cat", 150))
)
THINGS = figures(
    *(("yes", "cat", 30), ("yes", "dog", 20), ("no", "cat", 25), ("no", "bird", 23), ("no", "no", 2)),
    ("cat", "cat", 9),
)


def test_answer_counts_of_constructed_predictions():
    assert LIVELY["n"] == 150 and (LIVELY["answer"], LIVELY["share"]) == ("yes", 55 / 150) == (
        "yes",
        55 / 150,
    )
    assert LIVELY["right_share"] == 50 / 150
    assert LIVELY["yes_no"] == {"n": 100, "answer": "yes", "share": 0.55, "right_share": 0.5, "answered": 1.0}
    assert THINGS["yes_no"]["answered"] == 0.02 and THINGS["yes_no"]["answer"] == "cat"
    assert "yes_no" not in figures(("True", "False", 30)) and AnswerCounts().figures() == {}


@pytest.mark.parametrize(
    ("found", "marks"),
    [
        (LIVELY, ""),
        (ONE, "†"),
        (ONE_OF_YES_NO, "†"),
        (THINGS, "‡"),
        (figures(("yes", "cat", 50), ("no", "cat", 50)), "†‡"),
        (figures(("True", "True", 91), ("False", "True", 9)), ""),  # so is the truth
        (figures(("a", "a", 70), ("b", "a", 30)), "†"),
        (figures(("a", "a", 71), ("b", "a", 29)), ""),
        (figures(("a", "a", 50), ("b", "a", 40), ("b", "b", 10)), ""),  # 90 %, and not more
        (figures(("a", "a", 10), ("b", "a", 9)), ""),  # 19 items
        (figures(("yes", "no", 9), ("yes", "cat", 81), ("no", "dog", 10)), "‡"),
        (figures(("yes", "no", 10), ("yes", "cat", 80), ("no", "dog", 10)), ""),
        ({}, ""),
    ],
)
def test_marks_of_constructed_predictions(found, marks):
    assert marks_of(found) == marks
    assert len(footnotes({"ru": found})) == len(marks)


def test_footnotes_say_what_is_answered():
    one, things = footnotes({"en": LIVELY, "ru": ONE, "bn": ONE_OF_YES_NO, "zh": THINGS})
    assert one == (
        "† note: ru: 95.0 % of the predictions are 'no' (the commonest right one: 51.0 %); bn: 96.0 % of the "
        "answers to yes-no questions are 'no' (the commonest right one: 52.0 %)"
    )
    assert things == "‡ note: zh: 98.0 % of the yes-no questions get neither yes nor no"


def test_score_counts_answers_of_what_has_a_label_and_an_image():
    lines = [
        {"id": "1", "labels": {"yes": 1.0, "maybe": 0.3}, "prediction": "no", "kind": "verify"},
        {"id": "2", "labels": {"cat": 1.0}, "prediction": "no", "kind": "query"},
        {"id": "3", "labels": {"cat": 1.0}, "prediction": "", "kind": "query", "error": "gone"},
        {"id": "4", "labels": {}, "prediction": "dog", "kind": ""},
    ]
    assert score(lines, frozenset({"yes", "no", "cat"}))["answers"] == {
        "n": 2,
        "answer": "no",
        "share": 1.0,
        "right_share": 0.5,
        "yes_no": {"n": 1, "answer": "no", "share": 1.0, "right_share": 1.0, "answered": 1.0},
    }


def test_compare_marks_the_cell_of_a_language(runs, tmp_path):  # noqa: F811
    first = runs("a", 0.5, answers={"en": LIVELY, "ru": ONE})
    second = runs("b", 0.6, "fit.seed=1", answers={"en": LIVELY, "ru": THINGS})
    printed = shown(first, second)
    row = next(line for line in printed.splitlines() if line.startswith("| full fine-tuning"))
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[3].startswith("55.0 ±") and not cells[3].endswith("†") and cells[5].endswith("†‡")
    assert (
        "† note: nearly all items, or yes-no questions, get one answer: full fine-tuning, ru (1 of 2 runs)"
        in printed
    )
    assert "‡ note: yes-no questions get other answers: full fine-tuning, ru (1 of 2 runs)" in printed
    write_latex(compare_runs([first, second])[0], tmp_path / "table.tex")
    assert r"$\dagger$$\ddagger$" in (tmp_path / "table.tex").read_text()
    assert "note" not in to_markdown(compare_runs([runs("c", 0.5)])[0])


def test_compare_has_columns_of_extra_tests(runs):  # noqa: F811
    def extra(english, others):
        scores = {"en": english, "de": others, "ru": others}
        return {"extra_tests": {"shuffled_images": {code: {"accuracy": v} for code, v in scores.items()}}}

    first = runs("a", 0.5, **extra(0.3, 0.2))
    second = runs("b", 0.6, "fit.seed=1", **extra(0.4, 0.2))
    plain = runs("c", 0.6, "epochs=3")
    lines = shown(first, second, plain).splitlines()
    head, row = ([cell.strip() for cell in line.split("|")] for line in (lines[2], lines[4]))
    assert row[head.index("en, shuffled images")].startswith("35.0 ±")
    assert row[head.index("mean of the targets, shuffled images")].startswith("20.0")


def test_result_table_marks_main_and_extra_sets_and_not_shuffled_ones():
    sets = {
        "test_style": {"en": {"accuracy": 0.4, "answers": ONE}},
        "shuffled_images": {"en": {"accuracy": 0.2, "answers": ONE}},
    }
    result = {
        **{"task": "xgqa", "setting": "zero_shot", "split": "test", "method": "m", "seed": 0, "steps": 1},
        **{
            "accuracy": {"en": 0.5},
            "answers": {"en": THINGS},
            "by_type": {},
            "mean_targets": None,
            "gap": None,
        },
        "extra_tests": sets,
    }
    printed = table(result)
    assert "| en | 50.0 ‡ |  | 40.0 † | 20.0 | 45.9 |" in printed
    assert "† note: en, test_style: 95.0 %" in printed and "‡ note: en: 98.0 %" in printed
    del result["answers"], result["extra_tests"]  # as earlier versions stored it
    assert "note" not in table(result) and "| en | 50.0 |" in table(result)
    assert marked(None, None) == ""


def test_baselines_stand_beside_the_runs(runs, finetune, scenes, tmp_path):  # noqa: F811
    same = {"answers": {"en": LIVELY, "de": LIVELY, "ru": ONE}, "baselines": {"en": {"text": 0.25}}}
    lines = shown(runs("a", 0.5, **same), runs("b", 0.6, "fit.seed=1", **same)).splitlines()
    head, _, _, frequent, text = ([cell.strip() for cell in line.split("|")] for line in lines[2:7])
    by_head = [dict(zip(head, row, strict=True)) for row in (frequent, text)]
    assert by_head[0]["method"] == "most frequent answer" and by_head[0]["en, accuracy"] == "33.3"
    assert by_head[0]["ru, accuracy"] == "51.0" and by_head[0]["mean of the targets, accuracy"] == "42.2"
    assert by_head[1]["method"] == "text alone" and by_head[1]["en, accuracy"] == "25.0"
    assert by_head[1]["ru, accuracy"] == by_head[1]["mean of the targets, accuracy"] == ""
    other = runs("c", 0.6, "epochs=3", answers={"en": ONE, "de": LIVELY, "ru": ONE})  # of other items
    frequent = next(line for line in shown(tmp_path / "a", other).splitlines() if "most frequent" in line)
    assert "33.3" in frequent and "51.0" in frequent and frequent.count("33.3") == 1


def test_baselines_of_the_data_folder_are_those_of_the_whole_test_set(finetune, scenes, tmp_path):
    data = tmp_path / "scenes"
    shutil.copytree(scenes, data)
    text = {
        "xgqa": {"en": {"text": 0.25, "image": 0.125}, "targets": {"text": 0.2}},
        "xvnli": {"en": {"text": 0.5}},
    }
    (data / "baselines.json").write_text(json.dumps(text))
    own = [f"data={data}", "setting=untrained", f"model={fine_tuned(tmp_path, scenes)}"]
    code, printed = finetune("scenes_xgqa", "name=run", *own)
    assert code == 0 and "| most frequent answer | text alone | image alone |" in printed, printed
    cells = {line.split("|")[1].strip(): line.split("|")[4:7] for line in printed.splitlines() if "|" in line}
    assert [cell.strip() for cell in cells["en"][1:]] == ["25.0", "12.5"]
    assert [cell.strip() for cell in cells["mean of the targets"][1:]] == ["20.0", ""]
    found = json.loads((tmp_path / "run/result.json").read_text())
    assert found["baselines"] == text["xgqa"]
    assert finetune("scenes_xgqa", "name=few", "test_limit=30", *own)[0] == 0
    assert "baselines" not in json.loads((tmp_path / "few/result.json").read_text())
    (data / "baselines.json").write_text('{"xgqa": 3}')
    code, printed = finetune("scenes_xgqa", "name=bad", *own)
    assert code == 2 and "baselines.json" in printed and not (tmp_path / "bad").exists()


def fine_tuned(folder, scenes):
    """A small random model, fine-tuned in no step on questions."""
    from finetune.build import find_task
    from finetune.config import FinetuneConfig
    from raylib.models.finetuned import FinetuneModel
    from raylib.sample import DATA
    from tests.factories import make_model

    config = FinetuneConfig(task="xgqa", data=str(scenes))
    labels = find_task(config).label_names(config)
    FinetuneModel(make_model(vocabulary=12000, positions=64).float(), labels, 1, 0.1).eval().save(
        folder / "tuned"
    )
    shutil.copy2(DATA / "tokenizer.model", folder / "tuned")
    return folder / "tuned"


def test_scenes_bring_the_baselines_of_their_settings_alone(tmp_path, monkeypatch):
    sizes = ScenesConfig(train=3, dev=2, test=2, shots=1)
    settings = json.dumps(sizes.model_dump(), separators=(",", ":"))
    measured = {"xgqa": {"en": {"text": 0.5}}}
    monkeypatch.setattr(writer, "read_baselines", lambda: {settings: measured})
    writer.write_scenes(tmp_path / "same", sizes)
    for folder in (tmp_path / "same", tmp_path / "same/test_style"):
        assert json.loads((folder / "baselines.json").read_text()) == measured
    assert (tmp_path / "same/settings.json").read_text().strip() == settings
    writer.write_scenes(tmp_path / "others", sizes.model_copy(update={"test": 3}))
    assert not (tmp_path / "others/baselines.json").exists()
