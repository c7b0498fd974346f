"""Things that many trials of a search read and none changes: parsed files, tokens, matrices.

`shared(what, facts, make)` is `make()`; in a search the first that asks makes it, and the others get the same
from a store (`raylib.search.object_cache`: Ray's object store). What is asked for must follow from `facts`
alone.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Store(Protocol):
    folder: Path  # of the search: where files lie that its trials share

    def fetch(self, key: str, make: Callable[[], Any]) -> Any:
        """What is kept under `key`, or else what `make` makes, kept from then on."""


_store: Store | None = None


def use(store: Store | None) -> None:
    """From now on `shared` in this process keeps things in `store`; None: it makes them each time."""
    global _store
    _store = store


def store() -> Store | None:
    """What `shared` in this process keeps things in."""
    return _store


def shared(what: str, facts: tuple, make: Callable[[], T]) -> T:
    """`make()`, or what it was for another trial that asked for `what` with the same `facts` (told apart by
    their `repr`)."""
    if _store is None:
        return make()
    return _store.fetch(f"{what}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:24]}", make)


def stamp(path: str | Path) -> tuple:
    """What tells a file, or a folder of files, from what it was before: names, sizes and times of change."""
    path = Path(path).absolute()
    files = [path] if path.exists() else []
    if (
        path.is_dir()
    ):  # readers follow links to folders, which `rglob` does not; whoever reads an LMDB writes its lock.mdb
        below = (Path(folder, name) for folder, _, names in os.walk(path, followlinks=True) for name in names)
        files = sorted(p for p in below if p.is_file() and p.name != "lock.mdb")
    return str(path), *((str(f.relative_to(path)), (s := f.stat()).st_size, s.st_mtime_ns) for f in files)
