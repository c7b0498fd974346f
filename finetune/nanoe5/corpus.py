"""The texts that a vocabulary is trimmed to: the sample's, or those in files."""

import gzip
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

from finetune.formats.stream import open_text
from raylib.errors import UserError
from raylib.sample.concepts import LANGUAGES, read_captions, read_declaration, split_sentences

SAMPLE = "sample"
KINDS = (
    ".txt",
    ".tsv",
    ".json",
    ".jsonl",
)  # what is read of a folder, also with .gz behind, or JSON in a .zip


def read_corpus(sources: list[str]) -> set[str]:
    """All texts of `sources`: "sample", files (.json, .jsonl: every string in them; others: lines), folders
    of such files.

    Raises:
        UserError: no such file, nothing readable in a folder, no UTF-8, or no JSON (file and line).
    """
    texts: set[str] = set()
    for source in sources:
        if source == SAMPLE:
            texts.update(sample_texts())
        else:
            for path in _files(Path(source)):
                texts.update(_read_texts(path))
    return texts


def sample_texts() -> Iterator[str]:
    """Names, keywords, lists of keywords, paragraphs and sentences in all languages of the sample."""
    for language in LANGUAGES:
        for caption in read_captions(language).values():
            yield caption.name
            yield ", ".join(caption.keywords)
            yield from caption.keywords
        for section in read_declaration(language):
            for paragraph in section:
                yield paragraph
                yield from split_sentences(paragraph)


def _files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise UserError(f"trim={source}: no such file or folder; '{SAMPLE}' means the texts of the sample")
    files = sorted(path for path in source.rglob("*") if path.is_file() and _kind(path) in KINDS)
    if not files:
        raise UserError(
            f"trim={source}: no file in this folder ends in {', '.join(KINDS)} (or these with .gz)"
        )
    return files


def _kind(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix in (".gz", ".zip") else path.suffix


def _read_texts(path: Path) -> Iterator[str]:
    try:
        with open_text(path) as file:
            if _kind(path) == ".json":
                yield from _strings(json.load(file))
            elif _kind(path) == ".jsonl":
                for number, line in enumerate(file, 1):
                    try:
                        yield from _strings(json.loads(line))
                    except json.JSONDecodeError as e:
                        raise UserError(f"{path}, line {number}: not JSON ({e.msg})") from None
            else:
                yield from (line.rstrip("\n") for line in file)
    except json.JSONDecodeError as e:
        raise UserError(f"{path}: not JSON ({e})") from None
    except (UnicodeDecodeError, gzip.BadGzipFile, zipfile.BadZipFile, EOFError) as e:
        raise UserError(f"{path}: not to be read as text ({e})") from None


def _strings(value) -> Iterator[str]:
    """Every string in a JSON value, keys too: datasets key by label, answer or word."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)
