"""Writing of checkpoints: durable, every byte once, hashed on its way to the disk, beside the training.

A save is `CheckpointWriter.save(step, files)` on every worker:

1. `HostCopy` copies this worker's tensors into host memory, and training goes on.
2. A thread of each worker writes them into one folder under a partial name, and has them synced to the disk.
   The workers' threads meet in a process group of their own.
3. Worker 0 renames the folder, registers it (`raylib.checkpoint.register`), and only then drops older ones.

Killed at any moment, this leaves the older checkpoints registered, or these and the new one. The next save
waits for this one, and so does the end of the run. What a thread meets (a full disk) is raised by the next
call on all workers.
"""

import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from raylib import checkpoint
from raylib.distributed import gather_objects
from raylib.errors import MachineError, UserError, error_line, name_errors
from raylib.fileio import sync_file, sync_folder, write_json
from raylib.lock import require_owned

FileContent = bytes | Mapping[str, Tensor]  # tensors are written as safetensors
Files = Mapping[str, FileContent]  # of a folder, by name
CHUNK = 1 << 24  # bytes written, and hashed, at a time
ALIGNMENT = 64  # of tensors in host memory
DTYPES = {  # https://github.com/huggingface/safetensors, format
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


def write_files(folder: Path, files: Files, needed: int | None = None) -> dict[str, dict[str, Any]]:
    """Write `files` into `folder`, each once, and wait until they are on the disk. Returns {name: {"bytes",
    "sha256"}}. needed: bytes, all workers' files together.

    Raises:
        MachineError: a full disk, no permission.
    """
    written = {}
    for name, content in files.items():
        with name_errors(folder / name, needed):
            written[name] = _write_file(folder / name, content)
    return written


def num_bytes(files: Files) -> int:
    """Return how many bytes `files` take."""
    return sum(sum(map(len, _head_of(content))) + _data_bytes(content) for content in files.values())


def _write_file(path: Path, content: FileContent) -> dict[str, Any]:
    sha256, size = hashlib.sha256(), 0
    with open(path, "wb", buffering=1 << 20) as file:
        for part in _parts(content):
            # in pieces: the system writes one while the next is hashed
            for start in range(0, len(part), CHUNK):
                piece = part[start : start + CHUNK]
                file.write(piece)
                sha256.update(piece)
                size += len(piece)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": sha256.hexdigest()}


def _parts(content: FileContent) -> Iterator[bytes | memoryview]:
    yield from _head_of(content)
    if not isinstance(content, bytes):
        for name in _order(content):
            values = content[name].detach().cpu().contiguous().reshape(-1)
            if len(values):
                yield values.view(torch.uint8).numpy().data


def _head_of(content: FileContent) -> Iterator[bytes]:
    """Yield the whole of bytes; of tensors the header of a safetensors file."""
    if isinstance(content, bytes):
        yield content
        return
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in _order(content):
        x = content[name]
        header[name] = {
            "dtype": DTYPES[x.dtype],
            "shape": list(x.shape),
            "data_offsets": [offset, offset + x.nbytes],
        }
        offset += x.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text


def _order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names in the order of a safetensors file: wide elements first, so that all are aligned without gaps."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def _data_bytes(content: FileContent) -> int:
    return 0 if isinstance(content, bytes) else sum(x.nbytes for x in content.values())


class HostCopy:
    """Host memory for a worker's part of a checkpoint, kept from one save to the next; page-locked for a GPU,
    from which a stream of its own copies while the device computes."""

    def __init__(self, device: torch.device):
        self.device = device
        self.buffer = torch.empty(0, dtype=torch.uint8)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.copied: torch.cuda.Event | None = None

    def take(self, files: Files) -> dict[str, FileContent]:
        """Return `files` with tensors in host memory, whose content is that of this moment of the device's
        work: `wait_on_device` before anything changes the tensors, `wait_on_host` before the copies are
        read."""
        tensors = [
            x for content in files.values() if not isinstance(content, bytes) for x in content.values()
        ]
        needed = sum(_aligned(x.nbytes) for x in tensors)
        if needed > len(self.buffer):
            self.buffer = torch.empty(0, dtype=torch.uint8)  # lets go of the old one first
            self.buffer = torch.empty(needed, dtype=torch.uint8, pin_memory=self.stream is not None)
        offset, copies = 0, dict[str, FileContent]()
        if self.stream:
            # what has been computed so far is part of the copy
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):  # None: no other stream
            for name, content in files.items():
                if isinstance(content, bytes):
                    copies[name] = content
                    continue
                copies[name] = places = dict[str, Tensor]()
                for key, x in content.items():
                    place = self.buffer[offset : offset + x.nbytes].view(x.dtype).view(x.shape)
                    place.copy_(x.detach(), non_blocking=True)
                    if self.stream and x.is_cuda:
                        x.record_stream(self.stream)  # its memory is not given away before it is copied
                    places[key] = place
                    offset += _aligned(x.nbytes)
            self.copied = self.stream.record_event() if self.stream else None
        return copies

    def wait_on_device(self) -> None:
        """Let the device wait, before what it is told from now on, until the last copies are done; the host
        does not."""
        if self.copied:
            torch.cuda.current_stream(self.device).wait_event(self.copied)

    def wait_on_host(self) -> None:
        """Wait until the last copies are done."""
        if self.copied:
            self.copied.synchronize()


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class CheckpointWriter:
    """Writes the checkpoints of a run, of which each worker has a part.

    keep: newest checkpoints that stay. in_background: training goes on meanwhile, at the price of a copy of
    this worker's part in host memory.
    """

    def __init__(
        self, run: Path, keep: int, rank: int, world_size: int, device: torch.device, in_background: bool
    ):
        self.run, self.keep, self.rank = run, keep, rank
        # a group of its own: its meetings cross those of the training's in any order
        self.group = dist.new_group(backend="gloo", timeout=timedelta(hours=1)) if world_size > 1 else None
        self.copy = HostCopy(device) if in_background else None
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def save(self, step: int, files: Files, then: Callable[[], None], waits: bool = False) -> None:
        """Write the checkpoint of `step`, of which this worker has `files`, after the one before it; call
        `then` on every worker once it is registered.

        waits: return then, and not as soon as the tensors may change.
        Raises:
            MachineError, UserError: of the save before, or, with `waits`, of this one.
        """
        self.wait()
        if self.copy is None or waits:
            self._write(step, files)
            then()
            return
        copies = self.copy.take(files)
        arguments = (step, copies, then, self.copy)
        self.thread = threading.Thread(target=self._write_copies, args=arguments, name="save", daemon=True)
        self.thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        # whatever has ended the training, its last checkpoint becomes whole; but Ctrl-C waits for nothing
        if self.thread and not (kind and issubclass(kind, KeyboardInterrupt)):
            self.thread.join()
        if kind is None and self.group:
            dist.destroy_process_group(self.group)
            self.group = None

    def before_update(self) -> None:
        """Let the device finish copying before it changes weights and optimizer."""
        if self.copy:
            self.copy.wait_on_device()

    def check(self) -> None:
        """Raise what the save under way has come to, if it has failed: on all workers, which call this after
        the same step."""
        if self.thread and any(gather_objects(self.error is not None)):
            self.wait()

    def wait(self) -> None:
        """Wait for the save under way, on all workers.

        Raises:
            MachineError, UserError: it has failed; the same on every worker.
        """
        if self.thread:
            self.thread.join()
            self.thread = None
        if error := self.error:
            self.error = None
            raise error

    def find_newest(self) -> Path | None:
        """Return the newest checkpoint, that under way included if it can be written; for a worker whose
        training has failed."""
        if self.thread:
            self.thread.join()
        return checkpoint.find_newest(self.run)

    def _write_copies(self, step: int, files: Files, then: Callable[[], None], copy: HostCopy) -> None:
        try:
            copy.wait_on_host()
            self._write(step, files)
            then()
        except BaseException as e:  # raised where training can end
            self.error = e

    def _write(self, step: int, files: Files) -> None:
        name, folder = checkpoint.step_name(step), self.run / checkpoint.FOLDER
        partial = folder / f".{name}.partial"
        needed = sum(gather_objects(num_bytes(files), self.group))
        try:
            self._together(lambda: self._prepare(folder, partial, needed))
            self._together(lambda: self._write_part(partial, files, needed))
            self._together(lambda: self._register(partial, name, needed))
        except Exception:
            if self.rank == 0:
                with suppress(OSError):  # the next start removes what cannot be removed now
                    checkpoint.remove_folder(partial)
            raise

    def _prepare(self, folder: Path, partial: Path, needed: int) -> None:
        if self.rank != 0:
            return
        if not folder.is_dir():
            raise MachineError(
                f"{folder}: the folder of this run is gone, and its checkpoints with it; leave it in its "
                "place while the run goes on, and start again"
            )
        with name_errors(partial, needed):
            checkpoint.remove_folder(partial)
            partial.mkdir()
            total, _, free = shutil.disk_usage(folder)
            # before half a checkpoint is written; some network file systems say nothing of their size
            if total and free < needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

    def _write_part(self, partial: Path, files: Files, needed: int) -> None:
        write_json(partial / f"files-{self.rank:05d}.json", write_files(partial, files, needed))

    def _register(self, partial: Path, name: str, needed: int) -> None:
        if self.rank != 0:
            return
        with name_errors(partial, needed):
            if (metrics := self.run / "metrics.jsonl").is_file():
                sync_file(metrics)  # lines of steps that no start would do again
            sync_folder(partial)
            final = partial.with_name(name)
            require_owned(self.run)  # or a folder that another start has registered would go
            checkpoint.remove_folder(final)  # an unregistered leftover of a crash
            partial.rename(final)
            sync_folder(partial.parent)
            checkpoint.register(self.run, name, self.keep)

    def _together(self, work: Callable[[], None]) -> None:
        """Do a part of a save on every worker, and wait for all.

        Raises:
            MachineError, UserError: on every worker, what one of them has met.
        """
        error: Exception | None = None
        try:
            work()
        except Exception as e:
            error = e
        report: Exception | None = error  # what the others raise
        if isinstance(error, OSError):
            report = error = MachineError(str(error_line(error) or error))
        elif error and not isinstance(error, MachineError | UserError):  # a bug: its traceback is there
            report = RuntimeError(f"worker {self.rank}: {error!r}")
        errors = gather_objects(report, self.group)
        if first := error or next(filter(None, errors), None):
            raise first
