"""Captions that are true of another image are no negatives of it: sets of facts, the objective that reads
them on any number of workers, batches, and the scenes that tell them."""

import json
import random

import pytest
import torch

from pretrain.batches import DataConfig, StepBatches, StreamConfig
from raylib.data.shards import ShardWriter
from raylib.errors import UserError
from raylib.facts import WORDS, encode_facts, find_true
from raylib.objectives.pretraining import ObjectiveConfig, UnifiedObjective
from raylib.packed import Ragged
from raylib.sample import (
    DATA,
    NUM_SCENES,
    draw_dev_scenes,
    draw_training_scenes,
    find_true_names,
    read_images,
    read_plain_concepts,
)
from tests.factories import make_batch, make_model, take_rows
from tests.test_batches import content
from tests.test_objective import compare
from tests.workers import assert_workers_equal_one, run_workers


def test_captions_are_true_where_all_claims_are_facts_of_the_image():
    rng = random.Random(1)
    words = [f"thing {i}" for i in range(60)]
    truths = [rng.sample(words, rng.randint(0, 30)) for _ in range(200)]
    claims = [rng.sample(words, rng.randint(0, 3)) for _ in range(300)]
    expected = torch.tensor([[bool(c) and set(c) <= set(t) for c in claims] for t in truths])
    found = find_true(encode_facts(truths), encode_facts(claims))
    assert encode_facts(truths).shape == (200, WORDS) and 1000 < expected.sum() < 20_000
    assert found[expected].all()  # never missed
    assert found[~expected].sum() < 0.001 * (~expected).sum()  # and seldom taken for true


# captions 1 and 3 are true of image 0, caption 0 of image 4; of caption 2 nothing is known
TRUTHS = (["a", "b", "c"], ["a"], [], ["b", "c", "e"], ["a", "b", "c", "d"])
CLAIMS = (["a", "c"], ["a"], [], ["b", "c"], ["d"])
TRUE = {
    (i, j) for i in range(5) for j in range(5) if i != j and CLAIMS[j] and set(CLAIMS[j]) <= set(TRUTHS[i])
}


def batch_with_facts():
    batch = make_batch(4)
    batch["image_text"] |= {"truths": encode_facts(TRUTHS), "claims": encode_facts(CLAIMS)}
    return batch


@pytest.mark.parametrize(
    "switches", [{}, {"fuse_every": 2}, {"contrast_groups": 2}, {"itm_text": "masked", "directions": "mean"}]
)
def test_objective_leaves_true_captions_out_of_negatives(switches):
    assert TRUE == {(0, 1), (0, 3), (4, 0), (4, 1), (4, 3)}
    compare(make_model(), batch_with_facts(), ObjectiveConfig(**switches), TRUE)


def terms_and_gradients(rank, world, config):
    model = make_model()
    loss, terms = UnifiedObjective(model, config)(take_rows(batch_with_facts(), rank, world))
    loss.backward()
    return terms, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("contrast", ["softmax", "sigmoid"])
def test_objective_with_facts_is_the_same_on_any_workers(contrast):
    config = ObjectiveConfig(contrast=contrast)
    alone = terms_and_gradients(0, 1, config)
    assert_workers_equal_one(run_workers(terms_and_gradients, 3, config), alone)


def test_sigmoid_contrast_leaves_true_captions_out():
    model = make_model()
    _, terms = UnifiedObjective(model, ObjectiveConfig(contrast="sigmoid"))(batch_with_facts())
    part = batch_with_facts()["image_text"]
    left = model.embed_images(model.encode_images(part["images"]), normalize=True)
    right = model.embed_text(Ragged(part["text"].clean, part["text"].lengths), normalize=True)
    expected = 0.0
    for i in range(5):
        for j in range(5):
            if (i, j) not in TRUE:
                z = 1 if i == j else -1
                score = left[i] @ right[j] / model.temperature + model.contrast_bias
                expected -= torch.nn.functional.logsigmoid(z * score) / 5
    torch.testing.assert_close(terms["ucl_image"].double(), 2 * expected[0].detach(), rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Samples with two captions, of the second of which nothing is said."""
    folder = tmp_path_factory.mktemp("facts")
    with ShardWriter(folder, "image_text", max_samples=8) as writer:
        for number, image in enumerate(list(read_images("noto").values())[:20]):
            record = {"captions": {"en": [f"thing {number}", "a thing"]}, "facts": facts_of(number)}
            writer.write(f"k{number}", {"json": json.dumps(record).encode(), "png": image})
    return folder


def facts_of(number):
    return {
        "image": [f"thing {number}", f"thing {number + 1}"],
        "captions": {f"thing {number}": [f"thing {number}"]},
    }


def open_batches(folder, rank=0, world=1):
    stream = StreamConfig(folder=str(folder), batch=10, lanes=2, length=16)
    tokenizer = str(DATA / "tokenizer.model")
    config = DataConfig(tokenizer=tokenizer, image_text=stream, augment=None, facts=True)
    return StepBatches(config, 16, 3, rank, world)


def test_batches_hold_facts_of_their_images_and_captions(folder):
    batches, known = open_batches(folder), 0
    source, tokenizer = batches.streams["image_text"].source, batches.streams["image_text"].tokenizer
    number_of = {source.sample("en", n).identity: n for n in range(20)}
    for step in range(4):
        batch = batches[step]["image_text"]
        text = batch["text"].clean.split(batch["text"].lengths.tolist())
        for row, (image_id, ids) in enumerate(zip(batch["image_id"].tolist(), text, strict=True)):
            number = number_of[image_id]
            caption = f"thing {number}"
            is_first = ids[1:-1].tolist() == tokenizer.encode([caption])[0].tolist()
            assert batch["truths"][row].equal(encode_facts([facts_of(number)["image"]])[0])
            assert batch["claims"][row].equal(encode_facts([[caption] if is_first else []])[0])
            known += is_first
    assert 5 < known < 35
    parts = [open_batches(folder, rank, 3)[2] for rank in range(3)]
    assert content(*parts) == content(batches[2])


def test_batches_without_facts_or_with_damaged_ones_say_so(folder, tmp_path):
    image = next(iter(read_images("noto").values()))
    for name, facts in (("none", {}), ("damaged", {"facts": {"image": "red", "captions": {}}})):
        with ShardWriter(tmp_path / name, "image_text") as writer:
            for number in range(20):
                record = {"captions": {"en": [f"thing {number}"]}, **facts}
                writer.write(f"k{number}", {"json": json.dumps(record).encode(), "png": image})
    for name in ("none", "damaged"):
        fault = r'sample k0 has no "facts" in its .json, or damaged ones; .* set data.facts=false'
        with pytest.raises(UserError, match=fault):
            open_batches(tmp_path / name)
    with ShardWriter(tmp_path / "later", "image_text") as writer:
        for number in range(20):
            record = {"captions": {"en": ["a thing"]}, "facts": facts_of(number) if number == 0 else 1}
            writer.write(f"k{number}", {"json": json.dumps(record).encode(), "png": image})
    batches = open_batches(tmp_path / "later")
    with pytest.raises(UserError, match="20 unusable samples one after another"):
        for step in range(9):
            batches[step]
    assert any("sample k7 has no" in warning for warning in batches.streams["image_text"].warnings)
    with ShardWriter(tmp_path / "json", "image_text") as writer:
        for number in range(20):
            writer.write(f"k{number}", {"json": b"{", "png": image})
    with pytest.raises(UserError, match="sample k0 has a .json that is no UTF-8 JSON"):
        open_batches(tmp_path / "json")


def test_facts_are_found_of_captions_with_surplus_white_space(tmp_path):
    image = next(iter(read_images("noto").values()))
    record = {
        "captions": {"en": [" a  dog "]},
        "facts": {"image": ["dog"], "captions": {" a  dog ": ["dog"]}},
    }
    with ShardWriter(tmp_path, "image_text") as writer:
        writer.write("k", {"json": json.dumps(record).encode(), "png": image})
    stream = StreamConfig(folder=str(tmp_path), batch=1, lanes=1, length=16)
    tokenizer = str(DATA / "tokenizer.model")
    config = DataConfig(tokenizer=tokenizer, image_text=stream, augment=None, facts=True)
    assert StepBatches(config, 16, 3)[0]["image_text"]["claims"].equal(encode_facts([["dog"]]))


def test_scenes_tell_what_captions_are_true_of():
    dev = list(draw_dev_scenes())
    assert len(dev) == 512 and dev[0].name == f"scene{NUM_SCENES}"
    assert all(set(scene.facts["captions"]) == set(scene.captions) for scene in dev)
    # a scene's own captions are true of it, and few of those of others
    for scene in dev:
        for claims in scene.facts["captions"].values():
            assert claims and set(claims) <= set(scene.facts["image"])
    claims = [claims for scene in dev for claims in scene.facts["captions"].values()]
    table = find_true(encode_facts([scene.facts["image"] for scene in dev]), encode_facts(claims))
    assert 0.002 < table.float().mean() < 0.01
    pairs = [s for s in dev if any(" beside " in c for c in s.captions)]
    beside = next(c for s in pairs for c in s.captions if " beside " in c)
    left, _, right = beside.partition(" beside ")
    (scene,) = [s for s in pairs if beside in s.captions][:1]
    assert {f"{right} beside {left}", left, right} <= set(scene.facts["image"])


def test_facts_of_scenes_know_what_lies_above_in_wordnet():
    key_of = {name: key for key, name in read_plain_concepts().items()}
    true = find_true_names()
    assert true[key_of["poodle"]] == ["poodle", "dog"] and "bird" in true[key_of["owl"]]
    assert true[key_of["dog"]] == ["dog"]
    scene = next(s for s in draw_training_scenes() if "poodle" in s.facts["image"])
    assert "dog" in scene.facts["image"] and any(
        f.startswith(("big dog", "little dog")) for f in scene.facts["image"]
    )
