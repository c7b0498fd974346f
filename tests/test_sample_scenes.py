"""Scenes for pretraining: what the captions say is what the image shows."""

import json
import re

import numpy as np
import pytest

from pretrain.corpora import build_sample_corpus
from pretrain.train import resolve_data, with_vocabulary
from raylib.data.images import decode_image, resize_image
from raylib.data.shards import MANIFEST
from raylib.data.sources import Source
from raylib.models.unified import UnifiedModel
from raylib.sample import (
    DATA,
    QUESTION_COPIES,
    TRAINING_VENDORS,
    Placement,
    caption_scene,
    decode_drawings,
    draw_training_scenes,
    draw_unseen_scenes,
    is_held_out,
    place_concepts,
    read_plain_concepts,
    read_sentence_pairs,
    read_sentences,
)
from raylib.settings import AugmentConfig
from raylib.text import Tokenizer

COUNT = 60


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("raylib.sample.NUM_SCENES", COUNT)
        patch.setattr(
            "raylib.sample.AUGMENTATION", AugmentConfig(scale=(1, 1), ratio=(1, 1), operations=0)
        )  # to know them by
        return build_sample_corpus(tmp_path_factory.mktemp("cache"), scenes=True)


def test_sample_scenes_captions_equal_worked_example():
    names = {"a": "dog", "b": "bus", "c": "cup"}
    dog, bus = Placement("a", 1, 1, 30, 0, True), Placement("b", 36, 40, 19, 3, False)
    assert caption_scene([dog], names, 0) == {"dog": ["dog"]}
    for i in range(8):
        captions = caption_scene([dog, bus], names, i)
        everything, places, last = captions
        assert sorted(captions[everything]) == ["bus", "dog"]
        assert captions[places] == places.split(", ") and captions[last] == last.split(", ")
        assert everything in ("dog and bus", "bus and dog")
        assert sorted(places.split(", ")) == ["bus bottom right", "dog top left"]
        assert sorted(last.split(", ")) == ["big dog", "little bus"]  # no relation: they stand across
    cup = Placement("c", 33, 0, 19, 1, False)
    said = {list(caption_scene([dog, cup], names, i))[2] for i in range(20)}
    assert said == {"dog beside cup", "big dog, little cup", "little cup, big dog"}
    said = {list(caption_scene([bus, cup], names, i))[2] for i in range(20)}
    assert said == {"cup above bus", "little cup, little bus", "little bus, little cup"}


def test_sample_scenes_captions_match_what_is_drawn(corpus):
    """Of the things that a caption names, the one that it places in a quadrant is the one whose drawing fits
    there."""
    keys = {name: key for key, name in read_plain_concepts().items()}
    source = Source(corpus / "image_text", kind="image_text")
    assert source.size("en") == COUNT
    several = 0
    for number in range(COUNT):
        sample = source.sample("en", number)
        image = decode_image(sample.read("webp")).astype(float)
        captions = json.loads(sample.read("json"))["captions"]["en"]
        if len(captions) == 1:
            assert not is_held_out(keys[captions[0]])
            continue
        several += 1
        said = [
            re.fullmatch(r"(.*) (top|bottom) (left|right)", part).groups() for part in captions[1].split(", ")
        ]
        assert not any(is_held_out(keys[name]) for name, *_ in said)
        quadrants = {2 * (row == "bottom") + (column == "right"): keys[name] for name, row, column in said}
        assert len(quadrants) == len(said)
        for quadrant in range(4):
            top, left = 32 * (quadrant // 2), 32 * (quadrant % 2)
            cell = image[top : top + 32, left : left + 32]
            if quadrant in quadrants:
                errors = {key: fits(cell, key) for key in quadrants.values()}
                assert min(errors, key=errors.get) == quadrants[quadrant], errors
            else:
                assert cell.min() > 225  # white, but for what WebP leaves
    assert several > COUNT / 5


def fits(cell: np.ndarray, key: str) -> float:
    """Mean error of the drawing that fits `cell` (32, 32, 3) best, of both vendors, sizes, and all places."""
    errors = []
    for vendor in TRAINING_VENDORS:
        for side in (19, 30):
            drawing = resize_image(decode_drawings(vendor)[key], side).astype(float)
            for top in range(33 - side):
                for left in range(33 - side):
                    made = np.full_like(cell, 255)
                    made[top : top + side, left : left + side] = drawing
                    errors.append(np.abs(cell - made).mean())
    return min(errors)


def test_sample_scenes_variation_changes_pixels_not_captions(monkeypatch):
    """The same scene with and without variation: the same captions, other pixels."""
    monkeypatch.setattr("raylib.sample.NUM_SCENES", 4)
    varied = list(draw_training_scenes())
    monkeypatch.setattr("raylib.sample.AUGMENTATION", AugmentConfig(scale=(1, 1), ratio=(1, 1), operations=0))
    for one, other in zip(varied, draw_training_scenes(), strict=True):
        assert one.captions == other.captions and one.image != other.image


def test_sample_scenes_texts_are_those_of_sample_and_sentences(corpus, tmp_path_factory):
    manifest = json.loads((corpus / "image_text" / MANIFEST).read_text())
    assert {shard["language"] for shard in manifest["shards"]} == {"en"}
    plain = build_sample_corpus(tmp_path_factory.mktemp("plain"))
    for part in ("parallel", "text"):
        ours, plain_manifest = (
            json.loads((folder / part / MANIFEST).read_text()) for folder in (corpus, plain)
        )
        counts = [
            {shard["language"]: shard["samples"] for shard in manifest["shards"]}
            for manifest in (ours, plain_manifest)
        ]
        for language, number in counts[0].items():
            own = read_sentences(language) if part == "text" else read_sentence_pairs(language)
            copies = (QUESTION_COPIES - 1) * sum(pair[0].endswith("?") for pair in own if part == "parallel")
            assert number == counts[1][language] + len(own) + copies and len(own) >= 4000


def test_sample_scenes_unseen_images_use_unseen_vendor():
    images = draw_unseen_scenes()
    assert images.keys() == decode_drawings("fluent").keys()
    for key in list(images)[::300]:
        (placed,) = place_concepts([key], 64, "unseen", key)
        shown = decode_image(images[key]).astype(float)
        part = shown[placed.top : placed.top + placed.size, placed.left : placed.left + placed.size]
        assert np.abs(part - resize_image(decode_drawings("fluent")[key], placed.size)).mean() < 12
        assert np.abs(shown - 255).sum() - np.abs(part - 255).sum() < 0.05 * np.abs(shown - 255).sum()


def test_sample_scenes_vocabulary_and_tokenizer_come_from_initial_model(mini, corpus, tmp_path, monkeypatch):
    folder = tmp_path / "encoder"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes((DATA / "tokenizer.model").read_bytes())
    monkeypatch.setattr("raylib.sample.NUM_SCENES", COUNT)
    config = mini("corpus=scenes", "data.retrieval=null", "model.vocabulary=0", f"init.text={folder}")
    data = resolve_data(config)
    made = tmp_path / "cache" / data.image_text.folder.split("/")[-2]
    assert made.name == corpus.name  # the same tokenizer and count: the same corpus
    assert data.tokenizer == str(made / "tokenizer.model") and data.retrieval == str(made / "retrieval")
    size = Tokenizer.load(data.tokenizer).vocabulary
    config = with_vocabulary(config, data)
    assert config.model.vocabulary == size
    assert UnifiedModel(config.model).embedding.word.weight.shape[0] == size
