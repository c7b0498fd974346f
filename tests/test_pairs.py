"""Retrieval by pairs: options, losses and scores against slow loops; a run from the command line."""

import functools
import json

import numpy as np
import pytest
import torch

from finetune.__main__ import main
from finetune.batches import BatchOrder, CaptionPairs, encode_texts
from finetune.build import find_task
from finetune.formats import Captioned
from finetune.recipes import RECIPES
from finetune.tasks.base import Pipeline
from finetune.tasks.datasets import TASKS
from finetune.tasks.pairs import PairBatches, PairObjective, score_pairs
from raylib.config import override
from raylib.models.finetuned import FinetuneModel
from raylib.packed import Ragged
from raylib.text import Tokenizer
from tests.factories import make_model
from tests.test_finetune_models import regions_of, text_folder, write_regions
from tests.workers import assert_workers_equal_one, run_workers

ITEMS = [Captioned(f"{i}", tuple(f"text {i} {j}" for j in range(1 + i % 3))) for i in range(7)]


class Regions:
    """Two regions an image, whose features say which one it is."""

    num_draws = 0

    def __init__(self, dtype=torch.float32):
        self.dtype = dtype

    def read(self, names, draws=None):
        rows = [[float(name), *[0.5] * 10] for name in names for _ in range(2)]
        values = torch.tensor(rows, dtype=self.dtype)
        return {"regions": Ragged(values, torch.full((len(names),), 2))}


@pytest.fixture
def tokenizer(model):
    return Tokenizer.load(model)


@pytest.fixture
def pair_model():
    torch.manual_seed(0)
    return FinetuneModel(make_model(vocabulary=12000).float(), ("match",), 1, 0.0, 4).eval()


def test_options_are_the_pair_and_three_wrong_ones(tokenizer):
    """In VOLTA's order, over two epochs; an example's draws do not depend on the worker that has it."""
    order = BatchOrder(5, 0, keep_last=True)
    batches = PairBatches(ITEMS, Regions(), tokenizer, 20, order)
    captions = {text: int(item.image) for item in ITEMS for text in item.captions}
    known = dict(zip(map(tuple, tokenizer.encode(list(captions))), captions.values(), strict=True))
    drawn = []
    for step in range(2 * batches.epoch_steps):
        part = batches[step]["pairs"]
        rows = part["state_rows"].tolist()
        images = [int(part["regions"].values[2 * row, 0]) for row in rows]
        ids = part["text"].values.split(part["text"].lengths.tolist())
        texts = [tuple(row[1:-1].tolist()) for row in ids]
        for i in range(0, len(rows), 4):
            assert known[texts[i]] == images[i] == images[i + 1] == images[i + 3] != images[i + 2]
            assert texts[i + 2] == texts[i]
            assert known[texts[i + 1]] != images[i] != known[texts[i + 3]]
            drawn.append((images[i], texts[i], images[i + 2], texts[i + 1], texts[i + 3]))
    assert len(set(drawn)) > len(CaptionPairs(ITEMS))  # another epoch draws others
    halves = [
        PairBatches(ITEMS, Regions(), tokenizer, 20, order._replace(rank=r, world=2))[0] for r in (0, 1)
    ]
    whole = batches[0]["pairs"]
    joined = torch.cat([half["pairs"]["text"].values for half in halves])
    assert joined.equal(whole["text"].values)
    shares = torch.cat([half["pairs"]["regions"].values for half in halves])
    assert shares.equal(whole["regions"].values)


@pytest.mark.parametrize("loss", ["ce", "triplet"])
def test_pair_losses_equal_slow_loops(tokenizer, pair_model, loss):
    part = PairBatches(ITEMS, Regions(), tokenizer, 20, BatchOrder(5, 0))[0]["pairs"]
    value, terms = PairObjective(pair_model, loss)({"pairs": part})
    with torch.no_grad():
        rows = pair_model(part)[:, 0].view(-1, 4).tolist()
    expected = 0.0
    for right, *wrong in rows:
        if loss == "ce":
            expected += np.log(sum(np.exp(x) for x in (right, *wrong))) - right
        else:
            sigmoid = [1 / (1 + np.exp(-x)) for x in (right, *wrong)]
            expected += sum(max(0.0, 0.2 + x - sigmoid[0]) for x in sigmoid[1:]) / 3
    assert float(value) == float(terms["task"]) == pytest.approx(expected / len(rows), rel=1e-5)


def test_scores_of_all_pairs_equal_those_of_one(tokenizer, pair_model):
    recipe = override(RECIPES["iglue_uc2_xflickrco"](), ["fit.bf16=false", "length=20"])
    scores, faults = score_pairs(Pipeline(recipe, pair_model, tokenizer, Regions()), "en", ITEMS)
    texts = [text for item in ITEMS for text in item.captions]
    assert scores.shape == (len(ITEMS), len(texts)) and faults == []
    for i, j in ((0, 0), (3, 5), (6, len(texts) - 1)):
        ids = encode_texts([texts[j]], tokenizer, 20)
        with torch.no_grad():
            one = pair_model({"text": ids, **Regions().read([ITEMS[i].image])})
        assert float(scores[i, j]) == pytest.approx(float(one), abs=1e-5)


def on_share(rank, world, folder):
    """Loss, gradients, scores and dev accuracy of this worker's part."""
    torch.manual_seed(0)
    model = FinetuneModel(make_model(vocabulary=12000), ("match",), 1, 0.0, 4).double().eval()
    tokenizer = Tokenizer.load(folder)
    part = PairBatches(ITEMS, Regions(torch.float64), tokenizer, 20, BatchOrder(6, 0, rank, world))[0][
        "pairs"
    ]
    loss, terms = PairObjective(model, "triplet")({"pairs": part})
    loss.backward()
    recipe = override(RECIPES["iglue_uc2_xflickrco"](), ["fit.bf16=false", "length=20"])
    pipeline = Pipeline(recipe, model, tokenizer, Regions(torch.float64))
    values = {"task": terms["task"], "scores": score_pairs(pipeline, "en", ITEMS)[0]}
    dev = TASKS["xflickrco"].heads["pairs"].evaluate_dev(pipeline, {"en": ITEMS}, None)["en"]
    values["dev"] = torch.tensor(dev["accuracy"])
    return values, {k: p.grad for k, p in model.named_parameters()}


def test_pairs_on_several_workers_equal_one(model):
    assert_workers_equal_one(run_workers(functools.partial(on_share, folder=model), 2), on_share(0, 1, model))


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("uc2", "xlmr"),
        *(
            pytest.param(m, k, marks=pytest.mark.slow)
            for m, k in (("m3p", "xlmr"), ("xuniter", "xlmr"), ("muniter", "bert"))
        ),
    ],
)
def test_retrieval_by_pairs_runs_end_to_end(tmp_path, scenes, model, kind):
    """Trained on English and tested on all pairs, again, few-shot, and on translations."""
    text = text_folder(tmp_path / "text", kind)
    path = write_regions(tmp_path, "npz", regions_of(scenes, "xflickrco", [("shots", "ru")]))
    own = [
        *(f"data={scenes}", f"regions={path}", f"runs={tmp_path}", "runtime=local", "epochs=1", "batch=16"),
        *("fit.bf16=false", "fit.loader_workers=0", "test_limit=8"),
    ]
    run = tmp_path / "english"
    assert main([f"iglue_{model}_xflickrco", *own, "name=english", f"model={text}", "languages=en,ru"]) == 0
    found = json.loads((run / "result.json").read_text())
    assert found["retrieval"]["ru"]["n"] == 8 and found["retrieval"]["ru"]["pairs"] > 8 * 8
    assert main(["evaluate", str(run)]) == 0
    assert json.loads((run / "result.json").read_text())["retrieval"] == found["retrieval"]
    few = [f"iglue_{model}_few_shot_xflickrco", "name=few", f"model={run}", "languages=ru", "shots=5"]
    assert main([few[0], *own, *few[1:]]) == 0
    translated = [f"iglue_{model}_translate_test_xflickrco", "name=mt", f"model={run}", "languages=en,ru"]
    assert main([translated[0], *own, *translated[1:]]) == 0
    again = json.loads((tmp_path / "mt" / "result.json").read_text())
    assert again["retrieval"]["en"] == found["retrieval"]["en"] and again["steps"] == 0


def test_pairs_start_from_weights_as_the_settings_say(tmp_path, scenes):
    text = text_folder(tmp_path / "text", "xlmr")
    path = write_regions(tmp_path, "npz", regions_of(scenes, "xflickrco"))
    own = [f"data={scenes}", f"regions={path}", f"model={text}", "backbone_config.eps=0.125"]
    config = override(RECIPES["iglue_uc2_xflickrco"](), own)
    sizes = find_task(config).build_model(config).backbone.config
    assert (sizes.activation, sizes.eps) == ("relu", 0.125)


def test_head_pairs_is_of_retrieval_alone(tmp_path, scenes, model, capsys):
    assert set(TASKS["wit"].heads) == {"classifier", "pairs"}
    own = [f"data={scenes}", f"runs={tmp_path}", f"model={model}", "runtime=local", "name=run"]
    assert main(["scenes_xgqa", *own, "head=pairs"]) == 2
    assert "head=pairs scores images with captions; xgqa retrieves none" in capsys.readouterr().err
    assert main(["scenes_xflickrco", *own, "head=pairs", "loss=bce"]) == 2
    assert "set loss=ce or loss=triplet" in capsys.readouterr().err
    assert main(["scenes_xgqa", *own, "loss=triplet"]) == 2
    assert "loss=triplet is of pairs of a retrieval" in capsys.readouterr().err
