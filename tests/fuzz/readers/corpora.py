"""Readers of what pretraining corpora are built from, and of what is evaluated zero-shot."""

import gzip
from pathlib import Path
from typing import Any

from tests.fuzz.reader import Reader


def example_pairs(folder: Path) -> Path:
    path = folder / "WikiMatrix.de-en.tsv.gz"
    lines = "".join(f"1.{number}\tSatz {number}\tSentence {number}\n" for number in range(5, 9))
    path.write_bytes(gzip.compress(lines.encode(), mtime=0))
    return path


def read_pairs(path: Path) -> Any:
    from pretrain.corpus_formats import Tally, read_pairs

    tally = Tally(path, limit=0.0)
    pairs = []
    for pair in read_pairs(path, tally, "de"):
        tally.good += 1
        pairs.append(pair)
    tally.close()
    return pairs


def load_pairs(path: Path) -> Any:
    text = gzip.decompress(path.read_bytes()).decode("utf-8-sig")
    rows = [line.rstrip("\r").split("\t") for line in text.removesuffix("\n").split("\n")]
    if len(rows[0]) == 3:
        rows = [row[1:] for row in rows if float(row[0]) >= 1.04]
    pairs = [(english.strip(), other.strip()) for other, english in rows]
    assert all(map(all, pairs))
    return pairs


READERS = [
    Reader(
        name="pairs_gz",
        example=example_pairs,
        read=read_pairs,
        oracle=load_pairs,
        covers=("pretrain.corpus_formats:read_pairs", "pretrain.corpus_formats:read_lines"),
    ),
]
