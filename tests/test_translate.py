"""Translations made in advance, by a small random model: which files, in which form, resumed; mistakes."""

import gzip
import json

import pytest
import torch
import transformers

from finetune.__main__ import main
from finetune.strategies.alignment import TranslateConfig, translate
from finetune.tasks.datasets import TASKS


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


def test_translate_resumes_without_repeating(translator, tmp_path):
    folder = tmp_path / "xtd"
    folder.mkdir()
    (folder / "test_1kcaptions_de.txt").write_text("".join(f"bild {'abc'[i]}\n" for i in range(3)))
    (folder / "translated_to_en").mkdir()
    (folder / "translated_to_en" / "de.txt.partial").write_text("from before\n")
    config = TranslateConfig(data=str(tmp_path), languages=("de",), num_beams=1, length=8, batch=1)
    said = []
    (made,) = translate(TASKS["xtd_few"], translator, config, said.append)
    lines = made.read_text().splitlines()
    assert (
        lines[0] == "from before"
        and len(lines) == 3
        and said == [f"{made}: 3 texts, 1 of them from before; 2 came out empty, and stay as they were"]
        and not list(made.parent.glob("*.partial"))
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["xtd_fev", "MODEL"], "unknown task 'xtd_fev'"),
        (["xtd_few", "MODEL"], "data= is missing"),
        (["xtd_few", "MODEL", "data=none"], "languages= is missing"),
        (["xtd_few", "MODEL", "data=none", 'languages=["de"]'], "test_1kcaptions_de.txt: no such file"),
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
        (str(tmp_path), "no translation model can be read there"),
    ):
        assert main(["translate", "xtd_few", model, f"data={tmp_path}", 'languages=["de"]']) == 2
        assert words in capsys.readouterr().err
