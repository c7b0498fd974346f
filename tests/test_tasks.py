"""The contract of tasks: each one's data, batch, loss with terms of strategies, figures and dev score; a task
in a user's own file."""

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.__main__ import main
from finetune.batches import BatchOrder, encode_inputs
from finetune.build import build_model, find_task, load_task, open_visual_for
from finetune.config import FinetuneConfig
from finetune.formats import Captioned, Example, read_captions, read_examples
from finetune.strategies.base import AddedTerm, LossTerms
from finetune.tasks.base import Pipeline
from finetune.tasks.datasets import TASKS
from finetune.train import check
from raylib.config import override
from raylib.errors import UserError
from raylib.models import BACKBONES
from raylib.models.base import FusionBackbone
from raylib.models.finetuned import FinetuneModel
from raylib.sample import DATA
from raylib.text import Tokenizer
from tests import official
from tune_spaces.jobs import find_job

SCENES = ("xgqa", "xgqa_translated", "xvnli", "marvl", "xflickrco")
HEADS = [(name, head) for name, task in TASKS.items() for head in task.heads]
TERM_INPUTS = {  # what a term may read, of what a task provides
    "logits": lambda outputs: outputs.logits.logsumexp(1),
    "embeddings": lambda outputs: outputs.image_embeddings.square().sum(1),
}


@pytest.fixture
def data(scenes, tmp_path):
    """`data(name)` -> a folder with a tiny set of that task in its official format."""

    def make(name):
        if name in SCENES:
            return scenes
        folder = tmp_path / "data"
        getattr(official, {"xtd_few": "xtd"}.get(name, name))(folder)
        if name == "xtd_few":  # 50 to train on, 50 to choose by, the others to test
            names = [f"{official.COCO.format(i % len(official.EVERY))}.jpg" for i in range(104)]
            official.write_lines(folder / "xtd/test_image_names.txt", names)
            for language in TASKS[name].languages:
                lines = [official.say("en", i) for i in range(104)]
                official.write_lines(folder / f"xtd/test_1kcaptions_{language}.txt", lines)
        return folder

    return make


def open_pipeline(name, head, model, folder, **settings) -> Pipeline:
    config = FinetuneConfig(
        task=name, head=head, model=str(model), data=str(folder), image_size=16, **settings
    )
    built = build_model(config)
    return Pipeline(config, built, Tokenizer.load(DATA / "tokenizer.model"), open_visual_for(config, built))


def l2_penalty(model) -> AddedTerm:
    """A term that looks at the model's weights alone."""
    weights = [p for p in model.parameters() if p.requires_grad]
    return AddedTerm(0.1, lambda outputs, batch: sum(p.square().sum() for p in weights))


@pytest.mark.parametrize(("name", "head"), HEADS)
def test_task_from_its_files_to_its_score(name, head, model, data, tmp_path):
    """Fixture, batch, loss with terms of strategies, gradient, figures, dev score, result."""
    folder = data(name)
    pipeline = open_pipeline(name, head, model, folder)
    config, task = pipeline.config, find_task(pipeline.config)
    language = task.languages[0]
    items = task.read_split(config, "train", language, 8).load()
    kept, unknown = task.training_items(items, pipeline.model)
    assert len(kept) + len(unknown) == len(items) and kept
    readable = {name: read for name, read in TERM_INPUTS.items() if name in task.provides}
    terms = {
        "penalty": l2_penalty(pipeline.model),
        **{
            name: AddedTerm(0.0, lambda outputs, batch, read=read: read(outputs), reads=frozenset({name}))
            for name, read in readable.items()
        },
    }
    batch = task.batches(pipeline, kept, BatchOrder(4, seed=0))[0]
    objective = task.objective(config, pipeline.model, LossTerms(terms))
    loss, values = objective(batch)
    assert terms.keys() < values.keys() and all(math.isfinite(v) for v in values.values())
    assert float(values["penalty"]) == pytest.approx(float(terms["penalty"].values(None, {})), rel=1e-4)
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in pipeline.model.parameters())
    plain, _ = task.objective(config, pipeline.model, LossTerms())(batch)
    # dropout differs between both
    assert float(loss.detach()) == pytest.approx(float(plain.detach() + 0.1 * values["penalty"]), rel=0.5)

    sets = {language: task.read_split(config, "test", language, 4)}
    figures = task.test_details(config, task.evaluate(pipeline, sets, tmp_path / "out"), tmp_path / "out")
    dev = task.evaluate_dev(
        pipeline, {language: task.read_split(config, "test", language, 4)}, tmp_path / "dev"
    )
    score = task.dev_score(config, dev[language])
    assert 0 <= score.value <= 1 and 0 <= task.test_score(figures[language]) <= 1
    assert task.dev_score_name(config) in ("accuracy", "mean recall", "accuracy among four pairs")
    assert language in json.dumps(task.summarise(figures))


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if "decoder" not in task.heads])
def test_task_refuses_a_head_that_it_cannot_have(name):
    with pytest.raises(UserError, match=f"head=decoder generates answers of an open set; {name} has none"):
        find_task(FinetuneConfig(task=name, head="decoder"))


def test_one_text_alone_is_no_premise_of_its_own():
    """Two texts: the first is what the second is about. One: it is about nothing, and read once."""
    tokenizer = Tokenizer.load(DATA / "tokenizer.model")
    one, two = Example("1", ("a dog",), (), {}), Example("2", ("a dog", "an animal"), (), {})
    alone, both = (encode_inputs([e], {}, tokenizer, 9) for e in (one, two))
    assert alone.keys() == {"text"} and both.keys() == {"text", "premise"}
    assert alone["text"].values.equal(both["premise"].values)


@pytest.mark.parametrize("kind", [k for k, cls in BACKBONES.items() if issubclass(cls, FusionBackbone)])
def test_one_text_alone_is_classified_by_every_backbone(kind):
    """Its scores do not depend on the other texts of the batch, and tell texts apart."""
    torch.manual_seed(0)
    backbone = BACKBONES[kind](BACKBONES[kind].sizes["tiny"].model_copy(update={"vocabulary": 12000}))
    model = FinetuneModel(backbone, ("no", "yes"), 1, 0.0).eval()
    tokenizer = Tokenizer.load(DATA / "tokenizer.model")
    texts = [
        Example(str(i), (text,), (), {}) for i, text in enumerate(("a dog", "the red cat sleeps", "a cat"))
    ]
    with torch.inference_mode():
        together = model(encode_inputs(texts, {}, tokenizer, 12))
        apart = torch.cat([model(encode_inputs([text], {}, tokenizer, 12)) for text in texts])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
    assert len(together[:, 0].unique()) == 3


# ---- a task in a user's own file

RECORDS = [{"file": f"{i}.png", "q": f"is it {'red' if i % 2 else 'blue'}?", "a": "yes"} for i in range(9)]
CLASSIFICATION = """
from finetune.formats import read_examples
from finetune.tasks.base import Split
from finetune.tasks.classification import Classification

ONE_FILE = Split("{language}.jsonl", read_examples, {"text": "q", "label": "a"})
TASK = Classification(
    summary="questions about nothing",
    languages=("en", "de"),
    labels=("no", "yes"),
    splits={name: Split(f"{name}.{{language}}.jsonl", read_examples, {"text": "q", "label": "a"})
            for name in ("train", "dev", "test", "shots")},
)
"""
SUBCLASS = """
from finetune.tasks.datasets import Classification, Split
from finetune.formats import read_examples

class Colours(Classification):
    def __init__(self):
        super().__init__(summary="colours", languages=("en",), labels=("no", "yes"), splits={
            name: Split(f"{name}.en.jsonl", read_examples, {"text": "q", "label": "a"})
            for name in ("train", "dev", "test")})

    def dev_score_name(self, config):
        return "share of right colours"
"""


def write_records(folder, name, records):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))


def coloured(first: int, count: int, language: str) -> list[dict]:
    words = {"en": ("red", "blue"), "de": ("rot", "blau")}[language]
    return [
        {"q": f"{words[i % 2]} {i}?" + ("!" * (i % 3)), "a": ("no", "yes")[i % 2]}
        for i in range(first, first + count)
    ]


@pytest.fixture
def own(tmp_path):
    """A folder with data of one's own."""
    for language in ("en", "de"):
        for split, first in (("train", 0), ("dev", 100), ("test", 200), ("shots", 300)):
            write_records(tmp_path / "own", f"{split}.{language}.jsonl", coloured(first, 16, language))
    return tmp_path / "own"


RUN = [
    "scenes_xvnli",
    "runtime=local",
    "batch=8",
    "image_size=null",
    "fit.bf16=false",
    "fit.loader_workers=0",
    "languages=[]",
    "held_out_languages=[]",
    "freeze=[]",
    "extra_tests={}",
    "shuffled_images=false",
]


def test_task_of_a_users_file_runs_resumes_and_is_evaluated(own, model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_task.py").write_text(CLASSIFICATION)
    run = [
        *RUN,
        "task=my_task.py",
        f"model={model}",
        f"data={own}",
        f"runs={tmp_path}",
        "name=own",
        "epochs=2",
    ]
    assert main([*run, "fit.stop_after=2"]) == 0 and not (tmp_path / "own/result.json").exists()
    assert main(run) == 0, capsys.readouterr()
    result = json.loads((tmp_path / "own/result.json").read_text())
    assert result["task"] == "my_task.py" and result["steps"] == 4 and set(result["accuracy"]) == {"en", "de"}
    assert main(["evaluate", str(tmp_path / "own")]) == 0
    assert json.loads((tmp_path / "own/result.json").read_text())["accuracy"] == result["accuracy"]
    assert main(["compare", str(tmp_path / "own"), str(tmp_path / "own")]) == 0
    few = [*run[:-2], "name=few", "setting=few_shot", f"model={tmp_path / 'own'}", "epochs=1"]
    assert main(few) == 0, capsys.readouterr()
    few_result = json.loads((tmp_path / "few/result.json").read_text())
    assert set(few_result["accuracy"]) == {"de"} and few_result["steps"] == 2

    # its content is part of what the run is
    capsys.readouterr()
    (tmp_path / "my_task.py").write_text(CLASSIFICATION.replace("about nothing", "about colours"))
    assert main(run) == 2
    assert "my_task.py" in capsys.readouterr().err
    (tmp_path / "my_task.py").unlink()
    monkeypatch.chdir("/")
    assert main(["evaluate", str(tmp_path / "own")]) == 0  # by the copy in its folder, of what ran
    assert "other data" not in capsys.readouterr().out
    (tmp_path / "own/my_task.py").unlink()
    assert main(["evaluate", str(tmp_path / "own")]) == 2
    error = capsys.readouterr().err.strip()
    assert error == f"error: {tmp_path}/own/config.json: task=my_task.py: no such file"


def test_task_of_a_users_file_is_searched(own, model, tmp_path):
    """A search checks a trial of it, scores its dev sets, and reads its file as a part of what it is."""
    (tmp_path / "my_task.py").write_text(CLASSIFICATION)
    job, config = find_job("scenes_xvnli")
    settings = [s for s in RUN[1:] if s != "freeze=[]"] + ['freeze=["vision"]']
    paths = [f"task={tmp_path / 'my_task.py'}", f"model={model}", f"data={own}", f"runs={tmp_path}"]
    trial = job.trial_config(override(config, [*settings, *paths]), "both")
    job.check_config(trial)
    assert job.metric_names(trial, "both") == ("english_dev", "target_dev", "dev/de")
    assert tmp_path / "my_task.py" in [file.path for file in job.data_files(trial)]


def test_task_of_a_users_file_may_be_a_class(own, tmp_path):
    (tmp_path / "colours.py").write_text(SUBCLASS)
    task = load_task(str(tmp_path / "colours.py"))
    config = FinetuneConfig(task=str(tmp_path / "colours.py"), data=str(own))
    assert find_task(config).dev_score_name(config) == "share of right colours"
    assert task.label_names(config) == ("no", "yes") and not task.needs_images(config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("x = 1", "no class derived from Task"),
        (
            CLASSIFICATION + "\nOTHER = Classification(summary='', languages=(), splits={})\n",
            r"several tasks \(TASK, OTHER\); say which: .*mine\.py:TASK",
        ),
        ("from finetune.tasks.base import Task\nclass Mine(Task):\n    pass\n", "Mine has no "),
        (
            "from finetune.tasks.retrieval import Retrieval\nclass Mine(Retrieval):\n    pass\n",
            "without arguments",
        ),
    ],
)
def test_load_task_error_is_one_line(text, message, tmp_path):
    if text is not None:
        (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=message) as e:
        load_task(str(tmp_path / "mine.py"))
    assert "\n" not in str(e.value)


def test_load_task_by_its_name_in_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(CLASSIFICATION + "\nOTHER = Classification(summary='other', languages=(), splits={})\n")
    assert load_task(f"{file}:OTHER").summary == "other" != load_task(f"{file}:TASK").summary
    with pytest.raises(UserError, match=r"mine\.py: no task NONE; it has: TASK, OTHER"):
        load_task(f"{file}:NONE")
    (tmp_path / "colours.py").write_text(SUBCLASS)
    assert type(load_task(f"{tmp_path / 'colours.py'}:Colours")).__name__ == "Colours"


OWN_READER = """
from finetune.formats import Example
from finetune.tasks.base import Split
from finetune.tasks.classification import Classification

def read(path, field):
    record = {"right": 1}
    yield Example("1", ("text",), (), {})
    record[field]

TASK = Classification(
    summary="", languages=("en",), labels=("no",),
    splits={
        "test": Split("some.json", read, {"field": "wrong"}),
        "dev": Split("some.json", read, {"fields": "x"}),
        "train": Split("some_{lang}.json", read, {"field": "x"}),
        "shots": Split("some.json", read, {"field": "{shots}"}),
    },
)
"""


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("test", r"own\.py:9: KeyError: 'wrong', reading .*some\.json"),
        ("dev", r"split 'dev': read: missing a required argument: 'field'; its options are field"),
        ("train", r"'some_\{lang\}\.json' in a split: \{language\} and \{shots\} alone"),
        ("shots", r"'\{shots\}' in a split: \{language\} alone"),
    ],
)
def test_split_mistake_is_one_line(split, message, tmp_path):
    (tmp_path / "own.py").write_text(OWN_READER)
    (tmp_path / "some.json").write_text("{}")
    task = load_task(str(tmp_path / "own.py"))
    config = FinetuneConfig(task=str(tmp_path / "own.py"), data=str(tmp_path))
    with pytest.raises(UserError, match=message):
        task.read_split(config, split, "en").load()


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ('Example("1", "text", (), {})', r"some\.json, item 1: texts is 'text'; wanted a tuple of strings"),
        ('Example("1", ("text",), "a.png", {})', r"item 1: images is 'a\.png'; wanted a tuple"),
        ('Example("1", ("text",), (), "yes")', r"item 1: labels is 'yes'; wanted \{answer: score\}"),
        ('Captioned("a.png", "text")', r"item 1: captions is 'text'; wanted a tuple"),
    ],
)
def test_item_of_a_users_reader_that_is_no_tuple_is_one_line(item, message, tmp_path):
    """The letters of a text would be trained on as texts."""
    reader = OWN_READER.replace('Example("1", ("text",), (), {})', item)
    reader = reader.replace("import Example", "import Captioned, Example")
    (tmp_path / "own.py").write_text(reader)
    (tmp_path / "some.json").write_text("{}")
    with pytest.raises(UserError, match=message):
        load_task(str(tmp_path / "own.py")).read_split(
            FinetuneConfig(task="", data=str(tmp_path)), "test", "en"
        ).load()


def check_task(path, model, **settings):
    check(FinetuneConfig(**{"task": str(path), "model": str(model), "runs": str(path.parent), **settings}))


def test_languages_that_a_task_lacks_are_refused_by_their_setting(own, model, tmp_path):
    (tmp_path / "my_task.py").write_text(CLASSIFICATION)
    with pytest.raises(
        UserError, match=r"is in en, de: languages= names 'ar' too \(.*test\.ar\.jsonl: no such"
    ):
        check_task(tmp_path / "my_task.py", model, data=str(own), languages=("en", "ar"))
    one = CLASSIFICATION.replace(".{{language}}", ".en").replace('("en", "de")', '("en",)')
    (tmp_path / "one.py").write_text(one)
    with pytest.raises(
        UserError, match=r"is in en: languages= names 'ar' too \(its test set is that of 'en'"
    ):
        check_task(tmp_path / "one.py", model, data=str(own), languages=("en", "ar"))
    with pytest.raises(UserError, match=r"xgqa is in en, bn, .*: languages= names 'ar' too \(.*no such file"):
        check(FinetuneConfig(task="xgqa", model=str(model), data=str(own), languages=("ar",)))


def test_answers_that_are_nowhere_are_named(own, model, tmp_path):
    (tmp_path / "my_task.py").write_text(CLASSIFICATION.replace('"label": "a"', '"label": "b"'))
    task = load_task(str(tmp_path / "my_task.py"))
    examples = task.read_split(FinetuneConfig(task="", data=str(own)), "train", "en").load()
    with pytest.raises(UserError, match=r"none of the 16 training examples has an answer; check the field"):
        task.training_items(examples, SimpleNamespace(labels=("no", "yes")))
    open_set = dataclasses.replace(task, labels=())
    with pytest.raises(
        UserError, match=r"train\.en\.jsonl: no item has an answer.*read_examples has .*label='b'"
    ):
        open_set.label_names(FinetuneConfig(task="my", data=str(own)))
    answered = [e._replace(labels={"Yes": 1.0}) for e in examples]
    with pytest.raises(UserError, match=r"they have \[Yes\], the classes are \[no, yes\]"):
        task.training_items(answered, SimpleNamespace(labels=("no", "yes")))


@pytest.mark.parametrize("kind", ["images", "regions"])
@pytest.mark.parametrize("split", ["dev", "test"])
def test_missing_image_is_named_before_anything_starts(split, kind, own, model, tmp_path):
    (tmp_path / "my_task.py").write_text(CLASSIFICATION.replace('"label"', '"image": "i", "label"'))
    folder = tmp_path / kind
    folder.mkdir()

    def path(name):
        return folder / f"{name}.{'png' if kind == 'images' else 'npz'}"

    def write(name, shade):
        if kind == "images":
            Image.new("RGB", (4, 4), (shade, 0, 0)).save(path(name))
        else:
            np.savez(path(name), features=np.ones((1, 3)), boxes=np.ones((1, 4)), img_h=20, img_w=40)

    write("there", 0)
    records = {file: [json.loads(line) for line in file.read_text().splitlines()] for file in own.iterdir()}
    for number, (file, lines) in enumerate(records.items()):
        write(file.stem, number)
        write_records(own, file.name, [{**line, "i": file.stem} for line in lines])
    settings = {"data": str(own), kind: str(folder)}
    check_task(tmp_path / "my_task.py", model, **settings)
    path(f"{split}.en").unlink()
    what = "image" if kind == "images" else "regions"
    found = rf"items of .*{split}\.en\.jsonl \({split}, 'en'\) have no {what} in .*{kind}: '{split}\.en'"
    with pytest.raises(UserError, match=found):
        check_task(tmp_path / "my_task.py", model, **settings)


# ---- any JSONL


def test_read_examples_by_fields_that_options_name(tmp_path):
    records = [
        {"q_de": "rot?", "img": "a.png", "key": 7, "gold": {"ja": 1.0, "wohl": 0.3}, "sort": "colour"},
        {"q_de": "zwei?", "img": ["b", "c"], "key": "8", "gold": ["eins", 2], "sort": "count"},
        {"q_de": "was?", "img": 5, "key": 9, "sort": ""},
    ]
    write_records(tmp_path, "all.jsonl", records)
    options = {"text": "q_de", "image": "img", "label": "gold", "id": "key", "kind": "sort"}
    assert list(read_examples(tmp_path / "all.jsonl", **options)) == [
        Example("7", ("rot?",), ("a.png",), {"ja": 1.0, "wohl": 0.3}, "colour"),
        Example("8", ("zwei?",), ("b", "c"), {"eins": 1.0, "2": 1.0}, "count"),
        Example("9", ("was?",), ("5",), {}, ""),
    ]
    write_records(tmp_path, "two.jsonl", [{"a": "x", "b": "y", "l": "L", "r": "R", "label": True}])
    two = read_examples(tmp_path / "two.jsonl", text="b", premise="a", image="l|r")
    assert list(two) == [Example("1", ("x", "y"), ("L", "R"), {"True": 1.0})]


def test_read_captions_by_fields_that_options_name(tmp_path):
    write_records(tmp_path, "c.jsonl", [{"f": "a.png", "de": "ein Hund"}, {"f": 2, "de": ["Katze", "Kater"]}])
    assert list(read_captions(tmp_path / "c.jsonl", image="f", text="de")) == [
        Captioned("a.png", ("ein Hund",)),
        Captioned("2", ("Katze", "Kater")),
    ]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"label": "a"}, "no field 'text'"),
        ({"text": 3, "label": "a"}, "field 'text' is int"),
        ({"text": "t", "label": 0.5}, "field 'label' is float, 0.5; wanted an answer"),
        ({"text": "t", "label": {"a": "much"}}, "wanted a finite number"),
    ],
)
def test_read_examples_error_names_line_and_field(record, message, tmp_path):
    write_records(tmp_path, "bad.jsonl", [{"text": "t", "label": "a"}, record])
    with pytest.raises(UserError, match=rf"bad\.jsonl:2: .*{message}"):
        list(read_examples(tmp_path / "bad.jsonl"))
