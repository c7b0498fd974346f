"""Selection of the checkpoint that is evaluated: by what each recipe's paper chose, by which score, which of
ties."""

import json

import pytest

from finetune.__main__ import main
from finetune.build import dev_sets, dev_split, find_task, languages_of, read_split
from finetune.config import FinetuneConfig
from finetune.recipes import RECIPES
from finetune.stores.images import ImageSource, open_images
from finetune.tasks.ranking import retrieve
from finetune.tasks.retrieval import merge_captions
from raylib import checkpoint
from raylib.config import load_config
from raylib.models.finetuned import tokenizer_at
from raylib.models.unified import UnifiedModel
from raylib.text import Tokenizer
from tests import official
from tests.conftest import QUICK

CHOSEN = {  # recipe -> (select, metric, ties)
    "p0_uc2_baseline": ("best", "mean_recall", "first"),
    "p1_cclm_suf_xflickrco": ("last", "mean_recall", "first"),
    "p1_uc2_few_shot_xgqa": ("last", "mean_recall", "first"),
    "p2_xflickrco": ("best", "recall_at_1", "first"),
    "p2_xgqa": ("best", "recall_at_1", "first"),
    "p3_kd": ("last", "mean_recall", "first"),
    "p3_classify": ("best", "mean_recall", "first"),
    "p2_coco": ("best", "recall_at_1", "first"),
    "p4_xtd_few_framework": ("best", "recall_at_1", "last"),
    "p4_multi30k_full": ("best", "recall_at_1", "last"),
    "iglue_xflickrco": ("best", "mean_recall", "first"),
    "iglue_few_shot_xvnli": ("best", "mean_recall", "first"),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_selection_recipes_follow_their_papers(name):
    config = RECIPES[name]()
    assert (config.select, config.select_metric, config.select_ties) == CHOSEN[name]


def test_selection_is_stated_by_every_recipe():
    words = {
        "p1_uc2_suf_xgqa": "[last epoch]",
        "p4_xtd_few_full": "[best recall at 1 on the dev set, last of ties]",
        "iglue_xgqa": "[best accuracy on the dev set, first of ties]",
        "transfer_zero_shot": "[nothing is trained]",
        "p2_fm_iqa": "[last epoch: there is no dev set]",
    }
    assert all(RECIPES[name].__doc__.endswith(said) for name, said in words.items())
    assert all(RECIPES[name].__doc__.endswith("]") for name in RECIPES)


@pytest.mark.parametrize(
    "name", [name for name in RECIPES if RECIPES[name]().trains and RECIPES[name]().select == "best"]
)
def test_selection_best_has_a_dev_set_for_each_part(name):
    config = RECIPES[name]()
    for language in languages_of(config) if config.trains_apart else [None]:
        sets = dev_sets(config, language)
        score = f"[best {find_task(config).dev_score_name(config)} on the dev set, "
        assert bool(sets) == (score in RECIPES[name].__doc__) == (config.task != "fm_iqa")


def test_selection_uses_dev_sets_per_language(tmp_path, model):
    """Of MSCOCO, STAIR and COCO-CN: every language has its own."""
    config = RECIPES["p2_coco"]()
    assert dev_sets(config, None) == {"en": "dev"} and dev_split(config, "zh") == "dev"
    apart = config.model_copy(update={"setting": "single_language"})
    assert [dev_sets(apart, code) for code in ("en", "ja", "zh")] == [
        {"en": "dev"},
        {"ja": "dev"},
        {"zh": "dev"},
    ]


def test_selection_without_dev_set_says_last_epoch_is_evaluated(tmp_path, model, capsys):
    official.fm_iqa(tmp_path / "data")
    settings = [
        "p2_fm_iqa",
        "runtime=local",
        "workers=1",
        "backbone=unified",
        f"model={model}",
        f"data={tmp_path / 'data'}",
        f"runs={tmp_path}",
        *QUICK,
        "epochs=1",
    ]
    assert main(settings) == 0
    assert (
        "fm_iqa has no dev set that could choose a checkpoint: the last epoch's is evaluated"
        in capsys.readouterr().out
    )


def keep(run, scores, ties):
    """The step that is best after checkpoints of these scores."""
    for step, score in enumerate(scores, 1):
        folder = run / checkpoint.FOLDER / checkpoint.step_name(step)
        folder.mkdir(parents=True)
        (folder / "meta.json").write_text(
            json.dumps({"step": step, "workers": 1, "score": score, "skipped_steps": 0, **ties})
        )
        checkpoint.register(run, folder.name, 1)
    return checkpoint.read_meta(checkpoint.find_best(run))["step"]


@pytest.mark.parametrize(
    ("scores", "first", "last"),
    [
        ((0.5, 0.5, 0.5), 1, 3),
        ((0.2, 0.5, 0.5, 0.4), 2, 3),
        ((0.5, 0.4, 0.6), 3, 3),
        ((0.6, None, 0.5), 1, 1),
        ((0.0, 0.0), 1, 2),
    ],
)
def test_selection_of_ties_keeps_first_or_last(tmp_path, scores, first, last):
    assert keep(tmp_path / "none", scores, {}) == first  # checkpoints of before say nothing of ties
    assert keep(tmp_path / "first", scores, {"ties": "first"}) == first
    assert keep(tmp_path / "last", scores, {"ties": "last"}) == last


def test_selection_run_keeps_last_of_ties(finetune, tmp_path):
    """At a rate of nothing every epoch scores alike."""
    for ties, step in (("first", 3), ("last", 9)):
        code, printed = finetune(
            "scenes_xvnli", f"name={ties}", "optim.lr=1e-30", "epochs=3", f"select_ties={ties}"
        )
        assert code == 0 and checkpoint.read_meta(checkpoint.find_best(tmp_path / ties))["step"] == step, (
            printed
        )


def test_selection_of_retrieval_uses_requested_score(finetune, tmp_path, scenes):
    settings = ["epochs=1", "use_itm_head=false", 'languages=["en"]']
    found = {}
    for metric in ("mean_recall", "recall_at_1"):
        code, printed = finetune("scenes_xflickrco", f"name={metric}", f"select_metric={metric}", *settings)
        assert code == 0, printed
        found[metric] = checkpoint.read_meta(checkpoint.find_best(tmp_path / metric))
    config = load_config(FinetuneConfig, tmp_path / "recall_at_1" / "config.json")
    model = UnifiedModel.from_pretrained(checkpoint.find_best(tmp_path / "recall_at_1")).eval()
    tokenizer = Tokenizer.load(tokenizer_at(config.model))
    items, images = (
        merge_captions(list(read_split(config, "dev", "en"))),
        ImageSource(open_images(scenes / "images.tar"), 16),
    )
    figures = retrieve(model, items, images, tokenizer, config.length, None, tmp_path / "states")
    assert found["recall_at_1"]["score"] == pytest.approx((figures["i2t_r1"] + figures["t2i_r1"]) / 2)
    assert found["mean_recall"]["score"] == pytest.approx(figures["mean_recall"])
    assert figures["mean_recall"] != (figures["i2t_r1"] + figures["t2i_r1"]) / 2
    assert found["recall_at_1"]["evaluation"]["dev/en"] == found["recall_at_1"]["score"]
