"""Two-stage retrieval: how often it encodes and projects, and that this changes no score."""

import json
from collections import Counter

import pytest
import torch

from finetune.batches import encode_texts, read_inputs
from finetune.formats import Captioned, Example
from finetune.predict import class_scores, evaluate
from finetune.tasks import ranking
from finetune.tasks.ranking import _blocks, _Ranker, match_pairs, retrieve
from raylib.cache import EncoderStates, ItemStates, precompute_features, write_encoder_states
from raylib.models.layers import Memory
from raylib.packed import Ragged
from raylib.randomness import string_key
from raylib.text import Tokenizer
from tests.test_finetune import TOKENIZER, captions, pixels, questions, retriever, small_model


@pytest.fixture
def items(scenes):
    return [
        Captioned(item.image, (*item.captions, f"and {i}")) for i, item in enumerate(captions(scenes)[:40])
    ]


def count_rows(module, counts):
    """Count the rows (or images) that pass `module`, for each of its calls."""
    module.register_forward_pre_hook(lambda _, arguments: counts.append(len(arguments[0])))
    return counts


@pytest.mark.parametrize("candidates", [4, 0])
def test_ranking_encodes_and_projects_each_image_once(scenes, items, tmp_path, candidates):
    model = retriever()
    encoded = count_rows(model.vision, [])
    texts = count_rows(model.text.blocks[0].attention.query, [])
    projected = count_rows(model.fusion.blocks[0].cross_attention.key_value, [])
    fused = count_rows(model.fusion.blocks[-1].intermediate, [])
    found = retrieve(model, items, pixels(scenes), Tokenizer.load(TOKENIZER), 40, candidates, tmp_path / "s")
    num_texts = found["captions"]
    ids = encode_texts([c for item in items for c in item.captions], Tokenizer.load(TOKENIZER), 40)
    assert sum(encoded) == len(items) and sum(texts) == len(ids.values)
    # those that have many texts come again: `candidates=0` has no more than 2 PAIRS an image here
    assert sum(projected) == len(items) * (len(model.encode_images(torch.zeros(1, 16, 16, 3)).values))
    assert found["pairs"] == sum(
        queries * min(candidates or keys, keys)
        for queries, keys in ((len(items), num_texts), (num_texts, len(items)))
    )
    # a pair that is among both ways' candidates is scored once: of all pairs, each
    assert sum(fused) == len(items) * num_texts if candidates == 0 else sum(fused) < found["pairs"]


@pytest.mark.parametrize("pairs", [512, 7])
def test_ranking_scores_pairs_in_any_order_as_one_by_one(scenes, items, tmp_path, monkeypatch, pairs):
    monkeypatch.setattr(ranking, "PAIRS", pairs)
    model, tokenizer = retriever(), Tokenizer.load(TOKENIZER)
    states = precompute_features(model, pixels(scenes), [item.image for item in items], tmp_path / "images")
    ranker = _Ranker(model, items, states, tokenizer, 40, tmp_path / "s", False, ranks=True)
    rng = torch.Generator().manual_seed(0)
    images, texts = torch.randint(0, 40, (90,), generator=rng), torch.randint(0, 80, (90,), generator=rng)
    images[:30] = 3  # with more pairs than fit a block
    found = ranker.match(images, texts)
    every = [caption for item in items for caption in item.captions]
    for image, text, score in zip(images.tolist(), texts.tolist(), found.tolist(), strict=True):
        ids = encode_texts([every[text]], tokenizer, 40)
        with torch.inference_mode():
            states = ids.with_values(model.encode_text(ids))
            seen = model.encode_images(pixels(scenes).read([items[image].image])["images"])
            alone = match_pairs(model, states, Memory(seen, torch.tensor([0])), False)
        assert score == pytest.approx(float(alone), abs=1e-5)


def test_blocks_of_pairs_keep_an_image_whole_and_are_bounded(monkeypatch):
    monkeypatch.setattr(ranking, "PAIRS", 4)
    images = torch.tensor([0, 0, 1, 1, 1, 2, *[3] * 11, 4])
    blocks = _blocks(images)
    assert [i for block in blocks for i in range(block.start, block.stop)] == list(range(len(images)))
    assert all(block.stop - block.start <= 8 for block in blocks)
    for image in (0, 1, 2, 4):
        assert sum(image in images[block] for block in blocks) == 1
    assert sum(3 in images[block] for block in blocks) == 2


def test_item_states_on_the_device_equal_those_read_from_files(tmp_path):
    lengths = torch.tensor([3, 1, 4, 2, 5])
    states = Ragged(torch.randn(15, 6), lengths)
    names = list("abcde")

    def encode(keys):
        return states.select_rows(torch.tensor([names.index(key) for key in keys]))

    write_encoder_states(tmp_path / "s", names, list, encode, 2, torch.float16)
    order, cpu = ["d", "a", "e", "c"], torch.device("cpu")
    num_bytes = EncoderStates(tmp_path / "s").size(order)[1]
    assert num_bytes == 2 * 6 * (2 + 3 + 5 + 4)
    fits, streams = (
        ItemStates(EncoderStates(tmp_path / "s"), order, cpu, budget) for budget in (num_bytes, num_bytes - 1)
    )
    assert fits.resident is not None and fits.resident.values.dtype == torch.float16
    assert streams.resident is None
    for chosen in ([0, 1, 2, 3], [2, 2, 0]):
        rows = [names.index(order[i]) for i in chosen]
        expected = states.select_rows(torch.tensor(rows)).values.half().float()
        for source in (fits, streams):
            assert source.read(chosen).values.equal(expected)
            assert source.read(chosen).lengths.equal(lengths[torch.tensor(rows)])
            assert source.read_first(chosen).equal(states.values[states.starts[rows]].half().float())


def count_encoded(monkeypatch):
    """Hashes of the images that pass any image encoder from now on."""
    from raylib.models.vision import VisionEncoder

    encoded, forward = [], VisionEncoder.forward

    def count(self, images):
        encoded.extend(string_key(image.numpy().tobytes()) for image in images)
        return forward(self, images)

    monkeypatch.setattr(VisionEncoder, "forward", count)
    return encoded


@pytest.mark.parametrize("recipe", ["scenes_xgqa", "scenes_xflickrco"])
def test_evaluation_encodes_images_of_a_frozen_encoder_once_a_run(finetune, tmp_path, monkeypatch, recipe):
    """Test images after each of two epochs, at the end, and in two languages."""
    encoded = count_encoded(monkeypatch)
    # a training that changes nothing: images that are encoded in its steps are dropped out of
    settings = ("eval_each_epoch=true", "train_limit=32", "test_limit=10", "fit.bf16=false", "optim.lr=1e-12")
    results, counts = [], []
    for cached in ("true", "false"):
        code, printed = finetune(
            recipe, f"name=cached_{cached}", f"cache_image_states={cached}", 'freeze=["vision"]', *settings
        )
        assert code == 0, printed
        results.append(json.loads((tmp_path / f"cached_{cached}" / "result.json").read_text()))
        counts.append(Counter(encoded))
        encoded.clear()
    assert results[0]["evaluation_precision"] == "float32"
    names = ("accuracy",) if recipe == "scenes_xgqa" else ("retrieval", "recall_at_1")
    assert all(results[0][name] == results[1][name] for name in names)
    assert set(counts[0].values()) == {1} and max(counts[1].values()) > 2
    assert counts[0].keys() == counts[1].keys()


def test_retrieval_encodes_images_once_for_all_languages(finetune, tmp_path, monkeypatch):
    from finetune.tasks import retrieval

    encoded, languages, retrieve_one = count_encoded(monkeypatch), [], retrieval.retrieve

    def retrieve_counting(*arguments, **named):
        languages.append(len(encoded))
        return retrieve_one(*arguments, **named)

    monkeypatch.setattr(retrieval, "retrieve", retrieve_counting)
    settings = ("setting=untrained", "test_limit=12", "fit.bf16=false", "name=once")
    code, printed = finetune("scenes_xflickrco", *settings)
    assert code == 0, printed
    assert len(languages) == 2 and languages[0] == languages[1] > 0  # none is encoded by the languages
    assert not list((tmp_path / "once" / "predictions").glob(".*"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("candidates", [None, 4, 0])
@pytest.mark.parametrize("free", [None, 0], ids=["resident", "from files"])
def test_retrieval_on_a_gpu_equals_the_cpu(scenes, items, tmp_path, monkeypatch, candidates, free):
    tokenizer, found = Tokenizer.load(TOKENIZER), {}
    if free is not None:
        monkeypatch.setattr("raylib.cache.free_memory", lambda device: free)
    for device in ("cpu", "cuda"):
        model = retriever().to(device)
        found[device] = retrieve(model, items, pixels(scenes), tokenizer, 40, candidates, tmp_path / device)
    for name, figure in found["cpu"].items():  # pairs that nearly tie may change places
        assert found["cuda"][name] == pytest.approx(figure, abs=1 / len(items))
    model, bf16 = retriever().to("cuda"), True
    rounded = retrieve(model, items, pixels(scenes), tokenizer, 40, candidates, tmp_path / "bf16", bf16)
    assert rounded["pairs"] == found["cpu"]["pairs"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_predictions_on_a_gpu_wait_once_a_block(scenes, tmp_path):
    model, tokenizer = small_model().to("cuda"), Tokenizer.load(TOKENIZER)
    examples = questions(scenes)
    inputs = [read_inputs(examples[i : i + 8], pixels(scenes), tokenizer, 40) for i in range(0, 32, 8)]
    with torch.inference_mode():
        class_scores(model, inputs[0], True)  # the first call of a kernel may wait
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = [class_scores(model, each, True) for each in inputs]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(bool(finite.all()) for _, finite in found)


@pytest.mark.parametrize("num_images", [1, 2])
def test_predictions_read_and_project_an_image_once_for_the_texts_of_a_batch(scenes, tmp_path, num_images):
    """As xGQA asks 32 questions of an image, in the order of its file."""
    model, tokenizer = small_model(num_images=num_images), Tokenizer.load(TOKENIZER)
    names = sorted({name for e in questions(scenes) for name in e.images})[:5]
    examples = [
        Example(f"q{i}", (f"is it {i}?",), tuple(names[(i + k) % 5] for k in range(num_images)), {"yes": 1.0})
        for i in range(150)
    ]
    projected = count_rows(model.backbone.fusion.blocks[0].cross_attention.key_value, [])
    evaluate(model, {"en": examples}, pixels(scenes), tokenizer, 40, tmp_path / "p")
    tokens = model.backbone.count_image_tokens()
    assert sum(projected) <= tokens * (5 + 2 * num_images * 2)  # of three batches, and not 150
    lines = [json.loads(line) for line in (tmp_path / "p" / "en.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [e.id for e in examples]
    with torch.inference_mode():
        for e, line in zip(examples, lines, strict=True):
            scores = model(read_inputs([e], pixels(scenes), tokenizer, 40))
            assert line["prediction"] == model.labels[int(scores.argmax())]


def test_zero_shot_encodes_by_frozen_encoders_once_a_run(retrieval_set, monkeypatch):
    from pretrain.embeddings import FrozenStates
    from pretrain.evaluate import ZeroShotRetrieval
    from tests.factories import make_model

    def open_set():
        return ZeroShotRetrieval(retrieval_set, Tokenizer.load(TOKENIZER), 16, 64)

    def score(model, retrieval):
        with torch.inference_mode():
            return retrieval(model, bf16=False)

    kept, small = open_set(), open_set()
    model = make_model(vocabulary=12000, positions=64, dtype=torch.float32).eval()
    for part in (model.vision, model.embedding, model.text):
        part.requires_grad_(False)
    images, texts = count_rows(model.vision, []), count_rows(model.text.blocks[0].attention.query, [])
    first, counts = score(model, kept), (sum(images), sum(texts))
    assert counts == (len(kept.images), sum(len(rows.values) for rows in kept.ids.values()))
    with torch.no_grad():  # a step of training
        model.image_projection.weight.normal_()
        model.text_projection.weight.normal_()
    second = score(model, kept)
    assert (sum(images), sum(texts)) == counts and second != first
    assert second == score(model, open_set())
    with torch.no_grad():  # other weights, of a checkpoint
        model.load_state_dict({name: value + 0.01 for name, value in model.state_dict().items()})
    assert score(model, kept) == score(model, open_set())
    # what is too large is never kept, nor what trains
    with monkeypatch.context() as patch:
        patch.setattr(FrozenStates, "LIMIT", 0)
        score(model, small)
        assert not small.frozen.states
    model.vision.requires_grad_(True)
    score(model, small)
    assert small.frozen.states.keys() == {f"sentences {language}" for language in small.ids}
