"""Write the sample corpus, the images and texts of `raylib.sample`, as the folder of shards that training and
evaluation read."""

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pretrain import corpora, formats
from raylib import text
from raylib.data import shards, tars
from raylib.fileio import sha256_file
from raylib.sample import canvas, concepts
from raylib.sample.concepts import DATA, LANGUAGES, TRAINING_VENDORS, UNSEEN_VENDOR
from raylib.text import Tokenizer

SHARD = 256  # samples of an image_text shard


def build_sample_corpus(cache: Path | str, tokenizer: Path | str | None = None, scenes: bool = False) -> Path:
    """The folder of the sample under `cache`, built in some seconds if it is not there yet:

        image_text/      Noto and Twemoji drawings, two of each training concept; captions: English name,
                         keywords
        parallel/        English and 21 languages: names, keywords, Declaration of Human Rights; packed
        text/            22 languages, the same texts; packed
        retrieval/       Fluent drawings of all concepts, names in 22 languages, {"heldout": true or false}
        tokenizer.model  or `sentencepiece.bpe.model`, as `tokenizer` is called: the sample's own, unless it
                         is given

    With `scenes`, image_text holds images of one to four concepts with English captions that say what is
    where. The folder's name tells its content, and it appears whole: processes that build it at once all
    return the same.
    """
    cache, tokenizer = Path(cache), Path(tokenizer or DATA / "tokenizer.model")
    folder = cache / f"{'scenes' if scenes else 'sample'}-{_fingerprint(tokenizer)}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".sample-", dir=cache) as temporary:
        corpus = Path(temporary) / "corpus"
        _build(corpus, tokenizer, scenes)
        try:
            corpus.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process was faster
                raise
    return folder


def _fingerprint(tokenizer: Path) -> str:
    """Hash of everything that the folder depends on: the data, and the code that turns it into shards."""
    files = [path for part in ("captions", "pictures", "udhr") for path in sorted((DATA / part).iterdir())]
    modules = (canvas, concepts, corpora, shards, tars, text)
    code = [Path(str(module.__file__)) for module in modules] + [Path(__file__)]
    hashes = map(sha256_file, [*files, tokenizer, *code])
    return hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]


def _build(folder: Path, tokenizer_file: Path, scenes: bool) -> None:
    folder.mkdir()
    shutil.copyfile(tokenizer_file, folder / tokenizer_file.name)
    tokenizer = Tokenizer.load(folder / tokenizer_file.name)
    images = _captioned_scenes() if scenes else _training_images()
    corpora.write_image_text(folder / "image_text", images, max_samples=SHARD)
    unseen = canvas.draw_unseen_scenes() if scenes else concepts.read_images(UNSEEN_VENDOR)
    corpora.write_image_text(folder / "retrieval", _unseen_images(unseen), language="mul", max_samples=SHARD)
    tally = formats.Tally(DATA, limit=0.0)
    pairs = {code: concepts.list_training_pairs(code) for code in LANGUAGES if code != "en"}
    sentences = {code: zip(concepts.list_training_sentences(code)) for code in LANGUAGES}
    for kind, texts in (("parallel", pairs), ("text", sentences)):
        rows = {code: corpora.encode(texts[code], tokenizer, tally) for code in texts}
        corpora.write_packed(folder / kind, kind, tokenizer, rows)
    tally.close()


def _training_images() -> Iterator[corpora.ImageText]:
    """A training concept each: its drawings by the training vendors, its English captions."""
    drawings = {vendor: concepts.read_images(vendor) for vendor in TRAINING_VENDORS}
    for key, caption in concepts.read_training_captions("en").items():
        texts = [caption.name, ", ".join(caption.keywords)]
        captions = [text for text in dict.fromkeys(texts) if text]
        images = {f"{vendor}.png": drawings[vendor][key] for vendor in TRAINING_VENDORS}
        yield corpora.ImageText(key, images, {"en": captions})


def _captioned_scenes() -> Iterator[corpora.ImageText]:
    for scene in canvas.draw_training_scenes():
        yield corpora.ImageText(scene.name, {"webp": scene.image}, {"en": scene.captions})


def _unseen_images(drawings: dict[str, bytes]) -> Iterator[corpora.ImageText]:
    """A concept each: its drawing by the unseen vendor, its name in every language (keywords would be
    ambiguous)."""
    for key, image in drawings.items():
        captions = {language: [concepts.read_captions(language)[key].name] for language in LANGUAGES}
        yield corpora.ImageText(
            key, {"png": image}, captions, {"key": key, "heldout": concepts.is_held_out(key)}
        )
