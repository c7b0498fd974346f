"""Dictionaries, WordNet, word vectors: against slow references, examples worked by hand, and broken files."""

import json
import math
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from finetune.strategies.code_mixing import Dictionary, mix_text, open_dictionaries, read_dictionary
from finetune.strategies.label_distances import vector_distances, wordnet_distances
from finetune.strategies.prior import linguistic_prior
from finetune.strategies.word_vectors import label_vectors, read_vectors
from finetune.strategies.wordnet import FILES, HYPERNYM, HYPONYM, NONE, SYNONYM, WordNet, confusions
from raylib.errors import UserError
from raylib.randomness import uniform
from raylib.sample.scenes.labels import DATA, read_labels

LABELS = ("no", "yes", *read_labels())
WORDNET, VECTORS = DATA / "wordnet", DATA / "vectors.txt"


@pytest.fixture(scope="module")
def wordnet():
    return WordNet(WORDNET)


# ---- WordNet


@pytest.mark.parametrize(
    ("truth", "predicted", "relation"),
    [
        ("purse", "handbag", SYNONYM),
        ("handbag", "purse", SYNONYM),
        ("zebras", "zebra", SYNONYM),  # paper 0 counts both right
        ("zebra", "zebras", SYNONYM),
        ("Zebra", "zEBRA", SYNONYM),
        ("clutch bag", "handbag", HYPERNYM),  # two words
        ("PURSE", "clutch bags", HYPONYM),
        ("guide dog", "dog", NONE),  # a working dog is between them
        ("dog", "poodle", HYPONYM),
        ("poodle", "dog", HYPERNYM),
        ("cat", "guitar", NONE),
        ("glorp", "glorp", SYNONYM),  # unknown, but itself
        ("glorp", "dog", NONE),
    ],
)
def test_relations_equal_worked_example(wordnet, truth, predicted, relation):
    assert wordnet.relation(truth, predicted) == relation


def test_wordnet_relatives_equal_nltk_over_all_pairs(wordnet):
    """The paper's definition, with NLTK's own objects: names of lemmas, in both directions, of all pairs one
    by one."""
    reader = wordnet._reader
    names = [*LABELS, "zebras", "Dog", "glorp", "cats"]

    def synsets(name):
        return reader.synsets(name.replace(" ", "_")) or reader.synsets(name.replace(" ", "-"))

    def lemmas(found):
        return {lemma.replace("_", " ").lower() for synset in found for lemma in synset.lemma_names()}

    def bases(name):  # what a label is called in WordNet: itself, and what it may be an inflected form of
        return {
            name.lower(),
            *(form.replace("_", " ") for form in reader._morphy(name.lower().replace(" ", "_"), "n")),
        }

    relatives = wordnet.relatives(names)
    for i, true in enumerate(names):
        own = synsets(true)
        above = [h for s in own for h in s.hypernyms()]
        below = [h for s in own for h in s.hyponyms()]
        for j, other in enumerate(names):
            if i == j:
                continue
            named = bases(other)
            expected = NONE
            for relation, found in ((SYNONYM, own), (HYPERNYM, above), (HYPONYM, below)):
                if expected == NONE and (
                    named & lemmas(found) or (relation == SYNONYM and true.lower() == other.lower())
                ):
                    expected = relation
            got = SYNONYM if j in relatives.synonyms[i] else HYPERNYM if j in relatives.hypernyms[i] else NONE
            got = HYPONYM if j in relatives.hyponyms[i] else got
            assert got == wordnet.relation(true, other)
            assert got == expected, (true, other)


def test_wordnet_lookup_tries_underscores_then_hyphens(tmp_path):
    """A WordNet whose one noun is "t-shirt"."""
    folder = tmp_path / "wordnet"
    shutil.copytree(WORDNET, folder)
    header = "".join(line for line in (folder / "data.noun").open(encoding="utf-8") if line.startswith(" "))
    (folder / "data.noun").write_text(
        f"{header}{len(header):08d} 06 n 02 T-shirt 0 jersey 0 000 | a shirt  \n"
    )
    (folder / "index.noun").write_text(
        "".join(f"{word} n 1 0 1 0 {len(header):08d}  \n" for word in ("jersey", "t-shirt"))
    )
    wordnet = WordNet(folder)
    assert wordnet.relation("t shirt", "jersey") == wordnet.relation("jersey", "T-Shirt") == SYNONYM


@pytest.mark.parametrize("name", FILES)
def test_wordnet_missing_file_is_named(tmp_path, name):
    folder = tmp_path / "wordnet"
    shutil.copytree(WORDNET, folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"'{name}' is missing"):
        WordNet(folder)


def test_wordnet_other_data_is_refused(tmp_path):
    for name in FILES:
        (tmp_path / name).write_text("hello\n")
    with pytest.raises(UserError, match="not WordNet's files"):
        WordNet(tmp_path)


def test_wordnet_with_other_line_endings_is_read(tmp_path):
    shutil.copytree(WORDNET, tmp_path / "wordnet")
    data = tmp_path / "wordnet/data.noun"
    data.write_bytes(data.read_bytes().replace(b"\n", b"\r\n"))
    with (
        pytest.raises(UserError, match="'dog' leads nowhere"),
        pytest.warns(UserWarning, match="No WordNet synset"),
    ):
        WordNet(tmp_path / "wordnet").relation("dog", "cat")


def test_wordnet_without_nltk_names_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(UserError, match="pip install nltk"):
        WordNet(WORDNET)


# ---- the WordNet and the vectors that the scenes ship


def test_wordnet_shipped_copy_is_consistent(wordnet):
    """Every line lies where its offset says, every pointer leads to a line, everything is below "entity"."""
    data = (WORDNET / "data.noun").read_bytes()
    reader, count = wordnet._reader, 0
    for synset in reader.all_synsets():
        count += 1
        assert data[synset.offset() :].startswith(b"%08d" % synset.offset())
        assert {path[0].name() for path in synset.hypernym_paths()} == {"entity.n.01"}
        assert all(synset in lemma_synsets for lemma_synsets in map(reader.synsets, synset.lemma_names()))
        assert all(synset in other.hyponyms() for other in synset.hypernyms())
        assert all(synset in other.hypernyms() for other in synset.hyponyms())
    assert count == sum(not line.startswith(b" ") for line in data.splitlines()) > 300
    assert sum(path.stat().st_size for path in WORDNET.iterdir()) < 300_000
    assert "Princeton University" in (WORDNET / "data.noun").read_text(encoding="utf-8")


def test_wordnet_shipped_copy_agrees_with_relations(wordnet, scenes):
    """All relations among the labels are those of `relations.json`, but that WordNet calls a big cat "cat"
    too."""
    relations = json.loads((scenes / "relations.json").read_text(encoding="utf-8"))
    expected = {
        (name, other): SYNONYM for name, record in relations.items() for other in (name, *record["synonyms"])
    }
    above = [(name, other) for name, record in relations.items() for other in record["hypernyms"]]
    above += [("tiger", "cat"), ("lion", "cat"), ("leopard", "cat")]
    expected |= {pair: HYPERNYM for pair in above} | {pair[::-1]: HYPONYM for pair in above}
    found = {(a, b): wordnet.relation(a, b) for a in relations for b in relations}
    assert {pair: relation for pair, relation in found.items() if relation != NONE} == expected
    assert wordnet.synsets("yes") and wordnet.synsets("no") and wordnet.relation("yes", "no") == NONE


def test_scenes_ship_wordnet_and_vectors(scenes):
    for name in ("vectors.txt", *(f"wordnet/{name}" for name in FILES)):
        assert (scenes / name).read_bytes() == (DATA / name).read_bytes()
    assert WordNet(scenes / "wordnet").relation("poodle", "dog") == HYPERNYM
    assert VECTORS.stat().st_size < 150_000


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


def test_vectors_bad_files_are_one_line_errors(tmp_path):
    def refuses(data: bytes, message: str, name: str = "v.txt"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=message):
            label_vectors(tmp_path / name, ["dog"])

    refuses(b"", "first line is neither")
    refuses(b"Once upon a time\n", "first line is neither")
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
    with pytest.raises(UserError, match="damaged.*delete it"):
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


# ---- dictionaries


def test_muse_dictionary_lines_are_read(tmp_path):
    path = tmp_path / "de2.txt"
    path.write_text(
        "\ufeffDog Hund\ncat\tKatze\ncat\tKater\r\ncat Katze\npolar bear\tEisbär\nglass\tGlas\tein Glas\n"
        "is es ist\n  owl \t  Eule  \nPOLAR  BEAR CUB\tEisbärjunges\n" + "x y\n" * 5,
        encoding="utf-8",
    )
    read = read_dictionary(path, "de")
    assert read.entries == {
        "dog": ("Hund",),
        "cat": ("Katze", "Kater"),
        "polar bear": ("Eisbär",),
        "glass": ("Glas", "ein Glas"),
        "is": ("es ist",),
        "owl": ("Eule",),
        "polar bear cub": ("Eisbärjunges",),
        "x": ("y",),
    }
    assert (read.max_words, read.num_lines, read.num_odd) == (3, 14, 0)


def test_dictionary_malformed_lines_are_counted_then_refused(tmp_path):
    odd = [b"alone\n", b"\n", b"caf\xe9 Kaffee\n", b"word\t\n", b"\tWort\n"]
    good = [b"dog Hund\n"] * 45
    (tmp_path / "de2.txt").write_bytes(b"".join(good[:3] + odd + good[3:]))
    read, report = open_dictionaries(tmp_path, ["de"])
    assert (read["de"].num_odd, read["de"].num_lines, list(read["de"].entries)) == (5, 50, ["dog"])
    assert report == "English words with translations: de 1; 5 of 50 lines left out"
    (tmp_path / "de2.txt").write_bytes(b"".join(good[:3] + odd + good[4:]))
    with pytest.raises(UserError, match=r"de2\.txt: line 4 is the first of 5 \(of 49\)"):
        open_dictionaries(tmp_path, ["de"])
    (tmp_path / "fr2.txt").write_bytes(b"")
    with pytest.raises(UserError, match="fr2.txt: not one line is"):
        read_dictionary(tmp_path / "fr2.txt", "fr")


def test_dictionary_missing_language_lists_available_ones(tmp_path):
    (tmp_path / "de2.txt").write_text("dog Hund\n")
    (tmp_path / "en-ru.txt").write_text("dog собака\n")
    assert set(open_dictionaries(tmp_path, ["ru", "de"])[0]) == {"de", "ru"}
    with pytest.raises(UserError, match=r"no dictionary 'ko2\.txt'; there are: de, ru"):
        open_dictionaries(tmp_path, ["de", "ko"])
    with pytest.raises(UserError, match="there are: none"):
        open_dictionaries(tmp_path / "nowhere", ["ko"])
    with pytest.raises(UserError, match="no language"):
        open_dictionaries(tmp_path, [])


def test_dictionaries_of_scenes_cover_labels(scenes):
    opened, _ = open_dictionaries(scenes / "dictionaries", ["de", "zh"])
    assert opened["de"].num_odd == 0 and opened["de"].max_words > 1
    assert opened["de"].entries["guide dog"] == ("Blindenhund",) and opened["zh"].entries["dog"] == ("狗",)


# ---- code-mixing


def dictionary(language, **entries):
    entries = {source.replace("_", " "): found for source, found in entries.items()}
    return Dictionary(language, entries, max(source.count(" ") + 1 for source in entries), len(entries), 0)


DE = dictionary("de", dog=("Hund",), polar_bear=("Eisbär",), bear=("Bär",), the=("der", "die", "das"))
RU = dictionary("ru", dog=("собака",))


def always(text, dictionaries, *keys):
    return mix_text(text, dictionaries, 1.0, 1.0, *(keys or (0,)))


@pytest.mark.parametrize(
    ("text", "mixed"),
    [
        ("A Dog?", "A Hund?"),
        ("“DOG”, dog's (dog)...", "“Hund”, dog's (Hund)..."),
        ("polar bear, bear", "Eisbär, Bär"),  # the longest match first
        ("“Polar  Bear”?", "“Eisbär”?"),
        ("polar, bear", "polar, Bär"),
        ("polar (bear)", "polar (Bär)"),
        ("a polar", "a polar"),
        ("- ? dog", "- ? Hund"),
        ("", ""),
        (" ", " "),
    ],
)
def test_code_mixing_equals_worked_example(text, mixed):
    assert always(text, {"de": DE}) == mixed


def test_code_mixing_draws_language_before_lookup():
    """Half of the bears stay although German has them: Russian was drawn, and lacks them."""
    texts = Counter(always("dog bear", {"de": DE, "ru": RU}, 5, i) for i in range(4000))
    assert set(texts) == {"Hund Bär", "Hund bear", "собака Bär", "собака bear"}
    assert all(abs(count - 1000) < 120 for count in texts.values())


def test_code_mixing_shares_match_settings():
    words, n = "the dog the polar bear sleeps", 3000
    mixed = [mix_text(words, {"de": DE}, 0.5, 0.6, 7, 0, f"item{i}") for i in range(n)]
    touched = [text for text in mixed if text != words]
    assert len(touched) / n == pytest.approx(0.5 * (1 - 0.4**4), abs=0.03)
    assert sum("Eisbär" in text for text in mixed) / n == pytest.approx(
        0.3, abs=0.03
    )  # an entry of two words is one word
    assert not any("polar Bär" in text for text in mixed)
    articles = Counter(text.split()[0] for text in touched)
    assert all(articles[article] / n == pytest.approx(0.1, abs=0.02) for article in ("der", "die", "das"))
    assert mix_text(words, {"de": DE}, 0.0, 1.0, 7) == mix_text(words, {"de": DE}, 1.0, 0.0, 7) == words


def test_code_mixing_equals_slow_reference():
    """Word by word, each draw by itself."""
    both = {"ru": RU, "de": DE}
    text = "Is the dog near the polar bear?"
    for item in range(50):
        words, expected, i = text.split(), [], 0
        while i < len(words):
            language = ["de", "ru"][int(uniform(1, 2, item, 2, i) * 2)]
            replaced = uniform(1, 2, item, 1, i) < 0.7
            for count in (2, 1):
                key = " ".join(words[i : i + count]).lower().rstrip("?")
                found = both[language].entries.get(key) if len(words) - i >= count else None
                if found:
                    break
            if found and replaced:
                tail = "?" if words[i + count - 1].endswith("?") else ""
                expected.append(found[int(uniform(1, 2, item, 3, i) * len(found))] + tail)
            else:
                expected += words[i : i + count]
            i += count
        assert mix_text(text, both, 1.0, 0.7, 1, 2, item) == " ".join(expected)


def test_code_mixing_differs_by_epoch_and_agrees_across_processes():
    text = "the dog the dog the dog the dog"
    keys = [(0, epoch, "item7") for epoch in range(6)]
    mixed = [mix_text(text, {"ru": RU, "de": DE}, 1.0, 0.9, *key) for key in keys]
    assert len(set(mixed)) == 6
    assert mixed == [
        mix_text(text, {"de": DE, "ru": RU}, 1.0, 0.9, *key) for key in keys
    ]  # in any order of the languages
    code = (
        "from tests.test_lexicon import *; "
        "print(mix_text('the dog the dog the dog the dog', {'de': DE}, 1.0, 0.9, 0, 1, 'item7'))"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert other == mix_text(text, {"de": DE}, 1.0, 0.9, 0, 1, "item7")


# ---- confusions


def predictions(*pairs):
    for i, (answers, predicted) in enumerate(pairs):
        answers = answers if isinstance(answers, dict) else {answers: 1.0}
        yield {"id": str(i), "prediction": predicted, "labels": answers, "kind": ""}


def test_confusions_equal_worked_example(wordnet):
    found = confusions(
        predictions(
            *[("dog", "dog")] * 4,
            *[("purse", "handbag")] * 2,
            *[("dog", "poodle")] * 3,
            ("poodle", "dog"),
            *[("cat", "guitar")] * 4,
            ("yes", "no"),
            ("zebra", "zebras"),
            ({}, "dog"),
            ({"purse": 0.3, "dog": 0.6}, "handbag"),
            ({"purse": 0.3, "handbag": 1.0}, "purse"),
            ({"purse": 0.9, "handbag": 0.6}, "handbag"),
        ),
        wordnet,
    )
    assert found["n"] == 19
    assert found["accuracy"] == pytest.approx((4 + 0.3 + 0.6) / 19, abs=1e-6)
    assert found["accuracy_with_synonyms"] == pytest.approx((4 + 2 + 1 + 0.3 + 1.0 + 0.9) / 19, abs=1e-6)
    assert found["wrong"] == {"hpo": 3, "hyp": 1, "none": 6, "syn": 3}
    assert [(p["label"], p["prediction"], p["relation"], p["count"]) for p in found["confused"]] == [
        ("cat", "guitar", "none", 4),
        ("dog", "poodle", "hpo", 3),
        ("purse", "handbag", "syn", 2),
        ("dog", "handbag", "none", 1),
        ("poodle", "dog", "hyp", 1),
    ]
    assert [p["label"] for p in found["confused_related"]] == ["dog", "purse", "poodle", "zebra"]


def test_confusions_of_empty_input_are_zero(wordnet):
    assert confusions([], wordnet) == {
        "n": 0,
        "accuracy": 0.0,
        "accuracy_with_synonyms": 0.0,
        "wrong": {},
        "confused": [],
        "confused_related": [],
    }
