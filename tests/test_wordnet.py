"""WordNet: relations of labels, the copy that the scenes ship, confusions by relation; against NLTK's own
objects and examples worked by hand."""

import json
import shutil
import sys

import pytest

from finetune.predict import confusions
from finetune.strategies.lexical import FILES, HYPERNYM, HYPONYM, NONE, SYNONYM, WordNet
from raylib.errors import UserError
from raylib.sample.scenes import DATA, read_labels

LABELS = ("no", "yes", *read_labels())
WORDNET, VECTORS = DATA / "wordnet", DATA / "vectors.txt"


@pytest.fixture(scope="module")
def wordnet():
    return WordNet(WORDNET)


# ---- WordNet


def test_lemma_relatives_equal_the_loops_of_paper_0s_code(wordnet):
    """Its extract_wn_rel.py, pair by pair: spelling of lemmas as they stand, synonyms first, then hypernyms.
    With WordNet 3.0 and GQA's 1,842 answers all 3,392,964 cells equal its file's, and 2,764 differ from the
    paper's."""
    reader = wordnet._reader
    names = [*LABELS, "zebras", "Dog", "glorp", "clutch bags", "domestic dog"]

    def lemmas(synsets):
        return {lemma for synset in synsets for lemma in synset.lemma_names()}

    relatives, count = wordnet.lemma_relatives(names), 0
    for i, label in enumerate(names):
        synsets = reader.synsets(label.replace(" ", "_")) or reader.synsets(label.replace(" ", "-"))
        synonyms = lemmas(synsets)
        above = lemmas(h for synset in synsets for h in synset.hypernyms())
        below = lemmas(h for synset in synsets for h in synset.hyponyms())
        for j, other in enumerate(names):
            groups = (synonyms, above, below)
            held = [k for k in range(3) if i != j and other in groups[k]]
            relation = held[0] if held else None
            assert [j in group[i] for group in relatives] == [relation == k for k in range(3)], (label, other)
            count += relation is not None
    assert count == 38
    # words of a lemma are one word there
    assert all(" " not in names[j] for group in relatives for related in group for j in related)
    # and not symmetric: zebras knows zebra, which does not know zebras
    zebra, zebras = names.index("zebra"), names.index("zebras")
    assert zebra in relatives.synonyms[zebras] and zebras not in relatives.synonyms[zebra]


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
    with pytest.raises(UserError, match="not to be read as WordNet's files"):
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
