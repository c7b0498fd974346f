"""Shards: uncompressed WebDataset tars with a manifest and member offsets beside them.

A *source* is a folder:

    manifest.json          {"format": 1, "kind": KIND, "tokenizer": sha256 or null, "shards": [{"name",
                           "language", "samples", "bytes", "sha256"}, ...], "images": [extensions that are
                           images, ...]}
    en-000000.tar          the members of one sample lie together: KEY.json, KEY.png, ... (any WebDataset
                           reader's input)
    en-000000.index.json   where the members of each sample lie, and en-000000.index.bin, its copy that is
                           mapped into memory (`raylib.data.index`)

Kinds: `image_text` (a member of captions, one or more images), `text` and `parallel` (packed,
pre-tokenised: one "sample" of the tar is a block of up to BLOCK_ROWS sentences or sentence pairs:
KEY.ids.npy, all ids end to end, and KEY.ends.npy (rows, sides), running ends). `samples` in the manifest
counts what training draws: images, or rows.

Everything is written under a temporary name and renamed, the manifest last. `python -m raylib.data.shards
FOLDER KIND` makes the indices and the manifest for anybody's tars (`tars` says what it takes), several tars
at a time. `raylib.data.sources` reads all this.
"""

import io
import itertools
import multiprocessing
import os
import re
import signal
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Self

import numpy as np
from pydantic import AfterValidator

from raylib.command import command_parser, entry_point, local_path
from raylib.data.index import index_path, json_path, list_samples, read_npy_header, write_index
from raylib.data.tars import META, FolderSummary, TarScan
from raylib.display import hide_progress, progress
from raylib.errors import UserError, reading
from raylib.fileio import MAX_JSON, read_json_object, write_json
from raylib.processes import end_with_parent
from raylib.strict_json import check_shape
from raylib.text import is_language_code, language_of

KINDS = {"image_text": 1, "text": 1, "parallel": 2}  # kind -> sides
BLOCK_ROWS = 8192
MANIFEST = "manifest.json"
PLAIN_NAME = re.compile(r"(?![.-])[^/\\\x00-\x1f\x7f]+\.tar")
SERIAL_BYTES = 64 << 20  # of tars that are read faster than other processes start


def _check_shard_name(name: str) -> str:
    if not PLAIN_NAME.fullmatch(name):
        raise ValueError(f"shard name {name!r:.100} is no plain file name that ends in .tar")
    return name


ShardName = Annotated[str, AfterValidator(_check_shard_name)]


def index_folder(
    folder: Path | str,
    kind: str,
    language: str | None = None,
    summary: FolderSummary | None = None,
    workers: int | None = None,
) -> dict:
    """Index every tar of a folder and write its manifest: makes a source out of anybody's tars.

    Args:
        language: of all shards. None takes it from their names where these begin with a known code
            (`raylib.text`); other shards of image_text are English.
        summary: says which members are images; what was found is added to it. None: one of the plain ones.
        workers: processes, each of which reads a tar at a time; None: as many as there are CPUs. The result
            does not depend on it.

    Raises:
        UserError: no such folder, no tar in it, one that cannot be indexed (`TarScan`); a language that is no
            code, or a name that tells none; images that are not there, or several of which one is meant.
    """
    folder, summary = Path(folder), summary or FolderSummary()
    check_kind(kind)
    if language is not None and not is_language_code(language):
        raise UserError(f"language {language!r}: wanted a code like 'de' or 'zh-Hans'")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    # hidden ones are other writers' temporary files; macOS hides one beside each tar
    tars = sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))
    if not tars:
        packed = len([*folder.glob("*.tar.*"), *folder.glob("*.tgz")])
        raise UserError(
            f"{folder}: no .tar file here"
            + (f", but {packed} compressed ones: unpack them" if packed else "")
        )
    # the names come first: a tar of an hour's reading is not to fail by its name afterwards
    codes = [language or _language_of(path, kind) for path in tars]
    tasks = [
        (path, path, code, kind, FolderSummary(summary.listed))
        for path, code in zip(tars, codes, strict=True)
    ]
    shards = []
    for entry, part in _index_shards(tasks, f"index {folder}", workers):
        summary.merge(part or FolderSummary())
        shards.append(entry)
    manifest = {"format": 1, "kind": kind, "tokenizer": None, "shards": shards}
    if kind == "image_text":
        manifest["images"] = summary.select_images(folder)
    write_json(folder / MANIFEST, manifest)
    return manifest


def _language_of(path: Path, kind: str) -> str:
    """Return the language that the name of a tar begins with.

    Raises:
        UserError: it begins with none, and the kind has no usual one.
    """
    code = language_of(path.name, loose=kind != "image_text")
    if code is None and kind != "image_text":
        raise UserError(f"{path}: its name begins with no language code; say the language, --language CODE")
    return code or "en"


ShardTask = tuple[Path, Path, str, str, FolderSummary | None]  # arguments of `_index_shard`


def _index_shards(
    tasks: Sequence[ShardTask], description: str, workers: int | None = None
) -> Iterator[tuple[dict, FolderSummary | None]]:
    """Yield `_index_shard(*task)` of each task, in their order, of several at a time."""
    num_bytes = sum(task[0].stat().st_size for task in tasks if task[0].is_file())
    from raylib.runtime import available_cpus

    workers = min(workers or available_cpus(), len(tasks))
    if workers == 1 or num_bytes < SERIAL_BYTES:
        yield from progress(itertools.starmap(_index_shard, tasks), description, len(tasks), "shards")
        return
    # forked: they hash and read headers, and touch no library that has threads
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, context, _start_indexing) as pool:
        # processes, for reading headers holds Python's lock about as long as hashing runs without it
        results = pool.map(_index_shard, *zip(*tasks, strict=True))
        yield from progress(results, description, len(tasks), "shards")


def _start_indexing() -> None:
    """Let Ctrl-C and SIGTERM end a process of the pool without a word: its parent has one."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    hide_progress()


def _index_shard(
    path: Path, final: Path, language: str, kind: str, summary: FolderSummary | None
) -> tuple[dict, FolderSummary | None]:
    """Index the tar `path`, which gets the name `final`; return it as the manifest lists it, and the summary
    with what is in it."""
    scan = TarScan(path)
    if not scan.samples:
        raise UserError(f"{path}: holds no sample")
    for key, members in scan.samples.items():
        if kind != "image_text" and not members.keys() >= {"ids.npy", "ends.npy"}:
            raise UserError(
                f"{path}: sample {key} holds {', '.join(sorted(members))}, and shards of kind {kind!r} "
                "packed ids (ids.npy, ends.npy), which `python -m pretrain.corpora` writes"
            )
    if summary:
        summary.add(scan)
    samples = list_samples(scan)
    if final != path:
        os.replace(path, final)
    write_index(final, scan.bytes, samples)
    num_rows = sum(sample.rows for sample in samples)
    return {
        "name": final.name,
        "language": language,
        "samples": num_rows,
        "bytes": scan.bytes,
        "sha256": scan.sha256,
    }, summary


def index_command(folder: Path | str, kind: str) -> str:
    """The command that makes a manifest for a folder of tars."""
    return f"python -m raylib.data.shards {folder} {kind}"


def check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise UserError(f"kind {kind!r} of shards is unknown; one of: {', '.join(KINDS)}")


class ShardWriter:
    """Writes a source; use it as a context manager. Nothing appears before the block ends without an error.

        with ShardWriter(folder, "image_text") as writer:
            writer.write("cat", {"json": b'{"captions": {"en": ["a cat"]}}', "png": data})
        with ShardWriter(folder, "parallel", tokenizer) as writer:
            writer.write_rows("de", [(english_ids, german_ids), ...])

    Args:
        tokenizer: what made the ids (`.sha256`, `.vocabulary`); needed for packed kinds.
        max_samples, max_bytes: a shard is closed once it holds that many samples (rows) or bytes.

    A source that stood in the folder before is replaced: its shards and manifest go when the new ones are in
    place.
    """

    def __init__(
        self, folder, kind: str, tokenizer=None, max_samples: int | None = None, max_bytes: int = 1 << 30
    ):
        check_kind(kind)
        self.folder, self.kind, self.tokenizer, self.sides = Path(folder), kind, tokenizer, KINDS[kind]
        self.packed = kind != "image_text"
        if self.packed and tokenizer is None:
            raise ValueError(f"shards of kind {kind!r} hold ids: pass the tokenizer that made them")
        self.max_samples = max_samples or (1 << 22 if self.packed else 10_000)
        self.max_bytes = max_bytes
        self.images: set[str] = set()  # extensions that are images, for the manifest
        self.open: dict[str, _TarWriter] = {}
        self.done: list[tuple[Path, str, str]] = []  # temporary path, final name, language
        self.pending: dict[str, list] = {}  # packed rows that wait for a full block
        self.count: dict[str, int] = {}
        self.blocks = 0
        self.stale: set[str] = set()

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.stale = _list_stale(self.folder / MANIFEST)  # first: nothing is lost where it is damaged
        return self

    def write(self, key: str, members: dict[str, bytes], language: str = "en") -> None:
        """Append one sample: members by extension ("json", "noto.png"). Keys have no dot in their base
        name."""
        name = key.rsplit("/", 1)[-1]
        # a dot would end the key there (WebDataset), and readers skip what is __like_this__
        if not name or "." in name or META.match(key):
            raise ValueError(f"key {key!r}: a sample's key is not empty, has no dot, is not __like_this__")
        if not members:
            raise ValueError(f"sample {key!r} has no members")
        shard = self.open.get(language)
        if shard is None:
            number = self.count[language] = self.count.get(language, -1) + 1
            shard = self.open[language] = _TarWriter(self.folder, f"{language}-{number:06d}.tar", language)
        # WebDataset joins members of equal keys that lie together into one sample
        if shard.last == key:
            raise ValueError(f"key {key!r} twice in a row: readers would take it for one sample")
        shard.add(key, members)
        shard.samples += read_npy_header(ends := members["ends.npy"], len(ends))[1][0] if self.packed else 1
        if shard.samples >= self.max_samples or shard.file.tell() >= self.max_bytes:
            self.done.append(self.open.pop(language).close())

    def write_rows(self, language: str, rows) -> None:
        """Append sentences (kind text: arrays of ids) or pairs (kind parallel: (English ids, other ids)).

        Ids without specials, untruncated. Raises ValueError for an empty side or an id outside the
        vocabulary.
        """
        pending = self.pending.setdefault(language, [])
        for row in rows:
            sides = [np.asarray(side) for side in (row if self.sides == 2 else (row,))]
            if len(sides) != self.sides or any(side.ndim != 1 or not side.size for side in sides):
                raise ValueError(
                    f"a row of kind {self.kind!r} is {self.sides} non-empty list(s) of ids, got {row!r}"
                )
            pending.append(sides)
            if len(pending) == min(BLOCK_ROWS, self.max_samples):
                self._flush(language)

    def _flush(self, language: str) -> None:
        sides = [side for row in self.pending[language] for side in row]
        self.pending[language].clear()
        ids = np.concatenate(sides)
        if ids.min() < 0 or ids.max() >= self.tokenizer.vocabulary:
            raise ValueError(
                f"{language}: id {ids.min()} or {ids.max()} is outside 0..{self.tokenizer.vocabulary - 1}"
            )
        # most vocabularies of one language fit 16 bits: half the bytes to read
        ids = ids.astype(np.uint16 if self.tokenizer.vocabulary < 65536 else np.uint32)
        ends = np.cumsum([side.size for side in sides]).astype(np.uint32).reshape(-1, self.sides)
        self.write(f"{self.blocks:08d}", {"ids.npy": to_npy(ids), "ends.npy": to_npy(ends)}, language)
        self.blocks += 1

    def __exit__(self, kind, error, trace) -> None:
        try:
            if error is None:
                self._publish()
        finally:
            # after an error nothing stays, after none these are empty
            for shard in self.open.values():
                shard.close()[0].unlink()
            for temporary, _, _ in self.done:
                temporary.unlink(missing_ok=True)

    def _publish(self) -> None:
        for language, pending in self.pending.items():
            if pending:
                self._flush(language)
        while self.open:
            self.done.append(self.open.popitem()[1].close())
        # new shards take their names first, then the manifest names them, and only then the old ones go: a
        # reader that opens the folder meanwhile finds every shard of the manifest that it reads
        # read back from the disk: what is indexed is what lies there
        tasks = [
            (temporary, self.folder / name, language, self.kind, None)
            for temporary, name, language in sorted(self.done, key=lambda item: item[1])
        ]
        shards = [entry for entry, _ in _index_shards(tasks, f"index {self.folder}")]
        sha256 = self.tokenizer.sha256 if self.tokenizer else None
        manifest = {"format": 1, "kind": self.kind, "tokenizer": sha256, "shards": shards}
        if self.images:
            manifest["images"] = sorted(self.images)
        write_json(self.folder / MANIFEST, manifest)
        for name in self.stale - {shard["name"] for shard in shards}:
            (self.folder / name).unlink(missing_ok=True)
            index_path(self.folder / name).unlink(missing_ok=True)
            json_path(self.folder / name).unlink(missing_ok=True)


def _list_stale(manifest: Path) -> set[str]:
    """Return the names of the shards of a manifest that is written anew."""
    if not manifest.exists():
        return set()
    what, advice = "a manifest of shards", "delete it, or write into another folder"
    shards = read_json_object(manifest, ("shards",), what, advice, most=MAX_JSON)["shards"]
    with reading(manifest, what, advice):
        names = [shard["name"] for shard in shards]
        check_shape(names, list[ShardName])  # they will be deleted: none may lead out of the folder
        return set(names)


class _TarWriter:
    """One tar being written under a temporary name; same input, same bytes (no times, no owners)."""

    def __init__(self, folder: Path, name: str, language: str):
        self.name, self.language, self.samples = name, language, 0
        self.last: str | None = None
        self.path = folder / f".{name}.{os.getpid()}"
        self.file = open(self.path, "wb")  # noqa: SIM115  close() closes both
        self.tar = tarfile.TarFile(fileobj=self.file, mode="w", format=tarfile.PAX_FORMAT)

    def add(self, key: str, members: dict[str, bytes]) -> None:
        self.last = key
        for extension, data in members.items():
            member = tarfile.TarInfo(f"{key}.{extension}")
            # no time, no owner: equal samples give equal bytes, and so equal hashes
            member.size, member.mode = len(data), 0o444
            self.tar.addfile(member, io.BytesIO(data))

    def close(self) -> tuple[Path, str, str]:
        self.tar.close()
        self.file.close()
        return self.path, self.name, self.language


def to_npy(array: np.ndarray) -> bytes:
    np.save(file := io.BytesIO(), array, allow_pickle=False)
    return file.getvalue()


@entry_point()
def main(arguments: Sequence[str]) -> int:
    parser = command_parser(
        "raylib.data.shards",
        "Index anybody's WebDataset tars: write FOLDER/manifest.json, by which they are read.",
    )
    parser.add_argument("folder", type=local_path)
    parser.add_argument("kind", help=" or ".join(KINDS))
    parser.add_argument(
        "--language", help="code of all shards; else what their names begin with, or en for image_text"
    )
    parser.add_argument(
        "--images", nargs="+", metavar="EXTENSION", help="members that are images, such as jpg or noto.png"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes; default: as many as CPUs")
    args = parser.parse_args(arguments)
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers {args.workers}: give 1 or more")
    summary = FolderSummary(args.images)
    manifest = index_folder(args.folder, args.kind, args.language, summary, args.workers)
    shards = manifest["shards"]
    languages: Counter[str] = Counter()
    for shard in shards:
        languages[shard["language"]] += shard["samples"]
    found = ", ".join(f"{count} {language}" for language, count in languages.items())
    print(f"{args.folder}: {len(shards)} shards, {languages.total()} samples; by language: {found}")
    for line in summary.describe(manifest.get("images")):
        print(f"  {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
