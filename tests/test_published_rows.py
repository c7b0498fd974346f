"""Every row of paper 4's tables by its recipe, from published folders and official files, to its end: M-CLIP,
CLIP and a translation model are small and random."""

import json
import shutil

import cv2
import numpy as np
import pytest
import torch
import transformers

from finetune.__main__ import main
from finetune.recipes import RECIPES
from raylib.monitoring import read_metrics
from raylib.sample import DATA
from tests import official
from tests.factories import make_clip, write_mclip, xlmr_config
from tests.test_translate import translator  # noqa: F401 - a fixture

QUICK = ["runtime=local", "epochs=1", "languages=en,de", "fit.bf16=false", "fit.loader_workers=0"]
SLOW = pytest.mark.slow
# of each kind of row one is fast: they are the ways through the code
FAST = {
    "multi30k_framework",
    "multi30k_routine2",
    "xtd_few_soft_prompt_20",
    "xtd_few_zero_shot_from_en",
    "xtd_few_clip_mt",
    "xtd_few_zero_shot_prompt_target",
}
ROWS = [name.removeprefix("p4_") for name in RECIPES if name.startswith("p4_")]


def write_xtd(data) -> None:
    """XTD's files with 104 images: 50 to train on, 50 to choose by, 4 to test."""
    draw = np.random.default_rng(0)
    names = [official.COCO.format(i) + ".jpg" for i in range(104)]
    (data / "images").mkdir(parents=True, exist_ok=True)
    for name in names:
        cv2.imwrite(str(data / "images" / name), draw.integers(0, 256, (24, 32, 3), np.uint8))
    official.write_lines(data / "xtd/test_image_names.txt", names)
    for language in ("en", "de"):
        texts = [f"{official.say(language, i % 28)} {i}" for i in range(104)]
        official.write_lines(data / f"xtd/test_1kcaptions_{language}.txt", texts)


def write_translations(data) -> None:
    """Translations of both tasks from German and into it, where the commands below write them."""
    for way in ("to", "from"):
        for split, part in (("train", "train"), ("dev", "val"), ("test", "test_2016_flickr")):
            texts = [f"{way} {i}" for i in official.numbers(split)]
            official.write_lines(data / f"multi30k/translated_{way}_en/{part}.de", texts)
        official.write_lines(data / f"xtd/translated_{way}_en/de.txt", [f"{way} {i}" for i in range(104)])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with data/, mclip/ and clip/."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("rows")
    official.multi30k(folder / "data")
    write_xtd(folder / "data")
    sizes = xlmr_config(vocab_size=12000, max_position_embeddings=130)
    text = transformers.XLMRobertaModel(sizes, add_pooling_layer=False)
    write_mclip(folder / "mclip", text, torch.nn.Linear(64, 24))
    make_clip(12000).save_pretrained(folder / "clip")
    for name in ("mclip", "clip"):
        shutil.copy2(DATA / "tokenizer.model", folder / name)
    write_translations(folder / "data")
    return folder


@pytest.mark.parametrize("row", [row if row in FAST else pytest.param(row, marks=SLOW) for row in ROWS])
def test_row_of_paper_4_runs_to_its_end(home, tmp_path, row, capsys):
    recipe = RECIPES[f"p4_{row}"]()
    own = [f"data={home / 'data'}", f"runs={tmp_path}", "name=row"]
    if recipe.backbone == "clip":
        own.append(f"model={home / 'clip'}")
    else:
        own += [f"model={home / 'mclip'}", f"vision={home / 'clip'}"]
    code = main([f"p4_{row}", *own, *QUICK])
    assert code == 0, capsys.readouterr().err
    result = json.loads((tmp_path / "row" / "result.json").read_text())
    assert set(result["recall_at_1"]) == {"en", "de"} and "range" in result["disparity"]
    assert result["retrieval"]["de"]["n"] == (4 if recipe.task == "xtd_few" else 6)
    if not recipe.trains:
        assert result["steps"] == 0
        return
    terms = {
        code: {key for line in read_metrics(tmp_path / "row" / code) for key in line if "loss/" in key}
        for code in ("en", "de")
    }
    aligned = recipe.strategies.alignment is not None and recipe.strategies.alignment.weight > 0
    assert ("loss/alignment" in terms["de"]) == aligned
    assert "loss/alignment" not in terms["en"]  # there is nothing to draw English to
    if row.endswith("soft_prompt_20"):
        assert result["trainable"] == 20 * 64  # the prompt alone


def test_fine_tuning_evaluates_every_so_many_steps(home, tmp_path):
    """Multi30K's rows are evaluated every 300 steps, and the best of these checkpoints counts."""
    own = [f"data={home / 'data'}", f"runs={tmp_path}", "name=row", *QUICK, "languages=de", "epochs=3"]
    models = [f"model={home / 'mclip'}", f"vision={home / 'clip'}"]
    assert main(["p4_multi30k_full", *own, *models, "batch=3", "fit.eval_every=4"]) == 0
    steps = [line["step"] for line in read_metrics(tmp_path / "row" / "de") if "eval/score" in line]
    assert steps == [4, 8, 12, 16, 18]  # 16 captions are 6 steps an epoch


@pytest.mark.slow
def test_translate_commands_write_the_files_that_rows_read(translator, tmp_path):  # noqa: F811
    """The commands of docs/finetuning.md, in the places of `write_translations`."""
    data, by_hand = tmp_path / "data", tmp_path / "by_hand"
    official.multi30k(data)
    write_xtd(data)
    for task, splits in (("multi30k", ("train", "dev", "test")), ("xtd_few", ("test",))):
        for direction in ("to_en", "from_en"):
            for split in splits:
                options = [f"split={split}", f"direction={direction}", "num_beams=1", "length=16"]
                own = [f"data={data}", "languages=de", "batch=128"]
                assert main(["translate", task, str(translator), *own, *options]) == 0
    write_translations(by_hand)
    for path in (path for path in by_hand.rglob("*") if path.is_file()):
        lines = (data / path.relative_to(by_hand)).read_text().splitlines()
        assert len(lines) == len(path.read_text().splitlines())
