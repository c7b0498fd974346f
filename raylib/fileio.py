"""Files: written whole or not at all, hashed, locked; JSON of our own; names and bytes that may be spelled in
several ways.

macOS writes "é" in a file's name as "e" and an accent (NFD), most other systems as one character (NFC); both
look alike.
"""

import base64
import binascii
import errno
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import stat
import time
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import Any

from raylib.errors import UserError, name_errors, reading
from raylib.processes import process_start, try_lock
from raylib.strict_json import check_shape, parse_json

CHUNK = 1 << 16  # bytes read at a time
MAX_TRIES = 1000  # places where a record may begin in a line that a crash has damaged
MAX_SMALL = 1 << 24  # bytes of a file that is read whole: settings, sizes, records, results, a program
MAX_JSON = 1 << 29  # and of one that may have a value for each image, file or step of a run
URL_SAFE = bytes.maketrans(b"-_", b"+/")
DAY = 24 * 60 * 60  # seconds


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary name in the block, renamed to `path` after it: readers see the old file or the new one,
    also after the machine has lost its power.

    Raises:
        MachineError: the file cannot be written: a full disk, no permission.
    """
    # several processes, perhaps on several machines, may write the same file at once: each renames its own
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    with name_errors(path, temporary=temporary):
        try:
            yield temporary
            sync_file(temporary)
            os.replace(temporary, path)
            sync_folder(path.parent)
        finally:
            with suppress(OSError):  # it was renamed; or the error above says more
                temporary.unlink()


def copy_atomically(source: Path | str, path: Path) -> None:
    """Copy a file with its times, whole or not at all; one may be copied onto itself."""
    with atomic_file(path) as temporary:
        shutil.copy2(source, temporary)


def remove_temporaries(folder: Path) -> None:
    """Remove what processes that are no more have left of `atomic_file`, at any depth: those of this machine,
    and of others, whose processes nobody here can see, what nothing was written to for a day."""
    own = f".{os.uname().nodename}."
    for path in folder.rglob(".*"):
        before, _, pid = path.name.rpartition(".")
        if not pid.isdigit() or not path.is_file():
            continue
        if f"{before}.".endswith(own):
            is_left = process_start(int(pid)) == ""
        else:
            named = re.match(r"\..+\.(json|jsonl|yaml|txt|csv|md|png|npz|pt|safetensors)\..+\.", path.name)
            is_left = bool(named) and time.time() - path.stat().st_mtime > DAY
        if is_left:
            path.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Wait until a file's content is on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk, as after a file in it was renamed."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """An empty folder in the block, renamed to `path` after it, where nothing, or an empty folder, may be.

    Raises:
        UserError: another process is just writing it.
    """
    partial = path.with_name(f".{path.name}.partial")
    with name_errors(path, temporary=partial):
        partial.mkdir(parents=True, exist_ok=True)  # a crash may have left one
        descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
        try:
            is_free = try_lock(descriptor)
            if is_free is False or not os.path.samestat(os.fstat(descriptor), partial.stat()):
                raise UserError(f"{path}: another process is writing it; wait for its end, or give another")
            for left in partial.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield partial
            partial.replace(path)
        finally:
            os.close(descriptor)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file, a text as UTF-8, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any, compact: bool = False) -> None:
    """Write `value` as JSON, whole or not at all.

    Raises:
        ValueError: a float in it is not finite, for which JSON has no word.
    """
    text = json.dumps(
        value,
        ensure_ascii=False,
        allow_nan=False,
        indent=None if compact else 1,
        separators=(",", ":") if compact else None,
    )
    write_atomically(path, text + "\n")


def open_plain(path: Path | str, may_wait: bool = False) -> io.BufferedReader:
    """Open a file to read its bytes. A pipe would be waited for, for ever, and a device never end.

    may_wait: take these too.
    Raises:
        ValueError: it is one. OSError: as of `open`.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | (0 if may_wait else os.O_NONBLOCK))
    except OSError as e:
        if e.errno == errno.ENXIO:
            raise ValueError("a socket, where a file is needed") from None
        raise
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    # as `open` with a name: it refuses a folder, and errors name the file
    file = io.FileIO(os.fspath(path), opener=lambda *_: descriptor)
    if kind != stat.S_IFREG and not may_wait:
        file.close()
        raise ValueError("a pipe or a device, where a file is needed")
    return io.BufferedReader(file)


def read_bytes(path: Path, most: int = MAX_SMALL) -> bytes:
    """Read a file whole.

    Raises:
        ValueError: it has more bytes than `most`, or is no plain file.
    """
    with open_plain(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise ValueError(f"{size:,} bytes, of which {most:,} may be")
        return file.read(size)  # `most` would be made room for


def read_json(
    path: Path,
    what: str = "JSON",
    advice: str = "restore the file",
    finite: bool = True,
    shape: Any = None,
    most: int = MAX_SMALL,
) -> Any:
    """Read a JSON file (`raylib.strict_json`) that lies in memory whole.

    Args:
        what, advice: of the line (`raylib.errors.reading`).
        finite: NaN and Infinity are refused; False for what earlier versions of this code wrote.
        shape: the types that its values must have, where that matters, as pydantic has them.
        most: bytes; values take up to thirty times as many.
    Raises:
        UserError: it is damaged, too large, or another kind of file; a value has another type (its place is
            named).
    """
    with reading(path, what, advice):
        values = parse_json(read_bytes(path, most), finite)
        if shape is not None:
            check_shape(values, shape)
    return values


def read_json_object(
    path: Path,
    keys: Iterable[str] = (),
    what: str = "JSON",
    advice: str = "restore the file",
    finite: bool = True,
    shape: Any = None,
    most: int = MAX_SMALL,
) -> dict[str, Any]:
    """Read a JSON file that holds an object with `keys`; the rest as `read_json`.

    Raises:
        UserError: it does not.
    """
    values = read_json(path, what, advice, finite, shape, most)
    with reading(path, what, advice):
        if not isinstance(values, dict):
            raise ValueError(f"{type(values).__name__} in place of an object")
        if missing := sorted({*keys} - values.keys()):
            raise ValueError(f"no {', '.join(missing)} in it")
    return values


def append_jsonl(path: Path, record: dict[str, Any], durable: bool = False) -> None:
    """Append a record as a line of JSON; `durable`: it is on the disk, not in the system's memory alone,
    when this returns.

    Raises:
        ValueError: a float in it is not finite; nothing is written.
        MachineError: the disk is full, or broken; what was written of the line is taken back.
    """
    line = json.dumps(record, ensure_ascii=False, allow_nan=False)
    with name_errors(path), open(path, "a+b", buffering=0) as file:
        # a crash may have cut off the last line: this one must not become its end
        end, last = _last_line(file)
        if last and _parse_record(last) is None:
            file.truncate(end)
            last = b""
        data = memoryview(f"{line}\n".encode() if not last else f"\n{line}\n".encode())
        try:
            while data:  # a disk that is nearly full takes a part first
                data = data[file.write(data) :]
            if durable:
                os.fsync(file.fileno())
        except OSError:
            file.truncate(end + len(last))
            raise


def _last_line(file: io.FileIO) -> tuple[int, bytes]:
    """Return (where the last newline ends, what stands behind it)."""
    end, last = file.seek(0, os.SEEK_END), b""
    while end:
        start = max(0, end - CHUNK)
        file.seek(start)
        before, newline, behind = file.read(end - start).rpartition(b"\n")
        last = behind + last
        if newline:
            return start + len(before) + 1, last
        end = start
    return 0, last


def read_jsonl(path: Path, shape: Any = None) -> list[dict[str, Any]]:
    """Read all records that `append_jsonl` wrote, in order; none of a file that is not there. A last line
    that is not whole is left out: a crash cut it off (`repair_jsonl` says so), or it is being written.

    Args:
        shape: the types of each one's values, as of `read_json`.
    Raises:
        UserError: another line is no JSON object, or a value has another type; names it.
    """
    records = []
    # no str.splitlines: it would split at U+2028 and others, which JSON need not escape
    lines = _read_lines(path)
    for number, line in enumerate(lines, 1):
        record = _parse_record(line)
        if record is not None:
            if shape is not None:
                advice = "restore the file, or take that line out"
                with reading(f"{path}:{number}", "a record", advice):
                    check_shape(record, shape)
            records.append(record)
        elif line.strip() and number < len(lines):
            raise UserError(
                f"{path}:{number}: no JSON object ({line[:40]!r}); restore the file, or take that line out"
            )
    return records


def _read_lines(path: Path) -> list[bytes]:
    """Read the lines of a file, the last of which is empty where it ends well; none of no file."""
    if not os.path.lexists(path):
        return []
    with reading(path, "lines of JSON", "restore the file"):
        return read_bytes(path, MAX_JSON).split(b"\n")


def repair_jsonl(path: Path, key: str) -> list[str]:
    """Take out of a file of JSON lines, all of which have `key`, what a crash left: a line that was cut off,
    also where a later one follows on the same line, and zero bytes, as file systems leave them after a power
    failure. Return in words what was dropped. Whoever appends to a file calls this before.

    Raises:
        UserError: a line that no crash leaves; names it.
    """
    lines, kept, notes = _read_lines(path), [], []
    for number, line in enumerate(lines, 1):
        found, rest = _split_records(line.strip(b"\0"), key)
        kept += found
        if not rest and (found or not line):
            continue
        if rest and not _may_be_cut_off(rest):
            raise UserError(
                f"{path}:{number}: no JSON object with '{key}' ({rest[:40]!r}); restore the file, or take "
                "that line out"
            )
        what = "its last line" if number == len(lines) else f"line {number}"
        if found:
            what = f"the beginning of line {number}"
        notes.append(f"{path}: {what} was cut off by a crash and is dropped")
    if len(notes) > 4:
        notes[3:] = [f"{path}: {len(notes) - 3:,} more lines were cut off by crashes, and are dropped"]
    repaired = b"".join(record + b"\n" for record in kept)
    if repaired != b"\n".join(lines):
        write_atomically(path, repaired)
    return notes


def _split_records(line: bytes, key: str) -> tuple[list[bytes], bytes]:
    """Return (the records with `key` that end a line, what stands before them)."""
    records: list[bytes] = []
    start = 0 if key in (_parse_record(line) or {}) else line.rfind(b"{")
    for _ in range(MAX_TRIES):  # each parses the rest of the line
        if start < 0:
            break
        if key in (_parse_record(line[start:]) or {}):
            records, line, start = [line[start:], *records], line[:start], len(line)
        start = line.rfind(b"{", 0, start)
    return records, line.strip(b"\0")


def _parse_record(line: bytes) -> dict[str, Any] | None:
    try:
        record = parse_json(line, finite=False)  # as earlier versions wrote it
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _may_be_cut_off(line: bytes) -> bool:
    """Return whether a line is zero bytes, or may be the beginning of a JSON object."""
    text = line.replace(b"\0", b"").decode(errors="replace")
    try:
        json.loads(text)
    except json.JSONDecodeError as e:
        # where the text ends, or in a word (`-Infinity`) or a number that does not end there
        is_early = e.pos < len(text) - len("-Infinity") and not e.msg.startswith("Unterminated string")
        return not text.strip() or (text.startswith("{") and not is_early and e.msg != "Extra data")
    except (ValueError, RecursionError):  # a number of thousands of digits; nested too deeply
        pass
    return False


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def file_lock(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock file `path` in the block, after waiting for whoever holds it; a process that dies lets
    go. Without `wait`, yields whether it could be had at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # the system lets go of the lock of a process that dies: no stale file can keep others out
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def decode_base64(data: str | bytes) -> bytes:
    """Decode base64, which may be wrapped into lines, URL-safe, or without its padding.

    Raises:
        ValueError: a character that is none of base64's, or a length that none has. `base64.b64decode` alone
            leaves such characters out, and with them the "-" and "_" of the URL-safe alphabet.
    """
    data = data.encode() if isinstance(data, str) else bytes(data)
    with suppress(binascii.Error):  # the common form, for which the others need not be looked for
        return binascii.a2b_base64(data, strict_mode=True)
    data = b"".join(data.split()).translate(URL_SAFE).rstrip(b"=")
    return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)


def is_unicode(name: str) -> bool:
    """Return whether a name can be written in UTF-8: those of files may have any bytes."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def require_unicode(name: str, folder: Path | str) -> str:
    """Return the name of a file found in `folder`, which results will have.

    Raises:
        UserError: it is not in UTF-8.
    """
    if not is_unicode(name):
        raise UserError(f"{folder}: the name of a file in it, {name!a:.200}, is not in UTF-8; rename it")
    return name


def nfc(name: str) -> str:
    """Return a name in the normal form by which names are compared."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def unicode_forms(name: str) -> tuple[str, ...]:
    """Return a name as it is, and in the other normal forms that it may be stored in."""
    return tuple(dict.fromkeys((name, nfc(name), unicodedata.normalize("NFD", name))))


def find_file(folder: Path, name: str) -> Path | None:
    """Find the file `name` (perhaps with folders) below `folder`, in whichever normal form the disk has it;
    None, too, of a name that leads out of the folder."""
    top = os.path.abspath(folder)
    if os.path.commonpath((top, os.path.normpath(os.path.join(top, name)))) != top:
        return None
    if os.path.isfile(folder / name):
        return folder / name
    if name.isascii():
        return None
    path = folder
    for part in PurePath(name).parts:
        forms = (path / form for form in unicode_forms(part))
        if (below := next(filter(os.path.exists, forms), None)) is None:
            return None
        path = below
    return path if path.is_file() else None
