"""Kinds of files by their first bytes: why a file is not what was expected, and what to do."""

import re
from pathlib import Path
from typing import NamedTuple

HEAD = 4096  # bytes that are looked at
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# Answers of a server that were stored in place of the file: of any, and in the words of the hub
WEB_PAGE = re.compile(
    rb"(\xef\xbb\xbf)?\s*(<!doctype|<html|<head|<\?xml[^>]*>\s*<(!doctype|html|error))", re.I
)
ANSWER = re.compile(
    rb"(Entry|Repository|File|404:?|Page) not found|Invalid (username|credentials)|Access ?(to|denied)\b"
    rb"|401 |403 |404 |Unauthorized|Forbidden|Too many requests|Internal Server Error|Gateway|Bad gateway",
    re.I,
)
HUB_ADDRESS = re.compile(r"url\s*=\s*\S*huggingface\.co[:/](\S+?/\S+?)(?:\.git)?/?\s*$", re.M)
DOWNLOAD_AGAIN = "download it again"
# endings of files that a program is downloading: the hub's, browsers' and curl's, aria2's note beside one
UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".aria2")
# where the hub's program keeps them: below a `--local-dir`, and beside the snapshots of its cache
HUB_DOWNLOADS = (".cache/huggingface/download", "../../blobs")


class Kind(NamedTuple):
    """A format: its `name`, the bytes `magic` at the place `start`, and what shows that it was expected:
    a `word` in the description of the expected file, or the file's suffix."""

    name: str
    magic: bytes
    words: tuple[str, ...]
    start: int = 0


PICKLED = ("pickle", "pkl", "pytorch", "pt", "pth", "bin", "th", "ckpt")
KINDS = (
    Kind("a gzip file", b"\x1f\x8b", ("gz", "gzip", "tgz", "compressed")),
    Kind("an xz file", b"\xfd7zXZ\0", ("xz", "compressed")),
    Kind("a bzip2 file", b"BZh", ("bz2", "bzip2", "compressed")),
    Kind("a Zstandard file", b"\x28\xb5\x2f\xfd", ("zst", "zstandard", "compressed")),
    Kind("a zip archive", b"PK\x03\x04", ("zip", "npz", *PICKLED)),
    Kind("an empty zip archive", b"PK\x05\x06", ()),
    Kind("a 7z archive", b"7z\xbc\xaf\x27\x1c", ()),
    Kind("a RAR archive", b"Rar!\x1a\x07", ()),
    Kind("a tar archive", b"ustar", ("tar", "tars", "tgz"), 257),
    Kind("an HDF5 file", b"\x89HDF\r\n\x1a\n", ("hdf5", "h5", "hdf")),
    Kind("a numpy array (.npy)", b"\x93NUMPY", ("npy", "numpy")),
    Kind("a Parquet file", b"PAR1", ("parquet",)),
    Kind("an SQLite database", b"SQLite format 3\0", ("sqlite", "db")),
    Kind("a GGUF file", b"GGUF", ("gguf",)),
    Kind("a PNG image", b"\x89PNG", ("png", "image", "images", "picture")),
    Kind("a JPEG image", b"\xff\xd8\xff", ("jpg", "jpeg", "image", "images", "picture")),
    Kind("a GIF image", b"GIF8", ("gif", "image", "images", "picture")),
    Kind("a PDF", b"%PDF", ("pdf",)),
    Kind("a program", b"\x7fELF", ()),
    Kind("safetensors", b'{"', ("safetensors",), 8),
    *(Kind("a pickle", bytes((0x80, protocol)), PICKLED) for protocol in range(2, 6)),
)


def recognize(path: Path, expected: str) -> tuple[str, str]:
    """Return (why a file that could not be read as `expected` is none, what to do) as far as its first bytes
    tell; ("", "") where they do not."""
    try:
        if not path.is_file():  # a pipe would be waited for
            return "", ""
        with open(path, "rb") as file:
            head = file.read(HEAD)
    except (OSError, ValueError):
        return "", ""
    if path.suffix in UNFINISHED:
        return "an unfinished download, by its name", f"let it end, or {DOWNLOAD_AGAIN}"
    if not head:
        return "empty", "restore it, or " + DOWNLOAD_AGAIN
    if head.startswith(LFS_POINTER):
        return "a git-lfs pointer, not the file itself", _lfs_advice(path.parent)
    if not head.strip(b"\0"):
        return "zeros: an unfinished download, or copy", DOWNLOAD_AGAIN
    if WEB_PAGE.match(head) and not _is_expected(("html", "xml"), path, expected):
        return "a web page, such as a server sends in place of a file", DOWNLOAD_AGAIN
    if len(head) < 200 and ANSWER.match(head.strip()):
        return f"a server's answer in place of the file: {head[:60].decode(errors='replace')}", DOWNLOAD_AGAIN
    for kind in KINDS:
        if head.startswith(kind.magic, kind.start) and not _is_expected(kind.words, path, expected):
            return kind.name, "give the file that is meant"
    if partial := find_unfinished(path):
        return f"perhaps not whole: beside it is {partial}, an unfinished download", DOWNLOAD_AGAIN
    return "", ""


def find_unfinished(path: Path) -> Path | None:
    """Return an unfinished download of a file, or of one in a folder; None: there is none.

    A file's own is named after it; the hub's program names its own by hashes.
    """
    folder, begin = (path, "") if path.is_dir() else (path.parent, f"{path.name}.")
    places = [(folder, begin), *((folder / name, "") for name in HUB_DOWNLOADS)]
    try:
        found = [
            file
            for place, start in places
            if place.is_dir()
            for file in place.iterdir()
            if file.suffix in UNFINISHED and file.name.startswith(start)
        ]
    except OSError:
        return None
    return min(found, default=None)


def _is_expected(words: tuple[str, ...], path: Path, expected: str) -> bool:
    said = {*re.split(r"\W+", expected.lower()), *(s.lower().lstrip(".") for s in path.suffixes)}
    return not said.isdisjoint(words)


def _lfs_advice(folder: Path) -> str:
    """Return how to get the files of a cloned `folder` whose contents were left at their server."""
    clones = (above for above in (folder, *folder.absolute().parents) if (above / ".git/config").is_file())
    if clone := next(clones, None):
        with open(clone / ".git/config", encoding="utf-8", errors="replace") as file:
            if found := HUB_ADDRESS.search(file.read(HEAD)):
                again = f"hf download {found[1]} --local-dir {clone}"
                return f"`git lfs pull` in {clone}, or download it again: {again}"
    again = f"of the Hugging Face Hub: hf download NAME --local-dir {folder}"
    return f"`git lfs pull` in {clone or folder}, or download it again ({again})"
