"""Reads one damaged file in a process of its own, and judges what came of it."""

import contextlib
import faulthandler
import os
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.fuzz.mutate import PLACES, Case
from tests.fuzz.reader import MIB, Reader

# what may come of a file: the first two are right; the rest is a fault of the product
RIGHT = ("one line", "accepted and right")
OUTCOMES = (
    *RIGHT,
    "machine line",
    "accepted and wrong",
    "bad line",
    "traceback",
    "signal",
    "hang",
    "memory",
    "noise",
    "wrote outside",
    "process",
)
MAX_LINE = 400  # characters of a line, in which the folder is not counted
MAX_NOISE = 4000  # bytes that a library may write to the standard error of one reading
CONTROLS = re.compile("[\0-\x08\x0a-\x1f\x7f\x85\u2028\u2029]")
PATHS = {  # audit event -> which of its arguments are paths that are changed, and the places of their folders
    "os.remove": {0: 1},
    "os.rmdir": {0: 1},
    "os.mkdir": {0: 2},
    "os.rename": {0: 2, 1: 3},
    "os.link": {1: 3},
    "os.symlink": {1: 2},
    "os.truncate": {0: None},
    "os.chmod": {0: 2},
    "os.chown": {0: 3},
    "os.utime": {0: 3},
    "os.setxattr": {0: None},
    "os.removexattr": {0: None},
    "sqlite3.connect": {0: None},
}
OF_NAMES = {"os.remove", "os.rmdir", "os.mkdir", "os.rename", "os.link", "os.symlink"}
PROCESSES = {
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.forkpty",
    "pty.spawn",
    "socket.connect",
    "socket.bind",
    "socket.sendto",
    "urllib.Request",
}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Outcome(NamedTuple):
    """kind: of OUTCOMES. detail: the line, or the last of a traceback. seconds: of the CPU. peak: bytes that
    memory grew by."""

    kind: str
    detail: str = ""
    seconds: float = 0.0
    peak: int = 0


class Forbidden(BaseException):
    """Something that reading a file must not do."""


class Watch:
    """The audit hook of a process: what it does beyond reading, while `folder` is set."""

    def __init__(self) -> None:
        self.folder: tuple[str, ...] = ()  # these may be written below
        self.found: tuple[str, str] | None = None
        self._busy = False
        sys.addaudithook(self._hear)

    @contextlib.contextmanager
    def reading(self, *folders: Path) -> Iterator[None]:
        self.folder, self.found = tuple(os.path.realpath(folder) for folder in folders), None
        try:
            yield
        finally:
            self.folder = ()

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.folder or self._busy:
            return
        self._busy = True
        try:
            kind, what = "", ""
            if event in PROCESSES:
                kind, what = "process", f"{event} {arguments[:2]!r:.150}"
            elif event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
                if self._is_outside(arguments[0], None, True):
                    kind, what = "wrote outside", f"open {arguments[0]!r:.150}"
            elif event in PATHS:
                for place, folder in PATHS[event].items():
                    at = folder and arguments[folder]
                    if self._is_outside(arguments[place], at, event not in OF_NAMES):
                        kind, what = "wrote outside", f"{event} {arguments[place]!r:.150}"
            if kind:
                stack = [f for f in traceback.extract_stack() if "/tests/fuzz/" not in f.filename][-3:]
                places = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(stack))
                self.found = self.found or (kind, f"{what} in {places}")
                raise Forbidden(what)
        finally:
            self._busy = False

    def _is_outside(self, path: Any, folder: int | None, follows: bool) -> bool:
        """follows: what changes is what a link at `path` leads to, and not the link."""
        if isinstance(path, int):
            return False
        base = os.readlink(f"/proc/self/fd/{folder}") if folder is not None and folder >= 0 else os.getcwd()
        parent, name = os.path.split(os.path.join(base, os.fsdecode(path)))
        real = os.path.join(os.path.realpath(parent), name)
        real = os.path.realpath(real) if follows or name in ("", ".", "..") else real
        if real in (os.devnull, "/dev/tty") or real.startswith("/proc/self/"):
            return False
        return not any(real == below or real.startswith(below + "/") for below in self.folder)


def judge(
    reader: Reader, path: Path, target: Path, folder: Path, watch: Watch, tell: Callable[[str], object]
) -> Outcome:
    """Read `path`, in which `target` is damaged, and say what came of it.

    tell: is told when the product has read it, and the oracle begins, which may die of it.
    folder: has `files`, the damaged example, and `tmp`; nothing else may change in its parent.
    """
    before = _listing(folder.parent, folder)
    allowed = [folder / "tmp", *([folder / "files"] if reader.writes else [])]
    size = sum(file.stat().st_size for file in (folder / "files").rglob("*") if file.is_file())
    limit = reader.memory + reader.memory_factor * size
    noise = os.fstat(2).st_size
    values, error, began = None, None, time.process_time()
    with _limited_memory(limit + reader.address_space) as memory, watch.reading(*allowed):
        try:
            values = reader.read(path)
        except BaseException as e:
            error = e
    seconds, peak = time.process_time() - began, memory.peak
    found = watch.found or _left_behind(before, _listing(folder.parent, folder))
    if found:
        kind, detail = found
    elif peak > limit or _is_memory(error):
        kind, detail = "memory", f"{peak / MIB:,.0f} MiB, {limit / MIB:,.0f} allowed; {_last_line(error)}"
    elif os.fstat(2).st_size - noise > MAX_NOISE:
        os.lseek(2, noise, os.SEEK_SET)
        kind, detail = "noise", os.read(2, 150).decode(errors="replace")
        os.lseek(2, 0, os.SEEK_END)
    elif error is not None:
        kind, detail = judge_error(error, path, target, folder)
    else:
        tell("oracle")
        kind, detail = _compare(reader, path, values, watch, folder)
    return Outcome(kind, detail, seconds, peak)


def judge_error(error: BaseException, path: Path, target: Path, folder: Path) -> tuple[str, str]:
    """(outcome, the line) of an exception, as an entry point would print it."""
    from raylib.errors import MachineError, error_line

    line = error_line(error) if isinstance(error, Exception) else None
    if line is None:
        return "traceback", _last_line(error)
    text = str(line)
    # paths of this machine are as long as they are
    short = text.replace(str(folder), "")
    fault = ""
    if CONTROLS.search(text):
        fault = "a line break or a control character in it"
    elif len(short) > MAX_LINE:
        fault = f"{len(short)} characters"
    elif "Traceback" in text or not text.strip():
        fault = "no sentence"
    elif not any(name in text for name in (target.name, target.stem, path.name)):
        fault = f"does not name {target.name}"
    if fault:
        return "bad line", f"{fault}: {text!r:.500}"
    return "machine line" if isinstance(line, MachineError) else "one line", text


def _compare(reader: Reader, path: Path, values: Any, watch: Watch, folder: Path) -> tuple[str, str]:
    try:
        with watch.reading(folder / "files", folder / "tmp"):
            expected = reader.oracle(path)
            if reader.agree(values, expected):
                return "accepted and right", ""
    except BaseException as e:
        return "accepted and wrong", f"the oracle: {_last_line(e)}"
    return "accepted and wrong", f"read {_brief(values)}, the oracle {_brief(expected)}"


def _brief(values: Any) -> str:
    return re.sub(r"\s+", " ", repr(values))[:150]


def _last_line(error: BaseException | None) -> str:
    if error is None:
        return ""
    own = [
        frame for frame in traceback.extract_tb(error.__traceback__) if "/tests/fuzz/" not in frame.filename
    ]
    places = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(own[-4:]))
    if not own and (frames := traceback.extract_tb(error.__traceback__)):
        places = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
    return f"{type(error).__name__}: {re.sub(r'[^ -~]+', ' ', str(error))[:200]} in {places}"


def _is_memory(error: BaseException | None) -> bool:
    """Tell whether the limit of memory was met, also where the product has made a line of it."""
    seen = []
    while error is not None and error not in seen:
        seen.append(error)
        if isinstance(error, MemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _listing(folder: Path, own: Path) -> dict[str, tuple[int, int]]:
    """{path: (size, time of change)} of everything beside the damaged example."""
    found = {}
    for top, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if Path(top, name) not in (own / "files", own / "tmp")]
        for name in (*folders, *files):
            status = os.lstat(os.path.join(top, name))
            found[os.path.join(top, name)] = (status.st_size if name in files else 0, status.st_mtime_ns)
    found.pop(str(folder / "stderr.txt"), None)
    return found


def _left_behind(before: dict, after: dict) -> tuple[str, str] | None:
    changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    return ("wrote outside", f"changed: {', '.join(changed[:3])}") if changed else None


class _Memory:
    peak = 0


@contextlib.contextmanager
def _limited_memory(limit: int) -> Iterator[_Memory]:
    """Let this process take `limit` bytes more than it has; the peak of what it used is measured."""
    status = _status()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    memory = _Memory()
    resource.setrlimit(resource.RLIMIT_AS, (status["VmSize"] + limit, hard))
    try:
        yield memory
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        memory.peak = _status()["VmHWM"] - status["VmRSS"]


def _status() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {
        key: int(value.split()[0]) << 10
        for key, _, value in (line.partition(":") for line in lines)
        if " kB" in value
    }


def called_functions(reader: Reader, case: Case, root: Path) -> set[str]:
    """ "module:qualname" of every product function that reading a damaged example calls."""
    called = set()

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(root)):
            called.add((frame.f_code.co_filename, frame.f_code.co_qualname))

    if case.mutation in PLACES:  # of which one may have to wait for ever
        return set()
    sys.setprofile(note)
    with contextlib.suppress(Exception):
        reader.read(case.path)
    sys.setprofile(None)
    names = set()
    for file, function in called:
        parts = Path(file).relative_to(root).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        names.add(f"{module}:{function.replace('.<locals>', '')}")
    return names


def enter(folder: Path) -> Watch:
    """Make this process one that reads damaged files in `folder`: with nothing of its parent's that a file
    could reach, and what lies beside the files, to see that it stays."""
    beside = folder / "beside"
    beside.mkdir(parents=True)
    for name in ("canary.txt", "canary.json", "data.json"):
        (beside / name).write_text("[]\n")
    os.chdir(beside)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(folder / "stderr.txt", os.O_RDWR | os.O_CREAT | os.O_APPEND), 2)
    os.dup2(2, 1)
    faulthandler.enable(2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024 * MIB, 1024 * MIB))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    sys.dont_write_bytecode = True
    os.environ |= {"HOME": str(folder), "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    return Watch()


def use_temporary_folder(folder: Path) -> None:
    folder.mkdir()
    os.environ["TMPDIR"] = str(folder)
    tempfile.tempdir = None
