"""Distillation across languages (paper 3): every term against slow loops, states of both backbones, whole runs."""

import itertools
import json
import shutil

import pytest
import tokenizers
import torch
from safetensors.torch import load_file

from finetune.batches import encode_inputs
from finetune.distillation.inputs import Inputs, Side
from finetune.distillation.matching import matching_tokens, token_spans, words_at
from finetune.distillation.objective import DistillationObjective
from finetune.distillation.setup import check_models
from finetune.distillation.teacher import Teacher
from finetune.distillation.terms import TERMS
from finetune.examples import Example
from finetune.formats.vqa import read_cvil
from finetune.model import FinetuneModel
from finetune.strategies import STRATEGIES
from finetune.strategies.distillation import Distillation, chosen_layers
from raylib.backbones.oscar import TINY, Oscar
from raylib.errors import UserError
from raylib.model.places import find_places
from raylib.ragged import Ragged
from raylib.sample.concepts import DATA
from raylib.text import Tokenizer
from raylib.track import read_metrics
from tests.made import make_batch, make_model
from tests.test_collective import run_workers
from tests.test_oscar import FEATURES, shaken
from tests.test_strategies_run import ANSWERS, REFUSED, SETTINGS

LABELS = ("no", "yes")
SIZES = TINY.model_copy(update={"layers": 3, "dropout": 0.0})


@pytest.fixture(scope="module")
def wordpiece(tmp_path_factory):
    """A tokenizer as BERT's, which knows some words whole and cuts others."""
    words = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "dog", "cat", "polar", "bear", "play", "##ing", "what", "is", "the",
             "##s", "?", "a", "red", "b", "##all", "##ear"]  # fmt: skip
    model = tokenizers.models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    path = tmp_path_factory.mktemp("wordpiece") / "tokenizer.json"
    made.save(str(path))
    return Tokenizer.load(path)


def ours() -> Tokenizer:
    return Tokenizer.load(DATA / "tokenizer.model")


def made_examples() -> list[Example]:
    """Three questions in a made-up language with English words in them: tags of two, one of them nearly without regions."""
    first = Example("1", ("quid est dog ?",), ("a",), {}, tags=("dog", "polar bear", "zzyx"), pivot="what is the dog?",
                    aligned=(((9, 12), (12, 15)),))  # fmt: skip
    second = Example("2", ("cat et play",), ("b",), {}, pivot="a cat playing", aligned=(((0, 3), (2, 5)), ((7, 11), (6, 13))))
    third = Example("3", ("a a a",), ("c",), {}, tags=("red ball",), pivot="is a red ball", aligned=())
    return [first, second, third]


def made_regions(counts=(4, 1, 2)) -> Ragged:
    g = torch.Generator().manual_seed(3)
    return Ragged(torch.rand(sum(counts), FEATURES + 7, generator=g), torch.tensor(counts))


def made_lesson(tokenizer, terms=TERMS, layers=None, slots=0, public=False, rows=slice(None), length=40):
    """(objective, batch, teacher) of a small student and a small teacher, whose tokenizers may differ."""
    models = []
    for seed, words in ((1, 12000), (2, max(tokenizer.vocabulary, 30))):
        torch.manual_seed(seed)
        backbone = shaken(Oscar(SIZES.model_copy(update={"vocabulary": words})))
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in backbone.parameters():
                p.add_(torch.randn_like(p) * 0.1)
        models.append(FinetuneModel(backbone, LABELS, 1, 0.0, FEATURES))
    student, teacher = models
    sides = Side(ours(), student.backbone.parts), Side(tokenizer, teacher.backbone.parts)
    examples, regions = made_examples(), made_regions()
    chosen = list(range(3))[rows]
    seen = {"regions": regions.take(torch.tensor(chosen)), "tags": [()] * len(chosen)}
    examples = [examples[i] for i in chosen]
    part = {"index": torch.tensor(chosen), **encode_inputs(examples, seen, ours(), length)}
    part |= Inputs(*sides, length, terms, slots, public)(examples, seen, part)
    layers = layers or {1: 1.0, 3: 1.0}
    beside = Teacher(teacher, tuple(layers), slots > 0)
    objective = DistillationObjective(student, beside, layers, "ce", 0.0, None, public, slots > 0)
    return objective.eval(), {"examples": part}, teacher


def slow_parts(objective, batch, teacher, tokenizer, slots=0):
    """For each example and layer, in plain loops over texts: {"cls", "image", "tags", "mixed": [(student, teacher) of tokens
    that match], "t", "n": (tokens of tags, of words) of both}. No positions but those counted here."""
    part, found = batch["examples"], []
    student_rows, _ = objective.model.states(part, tuple(objective.layers), slots > 0)
    teacher_rows, _ = teacher.states({**part, **part["teacher"]}, tuple(objective.layers), slots > 0)
    mine_tok = ours()
    for i, e in enumerate(made_examples()):
        mine_text, theirs_text = mine_tok.encode([e.texts[-1]])[0], tokenizer.encode([e.pivot])[0]
        tags = " ".join(e.tags)
        mine_tags, theirs_tags = (t.encode([tags])[0] if tags else [] for t in (mine_tok, tokenizer))
        regions = int(part["regions"].lengths[i])
        sizes = [(len(text) + 2, len(tag) + bool(tags), regions, int(slots > 0))
                 for text, tag in ((mine_text, mine_tags), (theirs_text, theirs_tags))]  # fmt: skip
        per_layer = []
        for a, b in zip(student_rows, teacher_rows, strict=True):
            row, other = (rows.take(torch.tensor([i])).values for rows in (a, b))
            assert [len(row), len(other)] == [sum(s) for s in sizes]
            heads = [s[0] + s[1] for s in sizes]
            values = {"cls": [(row[0], other[0])],
                      "image": [(row[heads[0] + r], other[heads[1] + r]) for r in range(regions)],
                      "empty": [(row[-1], other[-1])] * max(0, slots - regions)}  # fmt: skip
            same = slow_matches(tags, tags, words_at(tags), words_at(tags), mine_tok, tokenizer, False)
            values["tags"] = [(row[sizes[0][0] + s], other[sizes[1][0] + t]) for s, t in same]
            if tags:
                values["tags"].append((row[sizes[0][0] + len(mine_tags)], other[sizes[1][0] + len(theirs_tags)]))
            words = [w for w, _ in e.aligned], [w for _, w in e.aligned]
            values["mixed"] = [(row[1 + s], other[1 + t])
                               for s, t in slow_matches(e.texts[-1], e.pivot, *words, mine_tok, tokenizer, True)]  # fmt: skip
            per_layer.append(values)
        found.append((per_layer, [s[1] for s in sizes], [s[0] - 2 for s in sizes]))
    return found


def slow_matches(text, other, words, others, mine, theirs, whole):
    """Words are found by cutting the text at every character; only single words are looked at."""
    pairs = []
    for (a, b), (c, d) in zip(words, others, strict=True):
        before = len(mine.encode([text[:a].strip()])[0]), len(theirs.encode([other[:c].strip()])[0])
        left, right = (t.pieces(t.encode([w])[0]) for t, w in ((mine, text[a:b]), (theirs, other[c:d])))
        if whole and left != right:
            continue
        j = 0
        for i, piece in enumerate(left):
            for k in range(j, len(right)):
                if right[k] == piece:
                    pairs.append((before[0] + i, before[1] + k))
                    j = k + 1
                    break
    return pairs


def mse(pair) -> float:
    a, b = pair
    return sum(float(x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a)


@pytest.mark.parametrize("own", [True, False], ids=["one tokenizer", "two tokenizers"])
@pytest.mark.parametrize("term", [("cls",), ("image",), ("tags",), ("mixed",), ("cls", "image", "tags", "mixed")])
@pytest.mark.parametrize("slots", [0, 5])
def test_terms_are_the_slow_ones(wordpiece, term, own, slots):
    """Equations 2 to 6: p regions, t x t' tokens of tags, n x n' of words, lambda_m."""
    tokenizer = ours() if own else wordpiece
    layers = {1: 0.5, 3: 2.0}
    objective, batch, teacher = made_lesson(tokenizer, term, layers, slots)
    with torch.no_grad():
        loss, values = objective(batch)
        parts = slow_parts(objective, batch, teacher, tokenizer, slots)
    wanted = dict.fromkeys(term, 0.0)
    for per_layer, t, n in parts:
        for values_of, weight in zip(per_layer, layers.values(), strict=True):
            p = max(slots, len(values_of["image"]))
            each = {"cls": 1.0, "image": p, "tags": t[0] * t[1], "mixed": n[0] * n[1]}
            for name in term:
                pairs = values_of[name] + (values_of["empty"] if name == "image" else [])
                wanted[name] += sum(weight * mse(pair) / each[name] for pair in pairs) / len(parts)
    assert {k: float(v) for k, v in values.items()} == pytest.approx(wanted, rel=1e-4)
    assert float(loss) == pytest.approx(sum(wanted.values()), rel=1e-4) and all(v > 0 for v in wanted.values())


@pytest.mark.parametrize("slots", [0, 5])
def test_the_public_codes_single_mean(wordpiece, slots):
    """One mean over all positions of the batch times the width, a layer."""
    objective, batch, teacher = made_lesson(wordpiece, layers={1: 1.0, 3: 0.25}, slots=slots, public=True)
    with torch.no_grad():
        loss, values = objective(batch)
        parts = slow_parts(objective, batch, teacher, wordpiece, slots)
    wanted = 0.0
    for m, weight in enumerate((1.0, 0.25)):
        pairs = [pair for per_layer, _, _ in parts for rows in per_layer[m].values() for pair in rows]
        wanted += weight * sum(map(mse, pairs)) / len(pairs)
    assert float(loss) == pytest.approx(wanted, rel=1e-4) and float(sum(values.values())) == pytest.approx(wanted, rel=1e-4)


def test_what_matches_between_two_tokenizers(wordpiece):
    tokens = matching_tokens(("what playing dogs", words_at("what playing dogs"), wordpiece),
                             ("playing playing dog", words_at("playing playing dog"), wordpiece))  # fmt: skip
    assert tokens == [(1, 2), (2, 3), (3, 4)]  # play, ing, dog: word by word
    whole = matching_tokens(("dogs", [(0, 4)], wordpiece), ("dog", [(0, 3)], wordpiece), whole=True)
    assert whole == []
    assert token_spans("what is the dog?", [(12, 15), (15, 16), (13, 15)], wordpiece) == [(3, 4), (4, 5), None]
    assert wordpiece.pieces(wordpiece.encode(["playing"])[0]) == ["▁play", "ing"]
    assert ours().pieces(ours().encode(["dog"])[0])[0].startswith("▁")


def test_a_cut_text_loses_its_matches_not_its_places():
    """Where length cuts question and tags, what is gone is compared with nothing."""
    for term in ("tags", "mixed"):
        whole, *cut = (made_lesson(ours(), length=n)[1]["examples"]["pairs"][term].student for n in (40, 8, 5))
        assert len(whole) > len(cut[-1]) and len(cut[0]) >= len(cut[-1])


def test_the_teacher_learns_nothing_and_does_not_drop(wordpiece):
    objective, batch, teacher = made_lesson(wordpiece)
    objective.train()
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert not any(p is q for p in objective.parameters() for q in teacher.parameters())
    objective(batch)[0].backward()
    assert all(p.grad is None for p in teacher.parameters())
    unused = {name.split(".")[1] for name, p in objective.model.named_parameters() if p.grad is None}
    assert unused <= {"pooler", "hidden", "norm", "output"}


def on_share(rank, world):
    objective, batch, _ = made_lesson(ours(), public=False, rows=slice(rank, None, world))
    loss, values = objective(batch)
    loss.backward()
    public, other, _ = made_lesson(ours(), public=True, rows=slice(rank, None, world))
    values = {**values, **{f"public {k}": v for k, v in public(other)[1].items()}}
    return values, {k: p.grad for k, p in objective.model.named_parameters()}


def test_workers_equal_one_worker():
    """Three examples on two workers: shares of two and of one."""
    results, (values, gradients) = run_workers(on_share, 2), on_share(0, 1)
    for name, value in values.items():
        for rank in range(2):
            torch.testing.assert_close(results[rank][0][name], value, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        if gradient is not None:
            mean = sum(result[1][name] for result in results) / 2
            torch.testing.assert_close(mean, gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_states_of_the_unified_model():
    """After the last layer they are what `ground` gives; after the text layers what the text encoder does."""
    model, part = make_model().eval(), make_batch(3, 6)["image_text"]
    text = Ragged(part["text"].clean, part["text"].lengths)
    pictures = model.encode_images(part["images"])
    states, places = model.states(text, pictures, [1, 2, 4])
    assert places.text.lengths.equal(text.lengths) and places.text.values.equal(torch.arange(len(text.values)))
    assert not places.tags.lengths.any() and not places.regions.lengths.any() and places.cls.equal(text.starts)
    torch.testing.assert_close(model.pooled(states[-1].values[places.cls]), model.ground(text, pictures))
    torch.testing.assert_close(states[-1].values, model.ground_tokens(text, pictures).values)
    torch.testing.assert_close(states[1].values, model.encode_text(text))
    first = model.text.blocks[0]
    model.text.blocks = model.text.blocks[:1]
    torch.testing.assert_close(states[0].values, model.encode_text(text))
    assert model.text.blocks[0] is first
    with pytest.raises(UserError, match="layers .5.: unified has layers 1 to 4; name some"):
        make_model().states(text, pictures, [5])
    with pytest.raises(UserError, match="states need fusion=cross"):
        make_model(fusion="entangled").states(text, pictures, [1])


@pytest.mark.parametrize(("settings", "student", "teacher", "wanted"), [
    ({}, 12, 12, ({3: 1.0, 6: 1.0, 9: 1.0, 12: 1.0}, (3, 6, 9, 12))),
    ({}, 4, 4, ({3: 1.0, 4: 1.0}, (3, 4))),
    ({}, 9, 9, ({3: 1.0, 6: 1.0, 9: 1.0}, (3, 6, 9))),
    ({"layers": (1, 2), "teacher_layers": (6, 12), "weights": (1, 0.5)}, 2, 12, ({1: 1.0, 2: 0.5}, (6, 12))),
    ({}, 6, 12, "the student has 6 layers, the teacher 12; say which go together"),
    ({"layers": (6,)}, 6, 12, "the student has 6 layers, the teacher 12; say which go together"),
    ({"layers": (2, 1)}, 4, 4, r"layers=\[2, 1\]: the model has layers 1 to 4"),
    ({"layers": (1, 5)}, 4, 4, r"layers=\[1, 5\]: the model has layers 1 to 4"),
    ({"layers": (1, 2), "teacher_layers": (1, 13)}, 4, 12, r"teacher_layers=\[1, 13\]: the model has layers 1 to 12"),
    ({"weights": (1.0,)}, 4, 4, "weights: 1 values for 2 layers"),
])  # fmt: skip
def test_layers(settings, student, teacher, wanted):
    method = Distillation(teacher="x", **settings)
    if isinstance(wanted, str):
        with pytest.raises(UserError, match=wanted) as e:
            chosen_layers(method, student, teacher)
        assert "\n" not in str(e.value)
    else:
        assert chosen_layers(method, student, teacher) == wanted


def test_models_that_do_not_go_together():
    def model(backbone):
        return FinetuneModel(backbone, LABELS, 1, 0.0)

    oscar, unified = Oscar(TINY), make_model()
    for student, teacher, settings, words in (
        (unified, unified, {}, "tokens: unified has no tokens of pictures in its rows, which 'image' compares; leave 'image'"),
        (unified, unified, {"tokens": ("cls", "tags")}, "unified has no object tags"),
        (unified, unified, {"tokens": ("cls",), "slots": 50}, "unified has no slots of regions"),
        (oscar, unified, {}, "oscar's rows are of text, tags, regions, the teacher's, unified's, of text"),
        (oscar, Oscar(TINY.model_copy(update={"width": 64})), {}, "the teacher's states are 64 wide, the student's 32"),
    ):
        with pytest.raises(UserError, match=words):
            check_models(Distillation(teacher="x", **settings), model(student), model(teacher))
    check_models(Distillation(teacher="x"), model(oscar), model(Oscar(TINY)))
    check_models(Distillation(teacher="x", tokens=("cls", "mixed")), model(unified), model(make_model()))
    assert find_places(*(torch.tensor([1]),) * 3).cls.tolist() == [0]


# whole runs


@pytest.fixture(scope="session")
def parallel(scenes, tmp_path_factory):
    """Questions of the scenes in English and Russian, as cViL has them: 30 to train on, 15 to choose by, 15 to test."""
    folder = tmp_path_factory.mktemp("parallel")
    answers = json.loads((scenes / "gqa/annotations/trainval_label2ans.json").read_text())
    files = [json.loads((scenes / f"xGQA/annotations/zero_shot/testdev_balanced_questions_{code}.json").read_text())
             for code in ("en", "ru")]  # fmt: skip
    (folder / "cvil").mkdir()
    (folder / "cvil/answers.json").write_text(json.dumps(answers))
    lines = []
    for key, item in files[0].items():
        texts = {"en": item["question"], "ru": files[1][key]["question"]}
        record = {"q_id": key, "img_id": item["imageId"], **texts, "an": [answers.index(item["answer"])], "s": [1.0]}
        lines.append(json.dumps(record) + "\n")
    for name, rows in (("train", lines[:30]), ("dev", lines[30:45]), ("test", lines[45:])):
        (folder / f"cvil/{name}.jsonl").write_text("".join(rows))
    for name in ("vectors.txt", "dictionaries", "images.tar"):
        (shutil.copytree if (scenes / name).is_dir() else shutil.copy2)(scenes / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def teacher(parallel, model, tmp_path_factory):
    """An English model of these questions."""
    from finetune.__main__ import main
    from tests.conftest import QUICK

    runs = tmp_path_factory.mktemp("teacher")
    assert main(["scenes_xgqa", "task=cvil_vqa", "name=english", f"model={model}", f"data={parallel}", f"runs={runs}",
                 "epochs=1", 'languages=["en"]', "batch=10", "optim.lr=0.01", 'freeze=["vision"]', *QUICK[1:]]) == 0  # fmt: skip
    return runs / "english"


@pytest.fixture
def distil(finetune, parallel, teacher):
    """`distil(*settings)`: a student of Russian."""
    fixed = ["task=cvil_vqa", f"data={parallel}", 'languages=["ru"]', "setting=single_language", "batch=10",
             f"strategies.distillation.teacher={teacher}", "select=last"]  # fmt: skip
    return lambda *settings: finetune("scenes_xgqa", *fixed, *settings)


CLS = 'strategies.distillation.tokens=["cls"]'


def weights(folder, step=6):
    return load_file(folder / "ru" / "checkpoints" / f"step_{step:06d}" / "model.safetensors")


def test_a_student_learns_and_resumes_to_the_bit(distil, tmp_path):
    """The distance to the teacher falls; a run stopped in its middle is the same."""
    code, printed = distil("name=whole", CLS, "epochs=4", "optim.lr=0.003")
    assert code == 0, printed
    losses = [line["loss/cls"] for line in read_metrics(tmp_path / "whole" / "ru") if "loss/cls" in line]
    assert len(losses) == 12 and losses[-1] < 0.7 * losses[0]
    for stop in (["fit.stop_after=5"], []):
        assert distil("name=parts", CLS, "epochs=4", "optim.lr=0.003", *stop)[0] == 0
    whole, parts = weights(tmp_path / "whole", 12), weights(tmp_path / "parts", 12)
    assert all(value.equal(parts[key]) for key, value in whole.items())
    found = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert found["accuracy"].keys() == {"ru"} and "distillation" in found["method"]


@pytest.mark.parametrize("frozen", [["vision"], []], ids=["encoded once", "pixels"])
def test_stored_states_give_the_same_losses(distil, tmp_path, frozen):
    """Made once into safetensors shards, read back; a resumed run reads the same ones."""
    runs = {}
    for name, stops in (("live", [[]]), ("stored", [[]]), ("parts", [["fit.stop_after=4"], []])):
        chosen = [f"strategies.distillation.states={'live' if name == 'live' else 'stored'}", f"freeze={json.dumps(frozen)}"]
        for stop in stops:
            code, printed = distil(f"name={name}", CLS, *chosen, *stop)
            assert code == 0, printed
        runs[name] = [line["loss/cls"] for line in read_metrics(tmp_path / name / "ru") if "loss/cls" in line]
    assert runs["live"] == pytest.approx(runs["stored"], rel=1e-5) and len(runs["live"]) == 6
    assert all(value.equal(weights(tmp_path / "parts")[key]) for key, value in weights(tmp_path / "stored").items())
    (folder,) = (tmp_path / "stored" / "teacher").iterdir()
    assert list(folder.glob("states-0-*.safetensors"))


def test_the_teachers_head_serves_the_student(distil, teacher, tmp_path):
    """It is copied and stands still, so the dev set can choose the best checkpoint."""
    code, printed = distil("name=headed", CLS, "strategies.distillation.classifier=teacher", "select=best")
    assert code == 0, printed
    trained = weights(tmp_path / "headed")
    there = load_file(next((teacher / "best").glob("model.safetensors")))
    assert all(trained[name].equal(value) for name, value in there.items() if name.startswith("head."))
    code, printed = distil("name=new", CLS, "select=best")
    assert code == 2 and "trains no head that could choose the best checkpoint" in printed


def test_with_the_answers_beside_it_and_all_other_methods(distil, tmp_path):
    """Everything that is no tuning at once, in English; resumed."""
    names = [name for name in ANSWERS if name not in ("lora", "adapter", "compacter", "soft_prompt")]
    chosen = [CLS, "strategies.distillation.task=1", "setting=zero_shot", 'languages=["en","ru"]',
              *(setting for name in names for setting in SETTINGS[name])]  # fmt: skip
    for name, stops in (("whole", [[]]), ("parts", [["fit.stop_after=4"], []])):
        for stop in stops:
            code, printed = distil(f"name={name}", *chosen, *stop)
            assert code == 0, printed
    whole, parts = (load_file(tmp_path / name / "checkpoints/step_000006/model.safetensors") for name in ("whole", "parts"))
    assert all(value.equal(parts[key]) for key, value in whole.items())
    assert {"loss/cls", "loss/task", "loss/prior"} <= {key for line in read_metrics(tmp_path / "whole") for key in line}


@pytest.mark.slow
@pytest.mark.parametrize("name", ANSWERS)
def test_with_each_other_method(distil, tmp_path, name):
    chosen = [CLS, "strategies.distillation.task=1", "setting=zero_shot", 'languages=["en","ru"]', *SETTINGS[name]]
    for run, stops in (("whole", [[]]), ("parts", [["fit.stop_after=4"], []])):
        for stop in stops:
            code, printed = distil(f"name={run}", *chosen, *stop)
            assert code == 0, printed
    whole, parts = (load_file(tmp_path / run / "checkpoints/step_000006/model.safetensors") for run in ("whole", "parts"))
    assert all(value.equal(parts[key]) for key, value in whole.items())


def test_two_steps_of_training(finetune, distil, parallel, tmp_path):
    """Distilled, then on the answers: the classifier alone for an epoch, then all layers; the best checkpoint by validation. The
    variant without distillation is the second step by itself, on translations."""
    code, printed = distil("name=first", CLS, 'freeze=["vision"]')
    assert code == 0, printed
    second = ["task=cvil_vqa", f"data={parallel}", 'languages=["ru"]', "setting=single_language", "batch=10", "epochs=3",
              f"model={tmp_path / 'first' / 'ru'}", "strategies.head_first.epochs=1", "answers=5", "fit.keep=9"]  # fmt: skip
    code, printed = finetune("scenes_xgqa", "name=second", *second, 'freeze=["vision"]')
    assert code == 0, printed
    first, after, last = weights(tmp_path / "first"), *(load_file(
        tmp_path / "second" / "ru" / "checkpoints" / f"step_{step:06d}" / "model.safetensors") for step in steps(tmp_path))
    layers = [name for name in first if name.startswith(("backbone.text.", "backbone.fusion.", "backbone.embedding."))]
    assert all(first[name].equal(after[name]) for name in layers) and not all(first[name].equal(last[name]) for name in layers)
    found = json.loads((tmp_path / "second" / "result.json").read_text())
    counts = found["counts"]["ru"]
    assert found["coverage"]["ru"] == pytest.approx(1 - counts["unknown_answers"] / counts["n"]) and found["coverage"]["ru"] < 1
    assert found["unknown_training_answers"] > 0 and found["method"] == "head first (epochs 1)"
    assert (tmp_path / "second" / "ru" / "best").is_dir()
    code, printed = finetune("scenes_xgqa", "name=bad", *second)
    assert code == 2 and 'set freeze=["vision"]' in printed


def steps(runs) -> tuple[int, int]:
    """The first and the last checkpoint: after an epoch, and at the end."""
    found = sorted(int(path.name.removeprefix("step_")) for path in (runs / "second" / "ru" / "checkpoints").glob("step_*"))
    return found[0], found[-1]


def test_answers_with_one_translation_are_one_class(tmp_path):
    """"up" and "above" are one word in Hindi; what both score together counts, 1 at most."""
    (tmp_path / "answers.json").write_text(json.dumps(["up", "above", "cat"]))
    (tmp_path / "answers.hi.json").write_text(json.dumps(["ऊपर", "ऊपर", "बिल्ली"]))
    line = {"en": "where?", "hi": "कहाँ?", "img_id": 1, "q_id": 2, "an": [0, 1, 2], "s": [0.6, 0.3, 0.3], "o": "dog; polar bear;"}
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(line) + "\n" + json.dumps({**line, "s": [0.9, 0.6, 0.3]}) + "\n")
    found = list(read_cvil(path, "hi", "answers.json", "answers.hi.json"))
    assert found[0].labels == {"ऊपर": pytest.approx(0.9), "बिल्ली": 0.3} and found[1].labels["ऊपर"] == 1.0
    assert found[0].tags == ("dog", "polar bear") and found[0].texts == ("कहाँ?",)
    (tmp_path / "answers.hi.json").write_text(json.dumps(["ऊपर"]))
    with pytest.raises(UserError, match="answers.hi.json: wanted a list of 3 translations"):
        list(read_cvil(path, "hi", "answers.json", "answers.hi.json"))


@pytest.mark.parametrize(("settings", "words"), [
    ([], "no such file; word alignments are made with"),
    (['strategies.distillation.tokens=["cls","image"]'], "unified has no tokens of pictures in its rows"),
    (['strategies.distillation.tokens=["cls","cls"]'], "name each once"),
    ([CLS, "strategies.distillation.teacher=none"], "teacher=none: no such model"),
    ([CLS, "strategies.distillation.layers=[9]"], "layers=[9]: the model has layers 1 to 4"),
    ([CLS, "strategies.prior.k=3"], "strategies.distillation.task=0: prior is of the classifier"),
    ([CLS, "head=decoder"], "strategies.distillation is for classifiers"),
    ([CLS, "image_size=32"], "the teacher sees pictures of 16 pixels, the student of 32"),
    ([CLS, "answers=5", "strategies.distillation.classifier=teacher"], "the teacher's answers"),
    (['strategies.distillation.tokens=["mixed"]', "setting=zero_shot"], "training reads English alone"),
])  # fmt: skip
def test_mistakes_are_one_line(distil, settings, words):
    code, printed = distil("name=wrong", *settings)
    assert code == 2 and words in printed and printed.strip().splitlines()[-1].startswith("error: ")


def test_retrieval_is_refused(finetune, teacher):
    code, printed = finetune("scenes_xflickrco", f"strategies.distillation.teacher={teacher}", "select=last")
    assert code == 2 and "strategies.distillation wants questions with answers" in printed


def test_it_is_registered_where_it_sees_texts_first():
    order = list(STRATEGIES)
    assert order.index("distillation") < order.index("code_mixing")
    assert not REFUSED & set(itertools.product(["distillation"], order))
