"""Paper 3 (cViL) against its public code, kshitij98/cViL, and its data sets' published forms."""

import math

import pytest
import tokenizers
import torch

from finetune.batches import encode_inputs
from finetune.formats import Example
from finetune.strategies.distillation.pairs import RowTokenizer, TeacherInputs, pair_distance, pair_weight
from raylib.packed import Ragged
from raylib.text import Tokenizer

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
