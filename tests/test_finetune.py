"""The fine-tuned model, its evaluation and its metrics, each against a slow reference."""

import json
import shutil

import cv2
import numpy as np
import pytest
import torch

from finetune.batches import BatchOrder, CaptionBatches, ExampleBatches
from finetune.config import FinetuneConfig
from finetune.formats import Captioned, Example, answers
from finetune.predict import CorpusBleu, evaluate, score
from finetune.stores.images import ImageSource, PrecomputedFeatures, open_images
from finetune.strategies.base import AddedTerm, LossTerms
from finetune.strategies.prior import LinguisticPrior
from finetune.tasks.classification import ClassificationObjective
from finetune.tasks.datasets import TASKS
from finetune.tasks.ranking import retrieve
from finetune.tasks.retrieval import merge_captions
from raylib.cache import precompute_features
from raylib.config import override
from raylib.errors import UserError
from raylib.models.finetuned import FinetuneModel, freeze
from raylib.models.layers import Memory
from raylib.packed import Ragged
from raylib.sample import DATA
from raylib.text import Tokenizer
from tests import reference
from tests.factories import make_model
from tests.workers import run_workers

TOKENIZER = DATA / "tokenizer.model"


def small_model(
    labels=("no", "yes", "maybe"), num_images=1, regions=None, dtype=torch.float32
) -> FinetuneModel:
    unified = make_model(vocabulary=12000, positions=64, dtype=torch.float32)
    return FinetuneModel(unified, labels, num_images, 0.0, regions).to(dtype).eval()


def retriever(dtype=torch.float32):
    return make_model(vocabulary=12000, positions=64, dtype=dtype).eval()


def pixels(scenes) -> ImageSource:
    return ImageSource(open_images(scenes / "images.tar"), 16)


def questions(scenes, language="en") -> list[Example]:
    return list(answers.read_gqa(scenes / f"xGQA/annotations/few_shot/{language}/test.json"))


def captions(scenes, language="en") -> list[Captioned]:
    split = TASKS["xflickrco"].split("test", language)
    return list(split.read(scenes / split.path.format(language=language)))


def test_fuse_equals_slow_reference_for_two_images(scenes):
    """One example at a time, by loops: two images side by side."""
    model = small_model(num_images=2, dtype=torch.float64)
    ids = Ragged(torch.randint(5, 12000, (9,)), torch.tensor([5, 4]))
    images = torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8)
    logits = model({"text": ids, "images": images})
    u = model.backbone
    for row, text in enumerate(ids.values.split([5, 4])):
        states = reference.text_states(u, text)
        cls = [
            reference.fused_states(u, states, reference.image_states(u, images[2 * row + side]))[0]
            for side in range(2)
        ]
        torch.testing.assert_close(logits[row], model.head(torch.cat(cls)[None])[0])


def test_premise_is_fused_like_a_text_of_its_own(scenes):
    model = small_model(dtype=torch.float64)
    ids, premise = (Ragged(torch.randint(5, 12000, (7,)), torch.tensor(n)) for n in ([3, 4], [5, 2]))
    logits = model({"text": ids, "premise": premise})
    u = model.backbone
    for row, (text, other) in enumerate(
        zip(ids.values.split([3, 4]), premise.values.split([5, 2]), strict=True)
    ):
        state = reference.fused_states(u, reference.text_states(u, text), reference.text_states(u, other))[0]
        torch.testing.assert_close(logits[row], model.head(state[None])[0])


@pytest.mark.parametrize("loss", ["ce", "ce_labels", "bce", "bce_mean"])
def test_classification_loss_equals_worked_example(loss):
    model = small_model(dtype=torch.float64)
    premise = Ragged(torch.arange(5, 11), torch.tensor([4, 2]))
    part = {
        "text": Ragged(torch.randint(5, 12000, (6,)), torch.tensor([3, 3])),
        "premise": premise,
        "answer": torch.tensor([2, 0]),
        "scores": torch.tensor([[0, 0.3, 1], [0.6, 0, 0]]),
    }
    value, terms = ClassificationObjective(model, loss)({"examples": part})
    logits, expected = model(part), 0.0
    for row in range(2):
        if loss.startswith("ce"):
            expected -= float((logits[row, part["answer"][row]] - logits[row].logsumexp(0)).detach()) / 2
        else:
            for label in range(3):
                p, y = float(torch.sigmoid(logits[row, label])), float(part["scores"][row, label])
                expected -= (y * np.log(p) + (1 - y) * np.log(1 - p)) / 2
    expected /= 3 if loss == "bce_mean" else 1
    assert float(terms["task"]) == pytest.approx(expected, rel=1e-5)
    # the number of labels multiplies what is trained on, and not what is told
    assert float(value.detach()) == pytest.approx(expected * (3 if loss == "ce_labels" else 1), rel=1e-5)


def test_prior_that_follows_code_has_the_loss_of_paper_0s_code():
    """Its `ForwardModelsTrain`: (CE + lambda prior) times the labels, of the ten likeliest (here 2); loss and
    gradients."""
    run = override(FinetuneConfig(task="xgqa"), ["strategies.prior.follow=code"])
    assert run.loss == "ce_labels" and run.strategies.prior.relatives == "lemmas"
    assert override(run, ["strategies.prior.follow=paper"]).loss == FinetuneConfig(task="xgqa").loss == "ce"
    torch.manual_seed(0)
    model, distance = small_model(dtype=torch.float64).eval(), torch.rand(3, 3, dtype=torch.float64)
    prior = LinguisticPrior(distance, 10.0, 2)
    terms = {"prior": AddedTerm(*prior.terms(model)["prior"], reads=frozenset({"logits"}))}
    part = {
        "text": Ragged(torch.randint(5, 12000, (6,)), torch.tensor([3, 3])),
        "premise": Ragged(torch.arange(5, 11), torch.tensor([4, 2])),
        "answer": torch.tensor([2, 0]),
    }
    value = ClassificationObjective(model, run.loss, LossTerms(terms))({"examples": part})[0]
    logits = model(part)
    rows = distance.T[part["answer"]]  # of each example, d(c, y) by c
    top, index = torch.topk(logits.softmax(-1), k=2)
    semantic = (top * rows[torch.arange(2).unsqueeze(1), index]).sum(-1).mean(0)
    expected = torch.nn.functional.cross_entropy(logits, part["answer"]) * 3 + 10.0 * semantic * 3
    torch.testing.assert_close(value, expected)
    trained = [p for p in model.parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad(x, trained, allow_unused=True) for x in (value, expected))
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, rtol=1e-5, atol=1e-6))


def test_classification_score_equals_worked_example():
    lines = [
        {"prediction": "cat", "labels": {"cat": 1.0}, "kind": "query"},
        {"prediction": "dog", "labels": {"cat": 1.0, "dog": 0.3}, "kind": "query"},
        {"prediction": "yes", "labels": {"no": 1.0}, "kind": "verify"},
        {"prediction": "yes", "labels": {"blue": 1.0}, "kind": "verify"},  # blue is no class
        {"prediction": "yes", "labels": {}, "kind": "verify"},
    ]
    result = score(lines, frozenset({"cat", "dog", "yes", "no"}))
    assert result["accuracy"] == pytest.approx(1.3 / 4) and result["n"] == 4
    assert result["by_type"] == {"query": pytest.approx(0.65), "verify": 0.0} and result["n_by_type"] == {
        "query": 2,
        "verify": 2,
    }
    assert result["unlabelled"] == 1 and result["unknown_answers"] == 1


def test_classification_interval_resamples_images_with_all_questions():
    """Ten questions each of 40 images, of which 20 are answered: 40 independent draws, and not 400."""
    lines = [
        {
            "id": f"{i}.{j}",
            "prediction": "yes",
            "labels": {"yes" if i % 2 else "no": 1.0},
            "kind": "",
            "images": [f"{i}"],
        }
        for i in range(40)
        for j in range(10)
    ]
    low, high = score(lines, frozenset({"yes", "no"}))["interval"]
    assert high - low == pytest.approx(2 * 1.96 * (0.25 / 40) ** 0.5, rel=0.15)
    alone = [
        {name: value for name, value in line.items() if name != "images"} for line in lines
    ]  # of an earlier version
    few, many = score(alone, frozenset({"yes", "no"}))["interval"]
    assert many - few == pytest.approx(2 * 1.96 * (0.25 / 400) ** 0.5, rel=0.15)
    assert score(lines[::-1], frozenset({"yes", "no"}))["interval"] == [low, high]
    assert score(alone, frozenset({"yes", "no"}), key=(1, "de"))["interval"] != [few, many]
    assert score(lines[:10], frozenset({"yes", "no"}))["interval"] is None  # of one image


def corpus_bleu(pairs, language):
    bleu = CorpusBleu(language)
    for prediction, references in pairs:
        bleu.add(prediction, references)
    return bleu.value()


def test_bleu_equals_nltk():
    from nltk.translate.bleu_score import corpus_bleu as nltk_bleu

    pairs = [
        ("the cat sat on the mat today", ["the cat sat on a mat", "a cat is on the mat today"]),
        ("two dogs run in the park", ["two dogs run in a park now"]),
    ]
    references, sentences = [[r.split() for r in rs] for _, rs in pairs], [s.split() for s, _ in pairs]
    value = corpus_bleu(pairs, "en")
    assert value == pytest.approx(nltk_bleu(references, sentences)) and 0 < value < 1
    assert corpus_bleu([("a", ["b"])], "en") == 0.0 and corpus_bleu([], "en") == 0.0
    # answers of fewer than four words, and none at all, beside longer ones
    pairs += [
        ("a dog", ["a dog", "two dogs"]),
        ("yes", ["no"]),
        ("", ["a cat"]),
        ("on a mat", ["on the mat"]),
    ]
    references, sentences = [[r.split() for r in rs] for _, rs in pairs], [s.split() for s, _ in pairs]
    assert corpus_bleu(pairs, "en") == pytest.approx(nltk_bleu(references, sentences), rel=1e-12)


def test_bleu_counts_words_of_japanese_and_characters_of_chinese():
    from nltk.translate.bleu_score import corpus_bleu as nltk_bleu

    words = ["猫", "が", "窓", "の", "外", "を", "見", "て", "いる"]
    pair = ("猫が窓の外を見ている", ["犬が窓の外を見ている"])
    assert corpus_bleu([pair], "ja") == pytest.approx(nltk_bleu([[["犬", *words[1:]]]], [words]))
    pair = ("猫在 看窗外的鸟", ["狗在看窗外的鸟"])
    assert corpus_bleu([pair], "zh") == pytest.approx(
        nltk_bleu([[list("狗在看窗外的鸟")]], [list("猫在看窗外的鸟")])
    )


def slow_recalls(model, items, images, tokenizer, candidates):
    """Every pair by itself, then two loops; nothing is cached."""
    texts = [(i, c) for i, item in enumerate(items) for c in item.captions]
    similar, match = np.zeros((len(items), len(texts))), np.zeros((len(items), len(texts)))
    with torch.inference_mode():
        for i, item in enumerate(items):
            image = model.encode_images(images.read([item.image])["images"])
            for t, (_, caption) in enumerate(texts):
                ids = torch.tensor([tokenizer.cls, *tokenizer.encode([caption])[0].tolist(), tokenizer.sep])
                text = Ragged(ids, torch.tensor([len(ids)]))
                states = text.with_values(model.encode_text(text))
                vectors = (
                    model.embed_images(image, normalize=True),
                    model.embed_text_states(states.values[:1], normalize=True),
                )
                similar[i, t] = float((vectors[0] * vectors[1]).sum())
                cls = model.fuse(states, None, Memory(image, torch.tensor([0])))[:1]
                logits = model.match_head(cls)[0].double()
                match[i, t] = float(logits[1] - logits[0])
    figures = {}
    for way, asks in (("i2t", range(len(items))), ("t2i", range(len(texts)))):
        ranks = []
        for q in asks:
            row, m = (similar[q], match[q]) if way == "i2t" else (similar[:, q], match[:, q])
            own = {t for t, (o, _) in enumerate(texts) if o == q} if way == "i2t" else {texts[q][0]}
            order = sorted(range(len(row)), key=lambda k: -row[k])
            k = candidates or len(order)
            order = sorted(order[:k], key=lambda k: -m[k]) + order[k:]
            ranks.append(min(order.index(o) for o in own))
        for k in (1, 5, 10):
            figures[f"{way}_r{k}"] = sum(r < k for r in ranks) / len(ranks)
    return figures


@pytest.mark.parametrize("candidates", [0, 3, 12])
def test_retrieval_two_stages_equal_scoring_every_pair(scenes, tmp_path, candidates):
    model, tokenizer, seen = retriever(), Tokenizer.load(TOKENIZER), pixels(scenes)
    items = captions(scenes)[:20]
    items[3] = Captioned(items[3].image, (*items[3].captions, "another one"))
    found = retrieve(model, items, seen, tokenizer, 40, candidates, tmp_path / "states")
    expected = slow_recalls(model, items, seen, tokenizer, candidates)
    assert {k: found[k] for k in expected} == pytest.approx(expected)
    per_image, per_text = (candidates or 21), (candidates or 20)
    assert found["pairs"] == 20 * per_image + 21 * per_text  # N K, and not N^2
    assert found["mean_recall"] == pytest.approx(np.mean(list(expected.values())))
    assert not (tmp_path / "states").exists()


def test_retrieval_large_match_logits_still_rank_in_float32(scenes, tmp_path):
    """From a difference of 17 the softmax is 1.0 for all: ties, which then counted as misses."""
    model, tokenizer, seen = retriever(), Tokenizer.load(TOKENIZER), pixels(scenes)
    with torch.no_grad():
        for parameter in model.match_head.parameters():
            parameter.mul_(400)
        list(model.match_head.parameters())[-1].add_(torch.tensor([-3000.0, 3000.0]))
    items = captions(scenes)[:20]
    for candidates in (0, 6):
        found = retrieve(model, items, seen, tokenizer, 40, candidates, tmp_path / "states")
        expected = slow_recalls(model, items, seen, tokenizer, candidates)
        assert {k: found[k] for k in expected} == pytest.approx(expected)
        assert found["mean_recall"] > 0
        with torch.no_grad():  # candidates stay ahead of all others, however unlikely the head finds them
            list(model.match_head.parameters())[-1].sub_(torch.tensor([-6000.0, 6000.0]))
        assert retrieve(model, items, seen, tokenizer, 40, candidates, tmp_path / "states") == found


def collapsed():
    """A retriever that finds all images, and all captions, the same."""
    model = retriever()
    with torch.no_grad():
        for part in (model.match_head, model.image_projection, model.text_projection):
            for parameter in part.parameters():
                parameter.zero_()
    return model


@pytest.mark.parametrize("candidates", [None, 0, 7])
def test_retrieval_collapsed_model_scores_chance(scenes, tmp_path, candidates):
    items = captions(scenes)[:20]
    found = retrieve(
        collapsed(), items, pixels(scenes), Tokenizer.load(TOKENIZER), 40, candidates, tmp_path / "states"
    )
    assert all(found[f"{way}_r{k}"] == pytest.approx(k / 20) for way in ("i2t", "t2i") for k in (1, 5, 10))


def test_retrieval_interval_of_recall_resamples_images(scenes, tmp_path):
    model, tokenizer, items = retriever(), Tokenizer.load(TOKENIZER), captions(scenes)
    found = [
        retrieve(model, items, pixels(scenes), tokenizer, 40, None, tmp_path / "states", key=key)
        for key in ((0, "en"), (0, "en"), (1, "en"))
    ]
    (low, high), score = found[0]["interval"], found[0]["mean_recall"]
    assert low < score < high and found[0] == found[1] and found[0]["interval"] != found[2]["interval"]


def test_classifier_logits_stay_float32_under_autocast():
    head = small_model(labels=tuple(map(str, range(500)))).head
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        logits = head(torch.randn(4, 16))
    assert logits.dtype == torch.float32 and all(len(row.unique()) > 490 for row in logits)


def evaluate_share(rank, world, scenes, folder):
    tokenizer = Tokenizer.load(TOKENIZER)
    model = small_model(labels=answers.read_answers(scenes / "gqa/annotations/trainval_label2ans.json"))
    sets = {code: questions(scenes, code) * 4 for code in ("en", "ko")}
    scores = evaluate(model, sets, pixels(scenes), tokenizer, 40, folder)
    found = [
        retrieve(model, captions(scenes)[:50], pixels(scenes), tokenizer, 40, 5, folder / "states")
        for model in (retriever(), collapsed())
    ]
    return scores, found  # of the second, hits are fractions


def test_evaluation_on_any_number_of_workers_is_equal(scenes, tmp_path):
    alone = evaluate_share(0, 1, scenes, tmp_path / "1")
    assert alone[0]["ko"]["n"] == alone[0]["ko"]["predictions"] == 240
    for world in (3, 5):  # of five, one has no batch of questions
        for result in run_workers(evaluate_share, world, scenes, tmp_path / str(world)):
            assert result == alone
        for code in ("en", "ko"):
            assert (tmp_path / str(world) / f"{code}.jsonl").read_bytes() == (
                tmp_path / "1" / f"{code}.jsonl"
            ).read_bytes()
        assert sorted(p.name for p in (tmp_path / str(world)).iterdir()) == ["en.jsonl", "ko.jsonl"]


def test_predictions_equal_model_applied_one_by_one(scenes, tmp_path):
    model, tokenizer, examples = small_model(), Tokenizer.load(TOKENIZER), questions(scenes)[:10]
    evaluate(model, {"en": examples}, pixels(scenes), tokenizer, 40, tmp_path)
    for example, line in zip(examples, (tmp_path / "en.jsonl").read_text().splitlines(), strict=True):
        ids = torch.tensor([tokenizer.cls, *tokenizer.encode([example.texts[0]])[0].tolist(), tokenizer.sep])
        inputs = {"text": Ragged(ids, torch.tensor([len(ids)])), **pixels(scenes).read(example.images)}
        expected = model.labels[int(model(inputs).argmax())]
        assert json.loads(line) == {
            "id": example.id,
            "prediction": expected,
            "labels": dict(example.labels),
            "kind": example.kind,
            "images": list(example.images),
        }


def test_cached_image_states_equal_images(scenes, tmp_path):
    model, tokenizer, examples = small_model(), Tokenizer.load(TOKENIZER), questions(scenes)
    names = [e.images[0] for e in examples]
    states = PrecomputedFeatures(
        precompute_features(model.backbone, pixels(scenes), names, tmp_path / "states"), pixels(scenes).store
    )
    both = (pixels(scenes), states)
    batches = [
        ExampleBatches(examples, model.labels, p, tokenizer, 40, False, BatchOrder(8, 0))[3]["examples"]
        for p in both
    ]
    assert batches[0]["text"].values.equal(batches[1]["text"].values) and batches[0]["answer"].equal(
        batches[1]["answer"]
    )
    torch.testing.assert_close(model(batches[0]), model(batches[1]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("world", [2, 3, 5])
def test_example_batches_hold_each_example_once_for_any_workers(scenes, world):
    tokenizer, examples = Tokenizer.load(TOKENIZER), questions(scenes)
    given = examples, ("no", "yes"), pixels(scenes), tokenizer, 40, False
    whole = ExampleBatches(*given, BatchOrder(12, 3))
    parts = [ExampleBatches(*given, BatchOrder(12, 3, rank, world)) for rank in range(world)]
    for epoch in (0, 1):
        taken = [
            n for place in range(whole.epoch_steps) for n in whole.rows(epoch * whole.epoch_steps + place)[2]
        ]
        assert sorted(taken) == list(range(60))
    assert list(whole.rows(0)[2]) != list(whole.rows(whole.epoch_steps)[2])
    one, several = whole[4]["examples"], [part[4]["examples"] for part in parts]
    for key in ("index", "images", "answer"):
        assert torch.cat([part[key] for part in several]).equal(one[key])


def test_caption_batches_pair_image_with_each_caption(scenes):
    items = [Captioned(f"ftest{i}.webp", (f"one {i}", f"two {i}")) for i in range(4)]
    batches = CaptionBatches(items, pixels(scenes), Tokenizer.load(TOKENIZER), 40, BatchOrder(8, 0))
    part = batches[0]["image_text"]
    assert batches.epoch_steps == 1 and part["images"].shape == (8, 16, 16, 3)
    assert len(part["image_id"].unique()) == 4 and len(part["text"].text_id.unique()) == 8


@pytest.mark.parametrize("encoded", [False, True])
def test_caption_batches_identify_images_by_bytes(tmp_path, encoded):
    """One image has several ids, or lies in several files; in two folders are different ones of one name."""
    files = {"val2014/COCO_val2014_000000000042.png": 1, "copy.png": 1, "a/7.png": 2, "b/7.png": 3}
    for name, shade in files.items():
        (tmp_path / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / "p" / name), np.full((16, 16, 3), shade, np.uint8))
    names = [
        "COCO_val2014_000000000042.png",
        "000000000042",
        "images/000000000042.png",
        "copy",
        "a/7",
        "a/7.png",
        "b/7.png",
    ]
    images = ImageSource(open_images(tmp_path / "p"), 16)
    if encoded:
        images = PrecomputedFeatures(
            precompute_features(retriever(), images, names, tmp_path / "states"), images.store
        )
    items = [Captioned(name, (f"caption {i}",)) for i, name in enumerate(names)]
    batches = CaptionBatches(items, images, Tokenizer.load(TOKENIZER), 40, BatchOrder(len(items), 0))
    order = batches.rows(0)[2].tolist()
    ids = [batches[0]["image_text"]["image_id"].tolist()[order.index(i)] for i in range(len(names))]
    assert ids[:4] == ids[:1] * 4 and ids[4:6] == ids[4:5] * 2 and len(set(ids)) == 3


def test_training_examples_drop_unknown_answers_and_merge_captions():
    examples = [
        Example(str(i), ("q",), ("i",), labels) for i, labels in enumerate(({"yes": 1.0}, {"blue": 1.0}, {}))
    ]
    assert TASKS["xgqa"].training_items(examples, small_model(("yes", "no"))) == ([examples[0]], examples[1:])
    assert merge_captions([Captioned("a", ("x",)), Captioned("b", ("y",)), Captioned("a", ("z",))]) == [
        Captioned("a", ("x", "z")),
        Captioned("b", ("y",)),
    ]


def test_freeze_and_resize_of_fine_tuned_model(scenes):
    model = small_model()
    freeze(model.backbone, ("embeddings", "text", "vision"))
    trainable = {
        name.split(".")[1]
        for name, p in model.named_parameters()
        if p.requires_grad and name.startswith("backbone")
    }
    assert trainable == {"fusion"}
    model.backbone.resize_images(32)
    assert model.backbone.encode_images(torch.zeros(1, 32, 32, 3, dtype=torch.uint8)).values.shape[0] == 17
    with pytest.raises(UserError, match="image_size=20 is not a multiple"):
        model.backbone.resize_images(20)


def test_finetune_model_saves_and_loads(tmp_path):
    model = small_model(regions=6)
    model.save(tmp_path / "m")
    again = FinetuneModel.from_pretrained(tmp_path / "m")
    assert again.labels == model.labels
    assert all(value.equal(again.state_dict()[name]) for name, value in model.state_dict().items())
    values = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**values, "labels": ["a", "b"]}))
    with pytest.raises(UserError, match=r"does not fit the model.*head.output.weight"):
        FinetuneModel.from_pretrained(tmp_path / "m")
    shutil.rmtree(tmp_path / "m")
