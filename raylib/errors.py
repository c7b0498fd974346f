"""Exceptions that one line tells wholly. `UserError`: a mistake in the input; `MachineError`: a failure of
the machine, in whichever library it was felt."""

import errno
import importlib
import os
import pwd
import re
import resource
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

from raylib.file_kinds import DOWNLOAD_AGAIN, find_unfinished, recognize

# xlm-roberta-base, openai/clip-vit-base-patch32
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
LONGEST_REASON = 200  # characters of what a library says
FILE_NAME = re.compile(r"\.(py|json|jsonl|txt|model|safetensors|bin|pt|pth|th|tar)$")
# user:password of an address; keys and signatures in its query, as of an S3 link that was signed
SECRET = re.compile(
    r"(?<=://)[^/\s@]*:[^/\s@]+(?=@)|(?<=[?&])[\w-]*(?:token|key|password|secret|signature|sig)=[^&\s]+", re.I
)


class UserError(Exception):
    """A mistake in the input, in one line: what, where, what to do. Entry points print it and exit with 2."""

    exit_code: ClassVar[int] = 2


class MachineError(Exception):
    """A failure of the machine, in one line: a full disk, a quota, no permission, a lost connection. The same
    start may succeed later. Entry points print it and exit with 1."""

    exit_code: ClassVar[int] = 1


class RunLost(MachineError):
    """A run that is not this process's any more: another start has it, its owner is gone, or its folder is.
    The same again, if it is tried again."""


class NotFinite(UserError):
    """A loss that is no number any more: the same again, if the run is started again."""


def require(module: str, extra: str) -> Any:
    """Import a module of a package that only some things need.

    Raises:
        UserError: it is not installed; says how it is.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{module.split('.')[0]} is not installed: pip install -e .[{extra}]") from None


def hub_hint(path: Path | str) -> str:
    """Return how to download a model of the Hugging Face Hub, if `path`, where nothing lies, may be its name;
    of one whose download has not ended, that; else ""."""
    if partial := find_unfinished(Path(path)):
        return f"; {partial} is an unfinished download: let it end, or {DOWNLOAD_AGAIN}"
    name, parent = str(path), Path(path).parent
    may_be = HUB_NAME.fullmatch(name) and not FILE_NAME.search(name) and not Path(path).exists()
    # beside other files it is a mistyped path
    if not may_be or name.startswith("runs/") or ("/" in name and parent.exists()):
        return ""
    return f"; if it is a model of the Hugging Face Hub, download it: hf download {name} --local-dir {name}"


# What an error of the operating system means, and what to do: of the machine, and of what was given
FREE_SPACE = "free some and start again: a run goes on from its newest checkpoint"
MACHINE_ERRORS = {
    errno.ENOSPC: f"no space left on the disk{{room}}; {FREE_SPACE}",
    errno.EDQUOT: f"the quota of {{user}} is used up{{room}}; {FREE_SPACE}",
    errno.EFBIG: "the file is larger than the file system, or `ulimit -f`, allows",
    errno.EROFS: "the file system is read-only; give another folder, or mount it to be written",
    errno.EACCES: "permission denied for {user}; give another path, or change its rights (chmod, chown)",
    errno.EPERM: "not permitted for {user}; give another path, or change its rights (chmod, chown, chattr)",
    errno.EMFILE: "too many open files (at most {files}); raise the limit: ulimit -n 65536",
    errno.ENFILE: "too many open files on this machine; end other processes, or raise fs.file-max",
    errno.EIO: "input/output error: the disk, or the connection to it, fails; see the kernel's log (dmesg)",
    errno.ENXIO: "no such device: the disk is gone; see the kernel's log (dmesg)",
    errno.ENODEV: "no such device: the disk is gone; see the kernel's log (dmesg)",
    errno.ESTALE: "stale file handle: its server has lost it; mount the file system anew and start again",
    errno.ENOTCONN: "the connection to its file system is lost; mount it anew and start again",
    errno.ENOLCK: "the file system cannot lock files; mount it with locks (NFS: a lock server)",
    errno.ENOMEM: "the machine has no memory left; end other processes, or take a machine with more",
    errno.EAGAIN: "no process or memory can be had now; end other processes, or raise `ulimit -u`",
    errno.EBUSY: "in use by another process, or a mount point; end what uses it",
    errno.ETXTBSY: "in use by another process; end what uses it",
}
INPUT_ERRORS = {
    errno.ENOENT: "no such file or folder; it may have been removed meanwhile",
    errno.ENOTDIR: "not a folder: a part of this path is a file; give a folder",
    errno.EISDIR: "a folder, where a file is needed; give a file",
    errno.EEXIST: "a file lies where a folder is needed, or the reverse; move it away, or give another path",
    errno.ENOTEMPTY: "the folder is not empty; move away what is in it, or give another path",
    errno.ENAMETOOLONG: "too long: a name has 255 bytes at most, a path 4,096; give a shorter one",
    errno.ELOOP: "symbolic links that lead in a circle; mend them, or give another path",
    errno.EXDEV: "on another file system than its target; give a path on the same one",
}
# Errors of the network; others of it have no number (`ConnectionError`, `TimeoutError`, `socket.gaierror`)
NETWORK_ERRORS = (
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.ENETDOWN,
    errno.EADDRNOTAVAIL,
    errno.EADDRINUSE,
)
# These explain whatever another library has made of them; a missing file, for one, may have been expected
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE)
NUMBER = re.compile(r"\(os error (\d+)\)|[Ee]rrno (\d+)\]|Os \{ code: (\d+)")  # of Rust, of Python, of C++
QUOTED_PATH = re.compile(r"""["']((?:/|\.{0,2}/)[^"']+)["']""")
# PyTorch's writer tells that bytes did not get into a file, and not why
TORCH_WRITER = re.compile(r"inline_container\.cc.*(unexpected pos|failed writing|file write failed)")


def error_line(
    error: BaseException, path: Path | str | None = None, needed: int | None = None
) -> UserError | MachineError | None:
    """Return the one line that `error` comes to, as an exception; None: it is a bug, which keeps its
    traceback.

    Args:
        path: what was being written or read, where the error does not name it.
        needed: bytes that were to be written.
    """
    first, *others = _causes(error)
    if isinstance(error, UserError):
        # a line that knows better what was being read, or written, than the system's error that it is about
        is_machine = any(_error_number(e) in MACHINE_ERRORS or _network_error(e) for e in others)
        return MachineError(str(error)) if is_machine else error
    if isinstance(error, MachineError):
        return error
    if (number := _error_number(first)) is not None:
        return _system_error(first, number, path, needed)
    if network := _network_error(first):
        return network
    for cause in others:
        number = _error_number(cause)
        if number in DISK_ERRORS:
            return _system_error(cause, number, path, needed)
    return None


def _causes(error: BaseException) -> list[BaseException]:
    """Return an exception, what it was raised from or in the handling of, and so on."""
    found: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in found:
        found.append(cause)
        cause = cause.__cause__ or cause.__context__
    return found


@contextmanager
def reading(path: Path | str, what: str, advice: str = "take an undamaged copy") -> Iterator[None]:
    """Turn whatever a library raises at a file that is empty, damaged, half-downloaded or another than
    expected into one `UserError`. The block is narrow: the library's parsing, and the checks of shape and
    type right after it; a bug in our own computations keeps its traceback.

    Args:
        what: the file was expected to be, such as "weights (safetensors)" or "JSON: a list of captions".
    Raises:
        UserError: "PATH: not to be read as WHAT (REASON); ADVICE"; of both, the file's first bytes may tell
            better ones.
        MachineError: a failure of the machine.
    """
    try:
        yield
    except BaseException as e:
        # a library in Rust panics with an exception of its own, which is no `Exception`
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        line = error_line(e, path)
        if line is e:
            raise
        raise line or unreadable(path, what, advice, e) from e


def unreadable(path: Path | str, what: str, advice: str, error: BaseException) -> UserError:
    """Return the line of a file that is not to be read as `what`, at which a library raised `error`."""
    seen, remedy = recognize(Path(path), what)
    return UserError(
        f"{path}: not to be read as {what} ({seen or describe_error(error)}); {remedy or advice}"
    )


def describe_error(error: BaseException) -> str:
    """Return what an exception says in its first line, shortened, in characters that can be printed."""
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # Python's, PyTorch's
        return "it asks for more memory than there is"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        byte = f"byte {error.object[error.start]:#04x} at {error.start:,}"
        return f"not {error.encoding.upper()} text: {byte}"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return shorten_text(f"no {lines[0]} in it" if isinstance(error, KeyError) else lines[0], LONGEST_REASON)


def hide_secrets(text: str) -> str:
    """Return `text` with *** in place of passwords and keys in addresses."""
    return SECRET.sub("***", text)


def printable(text: str) -> str:
    """Return a text with its line breaks and control characters, which may be commands to a terminal, as
    Python spells them."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shorten_text(text: str, most: int) -> str:
    """Return at most so many characters of a text, and as `printable` has them."""
    return printable(text if len(text) <= most else f"{text[: most - 3]}...")


def name_some(names: Sequence[str]) -> str:
    """Return the first of some names that come from a file, shortened, and how many there are besides."""
    shown = ", ".join(shorten_text(name, 40) for name in names[:6])
    return shown + (f" and {len(names) - 6} more" if len(names) > 6 else "")


@contextmanager
def name_errors(
    path: Path | str, needed: int | None = None, temporary: Path | str | None = None
) -> Iterator[None]:
    """Name `path` in the line of an error of the operating system that something in the block meets, such as
    a full disk, in whichever library.

    Args:
        needed: bytes that the block writes.
        temporary: name under which it writes what will be `path`.
    Raises:
        MachineError: a failure of the machine.
    """
    try:
        yield
    except Exception as e:
        if isinstance(e, OSError) and e.errno is not None and e.filename in (None, str(temporary)):
            e.filename, e.filename2 = str(path), None
        line = error_line(e, path, needed)
        if line is e or not isinstance(line, MachineError):
            raise
        raise line from e


def _error_number(error: BaseException) -> int | None:
    """Return the number of an error of the operating system that `error` is, or whose words it has."""
    if isinstance(error, OSError) and error.errno in {*MACHINE_ERRORS, *INPUT_ERRORS}:
        return error.errno
    text = str(error)
    if found := NUMBER.search(text):
        number = int(next(filter(None, found.groups())))
        return number if number in {*MACHINE_ERRORS, *INPUT_ERRORS} else None
    if TORCH_WRITER.search(text):
        return errno.ENOSPC
    # a library's own exception that has the system's words
    if isinstance(error, OSError | RuntimeError) or type(error) is Exception:
        return next((number for number in DISK_ERRORS if os.strerror(number) in text), None)
    return None


def _system_error(
    error: BaseException, number: int, path: Path | str | None, needed: int | None
) -> UserError | MachineError:
    names = [error.filename, error.filename2] if isinstance(error, OSError) else []
    quoted = QUOTED_PATH.findall(str(error))
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):  # of a copy, the target is what cannot be written
        names, quoted = names[::-1], quoted[::-1]
    found = [n for n in (*names, path, *quoted) if isinstance(n, bytes | str | Path) and n != ""]
    name = os.fsdecode(found[0]) if found else None
    if name and number == errno.ENAMETOOLONG and len(name) > 100:
        name = f"{name[:60]}... ({len(os.fsencode(name)):,} bytes)"
    where = f"{name}: " if name else ""
    if number in INPUT_ERRORS:
        return UserError(f"{where}{INPUT_ERRORS[number]}")
    facts = {
        "room": _describe_room(name, needed),
        "user": _user_name(),
        "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }
    return MachineError(f"{where}{MACHINE_ERRORS[number].format(**facts)}")


def _describe_room(name: str | None, needed: int | None) -> str:
    """Return " (... MB needed, ... MB free)" of the disk where `name` lies or should lie."""
    parts = [f"{needed / 1e6:,.1f} MB needed"] if needed is not None else []
    path = Path(name).absolute() if name else None
    place = next(filter(os.path.exists, (path, *path.parents)), None) if path else None
    with suppress(OSError):
        if place is not None:
            parts.append(f"{shutil.disk_usage(place).free / 1e6:,.1f} MB free")
            if os.statvfs(place).f_files and not os.statvfs(place).f_favail:
                parts.append("no inode free: too many files")
    return f" ({', '.join(parts)})" if parts else ""


def _user_name() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # a container's user without a name
        return f"user {os.geteuid()}"


def _network_error(error: BaseException) -> MachineError | None:
    is_network = isinstance(error, ConnectionError | TimeoutError | socket.gaierror) or (
        isinstance(error, OSError) and error.errno in NETWORK_ERRORS
    )
    # a pipe is no network: it stays an error of its own
    if not is_network or isinstance(error, BrokenPipeError):
        return None
    reason = " ".join(str(error).split()) or type(error).__name__
    return MachineError(f"no connection ({reason}); is the network up, and the address right?")
