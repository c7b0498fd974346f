"""Distillation across languages (paper 3): every term against slow loops, states of both backbones, layers,
answers."""

import json
import pickle

import pytest
import tokenizers
import torch

from finetune.batches import encode_inputs
from finetune.formats import Example
from finetune.formats.answers import read_cvil
from finetune.strategies.base import AddedTerm, LossTerms
from finetune.strategies.distillation.pairs import (
    TOKEN_KINDS,
    RowTokenizer,
    TeacherInputs,
    matching_tokens,
    word_spans,
    word_token_spans,
)
from finetune.strategies.distillation.strategy import (
    Distillation,
    DistillationConfig,
    check_models,
    compared_layers,
)
from finetune.strategies.distillation.teacher import StoredStates, Teacher, store_states
from finetune.tasks.classification import ClassificationObjective
from raylib.distributed import worker_rows
from raylib.errors import UserError
from raylib.models.finetuned import FinetuneModel
from raylib.models.oscar import TINY, Oscar
from raylib.packed import Ragged, find_segments
from raylib.sample import DATA
from raylib.text import PromptedTokenizer, Tokenizer
from tests.factories import make_batch, make_model
from tests.test_oscar import FEATURES, shaken
from tests.workers import assert_workers_equal_one, run_workers

LABELS = ("no", "yes")
SIZES = TINY.model_copy(update={"layers": 3, "dropout": 0.0})


@pytest.fixture(scope="module")
def wordpiece(tmp_path_factory):
    """A tokenizer as BERT's, which knows some words whole and cuts others."""
    words = [
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[PAD]",
        "[MASK]",
        "dog",
        "cat",
        "polar",
        "bear",
        "play",
        "##ing",
        "what",
        "is",
        "the",
        "##s",
        "?",
        "a",
        "red",
        "b",
        "##all",
        "##ear",
    ]
    model = tokenizers.models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    path = tmp_path_factory.mktemp("wordpiece") / "tokenizer.json"
    made.save(str(path))
    return Tokenizer.load(path)


def ours() -> Tokenizer:
    return Tokenizer.load(DATA / "tokenizer.model")


def make_examples() -> list[Example]:
    """Three questions in a made-up language with English words in them: tags of two, one of them nearly
    without regions."""
    first = Example(
        "1",
        ("quid est dog ?",),
        ("a",),
        {},
        tags=("dog", "polar bear", "zzyx"),
        pivot="what is the dog?",
        aligned=(((9, 12), (12, 15)),),
    )
    second = Example(
        "2",
        ("cat et play",),
        ("b",),
        {},
        pivot="a cat playing",
        aligned=(((0, 3), (2, 5)), ((7, 11), (6, 13))),
    )
    third = Example("3", ("a a a",), ("c",), {}, tags=("red ball",), pivot="is a red ball", aligned=())
    return [first, second, third]


def make_regions(counts=(4, 1, 2)) -> Ragged:
    g = torch.Generator().manual_seed(3)
    return Ragged(torch.rand(sum(counts), FEATURES + 7, generator=g), torch.tensor(counts))


def make_lesson(
    tokenizer, terms=TOKEN_KINDS, layers=None, slots=0, public=False, rows=slice(None), length=40
):
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
    sides = (
        RowTokenizer(ours(), student.backbone.row_parts),
        RowTokenizer(tokenizer, teacher.backbone.row_parts),
    )
    examples, regions = make_examples(), make_regions()
    chosen = list(range(3))[rows]
    seen = {"regions": regions.select_rows(torch.tensor(chosen)), "tags": [()] * len(chosen)}
    examples = [examples[i] for i in chosen]
    part = {"index": torch.tensor(chosen), **encode_inputs(examples, seen, ours(), length)}
    part |= TeacherInputs(*sides, length, terms, slots, public)(examples, seen, part)
    layers = layers or {1: 1.0, 3: 1.0}
    beside = Teacher(teacher, tuple(layers), slots > 0)
    settings = {"tokens": terms, "slots": slots, "normalise": "public" if public else "paper"}
    strategy = Distillation(DistillationConfig(teacher="x", **settings), {}, {})
    strategy.compare(layers, beside)
    added = {
        name: AddedTerm(*term, reads=DistillationConfig.needs)
        for name, term in strategy.terms(student).items()
    }
    objective = ClassificationObjective(student, "ce", LossTerms(added, strategy.hidden_states, 0.0))
    return objective.eval(), {"examples": part}, teacher


def slow_parts(objective, batch, teacher, tokenizer, slots=0):
    """For each example and layer, in plain loops over texts: {"cls", "image", "tags", "mixed": [(student,
    teacher) of tokens that match], "t", "n": (tokens of tags, of words) of both}. No positions but those
    counted here."""
    part, found = batch["examples"], []
    student_rows, _ = objective.model.hidden_states(part, objective.states.layers, slots > 0)
    teacher_rows, _ = teacher.hidden_states({**part, **part["teacher"]}, objective.states.layers, slots > 0)
    student_tok = ours()
    for i, e in enumerate(make_examples()):
        student_text, teacher_text = student_tok.encode([e.texts[-1]])[0], tokenizer.encode([e.pivot])[0]
        tags = " ".join(e.tags)
        student_tags, teacher_tags = (t.encode([tags])[0] if tags else [] for t in (student_tok, tokenizer))
        regions = int(part["regions"].lengths[i])
        sizes = [
            (len(text) + 2, len(tag) + bool(tags), regions, int(slots > 0))
            for text, tag in ((student_text, student_tags), (teacher_text, teacher_tags))
        ]
        per_layer = []
        for a, b in zip(student_rows, teacher_rows, strict=True):
            row, other = (rows.select_rows(torch.tensor([i])).values for rows in (a, b))
            assert [len(row), len(other)] == [sum(s) for s in sizes]
            heads = [s[0] + s[1] for s in sizes]
            values = {
                "cls": [(row[0], other[0])],
                "image": [(row[heads[0] + r], other[heads[1] + r]) for r in range(regions)],
                "empty": [(row[-1], other[-1])] * max(0, slots - regions),
            }
            same = slow_matches(tags, tags, word_spans(tags), word_spans(tags), student_tok, tokenizer, False)
            values["tags"] = [(row[sizes[0][0] + s], other[sizes[1][0] + t]) for s, t in same]
            if tags:
                values["tags"].append(
                    (row[sizes[0][0] + len(student_tags)], other[sizes[1][0] + len(teacher_tags)])
                )
            words = [w for w, _ in e.aligned], [w for _, w in e.aligned]
            values["mixed"] = [
                (row[1 + s], other[1 + t])
                for s, t in slow_matches(e.texts[-1], e.pivot, *words, student_tok, tokenizer, True)
            ]
            per_layer.append(values)
        found.append((per_layer, [s[1] for s in sizes], [s[0] - 2 for s in sizes]))
    return found


def slow_matches(text, other, words, others, student_tokenizer, teacher_tokenizer, whole):
    """Words are found by cutting the text at every character; only single words are looked at."""
    pairs = []
    for (a, b), (c, d) in zip(words, others, strict=True):
        before = (
            len(student_tokenizer.encode([text[:a].strip()])[0]),
            len(teacher_tokenizer.encode([other[:c].strip()])[0]),
        )
        left, right = (
            t.pieces(t.encode([w])[0])
            for t, w in ((student_tokenizer, text[a:b]), (teacher_tokenizer, other[c:d]))
        )
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
@pytest.mark.parametrize(
    "term", [("cls",), ("image",), ("tags",), ("mixed",), ("cls", "image", "tags", "mixed")]
)
@pytest.mark.parametrize("slots", [0, 5])
def test_distillation_terms_equal_slow_loops(wordpiece, term, own, slots):
    """Equations 2 to 6: p regions, t x t' tokens of tags, n x n' of words, lambda_m."""
    tokenizer = ours() if own else wordpiece
    layers = {1: 0.5, 3: 2.0}
    objective, batch, teacher = make_lesson(tokenizer, term, layers, slots)
    with torch.no_grad():
        loss, values = objective(batch)
        parts = slow_parts(objective, batch, teacher, tokenizer, slots)
    expected = dict.fromkeys(term, 0.0)
    for per_layer, t, n in parts:
        for values_of, weight in zip(per_layer, layers.values(), strict=True):
            p = max(slots, len(values_of["image"]))
            each = {"cls": 1.0, "image": p, "tags": t[0] * t[1], "mixed": n[0] * n[1]}
            for name in term:
                pairs = values_of[name] + (values_of["empty"] if name == "image" else [])
                expected[name] += sum(weight * mse(pair) / each[name] for pair in pairs) / len(parts)
    assert {k: float(v) for k, v in values.items()} == pytest.approx(expected, rel=1e-4)
    assert float(loss) == pytest.approx(sum(expected.values()), rel=1e-4) and all(
        v > 0 for v in expected.values()
    )


@pytest.mark.parametrize("slots", [0, 5])
def test_distillation_single_mean_of_public_code(wordpiece, slots):
    """One mean over all positions of the batch times the width, a layer; which tokens of texts are pairs
    there, tests/test_cvil.py compares with the code itself."""
    layers, kinds = {1: 1.0, 3: 0.25}, ("cls", "image")
    objective, batch, teacher = make_lesson(wordpiece, kinds, layers, slots, public=True)
    with torch.no_grad():
        loss, values = objective(batch)
        parts = slow_parts(objective, batch, teacher, wordpiece, slots)
    expected = 0.0
    for m, weight in enumerate((1.0, 0.25)):
        rows = [per_layer[m][kind] for per_layer, _, _ in parts for kind in (*kinds, "empty")]
        pairs = [pair for row in rows for pair in row]
        expected += weight * sum(map(mse, pairs)) / len(pairs)
    assert float(loss) == pytest.approx(expected, rel=1e-4) and float(sum(values.values())) == pytest.approx(
        expected, rel=1e-4
    )


def test_distillation_matches_tokens_between_two_tokenizers(wordpiece):
    tokens = matching_tokens(
        ("what playing dogs", word_spans("what playing dogs"), wordpiece),
        ("playing playing dog", word_spans("playing playing dog"), wordpiece),
    )
    assert tokens == [(1, 2), (2, 3), (3, 4)]  # play, ing, dog: word by word
    whole = matching_tokens(("dogs", [(0, 4)], wordpiece), ("dog", [(0, 3)], wordpiece), whole=True)
    assert whole == []
    assert word_token_spans("what is the dog?", [(12, 15), (15, 16), (13, 15)], wordpiece) == [
        (3, 4),
        (4, 5),
        None,
    ]
    assert wordpiece.pieces(wordpiece.encode(["playing"])[0]) == ["▁play", "ing"]
    assert ours().pieces(ours().encode(["dog"])[0])[0].startswith("▁")


def test_distillation_truncated_text_loses_matches_but_keeps_positions():
    """Tokens of question and tags that the length cuts off are compared with nothing."""
    for term in ("tags", "mixed"):
        whole, *cut = (
            make_lesson(ours(), length=n)[1]["examples"]["pairs"][term].student for n in (40, 8, 5)
        )
        assert len(whole) > len(cut[-1]) and len(cut[0]) >= len(cut[-1])


def test_distillation_prompt_shifts_student_positions():
    """The SEP, the tags and the aligned words are where they are behind it."""
    _, plain, _ = make_lesson(ours())
    prompted = PromptedTokenizer(ours(), ids=(7, 8, 9))
    examples, seen = make_examples(), {"regions": make_regions(), "tags": [()] * 3}
    part = encode_inputs(examples, seen, prompted, 40)
    parts = ("text", "tags", "regions")
    sides = RowTokenizer(prompted, parts), RowTokenizer(ours(), parts)
    made = TeacherInputs(*sides, 40, TOKEN_KINDS)(examples, seen, part)["pairs"]
    before = plain["examples"]
    rows = Ragged(
        torch.arange(3), before["text"].lengths + before["tags"].lengths + before["regions"].lengths
    )
    row_of = torch.arange(3).repeat_interleave(rows.lengths)
    for term in ("tags", "mixed"):
        was = before["pairs"][term]
        assert made[term].student.equal(was.student + 3 * (row_of[was.student] + 1)) and len(was.student)
        assert made[term].teacher.equal(was.teacher)


def on_store(rank, world, folder):
    """States that are the numbers of the examples; three examples at a time."""

    def states(chunk):
        lengths = [1 + int(e.id) % 3 for e in chunk]
        rows = [torch.full((2, n, 4), float(e.id)) for e, n in zip(chunk, lengths, strict=True)]
        return torch.cat(rows, 1), lengths

    examples = [Example(str(i % 7), ("a",), ("b",), {}) for i in range(10)]
    made = store_states(folder, examples, states, 3).read(["5", "0", "6"])
    assert made.shape == (2, 3 + 1 + 1, 4) and made[0, :, 0].tolist() == [5, 5, 5, 0, 6]
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("world", [1, 2])
def test_distillation_states_are_stored_by_all_workers(tmp_path, world):
    folder = tmp_path / "states"
    names = on_store(0, 1, folder) if world == 1 else run_workers(on_store, 2, folder)[0]
    expected = [
        f"{kind}-{rank}{'-0.safetensors' if kind == 'states' else '.json'}"
        for kind in ("index", "states")
        for rank in range(world)
    ]
    assert names == expected and not list(tmp_path.glob(".*"))
    again = pickle.loads(pickle.dumps(StoredStates(folder)))
    assert again.read(["3"]).flatten().unique().tolist() == [3]


def test_distillation_teacher_is_frozen_and_without_dropout(wordpiece):
    objective, batch, teacher = make_lesson(wordpiece)
    objective.train()
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert not any(p is q for p in objective.parameters() for q in teacher.parameters())
    objective(batch)[0].backward()
    assert all(p.grad is None for p in teacher.parameters())
    unused = {name.split(".")[1] for name, p in objective.model.named_parameters() if p.grad is None}
    assert unused <= {"pooler", "hidden", "norm", "output"}


def on_share(rank, world):
    rows = worker_rows(3, rank, world)
    share = slice(rows.start, rows.stop)
    objective, batch, _ = make_lesson(ours(), public=False, rows=share)
    loss, values = objective(batch)
    loss.backward()
    public, other, _ = make_lesson(ours(), public=True, rows=share)
    values = {**values, **{f"public {k}": v for k, v in public(other)[1].items()}}
    return values, {k: p.grad for k, p in objective.model.named_parameters()}


def test_distillation_on_two_workers_equals_one():
    """Three examples on two workers: shares of two and of one."""
    assert_workers_equal_one(run_workers(on_share, 2), on_share(0, 1))


def test_unified_states_agree_with_fuse_and_text_encoder():
    """After the last layer they are what `fused_cls` gives; after the text layers what the text encoder
    does."""
    model, part = make_model().eval(), make_batch(3, 6)["image_text"]
    text = Ragged(part["text"].clean, part["text"].lengths)
    images = model.encode_images(part["images"])
    states, places = model.hidden_states(text, images, [1, 2, 4])
    assert places.text.lengths.equal(text.lengths) and places.text.values.equal(
        torch.arange(len(text.values))
    )
    assert (
        not places.tags.lengths.any() and not places.regions.lengths.any() and places.cls.equal(text.starts)
    )
    torch.testing.assert_close(model.pool(states[-1].values[places.cls]), model.fused_cls(text, images))
    torch.testing.assert_close(states[-1].values, model.fused_states(text, images).values)
    torch.testing.assert_close(states[1].values, model.encode_text(text))
    first = model.text.blocks[0]
    model.text.blocks = model.text.blocks[:1]
    torch.testing.assert_close(states[0].values, model.encode_text(text))
    assert model.text.blocks[0] is first
    with pytest.raises(UserError, match="layers .5.: unified has layers 1 to 4; name some"):
        make_model().hidden_states(text, images, [5])
    with pytest.raises(UserError, match="states need fusion=cross"):
        make_model(fusion="entangled").hidden_states(text, images, [1])


@pytest.mark.parametrize(
    ("settings", "student", "teacher", "expected"),
    [
        ({}, 12, 12, ({3: 1.0, 6: 1.0, 9: 1.0, 12: 1.0}, (3, 6, 9, 12))),
        ({}, 4, 4, ({3: 1.0, 4: 1.0}, (3, 4))),
        ({}, 9, 9, ({3: 1.0, 6: 1.0, 9: 1.0}, (3, 6, 9))),
        (
            {"layers": (1, 2), "teacher_layers": (6, 12), "weights": (1, 0.5)},
            2,
            12,
            ({1: 1.0, 2: 0.5}, (6, 12)),
        ),
        ({"weights": (100.0,)}, 4, 4, ({3: 100.0, 4: 100.0}, (3, 4))),
        ({}, 6, 12, "the student has 6 layers, the teacher 12; say which go together"),
        ({"layers": (6,)}, 6, 12, "the student has 6 layers, the teacher 12; say which go together"),
        ({"layers": (2, 1)}, 4, 4, r"layers=\[2, 1\]: the model has layers 1 to 4"),
        ({"layers": (1, 5)}, 4, 4, r"layers=\[1, 5\]: the model has layers 1 to 4"),
        (
            {"layers": (1, 2), "teacher_layers": (1, 13)},
            4,
            12,
            r"teacher_layers=\[1, 13\]: the model has layers 1 to 12",
        ),
        ({"weights": (1.0, 1.0, 1.0)}, 4, 4, "weights: 3 values for 2 layers"),
    ],
)
def test_distillation_layers_are_paired_by_default_and_by_settings(settings, student, teacher, expected):
    method = DistillationConfig(teacher="x", **settings)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected) as e:
            compared_layers(method, student, teacher)
        assert "\n" not in str(e.value)
    else:
        assert compared_layers(method, student, teacher) == expected


def test_distillation_incompatible_models_are_refused():
    def model(backbone):
        return FinetuneModel(backbone, LABELS, 1, 0.0)

    oscar, unified = Oscar(TINY), make_model()
    for student, teacher, settings, words in (
        (
            unified,
            unified,
            {},
            "tokens: unified has no tokens of images in its rows, which 'image' compares; leave 'image'",
        ),
        (unified, unified, {"tokens": ("cls", "tags")}, "unified has no object tags"),
        (unified, unified, {"tokens": ("cls",), "slots": 50}, "unified has no slots of regions"),
        (oscar, unified, {}, "oscar's rows are of text, tags, regions, the teacher's, unified's, of text"),
        (
            oscar,
            Oscar(TINY.model_copy(update={"width": 64})),
            {},
            "the teacher's states are 64 wide, the student's 32",
        ),
    ):
        with pytest.raises(UserError, match=words):
            check_models(DistillationConfig(teacher="x", **settings), model(student), model(teacher))
    check_models(DistillationConfig(teacher="x"), model(oscar), model(Oscar(TINY)))
    check_models(
        DistillationConfig(teacher="x", tokens=("cls", "mixed")), model(unified), model(make_model())
    )
    assert find_segments(*(torch.tensor([1]),) * 3).cls.tolist() == [0]


def test_distillation_answers_with_one_translation_are_one_class(tmp_path):
    """ "up" and "above" are one word in Hindi; what both score together counts for either, 1 at most."""
    (tmp_path / "answers.json").write_text(json.dumps(["up", "above", "cat"]))
    (tmp_path / "answers.hi.json").write_text(json.dumps(["ऊपर", "ऊपर", "बिल्ली"]))
    line = {
        "en": "where?",
        "hi": "कहाँ?",
        "img_id": 1,
        "q_id": 2,
        "an": [0, 1, 2],
        "s": [0.6, 0.3, 0.3],
        "o": "dog; polar bear;",
    }
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(line) + "\n" + json.dumps({**line, "s": [0.9, 0.6, 0.3]}) + "\n")
    found = list(read_cvil(path, "hi", "answers.json", "answers.hi.json"))
    assert found[0].labels == {"up": pytest.approx(0.9), "above": pytest.approx(0.9), "cat": 0.3}
    assert found[1].labels["up"] == found[1].labels["above"] == 1.0
    assert found[0].tags == ("dog", "polar bear") and found[0].texts == ("कहाँ?",)
    (tmp_path / "answers.hi.json").write_text(json.dumps(["ऊपर"]))
    with pytest.raises(UserError, match="answers.hi.json: wanted 3 translations"):
        list(read_cvil(path, "hi", "answers.json", "answers.hi.json"))
