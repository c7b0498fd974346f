"""Word vectors, distances of labels and the linguistic prior on them, against slow references."""

import math
import shutil

import numpy as np
import pytest
import torch

from finetune.strategies.lexical import HYPERNYM, HYPONYM, NONE, SYNONYM, WordNet, label_vectors, read_vectors
from finetune.strategies.prior import linguistic_prior, vector_distances, wordnet_distances
from raylib.errors import UserError
from raylib.sample.scenes import DATA, read_labels

LABELS = ("no", "yes", *read_labels())
WORDNET, VECTORS = DATA / "wordnet", DATA / "vectors.txt"


@pytest.fixture(scope="module")
def wordnet():
    return WordNet(WORDNET)


# ---- vectors


ROWS = {
    "the": [0.5, -1.0, 2.0],
    "dog": [1.0, 0.25, -0.125],
    "New York": [9.0, 9.0, 9.0],
    "Hund": [0.0, 1.0, 0.0],
}


def text_lines(rows):
    return "".join(f"{word} {' '.join(map(str, row))}\n" for word, row in rows.items())


def write_vectors(folder, kind):
    path = folder / f"vectors.{kind}"
    if kind == "glove":
        path.write_text(text_lines(ROWS))
    elif kind == "text":  # the C tool ends its lines with a space
        path.write_text(f"{len(ROWS)} 3\n" + text_lines(ROWS).replace("\n", " \n"))
    elif kind in ("binary", "binary_lines"):  # the C tool puts a line end after each vector, gensim none
        end = b"\n" if kind == "binary_lines" else b""
        rows = {word.replace(" ", "_"): row for word, row in ROWS.items()}
        path.write_bytes(
            b"4 3\n"
            + b"".join(w.encode() + b" " + np.array(r, "<f4").tobytes() + end for w, r in rows.items())
        )
    else:
        np.save(path.with_suffix(".npy"), np.array(list(ROWS.values()), np.float32))
        path.with_suffix(".txt").write_text("".join(f"{word}\n" for word in ROWS))
        path = path.with_suffix(".npy")
    return path


@pytest.mark.parametrize("kind", ["glove", "text", "binary", "binary_lines", "npy"])
def test_vectors_formats_read_the_same(tmp_path, kind):
    path = write_vectors(tmp_path, kind)
    found = read_vectors(path, ["dog", "the", "York", "New", "glorp", "4"])
    assert {word: row.tolist() for word, row in found.items()} == {"the": ROWS["the"], "dog": ROWS["dog"]}
    assert all(row.dtype == np.float32 for row in found.values())
    rows, unknown = label_vectors(path, ["The dog", "glorp", "Hund_dog", "dog glorp"])
    assert np.allclose(
        rows, [[0.75, -0.375, 0.9375], [0, 0, 0], [0.5, 0.625, -0.0625], [1, 0.25, -0.125]]
    ) and unknown == [1]


@pytest.mark.parametrize("first", [b"the 1\n", b"\n", b"the the 1 2 3\n", b"\xef\xbb\xbfa 9 9 9\n"])
def test_vectors_broken_first_line_does_not_decide_their_width(tmp_path, first):
    (tmp_path / "v.txt").write_bytes(first + b"dog 1 2 3\ncat 4 5 6\n")
    assert read_vectors(tmp_path / "v.txt", ["dog", "cat"])["dog"].tolist() == [1, 2, 3]


def test_vectors_bad_files_are_one_line_errors(tmp_path):
    def refuses(data: bytes, message: str, name: str = "v.txt"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=message):
            label_vectors(tmp_path / name, ["dog"])

    refuses(b"", "it begins neither")
    refuses(b"Once upon a time\n", "it begins neither")
    refuses(b"the 1 2 3\ndog 1 2", "line 2: 'dog' is not followed by 3 numbers")
    refuses(b"the 1 2 3\ndog 1 2 x\n", "line 2: 'dog' is not followed by 3 numbers")
    refuses(b"2 3\nthe " + bytes(12) + b"dog " + bytes(11), "ends in the 2. of 2")
    refuses(b"the 1 2 3\n", "a vector for none of the 1 labels")
    refuses(b"junk", "no such file", "w.npy")
    (tmp_path / "v.txt").write_text("one\ntwo\n")
    refuses(b"junk", "not an array", "v.npy")
    np.save(tmp_path / "v.npy", np.zeros((3, 2)))
    with pytest.raises(UserError, match="with 2 words"):
        label_vectors(tmp_path / "v.npy", ["dog"])
    with pytest.raises(UserError, match="no such file"):
        label_vectors(tmp_path / "nothing.txt", ["dog"])


# ---- distances


def test_wordnet_distances_agree_with_relations(wordnet):
    names = (*LABELS, "glorp", "zebras")
    distance, report = wordnet_distances(names, WORDNET, 0.3, 0.6)
    value = {SYNONYM: 0.0, HYPONYM: 0.3, HYPERNYM: 0.6, NONE: 1.0}
    expected = [[value[wordnet.relation(true, predicted)] for true in names] for predicted in names]
    assert torch.equal(distance, torch.tensor(expected)) and distance.dtype == torch.float32
    assert report.unknown == ("glorp",) and str(report) == f"1 of {len(names)} labels have no synset: glorp"
    dog, poodle = names.index("dog"), names.index("poodle")
    assert distance[poodle, dog] == np.float32(0.3)  # poodle predicted, a hyponym of the true dog: d1
    assert distance[dog, poodle] == np.float32(0.6)  # dog predicted, a hypernym of the true poodle: d2


def test_vector_distances_equal_slow_loop(tmp_path):
    path = write_vectors(tmp_path, "glove")
    path.write_text(path.read_text() + "anti -1 -0.25 0.125\n")
    names = ["dog", "the dog", "glorp", "anti", "the", "glarp"]
    distance, report = vector_distances(names, path)
    rows = {"dog": ROWS["dog"], "the": ROWS["the"], "anti": [-1, -0.25, 0.125]}
    for i, one in enumerate(names):
        for j, other in enumerate(names):
            if i == j or "glorp" in (one, other) or "glarp" in (one, other):
                expected = float(i != j)
            else:
                a, b = (np.mean([rows[word] for word in name.split()], 0) for name in (one, other))
                expected = 1 - float(np.dot(a, b)) / math.dist(a, [0] * 3) / math.dist(b, [0] * 3)
            assert float(distance[i, j]) == pytest.approx(expected, abs=1e-6)
    assert distance[0, 3] == 2 and torch.equal(distance, distance.T) and distance.min() == 0
    assert str(report) == "2 of 6 labels have no vector: glorp, glarp"


def test_distances_are_cached_until_inputs_change(tmp_path):
    cache, folder = tmp_path / "cache", tmp_path / "wordnet"
    shutil.copytree(WORDNET, folder)
    first, report = wordnet_distances(LABELS, folder, 0.8, 0.7, cache)
    (file,) = cache.iterdir()
    written = file.stat().st_mtime_ns
    again, same = wordnet_distances(LABELS, folder, 0.8, 0.7, cache)
    assert torch.equal(first, again) and report == same and file.stat().st_mtime_ns == written
    wordnet_distances(LABELS[::-1], folder, 0.8, 0.7, cache)
    wordnet_distances(LABELS, folder, 0.7, 0.8, cache)
    assert len(list(cache.iterdir())) == 3
    with (folder / "noun.exc").open("a") as exceptions:
        exceptions.write("dawgs dog\n")
    wordnet_distances(LABELS, folder, 0.8, 0.7, cache)
    assert len(list(cache.iterdir())) == 4
    vectors = tmp_path / "vectors.txt"
    shutil.copy(VECTORS, vectors)
    one, _ = vector_distances(("dog", "glorp", "cat"), vectors, cache)
    two, report = vector_distances(("dog", "glorp", "cat"), vectors, cache)
    assert torch.equal(one, two) and report.unknown == ("glorp",) and len(list(cache.iterdir())) == 5
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="not to be read as distances of labels.*delete it"):
        wordnet_distances(LABELS, WORDNET, 0.8, 0.7, cache)


def test_distances_bad_settings_are_one_line_errors(tmp_path):
    with pytest.raises(UserError, match="between 0 and 1"):
        wordnet_distances(("dog", "cat"), WORDNET, 0.0, 0.8)
    with pytest.raises(UserError, match="'dog' comes twice"):
        vector_distances(("dog", "cat", "dog"), VECTORS)
    with pytest.raises(UserError, match="'lexnames' is missing"):
        wordnet_distances(("dog", "cat"), tmp_path, 0.8, 0.8, tmp_path)


# ---- the loss


def slow_prior(logits, answer, distance, k):
    losses = []
    for row, true in zip(logits, answer.tolist(), strict=True):
        p = row.exp() / row.exp().sum()
        best = sorted(range(len(row)), key=lambda c: -p[c].item())[:k]
        losses.append(sum(p[c] * distance[c, true] for c in best))
    return torch.stack(losses)


@pytest.mark.parametrize("k", [1, 3, 7, 10])
def test_linguistic_prior_equals_slow_loop(k):
    torch.manual_seed(0)
    logits = torch.randn(5, 7, dtype=torch.float64).requires_grad_()
    answer, distance = torch.tensor([0, 6, 3, 3, 1]), torch.rand(7, 7, dtype=torch.float64) * 2
    fast, slow = linguistic_prior(logits, answer, distance, k), slow_prior(logits, answer, distance, k)
    assert torch.allclose(fast, slow)
    gradients = [torch.autograd.grad(loss.sum(), logits, retain_graph=True)[0] for loss in (fast, slow)]
    assert torch.allclose(*gradients)
    assert torch.autograd.gradcheck(lambda x: linguistic_prior(x, answer, distance, k), logits)


def test_linguistic_prior_equals_worked_example():
    """p = (1/2, 1/4, 1/8, 1/8); the two most probable labels are 0 and 1: not made to sum to 1, predicted
    label first."""
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()[None]
    distance = torch.tensor([[0, 0.8, 1, 1], [0.4, 0, 1, 1], [1, 1, 0, 1], [1, 1, 1, 0]])
    assert linguistic_prior(logits, torch.tensor([0]), distance, 2).item() == pytest.approx(0.25 * 0.4)
    assert linguistic_prior(logits, torch.tensor([1]), distance, 2).item() == pytest.approx(0.5 * 0.8)
    assert linguistic_prior(logits, torch.tensor([3]), distance, 4).item() == pytest.approx(0.875)
    with torch.autocast("cpu", torch.bfloat16):
        assert linguistic_prior(logits.bfloat16(), torch.tensor([1]), distance, 2).dtype == torch.float32
