"""Corpora -> the sources that training reads: the field's files (`corpus_formats`), or the embedded sample
(`raylib.sample`).

    python -m pretrain.corpora OUT --tokenizer FILE --image-text FILE ... --parallel de=FILE ...
                               --text de=FILE ...

Everything streams. Each file's good and bad samples are counted, one log line a file.
"""

import hashlib
import itertools
import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

import raylib.sample
import raylib.sample.scenes
import raylib.text
from pretrain.corpus_formats import LIMIT, Tally, read_image_text, read_pairs, read_text
from raylib.command import add_max_pixels, command_parser, entry_point, local_path
from raylib.data import augmentation, index, shards, tars
from raylib.data.shards import ShardWriter
from raylib.errors import UserError
from raylib.fileio import sha256_file
from raylib.sample import (
    DATA,
    HELD_OUT_LANGUAGE,
    LANGUAGES,
    TEST_VENDORS,
    TRAINED_LANGUAGES,
    TRAINING_VENDORS,
    UNSEEN_VENDOR,
    CaptionedScene,
    draw_dev_scenes,
    draw_training_scenes,
    draw_unseen_scenes,
    is_held_out,
    list_held_out_pairs,
    list_held_out_sentences,
    list_training_pairs,
    list_training_sentences,
    read_concept_captions,
    read_images,
    read_training_captions,
)
from raylib.settings import MAX_PIXELS
from raylib.text import Tokenizer, is_language_code

SAMPLE_SHARD = 256  # samples of an image_text shard of the embedded corpus
BATCH = 4096  # sentences tokenised at a time


class ImageText(NamedTuple):
    """An image in one or more drawings, {extension: bytes}, with {language: captions} and what else its JSON
    tells."""

    key: str
    images: dict[str, bytes]
    captions: dict[str, list[str]]
    facts: Mapping = MappingProxyType({})


def write_image_text(folder: Path, samples: Iterable[ImageText], language: str = "en", **limits) -> None:
    """Write an image_text source; `limits` as in ShardWriter."""
    with ShardWriter(folder, "image_text", **limits) as writer:
        for sample in samples:
            record = json.dumps({"captions": sample.captions, **sample.facts}, ensure_ascii=False)
            writer.write(sample.key, {"json": record.encode(), **sample.images}, language)
            writer.images.update(sample.images)


def write_packed(folder: Path, kind: str, tokenizer: Tokenizer, rows: Mapping[str, Iterable]) -> None:
    """Write a text or parallel source of {language: rows of ids}, as `encode_rows` makes them."""
    with ShardWriter(folder, kind, tokenizer) as writer:
        for language, encoded in rows.items():
            writer.write_rows(language, encoded if kind == "parallel" else (ids for (ids,) in encoded))


def encode_rows(
    texts: Iterable[tuple[str, ...]], tokenizer: Tokenizer, tally: Tally
) -> Iterator[tuple[np.ndarray, ...]]:
    """Ids of (sentence,) or (English, other). A side without any token (zero-width characters alone) is a bad
    sample."""
    texts = iter(texts)
    while batch := list(itertools.islice(texts, BATCH)):
        for row in zip(*(tokenizer.encode(side) for side in zip(*batch, strict=True)), strict=True):
            if all(ids.size for ids in row):
                tally.good += 1
                yield row
            else:
                tally.skip("sentences without a token")


def prepare(
    out: Path | str,
    tokenizer: Path | str,
    image_text: Iterable[Path | str] = (),
    parallel: Mapping[str, Iterable[Path | str]] | None = None,
    text: Mapping[str, Iterable[Path | str]] | None = None,
    image_size: int | None = None,
    limit: float = LIMIT,
    images: Path | None = None,
    max_pixels: int = MAX_PIXELS,
) -> None:
    """Write `out`/image_text, `out`/parallel, `out`/text (those that are asked for) and a copy of the
    tokenizer.

    Args:
        parallel, text: {language: files}.
        image_size: images whose shorter side is longer (pixels) are shrunk to it; None keeps the files'
            bytes.
        limit: share of bad samples in a file that is still normal.
        images: folder below which the images of `image_text` lie; None: below that of the file that names
            them.
        max_pixels: of an image; a larger one is not decoded, and skipped.

    Raises UserError: unreadable or cut file, unknown format, too many bad samples, no samples; nothing to
    read; a language that cannot name a shard.
    """
    for language in (*(parallel or ()), *(text or ())):
        if not is_language_code(language):
            raise UserError(
                f"language {language!r}: wanted a code like 'de' or 'zh-Hans', it names the shards"
            )
    if parallel and "en" in parallel:
        raise UserError("parallel files are English and another language: name the other one, not 'en'")
    image_text = list(image_text)
    if not (image_text or parallel or text):
        raise UserError(f"nothing to write to {out}: give image-text, parallel or text files")
    out, model = Path(out), Tokenizer.load(tokenizer)
    out.mkdir(parents=True, exist_ok=True)
    copy = out / model.path.name
    if copy.resolve() != model.path.resolve():
        shutil.copyfile(model.path, copy)
    if image_text:
        if images and not images.is_dir():
            raise UserError(f"{images}: no such folder; give that of the images")
        records = _read_files(
            image_text,
            limit,
            lambda path, tally: read_image_text(path, tally, image_size, images, max_pixels),
        )
        items = (ImageText(f"{row:09d}", found, {"en": texts}) for row, (found, texts) in enumerate(records))
        write_image_text(out / "image_text", items)
    for kind, files, read in (("parallel", parallel, read_pairs), ("text", text, read_text)):
        if files:
            rows = {code: _encode_files(paths, limit, read, code, model) for code, paths in files.items()}
            write_packed(out / kind, kind, model, rows)


def _read_files(
    files: Iterable[Path | str], limit: float, read: Callable[[Path, Tally], Iterator]
) -> Iterator:
    for path in map(Path, files):
        tally = Tally(path, limit)
        yield from read(path, tally)
        tally.close()


def _encode_files(
    files: Iterable[Path | str], limit: float, read: Callable, language: str, tokenizer: Tokenizer
) -> Iterator:
    return _read_files(
        files, limit, lambda path, tally: encode_rows(read(path, tally, language), tokenizer, tally)
    )


def build_sample_corpus(cache: Path | str, tokenizer: Path | str | None = None, scenes: bool = False) -> Path:
    """The folder of the sample under `cache`, built in some seconds if it is not there yet:

        image_text/      Noto and Twemoji drawings, two of each training concept; captions: English name,
                         keywords
        parallel/        English and 20 languages: names, keywords, Declaration of Human Rights; packed
        text/            21 languages, the same texts; packed
        retrieval/       Fluent drawings of all concepts, names in 22 languages, {"heldout": true or false}
        test_sets/NAME/  the same of drawings by vendors on which nothing was chosen
        dev/             image_text: Fluent drawings of training concepts; parallel, text: held-out concepts
        tokenizer.model  or `sentencepiece.bpe.model`, as `tokenizer` is called: the sample's own, unless it
                         is given

    With `scenes`, image_text holds images of one to four concepts with English captions that say what is
    where, the texts have the sentences of `raylib.sample.read_sentence_pairs` too, and dev/image_text has
    more scenes. The folder's name tells its content, and it appears whole: processes that build it at once
    all return the same.
    """
    cache, tokenizer = Path(cache), Path(tokenizer or DATA / "tokenizer.model")
    if not tokenizer.is_file():  # a folder with one, or an error
        tokenizer = Tokenizer.load(tokenizer).path
    folder = cache / f"{'scenes' if scenes else 'sample'}-{_fingerprint(tokenizer)}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".sample-", dir=cache) as temporary:
        corpus = Path(temporary) / "corpus"
        _build_sample(corpus, tokenizer, scenes)
        try:
            corpus.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process was faster
                raise
    return folder


def _fingerprint(tokenizer: Path) -> str:
    """Hash of everything that the folder depends on: the data, and the code that turns it into shards."""
    parts = ("captions", "pictures", "sentences", "udhr")
    files = [path for part in parts for path in sorted((DATA / part).iterdir())]
    files.append(raylib.sample.scenes.DATA / "labels.json")  # what is true of a scene
    modules = (raylib.sample, augmentation, shards, tars, index, raylib.text)
    code = [Path(str(module.__file__)) for module in modules]
    hashes = map(sha256_file, [*files, tokenizer, *code, Path(__file__)])
    return hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]


def _build_sample(folder: Path, tokenizer_file: Path, scenes: bool) -> None:
    folder.mkdir()
    shutil.copyfile(tokenizer_file, folder / tokenizer_file.name)
    tokenizer = Tokenizer.load(folder / tokenizer_file.name)
    images = _scene_images(draw_training_scenes()) if scenes else _training_images()
    write_image_text(folder / "image_text", images, max_samples=SAMPLE_SHARD)
    unseen = draw_unseen_scenes() if scenes else read_images(UNSEEN_VENDOR)
    write_image_text(folder / "retrieval", _unseen_images(unseen), language="mul", max_samples=SAMPLE_SHARD)
    for vendor in TEST_VENDORS:
        drawings = draw_unseen_scenes(vendor) if scenes else read_images(vendor)
        test_set = folder / "test_sets" / vendor
        write_image_text(test_set, _unseen_images(drawings), language="mul", max_samples=SAMPLE_SHARD)
    dev = _scene_images(draw_dev_scenes()) if scenes else _dev_images(unseen)
    write_image_text(folder / "dev" / "image_text", dev, max_samples=SAMPLE_SHARD)
    training_texts = (partial(of, sentences=scenes) for of in (list_training_pairs, list_training_sentences))
    _write_texts(folder, tokenizer, *training_texts)
    _write_texts(folder / "dev", tokenizer, list_held_out_pairs, list_held_out_sentences)


def _write_texts(
    folder: Path,
    tokenizer: Tokenizer,
    list_pairs: Callable[[str], Iterable],
    list_sentences: Callable[[str], Iterable],
) -> None:
    """Write parallel/ and text/ of a language's pairs and sentences, of all but the held-out one."""
    tally = Tally(DATA, limit=0.0)
    texts: dict[str, dict[str, Iterable]] = {
        "parallel": {code: list_pairs(code) for code in TRAINED_LANGUAGES if code != "en"},
        "text": {code: zip(list_sentences(code)) for code in TRAINED_LANGUAGES},
    }
    for kind, by_language in texts.items():
        rows = {code: encode_rows(of, tokenizer, tally) for code, of in by_language.items()}
        write_packed(folder / kind, kind, tokenizer, rows)
    tally.close()


def _scene_images(scenes: Iterable[CaptionedScene]) -> Iterator[ImageText]:
    for scene in scenes:
        yield ImageText(scene.name, {"webp": scene.image}, {"en": scene.captions}, {"facts": scene.facts})


def _training_images() -> Iterator[ImageText]:
    """A training concept each: its drawings by the training vendors, its English captions."""
    drawings = {vendor: read_images(vendor) for vendor in TRAINING_VENDORS}
    for key, captions in _captions_of_training():
        images = {f"{vendor}.png": drawings[vendor][key] for vendor in TRAINING_VENDORS}
        yield ImageText(key, images, {"en": captions})


def _dev_images(unseen: dict[str, bytes]) -> Iterator[ImageText]:
    """A training concept each: its drawing by the unseen vendor, its English captions."""
    for key, captions in _captions_of_training():
        if key in unseen:
            yield ImageText(key, {"png": unseen[key]}, {"en": captions})


def _captions_of_training() -> Iterator[tuple[str, list[str]]]:
    for key, caption in read_training_captions("en").items():
        yield key, list(filter(None, dict.fromkeys((caption.name, ", ".join(caption.keywords)))))


def _unseen_images(drawings: dict[str, bytes]) -> Iterator[ImageText]:
    """A concept each: its drawing by an unseen vendor, its name in every language (keywords would be
    ambiguous)."""
    for key, image in drawings.items():
        captions = {language: [read_concept_captions(language)[key].name] for language in LANGUAGES}
        facts = {"key": key, "heldout": is_held_out(key), "heldout_languages": [HELD_OUT_LANGUAGE]}
        yield ImageText(key, {"png": image}, captions, facts)


@entry_point()
def main(arguments: Sequence[str]) -> int:
    parser = command_parser("pretrain.corpora", __doc__.partition("\n")[0])
    parser.add_argument("out", type=local_path)
    parser.add_argument(
        "--tokenizer",
        required=True,
        type=local_path,
        help="SentencePiece model or tokenizer.json, or its folder",
    )
    parser.add_argument(
        "--image-text", nargs="+", type=local_path, action="extend", default=[], metavar="FILE"
    )
    for stream in ("--parallel", "--text"):
        parser.add_argument(stream, nargs="+", action="extend", default=[], metavar="LANGUAGE=FILE")
    parser.add_argument(
        "--images",
        type=local_path,
        metavar="FOLDER",
        help="the folder below which images lie; else that of the file that names them",
    )
    parser.add_argument("--image-size", type=int, help="shrink images to this shorter side, in pixels")
    parser.add_argument(
        "--limit", type=float, default=LIMIT, help="share of bad samples that is still normal"
    )
    add_max_pixels(parser)
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    streams: dict[str, dict[str, list[Path]]] = {"parallel": {}, "text": {}}
    for stream, files in streams.items():
        for pair in getattr(args, stream):
            language, equals, path = pair.partition("=")
            if not equals:
                parser.error(f"--{stream} {pair}: wanted LANGUAGE=FILE")
            files.setdefault(language, []).append(local_path(path))
    prepare(
        args.out,
        args.tokenizer,
        args.image_text,
        **streams,
        image_size=args.image_size,
        limit=args.limit,
        images=args.images,
        max_pixels=args.max_pixels,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
