"""Objects that many trials of a search read and none changes: parsed files, tokens, matrices.

`cached(name, key, fn)` is `fn()`. In a search, the first trial that asks calls `fn`, and the others get the
same object from an `ObjectCache` (Ray's object store).
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class ObjectCache(Protocol):
    """An object store that the trials of one search share."""

    folder: Path  # of the search, for files that its trials share

    def get_or_create(self, key: str, fn: Callable[[], Any]) -> Any:
        """Return the object stored under `key`; if there is none, store `fn()` and return it."""


_cache: ObjectCache | None = None


def set_cache(cache: ObjectCache | None) -> None:
    """Let `cached` in this process keep objects in `cache`; None: nowhere."""
    global _cache
    _cache = cache


def get_cache() -> ObjectCache | None:
    """Return the cache that `cached` in this process keeps objects in."""
    return _cache


def cached(name: str, key: tuple, fn: Callable[[], T]) -> T:
    """Return `fn()`, or the object that another trial got for the same `name` and `key`. The object must
    follow from `key` alone; keys are equal if their `repr` is."""
    if _cache is None:
        return fn()
    return _cache.get_or_create(f"{name}-{hashlib.sha256(repr(key).encode()).hexdigest()[:24]}", fn)


def file_fingerprint(path: str | Path) -> tuple:
    """Return (absolute path, (name, size, time of change) of the file or of each file of the folder)."""
    path = Path(path).absolute()
    files = [path] if path.exists() else []
    if path.is_dir():
        # `os.walk`, because readers follow links to folders and `rglob` does not. lock.mdb is left out,
        # because opening an LMDB for reading writes it.
        below = (Path(folder, name) for folder, _, names in os.walk(path, followlinks=True) for name in names)
        files = sorted(p for p in below if p.is_file() and p.name != "lock.mdb")
    return str(path), *((str(f.relative_to(path)), (s := f.stat()).st_size, s.st_mtime_ns) for f in files)
