"""Test images that are in a pretraining corpus: by their bytes, and by a perceptual hash that survives
another encoding or size.

    python -m pretrain overlap CORPUS DATA [--names FILE ...] [--json FILE]

CORPUS is a folder of image-text shards, or a corpus that holds one as `image_text`. DATA is a folder of
images, a tar of them, a retrieval set with `captions.json`, or shards. `--names` keeps those images of DATA
that annotation files name (IGLUE's .jsonl and .json files, or one name a line), where DATA holds training
images too; names without an image are counted.
"""

import multiprocessing
import os
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch

from raylib.data.images import BadImage, decode_image, is_image, read_image_file
from raylib.data.shards import MANIFEST
from raylib.data.sources import Source
from raylib.data.tars import TarScan
from raylib.display import markdown_table, percent, progress
from raylib.errors import UserError, reading
from raylib.fileio import MAX_JSON, nfc, read_json, require_unicode, write_json
from raylib.processes import end_with_parent
from raylib.provenance import provenance
from raylib.runtime import available_cpus
from raylib.settings import MAX_PIXELS
from raylib.strict_json import parse_json
from raylib.textfile import open_text

SIDE, LOW = 32, 8  # pixels a side that are transformed; lowest frequencies a side that are kept
# standard deviation of the grey levels, of 255, below which an image is all but one colour and has no hash
FLAT = 4.0
CHUNK = 512  # images hashed at a time by a process
# where annotations name images
FIELDS = re.compile(r"^(img_path|img_id|image|imageId|image_id|left_img|right_img|Flikr30kID|wit_ix)$")
PAIR = re.compile(
    r"^(\w+-\d+-\d+)-\d+$"
)  # an identifier of NLVR2, whose images are called by its first three parts
LOWER_COCO_PREFIX = re.compile(r"^coco_[a-z]+\d{4}_(?=\d{12}$)")  # of 2014; the number is the name of 2017


class ImageHashes(NamedTuple):
    """Of n images: names, hashes of the bytes (n,) uint64, perceptual hashes (n,) uint64; `flat` (n,) have
    none."""

    names: list[str]
    content: np.ndarray
    perceptual: np.ndarray
    flat: np.ndarray


def perceptual_hash(image: np.ndarray) -> tuple[int, bool]:
    """(64 bits, whether the image is flat) of an image, uint8 RGB (H, W, 3).

    The pHash of Zauner (2010): grey, 32 x 32 pixels, the 8 x 8 lowest frequencies of its cosine transform,
    each a bit: above their median or not. The first of them is the highest bit.
    """
    grey = cv2.resize(
        cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (SIDE, SIDE), interpolation=cv2.INTER_AREA
    ).astype(np.float32)
    low = cv2.dct(grey)[:LOW, :LOW].ravel()
    bits = np.packbits(low > np.median(low)).tobytes()
    return int.from_bytes(bits, "big"), float(grey.std()) < FLAT


def count_overlap(corpus: ImageHashes, test: ImageHashes, distance: int) -> dict[str, Any]:
    """Count the test images that are in `corpus`.

    Returns:
        {"images", "flat": of them, "same_bytes", "by_distance": {bits that differ from the nearest image of
        the corpus, up to `distance`: images}, "pairs": [{"test", "corpus", "distance", "same_bytes"}]}, of
        each image its nearest alone.
    """
    known = {int(value): i for i, value in enumerate(corpus.content)}
    candidates = np.flatnonzero(~corpus.flat)
    pairs: list[dict[str, Any]] = []
    for i, name in enumerate(test.names):
        nearest, bits = known.get(int(test.content[i])), 0
        same_bytes = nearest is not None
        if not same_bytes and not test.flat[i] and len(candidates):
            apart = np.bitwise_count(corpus.perceptual[candidates] ^ test.perceptual[i])
            nearest, bits = candidates[apart.argmin()], int(apart.min())
        if nearest is not None and bits <= distance:
            found = corpus.names[nearest]
            pairs.append({"test": name, "corpus": found, "distance": bits, "same_bytes": same_bytes})
    distances = Counter(pair["distance"] for pair in pairs)
    return {
        "images": len(test.names),
        "flat": int(test.flat.sum()),
        "same_bytes": sum(p["same_bytes"] for p in pairs),
        "by_distance": {bits: distances[bits] for bits in range(distance + 1)},
        "pairs": pairs,
    }


def hash_images(
    images: Iterable[tuple[str, bytes]],
    processes: int,
    total: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> tuple[ImageHashes, int]:
    """(hashes, how many images do not decode, or have more than `max_pixels`, and are left out) of (name,
    encoded bytes), in order."""
    images, results = progress(images, "hash", total, "images"), []
    waiting: deque[Future] = deque()
    # spawned, not forked: children would inherit the locks of OpenCV's and BLAS's threads
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, end_with_parent) as pool:
        while chunk := list(islice(images, CHUNK)):
            waiting.append(pool.submit(_hash_chunk, chunk, max_pixels))
            # encoded images of a few chunks are in memory at a time: a corpus does not fit
            if len(waiting) > 2 * processes:
                results.append(waiting.popleft().result())
        results += [future.result() for future in waiting]
    rows = [row for hashed, _ in results for row in hashed]
    names, content, perceptual, flat = zip(*rows, strict=True) if rows else ((), (), (), ())
    arrays = np.array(content, np.uint64), np.array(perceptual, np.uint64), np.array(flat, bool)
    return ImageHashes(list(names), *arrays), sum(bad for _, bad in results)


def _hash_chunk(
    images: Sequence[tuple[str, bytes]], max_pixels: int
) -> tuple[list[tuple[str, int, int, bool]], int]:
    rows, bad = [], 0
    for name, data in images:
        try:
            bits, flat = perceptual_hash(decode_image(data, name, max_pixels))
        except BadImage:
            bad += 1
            continue
        rows.append((name, int.from_bytes(blake2b(data, digest_size=8).digest(), "big"), bits, flat))
    return rows, bad


def open_corpus(path: Path) -> Source:
    """Return the image-text source at `path`, or in its folder `image_text`."""
    return Source(path if (path / MANIFEST).is_file() else path / "image_text", "image_text")


def read_source(source: Source) -> Iterator[tuple[str, bytes]]:
    """(shard and key, encoded bytes) of every image of a source."""
    for language in source.groups:
        for number in range(source.size(language)):
            sample = source.sample(language, number)
            for extension in sample.images:
                yield f"{sample.shard.path.name}: {sample.key}.{extension}", sample.read(extension)


def stream_images(path: Path) -> Iterator[tuple[str, bytes]]:
    """(name, encoded bytes) of every image of a folder, a tar, or shards.

    Raises:
        UserError: neither a folder nor a tar.
    """
    if (path / MANIFEST).is_file():
        yield from read_source(open_corpus(path))
    elif path.is_dir():
        for file in sorted(p for p in path.rglob("*") if _is_image(p.name)):
            if not file.is_file():
                raise UserError(f"{file}: a pipe, or a link to nothing, in place of an image; remove it")
            yield require_unicode(str(file.relative_to(path)), path), read_image_file(file)
    elif path.suffix == ".tar" and path.is_file():
        with open(path, "rb") as tar:
            for name, (offset, size, *_) in TarScan(path, hashes=False).files.items():
                if _is_image(name):
                    yield name, os.pread(tar.fileno(), size, offset)
    else:
        raise UserError(f"{path}: neither a folder nor a .tar of images")


def _keep(
    images: Iterable[tuple[str, bytes]], names: set[str], found_names: set[str]
) -> Iterator[tuple[str, bytes]]:
    """Yield the images that `names` names, all if it is empty; adds what they are called to `found_names`."""
    for name, data in images:
        stem = _stem(name)
        if not names or stem in names:
            found_names.add(stem)
            yield name, data


def _is_image(name: str) -> bool:
    base = os.path.basename(name)
    return is_image(base.lower()) and not base.startswith(".")


def read_names(path: Path) -> set[str]:
    """Names of images, as `_stem` has them, in an annotation file: of JSON, the values of the fields that
    name images; of another file, its lines.

    Raises:
        UserError: not to be read, or no name in it.
    """
    names: set[str] = set()
    if path.suffix == ".json":
        what, advice = "JSON that names images", "take an undamaged copy, or a file with a name a line"
        names.update(_named(read_json(path, what, advice, most=MAX_JSON)))
    else:
        with open_text(path, has_lines=True) as file:
            for number, line in enumerate(file, 1):
                if path.suffix == ".jsonl" and line.strip():
                    with reading(f"{path}:{number}", "a line of JSON that names images"):
                        names.update(_named(parse_json(line)))
                elif line.strip():
                    names.add(line.strip())
    if not names:
        raise UserError(
            f"{path}: no names of images in it; fields like img_path, imageId and left_img are looked for"
        )
    return {_stem(name) for name in names}


def _named(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if FIELDS.match(key) and type(inner) in (str, int):
                yield str(inner)
            elif key == "identifier" and isinstance(inner, str) and (pair := PAIR.match(inner)):
                yield from (f"{pair[1]}-img0", f"{pair[1]}-img1")
            else:
                yield from _named(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _named(inner)


def _stem(name: str) -> str:
    """Return a name without folder, ending, case, form of Unicode and what MSCOCO's names of 2014 begin
    with."""
    base = nfc(os.path.basename(name))
    return LOWER_COCO_PREFIX.sub("", (base.rsplit(".", 1)[0] if _is_image(base) else base).casefold())


def overlap_table(result: dict[str, Any]) -> str:
    """Markdown: how many test images are in the corpus, by how sure that is."""
    total, rows, within = result["images"], [["test images in the corpus", "images", "%"]], 0
    rows.append(["the same bytes", str(result["same_bytes"]), percent(result["same_bytes"] / total)])
    for bits, count in result["by_distance"].items():
        within += count
        rows.append([f"perceptual hash at most {bits} of 64 bits away", str(within), percent(within / total)])
    return markdown_table(rows)


def report_overlap(
    corpus_path: Path,
    data: Path,
    annotations: Sequence[Path],
    distance: int,
    to: Path | None,
    max_pixels: int = MAX_PIXELS,
) -> None:
    """Print, and write into the file `to`, how many images of `data`, of those that `annotations` name, are
    in a corpus."""
    source = open_corpus(corpus_path)
    processes = available_cpus()
    names = set().union(*map(read_names, annotations))
    found_names: set[str] = set()
    kept = _keep(stream_images(data), names, found_names)
    test, bad_test = hash_images(kept, processes, max_pixels=max_pixels)
    if not test.names:
        why = f"none of its {bad_test} images decodes" if bad_test else "no image in it"
        raise UserError(f"{data}: {why}{' that --names names' if names and not bad_test else ''}")
    missing = sorted(names - found_names)
    total = sum(map(source.size, source.groups))
    corpus, bad_corpus = hash_images(read_source(source), processes, total, max_pixels)
    result = {
        "corpus": str(corpus_path),
        "data": str(data),
        "corpus_images": len(corpus.names),
        "undecodable": {"corpus": bad_corpus, "data": bad_test},
        "missing": missing,
        **provenance(torch.device("cpu")),
        **count_overlap(corpus, test, distance),
    }
    print(overlap_table(result))
    print(
        f"{result['images']} test images, {result['corpus_images']} of the corpus; {bad_test} and "
        f"{bad_corpus} do not decode; {result['flat']} test images are all but one colour and are compared "
        "by bytes alone"
    )
    if missing:
        print(
            f"{len(missing)} of {len(names)} images that --names names are not in {data} and are not "
            f"counted, such as {missing[0]}"
        )
    for pair in result["pairs"][:5]:
        apart = "same bytes" if pair["same_bytes"] else f"{pair['distance']} bits"
        print(f"  {pair['test']} = {pair['corpus']} ({apart})")
    if to:
        write_json(to, result)
        print(f"every pair: {to}")
