"""Families of translation models, tiny and random, told their languages as `transformers` documents it; wrong
codes; several processes; batches by length."""

import json
import re
import shutil
from itertools import pairwise

import pytest
import sentencepiece
import torch
import transformers

from finetune.tasks.datasets import TASKS
from finetune.translation import TranslateConfig, cut_batches, translate
from finetune.translator import Devices, Translator, load_tokenizer
from raylib.errors import UserError

TEXTS = [
    "ein hund am see",
    "zwei",
    "собака и кот у воды",
    "犬が水辺にいる",
    "dos perros, tres gatos y un autobús",
]
SIZES = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "max_position_embeddings": 64,
}
CHARACTERS = sorted(set("".join(TEXTS)) - {" "})


@pytest.fixture(scope="module")
def spm(tmp_path_factory):
    """A SentencePiece model of characters."""
    folder = tmp_path_factory.mktemp("spm")
    (folder / "text").write_text("\n".join(TEXTS * 4), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "m"),
        model_type="char",
        vocab_size=len(CHARACTERS) + 4,
        character_coverage=1.0,
        minloglevel=2,
    )
    return folder / "m.model"


def pieces(spm):
    model = sentencepiece.SentencePieceProcessor(model_file=str(spm))
    return [model.id_to_piece(i) for i in range(3, model.get_piece_size())]


def save(folder, tokenizer, model_class, config, **more):
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    size = max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1) + 1
    model = model_class(config(vocab_size=size, **more))
    with torch.no_grad():  # larger weights, so that other inputs have other outputs
        for parameter in model.parameters():
            parameter.mul_(14.0 if parameter.dim() > 1 else 1.0)
    model.save_pretrained(folder)
    return folder


def m2m(folder, spm):
    words = ["<s>", "<pad>", "</s>", "<unk>", *pieces(spm)]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    tokenizer = transformers.M2M100Tokenizer(str(folder / "vocab.json"), str(spm))
    # 100 tokens of languages come after the vocabulary
    config = {"decoder_start_token_id": 2, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, **SIZES}
    return save(folder, tokenizer, transformers.M2M100ForConditionalGeneration, m2m_config, **config)


def m2m_config(vocab_size, **more):
    return transformers.M2M100Config(vocab_size=vocab_size + 108, **more)


def nllb(folder, spm):
    # many characters beside 202 languages, which are left out of what is written
    words = ["<s>", "<pad>", "</s>", "<unk>", "▁", *CHARACTERS, *map(chr, range(0x4E00, 0x5400))]
    tokenizer = transformers.NllbTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    config = {"decoder_start_token_id": 2, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, **SIZES}
    return save(
        folder, tokenizer, transformers.M2M100ForConditionalGeneration, transformers.M2M100Config, **config
    )


def mbart50(folder, spm):
    words = ["<unk>", "<s>", "</s>", "▁", *CHARACTERS]
    tokenizer = transformers.MBart50Tokenizer(vocab=[(word, -1.0) for word in words])
    config = {"decoder_start_token_id": 2, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, **SIZES}
    return save(
        folder, tokenizer, transformers.MBartForConditionalGeneration, transformers.MBartConfig, **config
    )


def mbart(folder, spm):
    from transformers.models.mbart.tokenization_mbart import FAIRSEQ_LANGUAGE_CODES

    words = ["<s>", "<pad>", "</s>", "<unk>", "▁", *CHARACTERS, *FAIRSEQ_LANGUAGE_CODES, "<mask>"]
    tokenizer = transformers.MBartTokenizer(vocab=[(word, -1.0) for word in words])
    config = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, **SIZES}
    return save(
        folder, tokenizer, transformers.MBartForConditionalGeneration, transformers.MBartConfig, **config
    )


T5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}


def t5_tokenizer(*more):
    words = ["<pad>", "</s>", "<unk>", "▁", *CHARACTERS, *"GETRFabcdefghijklmnopqrstuvwxyz:"]
    words = list(dict.fromkeys(words))
    tokenizer = transformers.T5Tokenizer(vocab=[(word, -1.0) for word in words], extra_ids=0)
    tokenizer.add_tokens(list(more), special_tokens=True)
    return tokenizer


def madlad(folder, spm):
    tokenizer = t5_tokenizer("<2de>", "<2en>", "<2zh>")
    return save(folder, tokenizer, transformers.T5ForConditionalGeneration, transformers.T5Config, **T5)


def t5(folder, spm):
    save(folder, t5_tokenizer(), transformers.T5ForConditionalGeneration, transformers.T5Config, **T5)
    config = json.loads((folder / "config.json").read_text())
    prefix = {"prefix": "translate German to English: "}
    config["task_specific_params"] = {"summarization": {}, "translation_de_to_en": prefix}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def marian(folder, spm, marks=(">>eng<<", ">>deu<<", ">>cmn_Hans<<")):
    words = ["</s>", "<unk>", *marks, *pieces(spm), "<pad>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    tokenizer = transformers.MarianTokenizer(str(spm), str(spm), str(folder / "vocab.json"))
    pad = len(words) - 1
    config = {"decoder_start_token_id": pad, "pad_token_id": pad, "eos_token_id": 0, "bos_token_id": 0}
    return save(folder, tokenizer, transformers.MarianMTModel, transformers.MarianConfig, **config, **SIZES)


def marian_of_two(folder, spm):
    return marian(folder, spm, marks=())


def documented(folder, family, source, target):
    """The calls that `transformers`' documentation of each family has."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    options, prefix = {}, ""
    if family == "m2m":
        tokenizer.src_lang = source
        options["forced_bos_token_id"] = tokenizer.get_lang_id(target)
    elif family in ("nllb", "mbart50"):
        tokenizer.src_lang = source
        options["forced_bos_token_id"] = tokenizer.convert_tokens_to_ids(target)
    elif family == "mbart":
        tokenizer.src_lang = source
        options["decoder_start_token_id"] = tokenizer.lang_code_to_id[target]
    elif family in ("madlad", "marian", "t5"):
        prefix = {"madlad": f"<2{target}> ", "marian": f">>{target}<< "}.get(
            family, "translate German to English: "
        )
    inputs = tokenizer([prefix + text for text in TEXTS], return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    outputs = model.generate(**inputs, num_beams=2, max_new_tokens=12, **options)
    forced = options.get("forced_bos_token_id")
    if forced is not None:
        assert (outputs[:, 1] == forced).all() and forced not in (tokenizer.unk_token_id, None)
    rows = [[id for id in row if id not in options.values()] for row in outputs.tolist()]
    return [" ".join(text.split()) for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]


FAMILIES = {
    "m2m": (m2m, {}, ("de", "en")),
    "nllb": (nllb, {"de": "deu_Latn", "en": "eng_Latn"}, ("deu_Latn", "eng_Latn")),
    "mbart50": (mbart50, {"de": "de_DE", "en": "en_XX"}, ("de_DE", "en_XX")),
    "mbart": (mbart, {"de": "de_DE", "en": "en_XX"}, ("de_DE", "en_XX")),
    "madlad": (madlad, {}, ("de", "en")),
    "t5": (t5, {}, ("de", "en")),
    "marian": (marian, {"en": "eng"}, ("", "eng")),
    "marian_of_two": (marian_of_two, {}, ("", "")),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def make(made, spm):
    """Make a model's folder, once."""

    def make(family):
        folder = made / family
        return folder if folder.exists() else FAMILIES[family][0](folder, spm)

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_translator_tells_languages_as_documented(family, make):
    folder = make(family)
    _, codes, names = FAMILIES[family]
    config = TranslateConfig(codes=codes, num_beams=2, length=12, bf16=False, devices=1)
    expected = documented(folder, family, *names)
    assert len(set(expected)) > 1
    long = config.model_copy(update={"length": 200})  # of the texts; the translations' is 12
    translator = Translator(folder, long)
    generate = translator.model.generate
    translator.model.generate = lambda **options: generate(**{**options, "max_new_tokens": 12})
    assert translator(TEXTS, "de", "en") == expected


@pytest.mark.parametrize("family", ["m2m", "nllb", "mbart50", "madlad", "marian"])
def test_translator_other_languages_have_other_translations(family, make):
    folder = make(family)
    codes = {"marian": {"en": "eng", "zh": "cmn_Hans"}, "m2m": {}, "madlad": {}}.get(
        family, {"de": FAMILIES[family][1].get("de"), "en": FAMILIES[family][1].get("en"), "zh": "zho_Hans"}
    )
    if family == "mbart50":
        codes["zh"] = "zh_CN"
    translator = Translator(folder, TranslateConfig(codes=codes, num_beams=1, length=12, bf16=False))
    assert translator(TEXTS, "de", "en") != translator(TEXTS, "de", "zh")


@pytest.mark.parametrize(
    ("family", "codes", "words"),
    [
        ("m2m", {"en": "eng"}, "knows no language 'eng'; give 'en' in codes= one of its 100, such as .*en"),
        ("m2m", {"de": "deu", "en": "en"}, "'deu'.* such as de"),
        ("nllb", {}, "'de'; give 'de' in codes= one of its 20., such as deu_Latn"),
        ("nllb", {"de": "deu_Latn", "en": "eng_latn"}, "'eng_latn'.* such as eng_Latn"),
        ("nllb", {"de": "deu_Latin", "en": "eng_Latn"}, "'deu_Latin'.* such as deu_Latn"),
        ("mbart50", {"en": "en_XX"}, "'de'; give 'de' in codes= one of its 52, such as de_DE"),
        ("madlad", {"en": "eng"}, "'eng'.* such as en"),
        ("marian", {}, "'en'; give 'en' in codes= one of its 3, such as eng"),
        ("marian_of_two", {"en": "eng"}, "is told no language by a token; leave codes= out"),
        ("t5", {"en": "en"}, "leave codes= out, or give prefix="),
    ],
)
def test_translate_wrong_code_is_named_before_the_model_is_read(
    family, codes, words, tmp_path, make, monkeypatch
):
    folder = make(family)
    (tmp_path / "xtd").mkdir()
    (tmp_path / "xtd" / "test_1kcaptions_de.txt").write_text("bild\n")
    monkeypatch.setattr("finetune.translator.Translator.__init__", None)
    monkeypatch.setattr("finetune.translation.hash_model", None)
    config = TranslateConfig(data=str(tmp_path), languages=("de",), codes=codes)
    with pytest.raises(UserError, match=words):
        translate(TASKS["xtd_few"], folder, config)


def test_translator_knows_japanese_by_the_name_that_xtd_has(make):
    languages = load_tokenizer(make("m2m"))[1]
    assert languages.tokens_of("jp", "en", TranslateConfig()) == {"jp": "__ja__", "en": "__en__"}
    with pytest.raises(UserError, match="no language 'jp'"):
        languages.tokens_of("jp", "en", TranslateConfig(codes={"jp": "jp"}))


def test_translate_t5_pair_without_words_is_refused(tmp_path, make):
    folder = make("t5")
    languages = load_tokenizer(folder)[1]
    with pytest.raises(UserError, match="no words for 'fr' to 'en', but for de to en; give them as prefix="):
        languages.tokens_of("fr", "en", TranslateConfig())
    assert languages.tokens_of("fr", "en", TranslateConfig(prefix="translate French to English: ")) == {}


def test_translator_tokenizer_that_has_no_source_language_is_refused(tmp_path, make):
    folder = shutil.copytree(make("nllb"), tmp_path / "nllb")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="m2m_100 model, whose tokenizer.* cannot be told a source language"):
        load_tokenizer(folder)


def test_translator_tokenizer_with_an_endless_pattern_is_refused(tmp_path, make):
    folder = shutil.copytree(make("nllb"), tmp_path / "nllb")
    values = json.loads((folder / "tokenizer.json").read_text())
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    values["pre_tokenizer"] = pattern
    (folder / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="tokenizer.json"):
        load_tokenizer(folder)


def test_translator_model_smaller_than_its_tokenizer_is_refused(tmp_path, make):
    folder = make("nllb")
    codes = {"de": "deu_Latn", "en": "eng_Latn"}
    translator = Translator(folder, TranslateConfig(codes=codes, num_beams=1, length=9, bf16=False))
    translator.model.config.vocab_size = 20
    with pytest.raises(UserError, match=re.escape("the model has 20; take both from the same place")):
        translator(TEXTS, "de", "en")


def test_cut_batches_have_each_text_once_and_are_of_like_length():
    texts = ["a" * (1 + 37 * i % 91) + str(i % 50) for i in range(200)] + ["", " \n"]
    batches = cut_batches(texts, 8)
    assert sorted(text for batch in batches for text in batch) == sorted({t for t in texts if t.strip()})
    assert max(map(len, texts)) == len(batches[0][0]) and all(len(batch) == 8 for batch in batches[:1])
    spans = [(min(map(len, batch)), max(map(len, batch))) for batch in batches]
    ordered = sorted(spans)
    assert all(high <= low for (_, high), (low, _) in pairwise(ordered))
    assert spans != ordered[::-1]  # their order says how long the rest takes
    assert cut_batches([*reversed(texts), texts[3]], 8) == batches
    assert cut_batches([], 8) == [] and cut_batches(["one"], 8) == [["one"]]


@pytest.mark.slow
def test_translate_by_two_processes_makes_the_same_file(tmp_path, make):
    folder = make("m2m")
    (tmp_path / "xtd").mkdir()
    source = tmp_path / "xtd" / "test_1kcaptions_de.txt"
    source.write_text("".join(f"{text} {i}\n" for i in range(6) for text in TEXTS), encoding="utf-8")
    made = {}
    for devices in (1, 2):
        config = TranslateConfig(
            data=str(tmp_path), languages=("de",), num_beams=1, length=9, batch=4, devices=devices, bf16=False
        )
        (file,) = translate(TASKS["xtd_few"], folder, config)
        made[devices] = file.read_bytes()
        file.unlink()
    assert made[1] == made[2] and made[1].count(b"\n") == 30


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.gpu
def test_translator_is_in_bf16_on_a_gpu(tmp_path, make):
    folder = make("m2m")
    from finetune.translation import _with_devices

    config = _with_devices(TranslateConfig(num_beams=1, length=9))
    assert config.bf16 and config.devices == torch.cuda.device_count()
    with Devices(folder, config) as devices:
        (done,) = devices.translate([TEXTS], "de", "en")
    assert len(done[1]) == len(TEXTS)
