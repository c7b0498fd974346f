"""Paper 3 (cViL) against its public code, kshitij98/cViL, and its data sets' published forms."""

import json
import math
import pickle
import zipfile

import numpy as np
import pytest
import tokenizers
import torch

from finetune.batches import encode_inputs
from finetune.config import FinetuneConfig
from finetune.formats import Example
from finetune.formats.answers import JA_VQA_IMAGES, answer_type, question_words
from finetune.predict import score
from finetune.recipes import RECIPES
from finetune.stores import Regions
from finetune.stores.images import join_regions
from finetune.strategies.distillation.pairs import RowTokenizer, TeacherInputs, pair_distance, pair_weight
from finetune.strategies.tuning import HeadFirst
from finetune.tasks.datasets import TASKS
from raylib.config import override
from raylib.errors import UserError
from raylib.models.attention import Attention
from raylib.models.finetuned import FinetuneModel, set_dropout
from raylib.models.oscar import TINY, Oscar
from raylib.packed import Ragged
from raylib.settings import ClassifierConfig
from raylib.text import Tokenizer
from tests.factories import make_model

# ---- the distillation loss

SPECIALS = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
STUDENT = "dog cat polar bear play ##ing what is the ##s ? a red b ##all ##ear quid est et ##m ##o"
TEACHER = "dog cat pol ##ar bear play ##ing what is the ##s ? a re ##d ball ##b b ##e ##ar"
# mixed question, English one, tags, regions; pairs of text tokens that `get_align` and `get_codemix_align` of
# its run_vqa_student.py have, run on the tokens that these tokenizers make
PUBLIC = (
    (
        ("quid est dog ?", "what is the dog?", "dog polar bear zzyx", 4),
        [[0, 0], [3, 4], [4, 5], [5, 6], [6, 7], [8, 10], [9, 11], [10, 12]],
    ),
    (
        ("cat et playing a a ?", "a cat playing a red ball ?", "", 1),
        [[0, 0], [1, 2], [3, 3], [4, 4], [5, 5], [6, 5], [7, 9], [8, 10]],
    ),
    (
        ("a a a red", "is a red ball", "red ball bears polar dogs", 2),
        [[0, 0], [1, 2], [2, 2], [3, 2], [5, 6], [9, 10], [10, 11], [12, 14], [13, 15], [14, 16]],
    ),
    (
        ("quid bear the bear", "the bear is the bear", "bear bear polar ball redo reds", 7),
        [[0, 0], [2, 5], [3, 4], [4, 5], [5, 6], [6, 7], [7, 8], [15, 16]],
    ),
)
PUBLIC_LOSS = 1.0570869553497935  # its MSELoss over all of them and 50 slots an image, on `states` below
TEXT, SLOTS, EMPTY, WIDTH = 128, 50, 500, 6  # a row: 128 tokens of text, 50 slots


def states(row: int, places: list[int], wave) -> torch.Tensor:
    """(n, 6) states that tell each place of each row from all others."""
    return torch.tensor(
        [[wave(0.3 + 1.7 * row + 0.37 * p + 1.3 * d) for d in range(WIDTH)] for p in places],
        dtype=torch.float64,
    )


def wordpiece(folder, name: str, words: str) -> Tokenizer:
    vocabulary = {word: i for i, word in enumerate([*SPECIALS, *words.split()])}
    model = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    model.save(str(folder / f"{name}.json"))
    return Tokenizer.load(folder / f"{name}.json")


def test_distillation_public_pairs_and_loss_equal_public_code(tmp_path):
    sides = [
        RowTokenizer(wordpiece(tmp_path, name, words), ("text", "tags", "regions"))
        for name, words in (("student", STUDENT), ("teacher", TEACHER))
    ]
    counts = [example[3] for example, _ in PUBLIC]
    examples = [
        Example(str(i), (mixed,), (str(i),), {}, tags=tuple(tags.split()), pivot=english, aligned=())
        for i, ((mixed, english, tags, _), _) in enumerate(PUBLIC)
    ]
    visual = {
        "regions": Ragged(torch.zeros(sum(counts), WIDTH), torch.tensor(counts)),
        "tags": [()] * len(PUBLIC),
    }
    batch = encode_inputs(examples, visual, sides[0].tokenizer, TEXT)
    kinds = ("cls", "image", "tags", "mixed")
    extra = TeacherInputs(*sides, TEXT, kinds, SLOTS, public=True)(examples, visual, batch)

    # rows as ours lie end to end: text, tags, regions, one empty slot
    values, places = [], []
    for inputs, wave in ((batch, math.sin), ({**visual, **extra["teacher"]}, math.cos)):
        side, at = [], []
        for i, count in enumerate(counts):
            length = int(inputs["text"].lengths[i] + inputs["tags"].lengths[i])
            row = [*range(length), *range(TEXT, TEXT + count), EMPTY]
            side.append(states(i, row, wave))
            at += [(i, place) for place in row]
        values.append(torch.cat(side))
        places.append(at)
    pairs = extra["pairs"]
    found = {
        (*places[0][int(s)], places[1][int(t)][1])
        for each in pairs.values()
        for s, t in zip(each.student, each.teacher, strict=True)
    }
    assert {pair for pair in found if pair[1] < TEXT} == {
        (i, s, t) for i, (_, expected) in enumerate(PUBLIC) for s, t in expected
    }
    total = sum(pair_distance(*values, each) for each in pairs.values())
    assert float(pair_weight(pairs)) == sum(len(expected) for _, expected in PUBLIC) + SLOTS * len(PUBLIC)
    assert float(total / pair_weight(pairs)) == pytest.approx(PUBLIC_LOSS, abs=1e-5)


# ---- answers of cViL's VQA


def write_answers(folder, names, translations):
    (folder / "cvil").mkdir(exist_ok=True)
    for name, values in (("answers.json", names), ("answers_hi.json", translations)):
        (folder / "cvil" / name).write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")


def test_hindi_answers_with_one_translation_are_2912_classes_of_3129(tmp_path):
    """217 of 3,129 answers share the translation of an earlier one, as in the paper; a model of Hindi alone
    has the others, any other model all."""
    names = [f"answer {i}" for i in range(3129)]
    translations = [f"उत्तर {i if i < 2912 else 7 * (i - 2912)}" for i in range(3129)]
    write_answers(tmp_path, names, translations)
    task, config = TASKS["cvil_vqa"], FinetuneConfig(task="cvil_vqa", data=str(tmp_path))
    apart = config.model_copy(update={"setting": "single_language", "languages": ("hi",)})
    classes = task.label_names(apart)
    assert len(classes) == 2912 and classes == tuple(names[:2912])
    for other in (
        config,
        apart.model_copy(update={"languages": ("ja",)}),
        apart.model_copy(update={"languages": ("hi", "ja")}),
        config.model_copy(update={"languages": ("hi",)}),  # trained in English
    ):
        assert task.label_names(other) == tuple(names)
    write_answers(tmp_path, names, dict(zip(names, translations, strict=True)))
    assert task.label_names(apart.model_copy(update={"name": "again"})) == classes
    write_answers(tmp_path, names, dict(zip(names[1:], translations[1:], strict=True)))
    with pytest.raises(UserError, match="no translation of 'answer 0', one of 1 that are missing"):
        task.label_names(apart.model_copy(update={"name": "third"}))
    (tmp_path / "cvil/answers_hi.json").unlink()
    with pytest.raises(UserError, match="answers_hi.json: no such file; answers with one translation"):
        task.label_names(apart.model_copy(update={"name": "fourth"}))


def test_cvil_reads_the_public_files_with_kinds_of_answers(tmp_path):
    """One array, answers in a pickle of {answer: number}, no answers in the test; Hindi scores are joined."""
    folder = tmp_path / "cvil"
    folder.mkdir()
    (folder / "trainval_ans2label.pkl").write_bytes(pickle.dumps({"yes": 0, "2": 1, "up": 2, "above": 3}))
    (folder / "answers_hi.json").write_text(json.dumps(["हाँ", "2", "ऊपर", " ऊपर"]), encoding="utf-8")
    line = {"en": "where?", "hi": "कहाँ?", "ja": "どこ?", "img_id": 9, "o": "dog;cat"}
    scored = ([[0], [1.0]], [[1, 0], [0.9, 0.3]], [[3, 2, 1], [0.6, 0.3, 0.3]])
    records = [{**line, "q_id": n, "an": an, "s": s} for n, (an, s) in enumerate(scored)]
    (folder / "train2014_qla_mrcnn.json").write_text(json.dumps(records))
    (folder / "test-dev2015_qla_mrcnn.json").write_text(json.dumps([line]))
    task = TASKS["cvil_vqa"]

    def read(part, language):
        return list(task.read(task.path(tmp_path, part, language), part, language))

    assert [e.kind for e in read("train", "ja")] == ["yes/no", "number", "other"]
    assert read("train", "ja")[2].labels == {"above": 0.6, "up": 0.3, "2": 0.3}
    hindi = read("train", "hi")[2]
    assert hindi.labels == {"up": pytest.approx(0.9), "above": pytest.approx(0.9), "2": 0.3}
    assert hindi.tags == ("dog", "cat") and read("test", "en")[0].labels == {}


@pytest.mark.parametrize(
    ("answer", "kind"),
    [("yes", "yes/no"), ("no", "yes/no"), ("2", "number"), ("10:30", "number"), ("1,000", "number")]
    + [("50%", "number"), ("2 dogs", "other"), ("yes sir", "other"), ("red", "other"), (":", "other")],
)
def test_answer_types_are_those_of_vqa(answer, kind):
    assert answer_type(answer) == kind


# ---- Japanese VQA on Visual Genome


def test_ja_vqa_is_dealt_out_of_the_published_file(tmp_path):
    """59,550 : 1,984 : 37,674 of 99,208 images, each in one part; files of one's own are taken first."""
    folder, count = tmp_path / "ja_vqa", 2000
    folder.mkdir()
    records = [
        {"id": i, "qas": [{"qa_id": 2 * i + n, "question": "何が見える？", "answer": "猫"} for n in (0, 1)]}
        for i in range(count)
    ]
    with zipfile.ZipFile(folder / "question_answers.json.zip", "w") as archive:
        archive.writestr("question_answers.json", json.dumps(records))
    task = TASKS["ja_vqa"]

    def read(part):
        return list(task.read(task.path(tmp_path, part, "ja"), part, "ja"))

    images = {part: {e.images[0] for e in read(part)} for part in ("train", "dev", "test")}
    sizes = {part: len(found) for part, found in images.items()}
    assert sizes == {"train": 1201, "dev": 40, "test": 759}  # of 2,000: 1,200.5, 40.0, 759.5
    assert set.union(*images.values()) == {str(i) for i in range(count)} and sum(sizes.values()) == count
    assert len(read("train")) == 2 * 1201
    assert sum(JA_VQA_IMAGES.values()) == 99_208
    (folder / "dev.json").write_text(json.dumps(records[:3]))
    assert len(read("dev")) == 6


def test_ja_vqa_scores_are_broken_down_by_question_word():
    """By the presence of each word: a question may be of several kinds, or of none."""
    assert question_words("このどんな犬は何をどこで見ている？") == (
        "nani (what)",
        "doko (where)",
        "donna (what kind)",
    )
    lines = [
        {"id": str(i), "prediction": prediction, "labels": {"猫": 1.0}, "kind": list(question_words(text))}
        for i, (text, prediction) in enumerate(
            [("何がどこにいる？", "猫"), ("どこ？", "犬"), ("犬はいるか？", "猫"), ("いくつある？", "犬")]
        )
    ]
    found = score(lines, frozenset(["猫", "犬"]))
    assert found["accuracy"] == 0.5 and found["n"] == 4
    assert found["by_type"] == {"nani (what)": 1.0, "doko (where)": 0.5, "ikutsu (how many)": 0.0}
    assert found["n_by_type"] == {"nani (what)": 1, "doko (where)": 2, "ikutsu (how many)": 1}


# ---- settings of the model


def test_p3_dropout_and_regions_reach_the_model(tmp_path):
    """0.3 wherever states are dropped, 0.1 in attention, in the classifier's own training too; 50 regions."""
    torch.manual_seed(0)
    model = FinetuneModel(
        Oscar(TINY), ("a", "b"), 1, 0.0, TINY.features, classifier=ClassifierConfig(layers=1)
    )
    set_dropout(model.backbone, 0.3, 0.1)
    rates = {m.p for m in model.backbone.modules() if isinstance(m, torch.nn.Dropout)}
    assert rates == {0.3} and {m.dropout for m in model.modules() if isinstance(m, Attention)} == {0.1}
    HeadFirst(5, 0.5, alone=True).adapt(model)
    model.train()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"head.output.weight", "head.output.bias"}
    assert all(m.training for m in model.backbone.modules())

    unified = make_model()
    before = [m.p for m in unified.image_encoder.modules() if isinstance(m, torch.nn.Dropout)]
    set_dropout(unified, 0.3, None)
    assert [m.p for m in unified.image_encoder.modules() if isinstance(m, torch.nn.Dropout)] == before
    assert unified.embedding.dropout.p == 0.3

    regions = [
        Regions(np.full((n, 2), n, np.float32), np.tile([0.0, 0, 1, 1], (n, 1)), 2.0, 2.0, ("dog",) * n)
        for n in (70, 3)
    ]
    read = join_regions(regions, True, RECIPES["p3_kd"]().max_regions)
    assert read["regions"].lengths.tolist() == [50, 3] and len(read["regions"].values) == 53
    assert join_regions(regions)["regions"].lengths.tolist() == [70, 3]


@pytest.mark.parametrize(
    ("assignments", "expected"),
    [
        ([], ("paper", 0)),
        (["strategies.distillation.normalise=public"], ("public", 50)),
        (["strategies.distillation.follow=code"], ("public", 50)),
        (["strategies.distillation.follow=code", "strategies.distillation.slots=36"], ("public", 36)),
    ],
)
def test_distillation_follow_sets_visible_defaults(assignments, expected):
    config = override(RECIPES["p3_kd"](), assignments).strategies.distillation
    assert (config.normalise, config.slots) == expected


def test_distillation_rate_needs_a_training_of_its_own():
    with pytest.raises(UserError, match="lr is of a training of its own; set epochs"):
        override(RECIPES["p3_kd"](), ["strategies.distillation.lr=0.1"])
