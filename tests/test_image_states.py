"""Pretraining with a frozen image encoder: each image is encoded once, and batches hold what the encoder
makes of the very images that they would have held."""

import shutil
from pathlib import Path

import pytest
import torch

from pretrain.batches import DataConfig, StepBatches, StreamConfig
from pretrain.train import run
from raylib.cache import fingerprint_module
from raylib.data.shards import ShardWriter
from raylib.models.recompute import set_recomputation
from raylib.models.vision import VisionEncoder
from raylib.monitoring import read_metrics
from raylib.packed import Ragged
from raylib.sample import DATA, read_images
from raylib.settings import PreprocessConfig
from tests.factories import make_model
from tests.workers import run_workers

LOCAL = ("runtime=local", "workers=1")
FROZEN = ("data.augment=null", "objective.train_vision=false")
PREPROCESS = PreprocessConfig(resize="shortest_edge", resize_to=20)


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    """Shards of 21 samples of two drawings each, the second one of number 5 damaged."""
    folder = tmp_path_factory.mktemp("drawings")
    noto = list(read_images("noto").values())
    with ShardWriter(folder, "image_text", max_samples=8) as writer:
        for number in range(21):
            second = b"no image" if number == 5 else noto[number + 30]
            writer.write(f"k{number}", {"txt": b"a drawing", "a.png": noto[number], "b.png": second})
        writer.images.update(("a.png", "b.png"))
    return folder


def open_batches(folder, rank=0, world=1):
    stream = StreamConfig(folder=str(folder), batch=10, lanes=2, length=16)
    config = DataConfig(
        tokenizer=str(DATA / "tokenizer.model"), image_text=stream, augment=None, bad_limit=1.0
    )
    return StepBatches(config, 16, 3, rank, world, PREPROCESS)


def encoder():
    return make_model(dtype=torch.float32, preprocess=PREPROCESS)


def cached(folder, states, rank=0, world=1):
    batches = open_batches(folder, rank, world)
    batches.cache_image_states(encoder(), states, bf16=False)
    return batches


def test_batches_hold_states_of_the_images_that_they_would_have_held(drawings, tmp_path):
    model, plain, batches = encoder().eval(), open_batches(drawings), cached(drawings, tmp_path)
    num_replaced = 0
    for step in range(12):
        expected, found = plain[step], batches[step]
        pairs, states = expected.pop("image_text"), found.pop("image_text")
        values = states.pop("states")
        with torch.no_grad():
            rows = [model.encode_images(image[None]).values for image in pairs.pop("images")]
        assert values.lengths.tolist() == [5] * 10
        torch.testing.assert_close(values.values, torch.cat(rows), rtol=1e-5, atol=1e-5)
        text, other = pairs.pop("text"), states.pop("text")
        assert all(a.equal(b) for a, b in zip(text, other, strict=True))
        assert pairs.keys() == states.keys()
        assert all(torch.as_tensor(pairs[name]).equal(torch.as_tensor(states[name])) for name in pairs)
        assert expected["bad"] == found["bad"] and found["tokens"] == int(text.lengths.sum()) + 50
        num_replaced += found["bad"]
    assert num_replaced


def encode_on_worker(rank, world, drawings, states):
    batches = cached(drawings, states, rank, world)
    return [(batch["index"], *batch["states"]) for batch in (batches[step]["image_text"] for step in (0, 7))]


def test_states_are_made_by_all_workers_together(drawings, tmp_path):
    whole = cached(drawings, tmp_path / "one")
    parts = run_workers(encode_on_worker, 2, drawings, tmp_path / "two")
    for i, step in enumerate((0, 7)):
        states = whole[step]["image_text"]["states"].values.unflatten(0, (10, -1))
        for part in parts:
            index, *ragged = part[i]
            torch.testing.assert_close(Ragged(*ragged).values.unflatten(0, (-1, 5)), states[index])
    files = {path.name for path in (tmp_path / "two").glob("*/*")}
    assert files == {"index-0.json", "index-1.json", "states-0.bin", "states-1.bin"}


def losses(folder):
    records = [r for r in read_metrics(folder) if "lr" in r]
    return [{k: v for k, v in r.items() if k.startswith("loss/")} for r in records]


def count_encoded(monkeypatch):
    """Numbers of images in each call of an image encoder from here on."""
    calls, forward = [], VisionEncoder.forward

    def count(self, images):
        calls.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(VisionEncoder, "forward", count)
    return calls


def test_frozen_encoder_sees_each_image_once_and_trains_the_same_model(mini, tmp_path, monkeypatch):
    own = (*LOCAL, *FROZEN, "data.dev=false", "data.retrieval=null", "corpus=CORPUS")
    calls = count_encoded(monkeypatch)
    corpus = Path(mini().corpus)
    plain = tmp_path / "corpus"
    shutil.copytree(corpus, plain, ignore=shutil.ignore_patterns("retrieval", "dev"))
    own = tuple(setting.replace("CORPUS", str(plain)) for setting in own)
    run(mini("name=each", *own, "data.cache_image_states=false"))
    assert calls.count(16) >= 6  # a batch each step
    calls.clear()
    run(mini("name=once", *own))
    images = sum(len(list(read_images(vendor))) for vendor in ("noto", "twemoji"))
    assert images <= sum(calls) <= images + 2 and max(calls) == 64  # and blank ones, that tokens be counted
    for found, expected in zip(losses(tmp_path / "once"), losses(tmp_path / "each"), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    calls.clear()
    run(mini("name=again", *own))  # with the states that are there
    assert sum(calls) <= 2 and losses(tmp_path / "again") == losses(tmp_path / "once")


def test_resumed_run_with_encoded_images_is_the_same_run(mini, tmp_path):
    run(mini("name=first", *LOCAL, "fit.steps=2"))
    start = tmp_path / "start"
    shutil.copytree(tmp_path / "first", start)
    settings = (*LOCAL, *FROZEN, f"init.model={start}")
    run(mini("name=whole", *settings))
    run(mini("name=parts", *settings, "fit.stop_after=3"))
    # neither states nor the encoder that they start from are what they were
    shutil.rmtree(tmp_path / "encoded")
    run(mini("name=first", *LOCAL, "fit.seed=8", f"runs={tmp_path / 'other'}", "fit.steps=2"))
    shutil.rmtree(start)
    shutil.copytree(tmp_path / "other" / "first", start)
    run(mini("name=parts", *settings))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    ends = [tmp_path / name / "checkpoints/step_000006/model.safetensors" for name in ("parts", "whole")]
    assert ends[0].read_bytes() == ends[1].read_bytes()


def test_fingerprint_tells_encoders_of_equal_weights_apart():
    """By heads and epsilons, which weights do not show; not by what changes nothing in evaluation."""
    marks = {}
    for name, sizes in (("", {}), ("eps", {"vision_eps": 1e-2}), ("drop", {"vision_dropout": 0.3})):
        marks[name] = fingerprint_module(make_model(**sizes).vision)
    assert marks["eps"] != marks[""] == marks["drop"]
    model = make_model()
    before = fingerprint_module(model.vision.train())
    set_recomputation(model, "all", 2)
    assert fingerprint_module(model.vision.eval()) == before
    model.vision.heads *= 2
    assert fingerprint_module(model.vision) != before


def test_augmented_images_are_encoded_anew(mini, tmp_path):
    run(mini("name=augmented", *LOCAL, "objective.train_vision=false", "fit.steps=1"))
    assert not (tmp_path / "encoded").exists()
