"""A model's name on the Hugging Face Hub in the place of a folder: the line says how to download it, wherever
a model is given."""

from pathlib import Path

import pytest

from finetune.__main__ import main as finetune
from finetune.strategies.distillation.__main__ import main as align
from finetune.strategies.distillation.teacher import load_teacher
from finetune.translation import TranslateConfig
from finetune.translator import Translator
from pretrain.__main__ import main as pretrain
from pretrain.corpora import main as corpus
from raylib import api as polyglance
from raylib.api.predict import main as predict
from raylib.errors import UserError, hub_hint
from raylib.models.finetuned import load_backbone
from raylib.models.hf_weights import load_vision
from raylib.models.swin import SwinSizes
from raylib.models.unified import TINY, UnifiedModel

NAMES = {
    "xlm-roberta-base",
    "org/name",
    "name",
    "google/vit-base-patch16-224",
    "Helsinki-NLP/opus-mt-de-en",
    "bert-base-multilingual-cased",
}
SWIN = TINY.model_copy(update={"swin": SwinSizes(width=8, layers=(1, 1), heads=(1, 1)), "patch": 4})
HINT = "if it is a model of the Hugging Face Hub, download it: hf download {0} --local-dir {0}\n"


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (pretrain, ["tiny", "init.text=xlm-roberta-base", "runtime=local", "runs=runs"]),
        (pretrain, ["tiny", "init.vision=google/vit-base-patch16-224", "runtime=local", "runs=runs"]),
        (pretrain, ["tiny", "init.model=name", "runtime=local", "runs=runs"]),
        (pretrain, ["tiny", "data.tokenizer=xlm-roberta-base", "runtime=local", "runs=runs"]),
        (pretrain, ["evaluate", "xlm-roberta-base", "data"]),
        (pretrain, ["export", "org/name", "out"]),
        (finetune, ["translate", "xtd_few", "Helsinki-NLP/opus-mt-de-en", "data=.", "languages=de"]),
        (align, ["bert-base-multilingual-cased", "data", "--languages", "de"]),
        (corpus, ["out", "--tokenizer", "xlm-roberta-base", "--text", "de=x.txt"]),
        (predict, ["xlm-roberta-base", "--texts", "texts.txt"]),
    ],
)
def test_hub_names_are_told_how_to_download(main, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").write_text("a dog\n")
    (tmp_path / "xtd").mkdir()
    (tmp_path / "xtd" / "test_1kcaptions_de.txt").write_text("ein Hund\n")
    assert main(arguments) == 2
    name = next(word.rpartition("=")[2] for word in arguments if word.rpartition("=")[2] in NAMES)
    line = capsys.readouterr().err
    assert line.endswith(HINT.format(name)) and line.count("\n") == 1
    assert not (tmp_path / "runs" / "tiny").exists()


@pytest.mark.parametrize(
    "load",
    [
        lambda name: load_backbone(name),
        lambda name: load_backbone(name, "uc2"),
        lambda name: load_teacher(name, "unified", None),
        lambda name: load_vision(UnifiedModel(TINY), name),
        lambda name: load_vision(UnifiedModel(SWIN), name),
        lambda name: Translator(Path(name), TranslateConfig()),
        lambda name: polyglance.load(name),
    ],
)
def test_hub_names_of_models_are_told_how_to_download(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as e:
        load("org/name")
    assert str(e.value).endswith(HINT.format("org/name").strip())


@pytest.mark.parametrize(
    "path", ["here", "here/model", "runs/smple", "/abs/model", "a/b/c", "x.model", "../m"]
)
def test_hub_hint_leaves_paths_alone(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert hub_hint(path) == ""
