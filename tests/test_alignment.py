"""Translation-based alignment (paper 4): what each routine compares, the losses against slow loops, workers,
whole runs."""

import json
import math

import pytest
import torch

from finetune.config import FinetuneConfig
from finetune.formats import Captioned
from finetune.strategies import Context
from finetune.strategies.alignment import TranslationAlignment, TranslationAlignmentConfig
from finetune.strategies.base import AddedTerm
from finetune.tasks.datasets import TASKS
from finetune.tasks.retrieval import CONTRAST_AND_ITM, ContrastObjective, MatchingObjective
from raylib.config import override
from raylib.distributed import worker_rows
from raylib.errors import UserError
from raylib.metrics import disparity
from raylib.monitoring import read_metrics
from raylib.objectives.pretraining import UnifiedObjective
from tests.factories import make_batch, make_model, take_rows
from tests.workers import assert_workers_equal_one, run_workers

FILES = {
    ("", "en"): {"1.jpg": ("a dog",), "2.jpg": ("a bus",)},
    ("", "de"): {"1.jpg": ("ein Hund",), "2.jpg": ("ein Bus",)},
    ("_to_en", "de"): {"1.jpg": ("a hound",), "2.jpg": ("a coach",)},
    ("_from_en", "de"): {"1.jpg": ("ein Köter",), "2.jpg": ("ein Omnibus",)},
}


def context(files=FILES, languages=("en", "de")) -> Context:
    return Context(None, None, languages, (), None, None, print, lambda made, language: files[made, language])


@pytest.mark.parametrize(
    ("routine", "shown", "pivot"),
    [
        (1, "ein Hund", "a dog"),
        (2, "ein Hund", "ein Köter"),
        (3, "a hound", "a dog"),
    ],
)
def test_alignment_routines_pair_captions_as_worked_by_hand(routine, shown, pivot):
    method = TranslationAlignmentConfig(routine=routine).build(context())
    changed = method.example(Captioned("1.jpg", ("ein Hund",)))
    assert changed == Captioned("1.jpg", (shown,), (pivot,))
    english = method.example(Captioned("2.jpg", ("a bus",)))
    rows = method.batch_inputs()([changed, english], None, {})
    assert rows["aligned"].tolist() == [True, False]


@pytest.mark.parametrize("routine", [1, 2, 3])
def test_alignment_english_alone_has_no_term(routine):
    method = TranslationAlignmentConfig(routine=routine).build(context(languages=("en",)))
    example = Captioned("2.jpg", ("a bus",))
    assert method.example(example) == example  # no pivot that could be encoded
    assert method.terms(None) == {}
    assert method.batch_inputs() is None


def test_alignment_independent_captions_take_english_ones_in_turn():
    files = {("", "en"): {"1.jpg": ("a", "b")}, ("", "de"): {"1.jpg": ("x", "y", "z")}}
    method = TranslationAlignmentConfig(routine=1).build(context(files, ("de",)))
    assert [method.example(Captioned("1.jpg", (t,))).pivots[0] for t in "xyz"] == ["a", "b", "a"]


def test_alignment_missing_translations_or_captions_are_named():
    short = {**FILES, ("_to_en", "de"): {"1.jpg": ("a hound", "a dog"), "2.jpg": ("a coach",)}}
    with pytest.raises(UserError, match="translations from 'de' into English: 2 for the 1 captions of 1.jpg"):
        TranslationAlignmentConfig(routine=3).build(context(short))
    with pytest.raises(UserError, match="no English caption of 1 images, such as 2.jpg"):
        TranslationAlignmentConfig(routine=1).build(
            context({**FILES, ("", "en"): {"1.jpg": ("a dog",)}}, ("de",))
        )


def aligned(loss: str, weight: float = 1.0) -> TranslationAlignment:
    return TranslationAlignment({}, loss, weight)


def slow_contrast(queries, keys, temperature: float, excluded=()) -> float:
    """Equations 1, 2 and 8 in plain loops. `excluded`: pairs (i, j) that are no negatives."""
    loss = 0.0
    for i, query in enumerate(queries):

        def cosine(j, query=query):
            return float(query @ keys[j] / (query.norm() * keys[j].norm())) / temperature

        below = sum(math.exp(cosine(j)) for j in range(len(keys)) if (i, j) not in excluded)
        loss -= math.log(math.exp(cosine(i)) / below) / len(queries)
    return loss


def aligned_batch() -> dict:
    """Six pairs with pivots, two of them of one image."""
    part = make_batch(3, 6)["image_text"]
    part["image_id"][4] = part["image_id"][1]
    pivot = make_batch(5, 6)["image_text"]["text"]
    return {
        "image_text": {
            **part,
            "pivot": type(make_model().encode_images(part["images"]))(pivot.clean, pivot.lengths),
        }
    }


@pytest.mark.parametrize("loss", ["mse", "pivot", "image"])
def test_alignment_losses_equal_slow_loops(loss):
    model, batch, weight = make_model().eval(), aligned_batch(), 0.7
    term = aligned(loss=loss, weight=weight).terms(model)["alignment"]
    terms = {"alignment": AddedTerm(*term, reads=TranslationAlignmentConfig.needs)}
    total, values = ContrastObjective(model, 0.5, terms)(batch)
    part = batch["image_text"]
    with torch.no_grad():
        image = model.embed_images(model.encode_images(part["images"]), normalize=False).float()
        text = model.embed_text(
            type(part["pivot"])(part["text"].clean, part["text"].lengths), normalize=False
        ).float()
        pivot = model.embed_text(part["pivot"], normalize=False).float()
    one_image = {(1, 4), (4, 1)}
    expected = {
        "i2t": slow_contrast(image, text, 0.5, one_image),
        "t2i": slow_contrast(text, image, 0.5, one_image),
    }
    if loss == "mse":
        expected["alignment"] = sum(float(d) ** 2 for row in (text - pivot) for d in row) / text.numel()
    else:
        expected["alignment"] = slow_contrast(pivot, text if loss == "pivot" else image, 0.5, one_image)
    assert {k: float(v) for k, v in values.items()} == pytest.approx(expected, rel=1e-5)
    assert float(total) == pytest.approx(
        expected["i2t"] + expected["t2i"] + weight * expected["alignment"], rel=1e-5
    )


@pytest.mark.parametrize("loss", ["pivot", "image"])
def test_alignment_that_follows_code_equals_its_arithmetic(loss):
    """PECTVLM's trainer: contrasts are means of both directions, and so is that of images and texts."""
    config = TranslationAlignmentConfig(follow="code", loss=loss, weight=0.7)
    assert config.directions == "both" and TranslationAlignmentConfig().directions == "one"
    run = override(FinetuneConfig(task="xtd_few", use_itm_head=False), ["strategies.alignment.follow=code"])
    assert run.contrast == "mean" and FinetuneConfig(task="xtd_few").contrast == "sum"
    model, batch = make_model().eval(), aligned_batch()
    part = batch["image_text"]
    part["image_id"][4] = 4  # the code masks no pair, so all images differ here
    method = TranslationAlignment({}, loss, 0.7, two_way=config.directions == "both")
    terms = {"alignment": AddedTerm(*method.terms(model)["alignment"], reads=config.needs)}
    total, values = ContrastObjective(model, 0.01, terms, is_mean=run.contrast == "mean")(batch)

    def unit(x):
        return x / x.norm(dim=-1, keepdim=True)

    def two_way(queries, keys):
        scores, labels = 100.0 * unit(queries) @ unit(keys).T, torch.arange(len(queries))
        cross_entropy = torch.nn.functional.cross_entropy
        return (cross_entropy(scores, labels) + cross_entropy(scores.T, labels)) / 2

    image = model.embed_images(model.encode_images(part["images"]), normalize=False)
    text = model.embed_text(type(part["pivot"])(part["text"].clean, part["text"].lengths), normalize=False)
    pivot = model.embed_text(part["pivot"], normalize=False)
    alignment = two_way(pivot, text if loss == "pivot" else image)
    assert float(values["alignment"]) == pytest.approx(float(alignment), rel=1e-5)
    expected = two_way(image, text) + 0.7 * alignment
    assert float(total) == pytest.approx(float(expected), rel=1e-5)
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    ours, theirs = (torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (total, expected))
    for name, a, b in zip(names, ours, theirs, strict=True):
        assert (a is None or not a.any()) if b is None else torch.allclose(a, b, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("loss", ["mse", "pivot", "image"])
def test_alignment_english_rows_count_in_no_term(loss):
    """Of six rows the second and the last are English: the term is a mean over the others alone, whose
    negatives they are; of a batch of English alone it is 0."""
    model, batch, rows = make_model().eval(), aligned_batch(), [0, 2, 3, 4]
    part = batch["image_text"]
    part["aligned"] = torch.tensor([True, False, True, True, True, False])
    term = TranslationAlignment({}, loss, 1.0, ("en", "de")).terms(model)["alignment"]
    objective = ContrastObjective(
        model, 0.5, {"alignment": AddedTerm(*term, reads=TranslationAlignmentConfig.needs)}
    )
    value = float(objective(batch)[1]["alignment"])
    with torch.no_grad():
        image = model.embed_images(model.encode_images(part["images"]), normalize=False).float()
        text = model.embed_text(
            type(part["pivot"])(part["text"].clean, part["text"].lengths), normalize=False
        ).float()
        pivot = model.embed_text(part["pivot"], normalize=False).float()
    if loss == "mse":
        expected = float((text - pivot)[rows].square().mean())
    else:
        keys = text if loss == "pivot" else image
        scores = torch.nn.functional.normalize(pivot) @ torch.nn.functional.normalize(keys).T / 0.5
        scores[1, 4] = scores[4, 1] = -torch.inf  # of one image
        expected = float(torch.nn.functional.cross_entropy(scores[rows], torch.tensor(rows)))
    assert value == pytest.approx(expected, rel=1e-5)
    part["aligned"][:] = False
    assert float(objective(batch)[1]["alignment"]) == 0.0


def on_share(rank, world):
    batch = aligned_batch()
    pivots = batch["image_text"].pop("pivot")
    share = take_rows({**make_batch(3, 6, 6, 6), "image_text": batch["image_text"]}, rank, world)[
        "image_text"
    ]
    share["pivot"] = pivots.select_rows(torch.tensor(worker_rows(6, rank, world)))
    model = make_model()
    terms = {}
    for loss in ("mse", "pivot"):
        term = aligned(loss=loss).terms(model)["alignment"]
        terms[loss] = AddedTerm(*term, reads=TranslationAlignmentConfig.needs)

    def nearness(outputs, part):
        return outputs.scores(outputs.image_embeddings, outputs.text_embeddings).logsumexp(1)

    def nearness_again(outputs, part):
        return nearness(outputs.rerun(), part)

    terms["scores"] = AddedTerm(0.3, nearness, reads=TranslationAlignmentConfig.needs)
    terms["again"] = AddedTerm(0.3, nearness_again, reads=TranslationAlignmentConfig.needs)
    loss, values = ContrastObjective(model, 0.5, terms)({"image_text": share})
    loss.backward()
    assert torch.equal(values["again"], values["scores"])  # a model without dropout
    return values, {k: p.grad for k, p in model.named_parameters()}


@pytest.mark.parametrize("world", [2, 4])
def test_alignment_on_several_workers_equals_one(world):
    assert_workers_equal_one(run_workers(on_share, world), on_share(0, 1))


def matching(loss: str, weight: float):
    """(an objective of matching with alignment beside it, the same without)."""
    model = make_model()
    unified = UnifiedObjective(model, CONTRAST_AND_ITM)
    config = TranslationAlignmentConfig(loss=loss, weight=weight)
    terms = {
        name: AddedTerm(*term, reads=config.needs)
        for name, term in aligned(loss, weight).terms(model).items()
    }
    return MatchingObjective(unified, terms), unified


@pytest.mark.parametrize("loss", ["mse", "pivot", "image"])
def test_alignment_beside_matching_equals_slow_loops(loss):
    """Return what matching makes of the batch, and the term at the model's own temperature."""
    objective, unified = matching(loss, 0.7)
    batch, model = aligned_batch(), unified.model
    (total, values), (before, own) = objective(batch), unified(batch)
    part, tau = batch["image_text"], float(model.temperature)
    with torch.no_grad():
        image = model.embed_images(model.encode_images(part["images"]), normalize=False).float()
        text = model.embed_text(
            type(part["pivot"])(part["text"].clean, part["text"].lengths), normalize=False
        ).float()
        pivot = model.embed_text(part["pivot"], normalize=False).float()
    if loss == "mse":
        expected = sum(float(d) ** 2 for row in (text - pivot) for d in row) / text.numel()
    else:
        expected = slow_contrast(pivot, text if loss == "pivot" else image, tau, {(1, 4), (4, 1)})
    assert float(values["alignment"]) == pytest.approx(expected, rel=1e-5)
    assert {name: float(values[name]) for name in own} == pytest.approx(
        {name: float(v) for name, v in own.items()}, rel=1e-9
    )
    assert float(total) == pytest.approx(float(before) + 0.7 * expected, rel=1e-5)
    total.backward()
    alone = torch.autograd.grad(unified(batch)[0], model.text_projection.weight)[0]
    assert not torch.allclose(model.text_projection.weight.grad, alone)


def matched_share(rank, world):
    batch = aligned_batch()
    pivots = batch["image_text"].pop("pivot")
    share = take_rows({**make_batch(3, 6, 6, 6), "image_text": batch["image_text"]}, rank, world)[
        "image_text"
    ]
    share["pivot"] = pivots.select_rows(torch.tensor(worker_rows(6, rank, world)))
    objective, _ = matching("pivot", 0.7)
    loss, values = objective({"image_text": share})
    loss.backward()
    return values, {k: p.grad for k, p in objective.model.named_parameters()}


@pytest.mark.parametrize("world", [2, 4])
def test_alignment_beside_matching_on_several_workers_equals_one(world):
    assert_workers_equal_one(run_workers(matched_share, world), matched_share(0, 1))


def test_disparity_of_published_row_is_reproduced():
    """Table 2's zero-shot row of M-CLIP: standard deviation 4.75, range 16.00."""
    row = [63.44, 59.94, 60.06, 58.90, 60.72, 51.00, 61.50, 56.11, 59.28, 59.28, 47.44]
    assert disparity(row) == {"std": pytest.approx(4.75, abs=0.005), "range": pytest.approx(16.0)}


def test_xtd_is_split_into_fifty_train_fifty_dev_and_rest(tmp_path):
    folder = tmp_path / "xtd" / "translated_to_en"
    folder.mkdir(parents=True)
    (tmp_path / "xtd" / "test_image_names.txt").write_text("".join(f"{i}.jpg\n" for i in range(1000)))
    for path, word in ((tmp_path / "xtd" / "test_1kcaptions_de.txt", "Bild"), (folder / "de.txt", "picture")):
        path.write_text("".join(f"{word} {i}\n" for i in range(1000)))
    task = TASKS["xtd_few"]
    parts = {
        name: list(task.read(task.path(tmp_path, name, "de"), name, "de"))
        for name in task.splits
        if "from" not in name
    }
    assert [len(parts[name]) for name in ("train", "dev", "test")] == [50, 50, 900]
    assert len({item.image for name in ("train", "dev", "test") for item in parts[name]}) == 1000
    assert [item.image for item in parts["train"]] == [item.image for item in parts["train_to_en"]]
    assert parts["translated"][0].captions[0] == parts["test"][0].captions[0].replace("Bild", "picture")
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(42)).tolist()
    assert [item.image for item in parts["train"]] == [f"{i}.jpg" for i in order[:50]]


FEW = ["setting=few_shot", "shots=5", "use_itm_head=false", "batch=5", "temperature=0.1", 'freeze=["vision"]']


def test_alignment_few_shot_with_lora_runs_end_to_end_and_resumes(finetune, tmp_path):
    """Routine 3 with LoRA and code-mixing: a set of small weights for the target, results on translations,
    resumed to the bit."""
    settings = [*FEW, "strategies.alignment={}", "strategies.lora.rank=2", "select=last"]
    code, printed = finetune(
        "scenes_xflickrco", "name=aligned", *settings, "strategies.code_mixing.probability=0.5"
    )
    assert code == 0, printed
    found = json.loads((tmp_path / "aligned" / "result.json").read_text())
    called = "alignment (routine 3, loss mse, weight 1.0) + code mixing (probability 0.5) + lora (rank 2)"
    assert found["method"] == called
    assert set(found["recall_at_1"]) == {"ru"} and found["disparity"] == {"std": 0.0, "range": 0.0}
    assert (
        found["retrieval"]["ru"]["pairs"] == 0
        and (tmp_path / "aligned" / "ru" / "tuned.safetensors").is_file()
    )
    losses = {key for line in read_metrics(tmp_path / "aligned" / "ru") for key in line}
    assert {"loss/i2t", "loss/t2i", "loss/alignment"} <= losses
    for stop in (["fit.stop_after=1"], []):
        code, printed = finetune(
            "scenes_xflickrco", "name=parts", *settings, "strategies.code_mixing.probability=0.5", *stop
        )
        assert code == 0, printed
    whole, parts = (
        (tmp_path / name / "ru" / "tuned.safetensors").read_bytes() for name in ("aligned", "parts")
    )
    assert whole == parts


def test_retrieval_untrained_and_translate_test_are_evaluated(finetune, tmp_path):
    settings = ["use_itm_head=false", "strategies.hard_prompt={}"]
    for setting in ("untrained", "translate_test"):
        code, printed = finetune("scenes_xflickrco", f"name={setting}", f"setting={setting}", *settings)
        assert code == 0, printed
    found = [
        json.loads((tmp_path / name / "result.json").read_text()) for name in ("untrained", "translate_test")
    ]
    assert found[0]["recall_at_1"]["en"] == found[1]["recall_at_1"]["en"] and found[0]["steps"] == 0
    assert found[0]["disparity"]["range"] == pytest.approx(
        abs(found[0]["recall_at_1"]["en"] - found[0]["recall_at_1"]["ru"])
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["strategies.alignment={}"], "setting=few_shot, single_language or all_language"),
        ([*FEW, "strategies.alignment={}", "shots=7"], "train_7.jsonl: no such file"),
        (["setting=untrained", "strategies.lora={}"], "setting=untrained trains nothing"),
    ],
)
def test_alignment_wrong_settings_are_one_line_errors(finetune, settings, words):
    code, printed = finetune("scenes_xflickrco", "name=wrong", *settings)
    assert code == 2 and words in printed and printed.strip().splitlines()[-1].startswith("error: ")
