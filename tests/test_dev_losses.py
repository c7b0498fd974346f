"""Losses of held-out samples in pretraining: equal to the slow reference, on any number of workers; what they
say of a model that reads its images."""

import json

import pytest

from pretrain import dev_losses
from pretrain.dev_losses import DevLosses, dev_batches
from pretrain.train import resolve_data, run
from raylib.errors import UserError
from raylib.monitoring import read_metrics
from raylib.objectives.pretraining import ObjectiveConfig, UnifiedObjective
from tests import reference
from tests.factories import make_model
from tests.workers import run_workers

CONFIG = ObjectiveConfig(fuse_every=2, directions="mean")
SMALL = ("data.image_text.batch=16", "data.parallel.batch=16", "data.text.batch=8")


def losses_of(data, rank=0, world=1, config=CONFIG):
    model = make_model(vocabulary=12000, positions=64).eval()
    batches = dev_batches(data, 16, 5, rank, world)
    return DevLosses(UnifiedObjective(model, config), batches, bf16=False)()


def slow_losses(data):
    model, batches = make_model(vocabulary=12000, positions=64).eval(), dev_batches(data, 16, 5)
    every_pair = CONFIG.model_copy(update={"fuse_every": 1})
    sums = dict.fromkeys(("vlm", "vlm_wrong_image"), 0.0)
    for number in range(dev_losses.NUM_BATCHES):
        batch, following = batches[number], batches[number + 1]
        pairs = batch["image_text"]
        values = reference.slow_terms(model, batch, CONFIG)
        values["vlm"] = reference.slow_terms(model, {"image_text": pairs}, every_pair)["vlm"]
        wrong = {**pairs, "images": following["image_text"]["images"]}
        values["vlm_wrong_image"] = reference.slow_terms(model, {"image_text": wrong}, every_pair)["vlm"]
        sums = {name: sums.get(name, 0.0) + value.item() for name, value in values.items()}
    return {name: total / dev_losses.NUM_BATCHES for name, total in sums.items()}


def test_dev_losses_equal_slow_reference(mini, monkeypatch):
    data = resolve_data(mini(*SMALL))
    monkeypatch.setattr(dev_losses, "NUM_BATCHES", 2)
    found, expected = losses_of(data), slow_losses(data)
    assert 0 < expected["itm_accuracy"] < 1 and expected["vlm"] != pytest.approx(expected["vlm_wrong_image"])
    named = {name if name == "itm_accuracy" else f"dev_loss/{name}": v for name, v in expected.items()}
    assert found == pytest.approx(named, rel=1e-6)


def on_worker(rank, world, data):
    return losses_of(data, rank, world)


def test_dev_losses_encode_each_image_once(mini, monkeypatch):
    data, images = resolve_data(mini(*SMALL)), []
    monkeypatch.setattr(dev_losses, "NUM_BATCHES", 2)
    model = make_model(vocabulary=12000, positions=64).eval()
    model.vision.register_forward_pre_hook(lambda _, arguments: images.append(len(arguments[0])))
    DevLosses(UnifiedObjective(model, CONFIG), dev_batches(data, 16, 5), bf16=False)()
    assert images == [16, 16, 16]  # two batches, and the one whose images stand beside the last captions


def test_dev_losses_are_the_same_on_any_workers(mini):
    data = resolve_data(mini(*SMALL))
    one = losses_of(data)
    for of_three in run_workers(on_worker, 3, data):
        assert of_three == pytest.approx(one, rel=1e-6)


def test_dev_losses_leave_training_as_it_is(mini, tmp_path):
    """Also where a text encoder that stands still keeps the states of sentences."""
    frozen = ["objective.train_embeddings=false", "objective.frozen_text_layers=1"]
    for name, more in (("with", []), ("without", ["data.dev=false"])):
        run(mini(f"name={name}", "runtime=local", "workers=1", "fit.eval_every=2", *frozen, *more))
    lines = [
        [{k: v for k, v in line.items() if k.startswith(("loss/", "eval/en"))} for line in read_metrics(run)]
        for run in (tmp_path / "with", tmp_path / "without")
    ]
    assert len(lines[0]) == 9 and lines[0] == lines[1]
    evaluation = json.loads((tmp_path / "with" / "result.json").read_text())["evaluation"]
    assert {f"dev_loss/{term}" for term in ("itm", "ucl_image", "tlm", "xmlm", "vlm_wrong_image")} < set(
        evaluation
    )
    assert 0 <= evaluation["itm_accuracy"] <= 1
    assert not any(
        name.startswith("dev_loss") for line in read_metrics(tmp_path / "without") for name in line
    )


def test_dev_losses_of_some_streams(mini, tmp_path, corpus):
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "text").symlink_to(corpus / "dev" / "text")
    assert set(losses_of(resolve_data(mini(*SMALL, f"data.dev={tmp_path / 'dev'}")))) == {"dev_loss/xmlm"}


def test_dev_losses_of_no_stream_are_an_error(mini, tmp_path):
    with pytest.raises(UserError, match=r"no folder image_text, parallel, text in it; data.dev=false leaves"):
        run(mini("name=none", f"data.dev={tmp_path}"))


def test_dev_losses_too_few_samples_are_found_before_start(mini):
    with pytest.raises(UserError, match=r"data.dev=.*dev: text: 248 lanes but 244 samples of language"):
        run(mini("name=few", "data.text.lanes=248", "data.text.batch=248"))
