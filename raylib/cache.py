"""Results that are made once and read often.

1. Objects that many trials of a search read and none changes: parsed files, tokens, matrices.
   `cached(name, key, fn)` is `fn()`. In a search, the first trial that asks calls `fn`, and the others get
   the same object from an `ObjectCache` (Ray's object store).
2. Indices of large files, `open_once(path, open)`: a process scans a file once, and hands what it found to
   its workers.
3. Encoder states of many items on disk: made by all workers together, and read by name. Memory stays bounded
   whatever the number of items: pages of the files come and go with the system's cache.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from raylib.data.index import FileBytes
from raylib.data.loading import prefetch, to_device, to_host
from raylib.display import progress
from raylib.distributed import barrier, broadcast_from_rank0, raise_on_all_workers, rank, world_size
from raylib.errors import NotFinite, UserError, reading
from raylib.fileio import MAX_JSON, file_lock, read_json_object
from raylib.finite import is_finite
from raylib.lock import make_folder
from raylib.packed import Ragged
from raylib.precision import autocast
from raylib.runtime import free_memory
from raylib.strict_json import Count

T = TypeVar("T")
CHUNK = 64  # images through an image encoder at a time
# no part of the data beside them: opening an LMDB writes the first, opening a shard the second
WRITTEN_BY_READERS = ("lock.mdb", ".index.bin")


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


_opened: dict[str, tuple[tuple, Any]] = {}  # path -> (fingerprint, what opening it made)


def open_once(path: Path, open: Callable[[Path], T]) -> T:
    """Return `open(path)`; or, of a file that has not changed, what it was in this process before, or in
    another trial. The object may be sent to other processes."""
    if not path.is_file():  # to see that nothing in a folder changed takes as long as to list it
        return open(path)
    key = file_fingerprint(path)
    if _opened.get(key[0], ((), None))[0] != key:
        _opened[key[0]] = key, cached("opened", key, lambda: open(path))
    return _opened[key[0]][1]


def opened_files() -> dict[str, tuple[tuple, Any]]:
    """Return what `open_once` has opened, for `share_opened` in another process."""
    return dict(_opened)


def share_opened(files: dict[str, tuple[tuple, Any]]) -> None:
    """Let `open_once` find what another process has opened."""
    _opened.update(files)


def file_fingerprint(path: str | Path) -> tuple:
    """Return (absolute path, (name, size, time of change) of the file or of each file of the folder)."""
    path = Path(path).absolute()
    files = [path] if path.exists() else []
    if path.is_dir():
        # `os.walk`, because readers follow links to folders and `rglob` does not
        below = (Path(folder, name) for folder, _, names in os.walk(path, followlinks=True) for name in names)
        files = sorted(p for p in below if p.is_file() and not p.name.endswith(WRITTEN_BY_READERS))
    return str(path), *((str(f.relative_to(path)), (s := f.stat()).st_size, s.st_mtime_ns) for f in files)


class StoredIndex(BaseModel):
    """The index of a worker's states; rows: first token, tokens of each item."""

    tokens: Count
    width: Count
    dtype: Literal["float32", "float16"]
    rows: dict[str, Annotated[list[Count], Field(min_length=2, max_length=2)]]
    faults: dict[str, str] = {}


class EncoderStates:
    """The folder that `write_encoder_states` made. May be sent to loader processes: files are opened where
    they are first read.

    Raises:
        UserError: the folder is damaged, or another's; names the file.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.faults: dict[str, str] = {}  # name of an item that could not be read -> why
        self.rows: dict[str, tuple[int, int, int]] = {}  # name -> (worker that wrote it, first token, tokens)
        self.shapes: list[tuple[int, int, str]] = []  # (tokens, width, dtype) of each worker's file
        for worker in range(len(list(folder.glob("index-*.json")))):
            path, what, advice = folder / f"index-{worker}.json", "an index of states", self._advice
            index = read_json_object(path, (), what, advice, shape=StoredIndex, most=MAX_JSON)
            with reading(path, what, advice):
                _require_fit(index, folder / f"states-{worker}.bin")
                shape = index["tokens"], index["width"], index["dtype"]
                # `read` puts items of several workers into one array
                others = {other[1:] for other in (*self.shapes, shape) if other[0]}
                if len(others) > 1:
                    raise ValueError(f"width and dtype {shape[1:]}, where another worker has others")
            self.shapes.append(shape)
            self.rows |= {name: (worker, first, count) for name, (first, count) in index["rows"].items()}
            self.faults |= index.get("faults", {})
        self._files: dict[int, FileBytes] = {}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_files": {}}

    @property
    def _advice(self) -> str:
        return f"delete {self.folder}, they are made again"

    def _find(self, names: Sequence[str]) -> list[tuple[int, int, int]]:
        """Rows of items."""
        try:
            return [self.rows[name] for name in names]
        except KeyError as error:
            raise UserError(f"{self.folder}: no states of {error.args[0]}; {self._advice}") from None

    def read(self, names: Sequence[str]) -> Ragged:
        """States of the items `names`, row after row: (T, d), as they were stored.

        Raises:
            UserError: there are none of an item, or they are not finite; names file and item.
        """
        # checked as a whole first, which costs one pass; item by item only to name the one at fault
        rows = self._find(names)
        lengths = [row[2] for row in rows]
        values = self._read(rows)
        if not is_finite(values):
            parts = values.split(lengths)
            bad = next(name for name, part in zip(names, parts, strict=True) if not is_finite(part))
            raise UserError(
                f"{self.folder}/states-{self.rows[bad][0]}.bin: states of {bad} are not finite (NaN or "
                f"infinite); {self._advice}"
            )
        return Ragged(values, torch.tensor(lengths))

    def read_first(self, names: Sequence[str]) -> Tensor:
        """The first state of each item, such as its CLS: (n, d), as stored."""
        return self._read([(worker, first, 1) for worker, first, _ in self._find(names)])

    def size(self, names: Sequence[str]) -> tuple[int, int]:
        """Count the tokens and the bytes of the states of these items."""
        rows = self._find(names)
        row_bytes = [width * np.dtype(dtype).itemsize for _, width, dtype in self.shapes]
        return sum(row[2] for row in rows), sum(row[2] * row_bytes[row[0]] for row in rows)

    def _read(self, rows: Sequence[tuple[int, int, int]]) -> Tensor:
        """(T, d) tokens of rows, (worker, first token, tokens) each."""
        _, width, dtype = self.shapes[rows[0][0]]
        values = np.empty((sum(tokens for *_, tokens in rows), width), dtype)
        row_bytes, place = width * values.itemsize, 0
        buffer = values.reshape(-1).view(np.uint8).data
        for worker, first, tokens in rows:
            if worker not in self._files:
                self._files[worker] = FileBytes(self.folder / f"states-{worker}.bin")
            end = place + tokens * row_bytes
            self._files[worker].read_into(buffer[place:end], first * row_bytes)
            place = end
        return torch.from_numpy(values)


def _require_fit(index: dict[str, Any], states: Path) -> None:
    """Raise ValueError where the rows of a worker's index do not lie in its `states`."""
    tokens = index["tokens"]
    wanted = tokens * index["width"] * np.dtype(index["dtype"]).itemsize
    if (size := states.stat().st_size) != wanted:
        raise ValueError(f"{states.name} has {size:,} bytes, and should have {wanted:,}")
    for name, (first, count) in index["rows"].items():
        if not 0 < count <= tokens - first:
            raise ValueError(f"row of {name!r:.40}: {first}, {count}, of {tokens} tokens")


class ItemStates:
    """States of the items `names` by number, float32 on `device`: all of them are brought there once, as they
    are stored, where they take no more than `budget` bytes (None: half of what a GPU has free); else those
    that are asked for are read from the files, pinned, and follow while the device works."""

    BLOCK = 256  # items read at a time

    def __init__(
        self, states: EncoderStates, names: Sequence[str], device: torch.device, budget: int | None = None
    ):
        self.states, self.names, self.device = states, names, device
        self.resident: Ragged | None = None
        tokens, size = states.size(names)
        if 0 < size <= (free_memory(device) // 2 if budget is None else budget):
            self.resident = self._upload(tokens)

    def read(self, items: Sequence[int]) -> Ragged:
        """States of some items, row after row: (T, d)."""
        if self.resident is not None:
            rows = self.resident.select_rows(torch.tensor(items))
        else:
            rows = to_device(self.states.read([self.names[i] for i in items]), self.device)
        return rows.with_values(rows.values.float())

    def read_first(self, items: Sequence[int]) -> Tensor:
        """The first state of each of some items: (n, d)."""
        if self.resident is not None:
            starts = to_device(self.resident.starts[torch.tensor(items)], self.device)
            return self.resident.values.index_select(0, starts).float()
        return to_device(self.states.read_first([self.names[i] for i in items]), self.device).float()

    def _upload(self, tokens: int) -> Ragged:
        values, lengths, start = None, [], 0
        for first in range(0, len(self.names), self.BLOCK):
            rows = self.states.read(self.names[first : first + self.BLOCK])
            if values is None:
                values = rows.values.new_empty(tokens, rows.values.shape[1], device=self.device)
            values[start : start + len(rows.values)] = to_device(rows.values, self.device)
            start += len(rows.values)
            lengths.append(rows.lengths)
        assert values is not None
        return Ragged(values, torch.cat(lengths))


def write_encoder_states(
    folder: Path,
    names: Sequence[str],
    read: Callable[[Sequence[str]], T],
    encode: Callable[[T], Ragged],
    batch: int,
    dtype: torch.dtype = torch.float32,
    unit: str = "images",
    faults: Mapping[str, str] = {},
) -> EncoderStates:
    """Encode all items `names` (unique), `batch` at a time, into `folder`; every worker does its share, and
    all wait for all. The folder appears whole: one that is there already is taken as it is. The next items
    are read, and the last states written, while the device works.

    Args:
        read: items -> the encoder's input; called in a thread.
        encode: this input -> states (T, d) on any device.
        dtype: what is stored: float32 or float16.
        unit: of progress: what the items are.
        faults: {name of an item that `read` could not read: why}, which `read` fills.

    Raises:
        NotFinite: states of an item are not finite, or too large for `dtype`.
    """
    write_sharded(
        folder,
        lambda out, rank, world: _write_share(
            out, rank, names[rank::world], read, encode, batch, dtype, unit, faults
        ),
    )
    return EncoderStates(folder)


class ImageReader(Protocol):
    """Images by name, as a model takes them."""

    def read_usable(self, names: Sequence[str]) -> tuple[Tensor, dict[str, str]]:
        """(images (n, size, size, 3), black in the place of each that cannot be used, {its name: why})."""


def precompute_features(
    model: Any, source: ImageReader, names: Iterable[str], folder: Path, bf16: bool = False
) -> EncoderStates:
    """All workers together: states of the images `names` after `model`'s image encoder, kept in `folder`;
    in float16 if they were made in bf16, which is no finer. Of images that cannot be used they say why."""
    device, faults = next(model.parameters()).device, dict[str, str]()

    def read(chunk: Sequence[str]) -> Tensor:
        images, found = source.read_usable(chunk)
        faults.update(found)
        return images

    def encode(images: Tensor) -> Ragged:
        with autocast(device, bf16):
            states = model.encode_images(to_device(images, device))
        return states.with_values(states.values.float())

    training, dtype = model.training, torch.float16 if bf16 else torch.float32
    model.eval()
    with torch.inference_mode():
        states = write_encoder_states(folder, sorted(set(names)), read, encode, CHUNK, dtype, faults=faults)
    model.train(training)
    return states


def write_sharded(folder: Path, write: Callable[[Path, int, int], None]) -> None:
    """Every worker does its share, `write(out, rank, world)`, and all wait for all. The folder appears whole:
    one that is there already is taken as it is; while another run is at it, it is waited for.

    Raises:
        NotFinite: on all workers, what `write` raised on one of them; the folder is not there then.
    """
    worker = rank()
    partial = folder.with_name(f".{folder.name}.partial")
    lock = folder.with_name(f".{folder.name}.lock")
    # one run at a time makes the folder; its other workers need no lock, for they wait for worker 0 below
    with file_lock(lock) if worker == 0 else contextlib.nullcontext():
        if broadcast_from_rank0(folder.is_dir()):
            if worker == 0:
                lock.unlink(missing_ok=True)  # which waiting for it may have made anew
            return
        if worker == 0:
            shutil.rmtree(partial, ignore_errors=True)
            make_folder(partial)
        barrier()
        # a worker that fails must reach the exchange all the same, or the others would wait for ever
        error = None
        try:
            write(partial, worker, world_size())
        except NotFinite as e:
            error = str(e)
        raise_on_all_workers(error)  # waits for all
        if worker == 0:
            partial.rename(folder)
            lock.unlink()  # whoever waits for it finds the folder, and whoever comes later needs no lock
        barrier()


def remove_encoder_states(folder: Path) -> None:
    """Remove states that were of use once, when no worker needs them any more."""
    barrier()
    if rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)


# numbers of a module that change nothing of what it makes of its inputs in evaluation
NO_EFFECT = re.compile(r"training|recomputes|num_pieces|gradient_checkpointing|p|.*drop.*")


def fingerprint_module(module: nn.Module, *facts) -> str:
    """A name for what `module` makes of inputs that `facts` tell: a hash of its weights, of the numbers that
    its parts hold beside them (heads, epsilons, windows) and of these."""
    digest = hashlib.sha256(repr(facts).encode())
    for name, part in sorted(module.named_modules()):
        numbers = {k: v for k, v in vars(part).items() if _is_number(v) and not NO_EFFECT.fullmatch(k)}
        digest.update(repr((name, type(part).__name__, sorted(numbers.items()))).encode())
    # by name, whatever the order in which parameters were made; in float32, whatever they train in
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | torch.dtype) or (
        isinstance(value, tuple) and all(map(_is_number, value))
    )


def _write_share(
    folder: Path,
    worker: int,
    names: Sequence[str],
    read: Callable[[Sequence[str]], Any],
    encode: Callable[[Any], Ragged],
    batch: int,
    dtype: torch.dtype,
    unit: str,
    faults: Mapping[str, str],
) -> None:
    rows: dict[str, tuple[int, int]] = {}
    tokens = width = 0
    chunks = [names[start : start + batch] for start in range(0, len(names), batch)]
    lengths: list[Tensor] = []

    def encoded() -> Iterator[Tensor]:
        inputs_of = prefetch((chunk, read(chunk)) for chunk in chunks)
        waited = progress(inputs_of, f"encode {unit}", len(names), unit, lambda pair: len(pair[0]))
        for _, inputs in waited:
            states = encode(inputs)
            lengths.append(states.lengths)
            # before the check: float16 overflows where float32 did not
            yield states.values.to(dtype)

    with open(folder / f"states-{worker}.bin", "wb") as file:
        for chunk, values in zip(chunks, to_host(encoded()), strict=True):
            states = Ragged(values, lengths.pop(0))
            if not is_finite(values):
                rows_of = zip(chunk, values.split(states.lengths.tolist()), strict=True)
                bad = next(name for name, row in rows_of if not is_finite(row))
                raise NotFinite(
                    f"states of {bad}: not finite (NaN or infinite) in {str(dtype).removeprefix('torch.')}"
                )
            starts = (tokens + states.starts).tolist()
            rows |= dict(zip(chunk, zip(starts, states.lengths.tolist(), strict=True), strict=True))
            tokens, width = tokens + len(values), values.shape[1]
            file.write(values.contiguous().numpy().data)
    index: dict[str, Any] = {"tokens": tokens, "width": width, "dtype": str(dtype).removeprefix("torch.")}
    index |= {"rows": rows, "faults": faults}
    (folder / f"index-{worker}.json").write_text(json.dumps(index, ensure_ascii=False), encoding="utf-8")
