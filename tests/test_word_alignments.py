"""Words that translate each other: Pharaoh files, contextual code-mixing, awesome-align against slow loops,
whole runs."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from finetune.strategies.distillation.__main__ import main as align_main
from finetune.strategies.distillation.word_alignments import (
    WordAligner,
    align_subwords,
    locate_words,
    mix_aligned,
    one_to_one_links,
    parse_links,
    read_alignments,
)
from raylib.errors import UserError
from raylib.monitoring import read_metrics
from raylib.sample import DATA
from raylib.text import Tokenizer
from raylib.words import split_words
from tests.test_distillation import wordpiece  # noqa: F401
from tests.test_distillation_run import distil, parallel, teacher  # noqa: F401


def ours() -> Tokenizer:
    return Tokenizer.load(DATA / "tokenizer.model")


def test_pharaoh_links_are_read():
    assert (
        parse_links("0-0 2-1  1-2", 3, 3, "f:1") == [(0, 0), (2, 1), (1, 2)]
        and parse_links("", 3, 3, "f:1") == []
    )
    for line, words in (
        ("0-3", "f:1: link 0-3 is out of range: there are 2 words and 3 English ones"),
        ("2-0", "f:1: link 2-0 is out of range"),
        ("0:1", "f:1: '0:1' is no link of two words, such as 0-1"),
        ("-1-0", "f:1: '-1-0' is no link"),
        ("1-", "f:1: '1-' is no link"),
    ):
        with pytest.raises(UserError, match=words):
            parse_links(line, 2, 3, "f:1")
    assert one_to_one_links([(0, 0), (1, 1), (1, 2), (2, 3), (3, 3), (4, 4), (4, 4)]) == [(0, 0), (4, 4)]


def test_word_spans_lie_in_their_text():
    assert locate_words(["was", "ist", "das", "?"], "was  ist das?", "f:1") == [
        (0, 3),
        (5, 8),
        (9, 12),
        (12, 13),
    ]
    assert locate_words(["これ", "は", "犬", "です", "か"], "これは犬ですか", "f:1") == [
        (0, 2),
        (2, 3),
        (3, 4),
        (4, 6),
        (6, 7),
    ]
    with pytest.raises(
        UserError, match="f:1: the words 'was das' are not those of the example, 'was ist das'"
    ):
        locate_words(["was", "das"], "was ist das", "f:1")


def test_words_are_split_in_any_language():
    assert split_words("What's the dog doing?") == ["What", "'", "s", "the", "dog", "doing", "?"]
    assert split_words("यह कुत्ता है।") == ["यह", "कुत्ता", "है", "।"]  # marks stay with their letters
    assert split_words("这是dog吗?") == ["这", "是", "dog", "吗", "?"]
    assert split_words("これは犬") == list("これは犬") and split_words("  ") == []


def write(folder, text, align, language="de"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{language}.text").write_text(text, encoding="utf-8")
    (folder / f"{language}.align").write_text(align, encoding="utf-8")
    return folder


EXAMPLES = [("1", "was macht der Hund?", "what does the dog do?"), ("2", "ein Ball", "a ball")]
TEXT = "was macht der Hund ? ||| what does the dog do ?\nein Ball ||| a ball\n"


def test_alignment_file_links_are_one_word_to_one(tmp_path):
    """One word to one; the English one is cut into the same sub-words by both tokenizers."""
    folder = write(tmp_path, TEXT, "0-0 1-1 1-4 2-2 3-3 4-5\n\n")
    found = read_alignments(folder, "de", EXAMPLES, (ours(), ours()))
    assert found["2", "ein Ball"] == ()
    links = found["1", "was macht der Hund?"]
    assert links == (((0, 3), (0, 4)), ((10, 13), (10, 13)), ((14, 18), (14, 17)), ((18, 19), (20, 21)))


def test_alignment_words_tokenized_differently_are_omitted(tmp_path, wordpiece):  # noqa: F811
    folder = write(tmp_path, TEXT, "0-0 2-2 3-3\n0-0 1-1\n")
    found = read_alignments(folder, "de", EXAMPLES, (wordpiece, wordpiece))
    assert len(found["1", "was macht der Hund?"]) == 3
    mixed = read_alignments(folder, "de", EXAMPLES, (ours(), wordpiece))
    for (key, text), links in mixed.items():
        english = next(e for k, t, e in EXAMPLES if (k, t) == (key, text))
        for _, (first, end) in links:
            cut = [t.pieces(t.encode([english[first:end]])[0]) for t in (ours(), wordpiece)]
            assert cut[0] == cut[1]
    assert sum(map(len, mixed.values())) < sum(map(len, found.values()))


@pytest.mark.parametrize(
    ("text", "align", "words"),
    [
        (TEXT, "0-0\n", "de.align: 1 lines for 2 training examples in 'de'"),
        (TEXT, "0-0\n0-7\n", "de.align:2: link 0-7 is out of range: there are 2 words and 2 English ones"),
        (TEXT, "0-0\nx\n", "de.align:2: 'x' is no link of two words"),
        ("a b\n", "\n", "de.text: 1 lines for 2"),
        (
            TEXT.replace(" ||| a ball", " a ball"),
            "0-0\n\n",
            r"de.text:2: expected words \|\|\| English words",
        ),
        (
            TEXT.replace("Ball", "Boll"),
            "0-0\n\n",
            "de.text:2: the words 'ein Boll' are not those of the example, 'ein Ball'",
        ),
    ],
)
def test_alignment_files_that_do_not_fit_are_named(tmp_path, text, align, words):
    with pytest.raises(UserError, match=words) as e:
        read_alignments(write(tmp_path, text, align), "de", EXAMPLES, (ours(), ours()))
    assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="ru.text: no such file; word alignments are made with"):
        read_alignments(tmp_path, "ru", EXAMPLES, (ours(), ours()))


LINKS = (((0, 3), (0, 4)), ((10, 13), (10, 13)), ((14, 18), (14, 17)))


def test_contextual_code_mixing_replaces_words_in_place():
    text, english = EXAMPLES[0][1:]
    assert mix_aligned(text, english, LINKS, 1.0, 0)[0] == "what macht the dog ?"
    seen = set()
    for epoch in range(30):
        mixed, aligned = mix_aligned(text, english, LINKS, 0.15, 0, epoch, "1")
        assert len(aligned) == 1  # 15 % of four words, but at least one
        for (first, end), (start, stop) in aligned:
            assert mixed[first:end] == english[start:stop] in ("what", "the", "dog")
        assert mix_aligned(text, english, LINKS, 0.15, 0, epoch, "1") == (mixed, aligned)
        seen.add(mixed)
    assert seen == {"what macht der Hund?", "was macht the Hund?", "was macht der dog ?"}
    assert len(mix_aligned(text, english, LINKS, 0.5, 0)[1]) == 2
    # where no spaces are written, the English word gets some, so that it is cut by itself
    mixed, aligned = mix_aligned("これは犬ですか", "is this a dog", (((3, 4), (10, 13)),), 0.15, 0)
    assert mixed == "これは dog ですか" and aligned == (((4, 7), (10, 13)),)


def test_contextual_code_mixing_counts_the_words_of_a_text_without_spaces():
    """A share of the segmenter's words, not of the one that stands between spaces."""
    text, english = "テーブルの上に犬と猫と鳥がいますか", "are there a dog a cat and a bird on the table"
    names = [("テーブル", "table"), ("上", "on"), ("犬", "dog"), ("猫", "cat"), ("鳥", "bird")]
    links = tuple(
        ((text.index(a), text.index(a) + len(a)), (english.index(b), english.index(b) + len(b)))
        for a, b in names
    )
    assert len(mix_aligned(text, english, links, 0.15, 0)[1]) == 1
    for share, count in ((0.15, 2), (0.3, 4), (1.0, 5)):
        mixed, aligned = mix_aligned(text, english, links, share, 0, num_words=13)
        assert len(aligned) == count
        assert all(mixed[slice(*span)] == english[slice(*source)] for span, source in aligned)


def test_distillation_replaces_a_share_of_japanese_words(tmp_path):
    """From the settings to the texts: several of a Japanese sentence, of a German one as ever."""
    from finetune.formats import Example
    from finetune.strategies.base import Context
    from finetune.strategies.distillation import DistillationConfig
    from finetune.strategies.distillation.strategy import Distillation

    ja, de = "公園で犬と猫と鳥が遊んでいます", "ein Hund und eine Katze spielen im Park"
    english = "a dog a cat and a bird are playing in a park"
    folders = (tmp_path, tmp_path, ("ja", "de"), (), tmp_path, tmp_path)
    examples = {code: [Example("1", (text,), ("i",), {})] for code, text in (("ja", ja), ("de", de))}
    context = Context(*folders, training=examples)
    pairs = {ja: [("犬", "dog"), ("猫", "cat"), ("鳥", "bird")], de: [("Hund", "dog"), ("Katze", "cat")]}

    def links(text):
        spans = [((text.index(a), text.index(a) + len(a)), english.index(b)) for a, b in pairs[text]]
        names = [b for _, b in pairs[text]]
        return tuple((span, (i, i + len(b))) for (span, i), b in zip(spans, names, strict=True))

    counts = {}
    for words in ("segmented", "spaces"):
        config = DistillationConfig(teacher="x", share=0.25, words=words)
        alignments = {("1", text): links(text) for text in (ja, de)}
        strategy = Distillation(config, {"1": english}, alignments, config._count_words(context))
        found = [len(strategy.example(each[0], 0, 0).aligned) for each in examples.values()]
        counts[words] = found
    assert counts == {"segmented": [3, 2], "spaces": [1, 2]}


def slow_links(states, others, threshold):
    """Two softmaxes in plain loops."""
    links = set()
    scores = [[float(x @ y) for y in others] for x in states]
    for i, row in enumerate(scores):
        for j, score in enumerate(row):
            forth = math.exp(score) / sum(math.exp(s) for s in row)
            back = math.exp(score) / sum(math.exp(scores[k][j]) for k in range(len(states)))
            if forth > threshold and back > threshold:
                links.add((i, j))
    return links


@pytest.mark.parametrize("threshold", [1e-3, 0.1, 0.4])
def test_align_subwords_selects_mutual_matches(threshold):
    g = torch.Generator().manual_seed(1)
    states, others = (torch.randn(n, 8, generator=g, dtype=torch.float64) for n in (5, 7))
    found = {tuple(pair) for pair in align_subwords(states, others, threshold).nonzero().tolist()}
    assert found == slow_links(states, others, threshold) and found
    assert align_subwords(states[:0], others, threshold).shape == (0, 7)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A small encoder of transformers, with our tokenizer."""
    import shutil

    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=12000,
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=24,
        num_hidden_layers=3,
        max_position_embeddings=40,
    )
    model = BertModel(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    model.save_pretrained(folder)
    shutil.copy2(DATA / "tokenizer.model", folder)
    return folder


def test_align_words_follows_any_of_their_subwords(encoder):
    """A batch of unequal lengths, beside each pair by itself, in loops over sub-words."""
    pairs = [
        (["der", "Elefant", "schläft"], ["the", "elephant", "sleeps", "."]),
        (["a"], ["a"]),
        ([], ["a"]),
        (["x"] * 90, ["x"]),
    ]
    aligner = WordAligner(encoder, layer=2, threshold=0.05)
    found = aligner.align(pairs)
    tokenizer, model = ours(), BertModel.from_pretrained(encoder).eval()
    for pair, links in zip(pairs[:3], found[:3], strict=True):
        sides = []
        for words in pair:
            cut = [tokenizer.encode([word])[0].tolist() for word in words]
            ids = [tokenizer.cls, *(i for row in cut for i in row), tokenizer.sep]
            with torch.no_grad():
                states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0, 1:-1]
            sides.append((states.double(), [w for w, row in enumerate(cut) for _ in row]))
        slow = slow_links(sides[0][0], sides[1][0], 0.05)
        assert set(links) == {(sides[0][1][i], sides[1][1][j]) for i, j in slow}
    assert found[1] == [(0, 0)] and found[2] == [] and found[0]
    with pytest.raises(UserError, match="layer=4, but it has layers 1 to 3"):
        WordAligner(encoder, layer=4)
    with pytest.raises(UserError, match="no config.json; give the folder of a multilingual encoder"):
        WordAligner(encoder / "none")


MIXED = 'strategies.distillation.tokens=["cls","mixed"]'


def test_distillation_of_code_mixed_questions_runs_and_resumes(distil, parallel, encoder, tmp_path, capsys):  # noqa: F811
    """Alignments are made by the command, words are mixed anew each epoch, a run stopped in its middle is the
    same."""
    out = ["--out", str(tmp_path / "alignments"), "--layer", "2", "--threshold", "0.05"]
    assert align_main([str(encoder), str(parallel), "--languages", "ru", *out]) == 0
    assert "ru: " in capsys.readouterr().out
    lines = (tmp_path / "alignments" / "ru.align").read_text().splitlines()
    texts = (tmp_path / "alignments" / "ru.text").read_text().splitlines()
    assert len(lines) == len(texts) == 30
    # random weights align nothing; a diagonal serves the run
    diagonal = [
        " ".join(f"{i}-{i}" for i in range(min(len(side.split()) for side in text.split(" ||| "))))
        for text in texts
    ]
    (tmp_path / "alignments" / "ru.align").write_text("".join(f"{line}\n" for line in diagonal))
    settings = [MIXED, f"strategies.distillation.alignments={tmp_path / 'alignments'}"]
    for name, stops in (("whole", [[]]), ("parts", [["fit.stop_after=4"], []])):
        for stop in stops:
            code, printed = distil(f"name={name}", *settings, *stop)
            assert code == 0, printed
    whole, parts = (
        load_file(tmp_path / name / "ru/checkpoints/step_000006/model.safetensors")
        for name in ("whole", "parts")
    )
    assert all(value.equal(parts[key]) for key, value in whole.items())
    assert all(
        line["loss/mixed"] > 0 for line in read_metrics(tmp_path / "whole" / "ru") if "loss/mixed" in line
    )
    bad = [*diagonal[:-1], "99-0"]
    (tmp_path / "alignments" / "ru.align").write_text("".join(f"{line}\n" for line in bad))
    code, printed = distil("name=wrong", *settings)
    assert code == 2 and "ru.align:30: link 99-0 is out of range" in printed
    assert align_main([str(encoder), str(parallel), "--languages", "xx", *out]) == 2
    assert json.loads((tmp_path / "whole" / "result.json").read_text())["accuracy"].keys() == {"ru"}
