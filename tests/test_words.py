"""Texts as public code normalises them, in many scripts; words where no spaces are."""

import gzip
import pickle
import re

import pytest

from finetune.config import FinetuneConfig
from finetune.recipes import RECIPES
from raylib.sample import DATA
from raylib.text import Tokenizer
from raylib.words import (
    ICU,
    UNCUT,
    NormalizedTokenizer,
    count_words,
    has_segmenter,
    normalize_caption,
    normalize_question,
    split_words,
)


def public_question(question, max_words):
    """ALBEF's function with CCLM's blanks, as a regular expression says it (zengyan-97/CCLM)."""
    question = re.sub(r"[,.'!?\"()*#:;~]", " ", question.lower()).replace("-", " ").replace("/", " ")
    words = question.rstrip(" ").split(" ")
    return " ".join(words[:max_words]) if len(words) > max_words else question.rstrip(" ")


def public_caption(caption, max_words):
    caption = re.sub(r"[,.'!?\"()*#:;~]", " ", caption.lower()).replace("-", " ").replace("/", " ")
    caption = re.sub(r"\s{2,}", " ", caption.replace("<person>", "person")).rstrip("\n").strip(" ")
    words = caption.split(" ")
    return " ".join(words[:max_words]) if len(words) > max_words else caption


def texts():
    """Declarations of human rights in all scripts of the sample, and what punctuation, blanks and case do."""
    found = [
        "A man's dog -- isn't it? (yes)",
        "<person> and  <PERSON>,\tby/the tree.\n",
        "ΟΔΥΣΣΕΥΣ. ΣΑΣ; Straße, İstanbul ǅ",
        "他、看《书》。「犬」…什么？",
        "¿Qué? ‘quoted’ “quoted” – dash",
        "...",
        "",
        "a\u00a0\u2003b \x0b c\r\n",
        " leading and trailing  ",
    ]
    for file in sorted((DATA / "udhr").glob("*.txt.gz")):
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            found += [line.rstrip("\n") for line in lines]
    return found


def test_normalised_texts_are_the_public_functions():
    every = texts()
    assert len(every) > 1000
    for text in every:
        assert normalize_question(text) == public_question(text, 10**6)
        assert normalize_caption(text) == public_caption(text, 10**6)


@pytest.fixture
def tokenizer(model):
    return Tokenizer.load(model)


def ids(tokenizer, text):
    return tokenizer.encode([text])[0].tolist()


@pytest.mark.parametrize(("name", "public"), [("question", public_question), ("caption", public_caption)])
def test_normalized_tokenizer_reads_what_public_code_gives(name, public, tokenizer):
    wrapped = NormalizedTokenizer(tokenizer, name, 7)
    long = "Is the man's dog, who  is (not) brown: left of the tree-house?"
    for text in [long, *texts()[:5]]:
        assert ids(wrapped, text) == ids(tokenizer, public(text, 10**6))
        assert ids(wrapped.for_training, text) == ids(tokenizer, public(text, 7))
    assert ids(wrapped, long) != ids(wrapped.for_training, long) != ids(tokenizer, long)
    again = pickle.loads(pickle.dumps(wrapped.for_training))
    assert ids(again, long) == ids(wrapped.for_training, long)
    assert len({tokenizer.sha256, wrapped.sha256, wrapped.for_training.sha256}) == 3
    wrapped.remember([long])
    assert ids(wrapped, long) == ids(tokenizer, public(long, 10**6))


def test_cclm_recipes_normalise_and_others_do_not():
    for name, recipe in RECIPES.items():
        config = recipe()
        expected = {"xgqa": ("question", 30)}.get(config.task, ("caption", 80))
        found = config.text_normalization, config.training_words
        assert found == (expected if name.startswith("p1_cclm") else ("none", None)), name
    assert FinetuneConfig(task="xgqa").text_normalization == "none"


CUT = {
    "ja": (
        "テーブルの上に犬がいるか？",
        ["テーブル", "の", "上", "に", "犬", "が", "いる", "か", "？"],
    ),
    "jp": ("公園で自転車に乗る", ["公園", "で", "自転", "車", "に", "乗る"]),
    "zh": ("一只狗在湖边跑。", ["一只", "狗", "在", "湖边", "跑", "。"]),
    "zh-Hant": ("在公園裡騎自行車的男人", ["在", "公園", "裡", "騎", "自行車", "的", "男人"]),
    "th": ("ผู้ชายกำลังวิ่งกับสุนัข", ["ผู้ชาย", "กำลัง", "วิ่ง", "กับ", "สุนัข"]),
    "lo": ("ຂ້ອຍກິນເຂົ້າແລະນໍ້າ", ["ຂ້ອຍ", "ກິນເຂົ້າ", "ແລະ", "ນໍ້າ"]),
    "km": ("ខ្ញុំចង់ទៅផ្ទះ", ["ខ្ញុំ", "ចង់ទៅ", "ផ្ទះ"]),
    "my": ("ကျွန်တော်ကျောင်းသို့သွားသည်", ["ကျွန်တော်", "ကျောင်း", "သို့", "သွား", "သည်"]),
}


@pytest.mark.parametrize("language", CUT)
def test_split_words_cuts_languages_without_spaces(language):
    text, words = CUT[language]
    assert split_words(text, language) == words
    assert count_words(text, language) == sum(any(map(str.isalnum, word)) for word in words)


@pytest.mark.parametrize(
    ("code", "same"),
    [("jpn", "ja"), ("zho", "zh"), ("cmn-Hant", "zh"), ("nan", "zh"), ("tha", "th"), ("lao", "lo")]
    + [("khm", "km"), ("mya", "my"), ("JPN", "ja")],
)
def test_split_words_by_codes_of_three_letters(code, same):
    text, words = CUT[same]
    assert has_segmenter(code) and split_words(text, code) == words


def test_split_words_keep_every_letter_of_every_script():
    """Also of texts in another script, in pieces of white space: what is read again finds its words."""
    for text in [
        *texts()[::9],
        *(text for text, _ in CUT.values()),
        "これは dog　ですか😀 (犬)",
        "狗\u200bที่ 2.5",
    ]:
        for language in ("ja", "zh", "th", "de", ""):
            assert "".join(split_words(text, language)) == "".join(text.split())


def test_split_words_of_other_languages_are_between_spaces_and_signs(caplog):
    assert split_words("What's the dog?", "en") == ["What", "'", "s", "the", "dog", "?"]
    assert split_words("어떤 개가 있습니까?", "ko") == ["어떤", "개가", "있습니까", "?"]
    assert split_words("这是dog吗?") == ["这", "是", "dog", "吗", "?"]
    assert split_words("a《犬》b", "ja") == ["a", "《", "犬", "》", "b"]
    assert count_words("was macht der Hund?", "de") == count_words("was macht der Hund?") == 4
    assert not has_segmenter("de") and has_segmenter("zh_TW")
    with caplog.at_level("WARNING"):
        assert split_words("བཀྲ་ཤིས་བདེ་ལེགས", "bo") and not set(ICU) & set(UNCUT)
    assert "bo: no segmenter is known" in caplog.text
