"""Translations made in advance, by a small random model: which files, in which form, resumed; mistakes."""

import gzip
import json
import shutil

import pytest
import torch
import transformers

from finetune.__main__ import main
from finetune.tasks.datasets import TASKS
from finetune.translation import TranslateConfig, translate
from raylib.errors import UserError


@pytest.fixture(scope="module")
def translator(tmp_path_factory):
    """A T5 of one layer over letters."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("translator")
    words = {
        w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", "de", "en", *"abcdefghijklmnopqrstuvwxyz"])
    }
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=len(words),
            d_model=16,
            d_kv=8,
            d_ff=16,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=0,
        )
    ).save_pretrained(folder)
    return folder


def test_translate_writes_jsonl_and_plain_lines_that_tasks_read(translator, tmp_path):
    """Translations as a task reads them: the same records, the same number of captions; of a test, where
    translate-test looks."""
    shots = tmp_path / "xFlickrCO" / "annotations" / "de"
    shots.mkdir(parents=True)
    lines = [
        {"sentences": ["ein hund", "noch ein hund"], "id": "0", "img_path": "0.jpg"},
        {"sentences": ["ein bus"], "id": "1", "img_path": "1.jpg"},
    ]
    for name in ("train_2.jsonl", "test.jsonl"):
        (shots / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = TASKS["xflickrco"]
    for split, made in (("shots", "shots_to_en"), ("test", "translated")):
        config = TranslateConfig(
            data=str(tmp_path), languages=("de",), split=split, shots=2, num_beams=1, length=8, batch=2
        )
        said = []
        files = translate(task, translator, config, said.append)
        assert files == [task.path(tmp_path, made, "de", 2)] and "3 texts" in said[-1]
        found = list(task.read(files[0], made, "de"))
        assert [(item.image, len(item.captions)) for item in found] == [("0.jpg", 2), ("1.jpg", 1)]
        translate(task, translator, config, said.append)
        assert said[-1].endswith("there already")
    raw = tmp_path / "multi30k" / "data" / "task1" / "raw"
    raw.mkdir(parents=True)
    (raw.parent / "image_splits").mkdir()
    (raw.parent / "image_splits" / "train.txt").write_text("0.jpg\n1.jpg\n")
    with gzip.open(raw / "train.en.gz", "wt") as file:
        file.write("a dog\na bus\n")
    options = [
        "split=train",
        "direction=from_en",
        "num_beams=1",
        "length=8",
        f"data={tmp_path}",
        'languages=["de"]',
    ]
    assert main(["translate", "multi30k", str(translator), *options]) == 0
    task = TASKS["multi30k"]
    assert len(list(task.read(task.path(tmp_path, "train_from_en", "de"), "train_from_en", "de"))) == 2


def settings(folder, **more):
    return TranslateConfig(
        **{"data": str(folder), "languages": ("de",), "num_beams": 1, "length": 8, "batch": 2, **more}
    )


@pytest.fixture
def xtd(tmp_path):
    """The German captions of a task of plain files: two that are the same, one empty, one with the separators
    that `str.splitlines` splits at and readers do not."""
    (tmp_path / "xtd").mkdir()
    captions = ["bild a", "bild b", "", "bild a", "ein\x0bhund\u2028am\x85see", "bild c"]
    path = tmp_path / "xtd" / "test_1kcaptions_de.txt"
    path.write_text("".join(f"{caption}\n" for caption in captions), encoding="utf-8")
    return path


@pytest.fixture
def made(xtd):
    """Where its translations go."""
    return xtd.parent / "translated_to_en" / "de.txt"


def run(translator, folder, **more):
    said = []
    translate(TASKS["xtd_few"], translator, settings(folder, **more), said.append)
    return said


def test_translate_lines_stay_in_their_places(translator, tmp_path, xtd, made):
    run(translator, tmp_path)
    with open(made, encoding="utf-8") as file:
        lines = [line.rstrip("\n") for line in file]
    assert len(lines) == 6 and lines[2] == "" and lines[0] == lines[3]
    assert not set("\x0b\u2028\x85\r") & set("".join(lines))


class Killed(Exception):
    pass


def test_translate_killed_in_any_batch_makes_the_same_file(translator, tmp_path, xtd, made, monkeypatch):
    """Killed before and after each batch, and with its line cut off after any of its bytes."""
    from finetune.translator import Translator

    xtd.write_text("".join(f"bild {letter}\n" for letter in "abcdefg"))
    run(translator, tmp_path)
    whole, batches = made.read_bytes(), []
    translate_batch = Translator.__call__

    def counting(self, texts, *codes):
        if len(batches) == limit:
            raise Killed
        batches.append(list(texts))
        return translate_batch(self, texts, *codes)

    monkeypatch.setattr(Translator, "__call__", counting)
    for limit in range(4):
        made.unlink()
        batches.clear()
        with pytest.raises(Killed):
            run(translator, tmp_path)
        partial = made.with_name("de.txt.partial").read_bytes()
        last = partial.rstrip(b"\n").rfind(b"\n") + 1
        for cut in range(last, len(partial), 1 + len(partial) // 4):
            made.unlink(missing_ok=True)
            made.with_name("de.txt.partial").write_bytes(partial[:cut])
            batches.clear()
            limit = 9
            said = run(translator, tmp_path)
            assert made.read_bytes() == whole
            assert (cut == last) == ("its last line was cut off" not in said[0])
        assert not list(made.parent.glob("*.partial"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_beams": 2}, "begun with another num_beams"),
        ({"length": 9}, "begun with another length"),
        ({"prefix": "translate German to English: "}, "begun with another prefix"),
        ({"bf16": True}, "begun with another bf16"),
        ({"model": True}, "begun with another model"),
    ],
)
def test_translate_partial_file_of_another_model_or_settings_is_refused(
    translator, tmp_path, xtd, made, change, words, monkeypatch
):
    from finetune.translator import Translator

    monkeypatch.setattr(Translator, "__call__", lambda *_: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        run(translator, tmp_path)
    if change.pop("model", None):
        shutil.copytree(translator, tmp_path / "other")
        (tmp_path / "other" / "config.json").write_text((translator / "config.json").read_text() + " ")
        translator = tmp_path / "other"
    with pytest.raises(UserError, match=f"de.txt.partial was {words}.*remove it"):
        run(translator, tmp_path, **change)


def test_translate_refuses_a_file_that_another_process_writes(translator, tmp_path, xtd, made, monkeypatch):
    from finetune.translator import Translator

    translate_batch = Translator.__call__

    def beside(self, texts, *codes):
        with pytest.raises(UserError, match="de.txt: another process is writing it"):
            run(translator, tmp_path)
        return translate_batch(self, texts, *codes)

    monkeypatch.setattr(Translator, "__call__", beside)
    run(translator, tmp_path)
    assert made.is_file() and not list(made.parent.glob(".*.lock"))


def test_translate_partial_file_of_an_earlier_version_is_refused(translator, tmp_path, xtd, made):
    made.parent.mkdir()
    made.with_name("de.txt.partial").write_text("from before\n")
    with pytest.raises(UserError, match="begun by an earlier version, which does not say by which model"):
        run(translator, tmp_path)


def test_translate_goes_on_where_the_source_changed_by_the_text(translator, tmp_path, xtd, made, monkeypatch):
    """A line that was put in before those that are done moves none of them."""
    from finetune.translator import Translator

    outputs = []

    def one(self, texts, *codes):
        if outputs:
            raise Killed
        outputs.append(texts)
        return [f"translation of {text}" for text in texts]

    monkeypatch.setattr(Translator, "__call__", one)
    with pytest.raises(Killed):
        run(translator, tmp_path)
    xtd.write_text("bild z\nbild b\nbild a\n")
    monkeypatch.setattr(Translator, "__call__", lambda self, texts, *_: [f"later {t}" for t in texts])
    said = run(translator, tmp_path, batch=1)
    assert made.read_text().splitlines() == ["later bild z", "later bild b", "translation of bild a"]
    assert said == [f"{made}: 3 texts, 1 of them from before"]


def test_translate_finished_file_of_other_settings_or_source_is_named(translator, tmp_path, xtd, made):
    run(translator, tmp_path)
    assert run(translator, tmp_path, batch=1) == [f"{made}: there already"]
    with pytest.raises(UserError, match="de.txt was made with another num_beams; remove it"):
        run(translator, tmp_path, num_beams=2)
    with open(xtd, "a") as file:
        file.write("noch ein bild\n")
    with pytest.raises(UserError, match="de.txt was made with another source; remove it"):
        run(translator, tmp_path)
    made.with_name(".de.txt.run.json").unlink()  # as of a file from elsewhere
    assert run(translator, tmp_path, num_beams=2) == [f"{made}: there already"]


def test_translate_captions_with_line_breaks_keep_their_lines(translator, tmp_path):
    """Of JSON lines: a caption that comes out empty stays, without its line breaks."""
    folder = tmp_path / "xFlickrCO" / "annotations" / "de"
    folder.mkdir(parents=True)
    captions = ["?\n?", "?\r? ?", "?\u2028?", "a dog"]
    lines = [{"sentences": captions, "id": "0", "img_path": "0.jpg"}]
    (folder / "test.jsonl").write_text(json.dumps(lines[0]) + "\n")
    task = TASKS["xflickrco"]
    (file,) = translate(task, translator, settings(tmp_path, split="test"), lambda _: None)
    (item,) = task.read(file, "translated", "de")
    assert len(item.captions) == 4 and not any(set(c) & set("\n\r\u2028") for c in item.captions)
    (folder / "test.jsonl").write_text(json.dumps({**lines[0], "sentences": ["\ud83d"]}) + "\n")
    file.unlink()
    with pytest.raises(UserError, match="test.jsonl:1: no JSON .half of a surrogate pair"):
        translate(task, translator, settings(tmp_path, split="test"), lambda _: None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["xtd_fev", "MODEL"], "unknown task 'xtd_fev'"),
        (["xtd_few", "MODEL"], "data= is missing"),
        (["xtd_few", "MODEL", "data=none"], "languages= is missing"),
        (["xtd_few", "MODEL", "data=none", 'languages=["de"]'], "test_1kcaptions_de.txt: no such file"),
        (
            ["xtd_few", "MODEL", "data=none", "languages=de,en"],
            "languages=en: direction=to_en leads to or from",
        ),
        (
            ["xtd_few", "MODEL", "data=none", "languages=en,", "direction=from_en"],
            "languages=en: direction=from",
        ),
        (["xgqa", "MODEL", "data=none", 'languages=["de"]'], "this task has no split 'train_to_en'"),
    ],
)
def test_translate_wrong_arguments_are_one_line_errors(arguments, words, translator, capsys):
    assert main(["translate", *(a.replace("MODEL", str(translator)) for a in arguments)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and words in said and said.count("\n") == 1


def test_translate_unfit_models_are_refused(tmp_path, capsys):
    (tmp_path / "xtd").mkdir()
    (tmp_path / "xtd" / "test_1kcaptions_de.txt").write_text("bild\n")
    for model, words in (
        ("none", "no such folder"),
        (str(tmp_path), "no config.json; give a checkpoint folder"),
    ):
        assert main(["translate", "xtd_few", model, f"data={tmp_path}", 'languages=["de"]']) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("direction", ["to_en", "from_en"])
@pytest.mark.parametrize("split", ["dev", "test"])
def test_translate_makes_every_split_of_multi30k(split, direction, translator, tmp_path, monkeypatch):
    """Also of translations that come out empty, which are stored as empty, in their places."""
    from finetune.translator import Translator

    task, part = TASKS["multi30k"], {"dev": "val", "test": "test_2016_flickr"}[split]
    made = "translated" if (split, direction) == ("test", "to_en") else f"{split}_{direction}"
    if not task.has(made, "cs"):
        pytest.fail(f"multi30k has no split {made}")
    raw = tmp_path / "multi30k" / "data" / "task1" / "raw"
    raw.mkdir(parents=True)
    (raw.parent / "image_splits").mkdir()
    (raw.parent / "image_splits" / f"{part}.txt").write_text("0.jpg\n1.jpg\n2.jpg\n")
    for language, words in (("cs", "jedna\ndva\ntři\n"), ("en", "one\ntwo\nthree\n")):
        with gzip.open(raw / f"{part}.{language}.gz", "wt", encoding="utf-8") as file:
            file.write(words)
    middle = {"dva", "two"}
    monkeypatch.setattr(
        Translator, "__call__", lambda self, texts, *codes: ["" if t in middle else f"{t}!" for t in texts]
    )
    said = []
    config = settings(tmp_path, languages=("cs",), split=split, direction=direction)
    (file,) = translate(task, translator, config, said.append)
    assert said == [f"{file}: 3 texts; 1 came out empty, and are stored as empty"]
    source = ["jedna", "dva", "tři"] if direction == "to_en" else ["one", "two", "three"]
    expected = [("0.jpg", f"{source[0]}!"), ("1.jpg", ""), ("2.jpg", f"{source[2]}!")]
    assert [(item.image, *item.captions) for item in task.read(file, made, "cs")] == expected


def test_translate_dev_is_the_languages_own_not_english(translator, tmp_path):
    """xFlickrCO's "dev" is English in every language; its target_dev, of which the first of five captions
    alone is in the language, is translated."""
    folder = tmp_path / "flickr30k" / "annotations_machine-translate"
    folder.mkdir(parents=True)
    record = {"sentences": ["ein hund", "a dog"], "id": "0", "img_path": "0.jpg"}
    (folder / "valid-de_gmt.jsonl").write_text(json.dumps(record) + "\n")
    task = TASKS["xflickrco"]
    (file,) = translate(task, translator, settings(tmp_path, split="dev"), lambda _: None)
    assert file == task.path(tmp_path, "target_dev_to_en", "de")
    (item,) = task.read(file, "target_dev_to_en", "de")
    assert len(item.captions) == 1
    xgqa = tmp_path / "xGQA" / "annotations" / "few_shot" / "de"
    xgqa.mkdir(parents=True)
    (xgqa / "test.json").write_text("{}")
    with pytest.raises(UserError, match="test.json: one JSON value; wanted plain lines"):
        translate(TASKS["xgqa"], translator, settings(tmp_path, split="test"), lambda _: None)
