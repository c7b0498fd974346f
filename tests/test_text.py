import json

import numpy as np
import pytest
import sentencepiece

from raylib.errors import UserError
from raylib.fileio import sha256_file
from raylib.models import find_tokenizer
from raylib.patterns import describe_problem
from raylib.text import Tokenizer, Tokens, add_specials, mask_tokens, text_ids

WORDS = [
    "cat dog",
    "Katze und Hund",
    "красный дом",
    "红色的房子",
    "bir ev",
    "the red house",
    "lila Haus №5",
    "ｆｕｌｌ width",
]


def train(folder, name, **options):
    """A small SentencePiece model; `options` place the special ids."""
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(WORDS * 20), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / name),
        vocab_size=70,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return folder / f"{name}.model"


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    ids = {"bos_id": 0, "pad_id": 1, "eos_id": 2, "unk_id": 3, "control_symbols": ["<mask>"]}
    return train(tmp_path_factory.mktemp("ours"), "tokenizer", **ids)


@pytest.fixture(scope="module")
def xlmr(tmp_path_factory):
    folder = tmp_path_factory.mktemp("xlmr")
    return train(folder, "xlmr").rename(folder / "sentencepiece.bpe.model")


def test_tokenizer_sentencepiece_model_gives_its_ids(ours):
    tokenizer = Tokenizer.load(ours)
    model = sentencepiece.SentencePieceProcessor(model_file=str(ours))
    assert (tokenizer.cls, tokenizer.pad, tokenizer.sep, tokenizer.unk, tokenizer.mask) == (0, 1, 2, 3, 4)
    assert tokenizer.vocabulary == model.get_piece_size() and tokenizer.sha256 == sha256_file(ours)
    texts = [*WORDS, "<mask> </s> ☃", ""]
    for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
        assert ids.dtype == np.int64 and ids.tolist() == model.encode(text)
    assert tokenizer.mask not in tokenizer.encode(["<mask>"])[0]  # a text cannot say <mask>
    assert (tokenizer.ordinary == np.arange(5, tokenizer.vocabulary)).all()


def test_tokenizer_xlmr_model_equals_transformers(xlmr):
    from transformers import XLMRobertaTokenizer

    tokenizer = Tokenizer.load(xlmr.parent)
    peer = XLMRobertaTokenizer.from_pretrained(str(xlmr.parent))
    texts = [*WORDS, "unknown ☃ sign", "  two   spaces "]
    assert [ids.tolist() for ids in tokenizer.encode(texts)] == [
        peer(text, add_special_tokens=False)["input_ids"] for text in texts
    ]
    assert tokenizer.vocabulary == len(peer)
    for name in ("cls", "sep", "pad", "mask", "unk"):
        assert getattr(tokenizer, name) == getattr(peer, f"{name}_token_id")
    wrapped = add_specials(tokenizer.encode(texts[:1]), tokenizer, 64)
    assert wrapped.values.tolist() == peer(texts[0])["input_ids"]


def test_tokenizer_json_equals_transformers(xlmr, tmp_path):
    from transformers import XLMRobertaTokenizer

    peer = XLMRobertaTokenizer.from_pretrained(str(xlmr.parent))
    peer.save_pretrained(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.path.name == "tokenizer.json"
    assert [ids.tolist() for ids in tokenizer.encode(WORDS)] == [i[1:-1] for i in peer(WORDS)["input_ids"]]
    assert (tokenizer.vocabulary, tokenizer.mask) == (len(peer), peer.mask_token_id)


def test_tokenizer_bad_files_are_named(tmp_path, xlmr):
    with pytest.raises(UserError, match="no such tokenizer"):
        Tokenizer.load(tmp_path / "missing.model")
    with pytest.raises(UserError, match="no tokenizer here"):
        Tokenizer.load(tmp_path)
    for name in ("bad.model", "bad.json"):
        (tmp_path / name).write_bytes(b"{}")
        with pytest.raises(UserError, match=name) as error:
            Tokenizer.load(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="have ids"):
        Tokenizer.load(train(tmp_path, "other", bos_id=2, eos_id=1, pad_id=3))


def test_tokenizer_pickles(ours):
    import pickle

    tokenizer = pickle.loads(pickle.dumps(Tokenizer.load(ours)))
    assert tokenizer.encode(["cat"])[0].size and tokenizer.mask == 4


def test_add_specials_truncates_and_frames_rows(ours):
    tokenizer = Tokenizer.load(ours)
    rows = [np.array([7, 8, 9, 10]), np.array([], np.uint16), np.array([11], np.uint16), np.array([5, 6, 7])]
    tokens = add_specials(rows, tokenizer, 5)
    assert tokens.lengths.tolist() == [5, 2, 3, 5]
    assert tokens.values.tolist() == [0, 7, 8, 9, 2, 0, 2, 0, 11, 2, 0, 5, 6, 7, 2]
    assert len(add_specials([], tokenizer, 5).values) == 0


def random_tokens(count, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 12, count)
    return Tokens(rng.integers(0, 40, lengths.sum()), lengths)


def test_mask_tokens_has_expected_shares_and_labels(ours):
    tokenizer = Tokenizer.load(ours)
    tokens = random_tokens(4000)
    out = mask_tokens(tokens, np.arange(4000), tokenizer, (1, 2, "text"))
    clean, masked, positions, labels = (
        getattr(out, n).numpy() for n in ("clean", "masked", "positions", "labels")
    )
    ordinary = np.isin(clean, tokenizer.ordinary)
    assert (clean == tokens.values).all() and ordinary[positions].all()
    assert (labels == clean[positions]).all() and (np.delete(masked == clean, positions)).all()
    assert len(positions) / ordinary.sum() == pytest.approx(0.15, abs=0.01)
    hidden = masked[positions] == tokenizer.mask
    kept = masked[positions] == labels
    assert hidden.mean() == pytest.approx(0.8, abs=0.03)
    assert kept.mean() == pytest.approx(0.1 + 0.1 / len(tokenizer.ordinary), abs=0.02)
    assert np.isin(masked[positions][~hidden], tokenizer.ordinary).all()


def test_mask_tokens_depends_on_the_sentence_alone(ours):
    """A sentence masked by itself, with only its index, is masked as in the whole batch."""
    tokenizer = Tokenizer.load(ours)
    tokens = random_tokens(50)
    whole = mask_tokens(tokens, np.arange(50), tokenizer, (1, 2, "text")).masked.numpy()
    rows, ends = np.split(tokens.values, np.cumsum(tokens.lengths))[:-1], np.cumsum(tokens.lengths)
    for i in (49, 3, 20):
        one = mask_tokens(
            Tokens(rows[i], tokens.lengths[i : i + 1]), np.array([i]), tokenizer, (1, 2, "text")
        )
        assert (one.masked.numpy() == whole[ends[i] - len(rows[i]) : ends[i]]).all()
    other = mask_tokens(tokens, np.arange(50), tokenizer, (1, 3, "text")).masked.numpy()
    assert (other != whole).any()


def test_text_ids_identify_equal_texts():
    tokens = Tokens(np.array([0, 5, 6, 2, 0, 6, 5, 2, 0, 5, 6, 2, 0, 5, 2]), np.array([4, 4, 4, 3]))
    a, b, c, d = text_ids(tokens)
    assert a == c and len({a, b, d}) == 3 and min(a, b, d) >= 0
    assert text_ids(Tokens(np.array([0, 5, 2]), np.array([3])))[0] == d  # whatever stands around it
    assert len(np.unique(text_ids(random_tokens(2000)))) > 1800


def test_tokenizer_cached_texts_have_same_ids():
    from raylib.sample import DATA

    tokenizer = Tokenizer.load(DATA / "tokenizer.model")
    texts = ["a red apple", "ein roter Apfel", "", "a red apple", "红苹果"]
    before = tokenizer.encode(texts)
    tokenizer.remember(texts[:3])
    tokenizer._encode = (lambda encode: lambda new: encode(_only(new)))(tokenizer._encode)
    for one, other in zip(before, tokenizer.encode(texts), strict=True):
        assert one.tolist() == other.tolist()


def _only(texts):
    """Return the part of the texts above that is left to encode."""
    assert texts == ["红苹果"]
    return texts


def test_tokenizer_of_a_missing_folder_is_told_apart_from_a_missing_tokenizer(tmp_path):
    with pytest.raises(UserError, match="corpus: no such file or folder"):
        find_tokenizer(tmp_path / "corpus")
    (tmp_path / "corpus").mkdir()
    with pytest.raises(UserError, match="corpus: no tokenizer in it; one of .* is looked for"):
        find_tokenizer(tmp_path / "corpus")


PUBLISHED = (  # CLIP, GPT-2, Llama 3, GPT-4o, BLOOM, DeepSeek, Gemma
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\s+",
    r" ?[^(\s|[.,!?…。，、।۔،])]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*",
    " {2,}",
)


@pytest.mark.parametrize(
    "pattern", [*PUBLISHED, "[]a]+", "[^]]+b", "(?<=a)b", "a+?", "a++", "(?:ab)+", "(?>a)b"]
)
def test_patterns_that_are_published_or_plain_have_no_problem(pattern):
    assert describe_problem(pattern) == ""


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+$", "(a|aa)+$", "(.*a){25}$", "a*a*a*b", "(a?)*", "a**", "a{2}{3}", r"(a)\1+", r"(?<n>a|b\g<n>c)"]
    + ["(?~abc)", "(?(1)a|b)", "(?x)# [\n(a+)+ # ]", "(a+", "a)", "[a[b]c]*.*.*", "((?:a+))*", "a" * 20_000],
)
def test_patterns_that_may_take_long_are_refused(pattern):
    assert describe_problem(pattern)


@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer"])
def test_tokenizer_json_with_a_pattern_that_takes_long_is_refused(part, tmp_path, capfd):
    kinds = {
        "normalizer": {"type": "Replace", "content": "x"},
        "pre_tokenizer": {"type": "Split", "behavior": "Isolated", "invert": False},
    }
    vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4, "a": 5}
    values = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }
    file = tmp_path / "tokenizer.json"
    for pattern, is_refused in (("(a+)+$", True), ("a+", False)):
        values[part] = {**kinds[part], "pattern": {"Regex": pattern}}
        file.write_text(json.dumps(values))
        if is_refused:
            with pytest.raises(UserError, match=f"{file}: not to be read as .*repeats what repeats"):
                Tokenizer.load(file)
        else:
            assert len(Tokenizer.load(file).encode(["aaaa a"])) == 1
    assert capfd.readouterr().err == ""
