"""Sentences and phrases with their translations out of the messages of two programs, for
`raylib.sample.rebuild` alone: Scratch (an npm package of JSON files), and LibreOffice (gettext catalogues of
Debian packages, which need apt-get and dpkg-deb). `extract_pairs` picks those of a language.

A message becomes pairs of sentences where both sides have as many (`raylib.sample.align`). What holds a
placeholder, markup, a path or a number is left out, and so are names of held-out concepts.
"""

import io
import json
import re
import struct
import subprocess
import tarfile
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from raylib.errors import UserError
from raylib.sample import LENGTH_RATIO, align, read_held_out_captions, split_sentences, stable_hash

SCRATCH = "scratch-l10n@3.18.357"  # of npm; later than 3 it is under another licence
SCRATCH_FILES = r"(editor|www)/[^/]+/({})\.json"
LIBREOFFICE = "libreoffice-l10n-{}=4:7.4.7-1+deb12u14"  # of Debian
# what both call languages otherwise than we
REGIONS = {"pt": "pt-br", "zh": "zh-cn"}
NUM_PAIRS = 4000  # of a language, at most
MOST_WORDS = 16  # of an English side
LONGEST = 110  # characters, of either side
QUESTION = "?؟;\u037e？"  # of Latin, Arabic, Greek and Han
ACCELERATORS = re.compile(r"\s*\([~_&]\w\)|[~_&](?=\w)")
ELLIPSES = re.compile(r"\s*(\.{3}|…)$")
# placeholders, markup, code, paths, numbers, names of keys
FOREIGN = re.compile(r"[%${}<>\\|=/@#*\[\]+^_~&()\d:«»„“”‚‘‹›\"…]|XX|\.\.\.|\b[A-Z]{2,}|'\B|\B'")


def extract_pairs(language: str, scratch: Mapping[str, bytes], folder: Path) -> list[tuple[str, str]]:
    """Return up to `NUM_PAIRS` (English, `language`): Scratch's, then LibreOffice's, of which those that ask
    come first; each in a scattered order. LibreOffice's package is downloaded into `folder`."""
    pairs: list[tuple[str, str]] = []
    for messages in (read_scratch(language, scratch), read_libreoffice(language, folder)):
        found = sorted(set(_split_messages(messages)))
        # a pair whose lengths are far from the usual ratio is no translation
        lengths = [sum(map(len, side)) for side in zip(*found, strict=True)] or [1, 1]
        ratio = lengths[1] / lengths[0]
        found = [
            (english, other)
            for english, other in found
            if 1 / LENGTH_RATIO < len(other) / len(english) / ratio < LENGTH_RATIO
        ]
        pairs += sorted(found, key=lambda pair: (not pair[0].endswith("?"), stable_hash("\t".join(pair))))
    return _drop_repetitions(pairs, language)[:NUM_PAIRS]


def read_scratch(language: str, files: Mapping[str, bytes]) -> Iterator[tuple[str, str]]:
    """Yield the messages (English, translation) of Scratch's files, {path: JSON}."""
    code = REGIONS.get(language, language)
    for path in sorted(files):
        translated = f"{path.removesuffix('en.json')}{code}.json"
        if path.endswith("/en.json") and translated in files:
            english, other = (_read_messages(files[name]) for name in (path, translated))
            yield from ((text, other[key]) for key, text in english.items() if key in other)


def _read_messages(content: bytes) -> dict[str, str]:
    """Key -> message, of a JSON file of texts or of {"message": text}."""
    messages = json.loads(content)
    return {k: m if isinstance(m, str) else m["message"] for k, m in messages.items()}


def read_libreoffice(language: str, folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the messages (English, translation) of a language's package."""
    package = LIBREOFFICE.format(REGIONS.get(language, language))
    try:
        subprocess.run(["apt-get", "download", "-qq", package], cwd=folder, check=True, capture_output=True)
        (path,) = folder.glob(f"{package.partition('=')[0]}_*.deb")
        files = subprocess.run(["dpkg-deb", "--fsys-tarfile", path], check=True, capture_output=True).stdout
    except FileNotFoundError as error:
        what = f"{error.filename} is not installed: the sentences come from Debian packages"
        raise UserError(what) from None
    except subprocess.CalledProcessError as failed:
        reason = failed.stderr.decode().strip().splitlines() or ["no reason given"]
        raise UserError(f"{' '.join(map(str, failed.cmd))} failed: {reason[-1]}") from None
    with tarfile.open(fileobj=io.BytesIO(files)) as archive:
        for member in sorted(archive, key=lambda member: member.name):
            content = archive.extractfile(member) if member.isfile() else None
            if content and member.name.endswith(".mo"):
                yield from read_mo(content.read())


def read_mo(content: bytes) -> Iterator[tuple[str, str]]:
    """Yield (message, translation) of a little-endian gettext .mo file, singular forms, contexts cut off."""
    magic, _, count, originals, translations = struct.unpack_from("<5I", content)
    assert magic == 0x950412DE, hex(magic)

    def text(table: int, i: int) -> str:
        length, offset = struct.unpack_from("<2I", content, table + 8 * i)
        return content[offset : offset + length].decode().partition("\0")[0]

    for i in range(count):
        yield text(originals, i).rpartition("\4")[2], text(translations, i)


def _split_messages(messages: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Yield the pairs of sentences that are good to learn from."""
    for english, other in (map(_clean, message) for message in messages):
        if english and other:
            pairs = align(split_sentences(english), split_sentences(other))
            yield from (pair for pair in pairs if is_good_pair(*pair))


def _clean(text: str) -> str:
    """NFC, without accelerators, a final ellipsis and superfluous white space."""
    return ELLIPSES.sub("", " ".join(ACCELERATORS.sub("", unicodedata.normalize("NFC", text)).split()))


def is_good_pair(english: str, other: str) -> bool:
    """Return whether both sides are one sentence or phrase without placeholders, both or neither ask, and
    the other one is translated."""
    words = english.split()
    if not 0 < len(words) <= MOST_WORDS or not 1 < max(len(english), len(other)) <= LONGEST:
        return False
    if FOREIGN.search(english) or FOREIGN.search(other) or len(split_sentences(english)) > 1:
        return False
    if not (other and english[0].isalpha() and other[0].isalpha() | (other[0] in "¿¡")):
        return False
    if english.endswith("?") != (other[-1] in QUESTION):
        return False
    shared = {word.casefold() for word in words} & {word.casefold() for word in other.split()}
    return len(shared) <= len(words) / 3


def _drop_repetitions(pairs: Iterable[tuple[str, str]], language: str) -> list[tuple[str, str]]:
    """Keep the first pair of every sentence, of either side, and none that names a held-out concept."""
    known = {
        (code, caption.name.casefold())
        for code in ("en", language)
        for caption in read_held_out_captions(code).values()
    }
    kept = []
    for english, other in pairs:
        sides = {("en", english.casefold()), (language, other.casefold())}
        if not sides & known:
            kept.append((english, other))
        known |= sides
    return kept
