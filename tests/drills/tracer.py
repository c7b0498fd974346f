"""Tracing of every file operation of a process below a folder, to do something to it at any one of them.

The process is forked, traced through ptrace(2), and stopped by a seccomp filter at the calls of `CALLS`
alone: so whatever writes is seen (Python, C++, Rust, any thread, any child process), and all else runs at
full speed. What is not seen is writing through a memory map.

An operation is told from others by its name, its path and how often it came before (`Operation`), not by its
number: threads may take turns in another order the next time.
"""

import contextlib
import ctypes
import os
import platform
import re
import signal
import socket
import struct
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
LIBC.ptrace.restype = ctypes.c_long
MACHINE = platform.machine()
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# name: numbers on x86_64 and aarch64 (0: there is no such call), and where its path is: "fd N", "path N" or
# "at N" (a folder's descriptor at argument N, the path after it); a call with two names has its target
CALLS = {
    "open": (2, 0, "path 0"),
    "creat": (85, 0, "path 0"),
    "openat": (257, 56, "at 0"),
    "write": (1, 64, "fd 0"),
    "pwrite64": (18, 68, "fd 0"),
    "writev": (20, 66, "fd 0"),
    "pwritev": (296, 70, "fd 0"),
    "sendfile": (40, 71, "fd 0"),
    "copy_file_range": (326, 285, "fd 2"),
    "fallocate": (285, 47, "fd 0"),
    "truncate": (76, 45, "path 0"),
    "ftruncate": (77, 46, "fd 0"),
    "fsync": (74, 82, "fd 0"),
    "fdatasync": (75, 83, "fd 0"),
    "rename": (82, 0, "path 1"),
    "renameat": (264, 38, "at 2"),
    "renameat2": (316, 276, "at 2"),
    "mkdir": (83, 0, "path 0"),
    "mkdirat": (258, 34, "at 0"),
    "rmdir": (84, 0, "path 0"),
    "unlink": (87, 0, "path 0"),
    "unlinkat": (263, 35, "at 0"),
    "link": (86, 0, "path 1"),
    "linkat": (265, 37, "at 2"),
    "symlink": (88, 0, "path 1"),
    "symlinkat": (266, 36, "at 1"),
}
WRITES = ("write", "pwrite64", "writev", "pwritev", "sendfile", "copy_file_range")
CHANGES = (*WRITES, "ftruncate", "truncate", "fallocate")
OPENS = ("open", "openat", "creat")
SYNCS = ("fsync", "fdatasync")
# of ptrace(2), prctl(2), seccomp(2), waitpid(2)
CONT, SYSCALL, SEIZE, LISTEN, GET_SYSCALL_INFO = 7, 24, 0x4206, 0x4208, 0x420E
OPTIONS = 0x1 | 0x2 | 0x4 | 0x8 | 0x10 | 0x80 | 0x100000  # sysgood, (v)fork, clone, exec, seccomp, exitkill
EVENT_SECCOMP, EVENT_STOP, SYSCALL_EXIT, WALL = 7, 128, signal.SIGTRAP | 0x80, 0x40000000
STOP_SIGNALS = (signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
RET_TRACE, RET_ALLOW = 0x7FF00000, 0x7FFF0000
AT_FDCWD = 0xFFFFFF9C
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Operation(NamedTuple):
    """A file operation: call, path below the traced folder with the process's number written as PID, how many
    alike came before, and, of a write, that half of it is to be done: it is torn."""

    call: str
    path: str
    number: int
    torn: bool = False

    def __str__(self) -> str:
        return f"{'half of ' if self.torn else ''}{self.call} {self.path} #{self.number}"


class Trace(NamedTuple):
    """What a traced run did: the operations of each worker in order; each worker's exit code (-9: killed);
    whether the operation came at which something was to be done."""

    operations: list[list[Operation]]
    codes: list[int]
    reached: bool


class TimeOut(Exception):
    """A traced run did not end."""


def trace(
    workers: Sequence[Callable[[], int]],
    folder: Path,
    log: Path,
    point: tuple[int, Operation] | None = None,
    action: Callable[[list[int]], object] | None = None,
    power_fails: bool = False,
    seconds: float = 120.0,
) -> Trace:
    """Run each of `workers` in a process forked from this one, with its output appended to `log`, and trace
    what they do below `folder`.

    point: (worker, operation) before which, or in the middle of which, `action` is done, given the process of
        each worker; None kills all of them. power_fails: what was not synced by then is lost (`Durability`).

    Raises:
        TimeOut: they did not end in so many `seconds`.
    """
    tracer = _Tracer(folder, log, point, action)

    def expire(*_) -> None:
        raise TimeOut(f"no end after {seconds:.0f} s; see {log}")

    before = signal.signal(signal.SIGALRM, expire)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        tracer.run(workers)
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)  # pytest has one too
        signal.signal(signal.SIGALRM, before)
        tracer.kill_all()
    if power_fails and tracer.reached:
        tracer.durability.lose_unsynced(folder)
    return Trace(tracer.operations, [tracer.codes[pid] for pid in tracer.workers], tracer.reached)


class Durability:
    """Bytes of each file that a power failure would leave: those at its last fsync."""

    def __init__(self):
        self.safe: dict[tuple[int, int], int] = {}  # (device, inode): bytes

    def note_change(self, path: str, size: int) -> None:
        """Note that a file of `size` bytes at the last sync, or before the trace, is written to."""
        self.safe.setdefault(self._inode(path), size)

    def note_sync(self, path: str) -> None:
        """Note that a file is on disk as it is."""
        inode = self._inode(path)
        if inode in self.safe:
            self.safe[inode] = os.stat(path).st_size

    def lose_unsynced(self, folder: Path) -> None:
        """Cut every file to what was synced of it."""
        for path in filter(Path.is_file, folder.rglob("*")):
            size = self.safe.get(self._inode(str(path)))
            if size is not None and size < path.stat().st_size:
                os.truncate(path, size)

    @staticmethod
    def _inode(path: str) -> tuple[int, int]:
        status = os.stat(path)
        return status.st_dev, status.st_ino


class _Call(NamedTuple):
    """A system call at its beginning: name, arguments, and what its path names."""

    name: str
    arguments: tuple[int, ...]
    path: str


class _Tracer:
    """The state of `trace`."""

    def __init__(
        self,
        folder: Path,
        log: Path,
        point: tuple[int, Operation] | None,
        action: Callable[[list[int]], object] | None,
    ):
        self.folder, self.log = str(folder), log
        self.point, self.action = point, action
        self.names = {call[MACHINE != "x86_64"]: name for name, call in CALLS.items()}
        self.workers: list[int] = []
        self.owner: dict[int, int] = {}  # a traced thread: the worker that it belongs to
        self.pending: dict[int, _Call] = {}  # a thread in a call of these
        self.counts: list[Counter] = []
        self.operations: list[list[Operation]] = []
        self.codes: dict[int, int] = {}
        self.durability = Durability()
        self.reached = False

    def run(self, workers: Sequence[Callable[[], int]]) -> None:
        """Start the workers and trace them until all have ended."""
        for number, work in enumerate(workers):
            ready, go = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(go)
                _be_worker(work, ready, self.log, self.workers[0] if self.workers else 0)
            os.close(ready)
            self.workers.append(pid)
            with contextlib.suppress(PermissionError):  # it has done so itself
                os.setpgid(pid, self.workers[0])
            self.owner[pid] = number
            self.counts.append(Counter())
            self.operations.append([])
            _ptrace(SEIZE, pid, 0, OPTIONS)
            os.write(go, b"g")
            os.close(go)
        while len(self.codes) < len(self.workers):
            pid, status = os.waitpid(-self.workers[0], WALL)
            if os.WIFSTOPPED(status):
                self._go_on(pid, os.WSTOPSIG(status), status >> 16)
            elif pid in self.workers:
                self.codes[pid] = os.waitstatus_to_exitcode(status)

    def kill_all(self) -> None:
        """End every process of the workers."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.workers[0], signal.SIGKILL)
        while len(self.codes) < len(self.workers):
            # each thread that is traced must be waited for, or the process does not end
            pid, status = os.waitpid(-self.workers[0], WALL)
            if pid in self.workers and not os.WIFSTOPPED(status):
                self.codes[pid] = os.waitstatus_to_exitcode(status)

    def _go_on(self, pid: int, number: int, event: int) -> None:
        request, deliver = CONT, 0
        if event == EVENT_SECCOMP:
            request = self._begin(pid)
        elif number == SYSCALL_EXIT:
            self._end(pid)
        elif event == EVENT_STOP and number in STOP_SIGNALS:
            request = LISTEN
        elif event == 0:
            deliver = number
        # a thread that was killed meanwhile is there no more
        LIBC.ptrace(request, pid, None, deliver)

    def _begin(self, pid: int) -> int:
        """Look at the call that a thread is about to make. Returns how it goes on: to the end of the call, or
        freely."""
        call = self._read_call(pid)
        if call is None or not (call.path + "/").startswith(self.folder + "/"):
            return CONT
        worker = self._worker_of(pid)
        own = os.path.relpath(call.path, self.folder).replace(socket.gethostname(), "HOST")
        own = re.sub(rf"\b{self.workers[worker]}\b", "PID", own)
        own = re.sub(r"\.tmp\w{6}$", ".tmpNAME", own)  # of safetensors
        self.counts[worker][call.name, own] += 1
        operation = Operation(call.name, own, self.counts[worker][call.name, own])
        self.operations[worker].append(operation)
        if self.point and (worker, operation) == (self.point[0], self.point[1]._replace(torn=False)):
            self.reached = True
            if self.action:
                self.action(self.workers)
            else:
                if self.point[1].torn:
                    self._tear(pid, call)
                os.killpg(self.workers[0], signal.SIGKILL)
                return CONT
        if call.name in CHANGES and os.path.isfile(call.path):
            self.durability.note_change(call.path, os.stat(call.path).st_size)
        self.pending[pid] = call
        return SYSCALL

    def _end(self, pid: int) -> None:
        call = self.pending.pop(pid, None)
        if call is None:
            return
        if call.name in SYNCS and os.path.isfile(call.path):
            self.durability.note_sync(call.path)
        elif call.name in OPENS and os.path.isfile(call.path) and not os.stat(call.path).st_size:
            self.durability.note_change(call.path, 0)  # new, or emptied

    def _worker_of(self, pid: int) -> int:
        """The worker that a thread, or a child process, belongs to."""
        if pid not in self.owner:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            facts = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
            above = int(facts["Tgid"])
            above = above if above != pid else int(facts["PPid"])
            self.owner[pid] = self._worker_of(above) if above > 1 else 0  # 0: its parent has ended
        return self.owner[pid]

    def _read_call(self, pid: int) -> _Call | None:
        info = ctypes.create_string_buffer(96)
        if LIBC.ptrace(GET_SYSCALL_INFO, pid, ctypes.c_void_p(len(info)), info) < 0:
            return None  # killed meanwhile
        number, *arguments = struct.unpack_from("<7Q", info, 24)
        name = self.names[number]
        kind, place = CALLS[name][2].split()
        at = int(place)
        try:
            if kind == "fd":
                path = os.readlink(f"/proc/{pid}/fd/{arguments[at] & 0xFFFFFFFF}")
            else:
                text = _read_string(pid, arguments[at + (kind == "at")])
                base = arguments[at] & 0xFFFFFFFF if kind == "at" else AT_FDCWD
                where = "cwd" if base == AT_FDCWD else f"fd/{base}"
                path = os.path.normpath(os.path.join(os.readlink(f"/proc/{pid}/{where}"), text))
        except OSError:  # a bad descriptor: the call will fail
            return None
        return _Call(name, tuple(arguments), path)

    def _tear(self, pid: int, call: _Call) -> None:
        """Do the first half of a write, in its place."""
        fd = call.arguments[int(CALLS[call.name][2].split()[1])] & 0xFFFFFFFF
        data = _written_bytes(pid, call)
        facts = dict(
            line.split(":\t", 1) for line in Path(f"/proc/{pid}/fdinfo/{fd}").read_text().splitlines()[:2]
        )
        out = os.open(f"/proc/{pid}/fd/{fd}", os.O_WRONLY)
        offset = int(facts["pos"])
        if call.name == "pwrite64":
            offset = call.arguments[3]
        elif int(facts["flags"], 8) & os.O_APPEND:
            offset = os.fstat(out).st_size
        os.pwrite(out, data[: len(data) // 2], offset)
        os.close(out)


def torn_writes(operations: Sequence[Operation]) -> list[Operation]:
    """The writes among `operations` that can be torn, as such."""
    return [each._replace(torn=True) for each in operations if each.call in ("write", "pwrite64", "writev")]


def _written_bytes(pid: int, call: _Call) -> bytes:
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        if call.name == "writev":
            table = os.pread(memory.fileno(), 16 * call.arguments[2], call.arguments[1])
            pieces = list(struct.iter_unpack("<2Q", table))
        else:
            pieces = [(call.arguments[1], call.arguments[2])]
        return b"".join(os.pread(memory.fileno(), size, address) for address, size in pieces)


def _read_string(pid: int, address: int) -> str:
    data = b""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        while b"\0" not in data:
            # not across a page that may not be there
            data += os.pread(memory.fileno(), 256 - (address + len(data)) % 256, address + len(data))
    return os.fsdecode(data.partition(b"\0")[0])


def _ptrace(request: int, pid: int, address: int, data: int) -> None:
    if LIBC.ptrace(request, pid, address, data) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"ptrace: {os.strerror(number)}")


def _be_worker(work: Callable[[], int], ready: int, log: Path, group: int) -> None:
    """Do `work` as a traced process of a process group (0: a new one), and end."""

    def begin() -> int:
        os.setpgid(0, group)
        os.read(ready, 1)  # until this process is traced
        os.close(ready)
        _filter_calls()
        redirect_output(log)
        return work()

    end_after(begin)


def end_after(work: Callable[[], int]) -> NoReturn:
    """Do `work` in a forked process, and end with the exit code that it returns, or that its exception
    means; nothing of what called `fork` goes on here."""
    code = 1
    try:
        code = work()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def redirect_output(log: Path) -> None:
    """Let this process, and its children, print to the end of a file."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number in (1, 2):
        os.dup2(out, number)
    os.close(out)


def _filter_calls() -> None:
    """Let the kernel stop this process, and whatever it starts, at the calls of `CALLS`."""
    column = int(MACHINE != "x86_64")
    opens = {"open": 24, "openat": 32}  # where the flags are in seccomp's data
    simple = [call[column] for name, call in CALLS.items() if call[column] and name not in opens]
    load, equal, any_bit, give, jump = 0x20, 0x15, 0x45, 0x06, 0x05
    tail = [
        (give, 0, 0, RET_ALLOW),
        (load, 0, 0, opens["open"]),
        (jump, 0, 0, 1),
        (load, 0, 0, opens["openat"]),
        (any_bit, 0, 1, WRITING),  # one that only reads changes nothing
        (give, 0, 0, RET_TRACE),
        (give, 0, 0, RET_ALLOW),
    ]
    checks = [*((n, 5) for n in simple), (CALLS["open"][column] or 1 << 20, 1), (CALLS["openat"][column], 3)]
    program = [(load, 0, 0, 4), (equal, 0, len(checks) + 1, AUDIT_ARCH[MACHINE]), (load, 0, 0, 0)]
    for i, (number, target) in enumerate(checks):
        program.append((equal, len(checks) - 1 - i + target, 0, number))
    program += tail
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *line) for line in program))
    header = struct.pack("@HP", len(program), ctypes.addressof(code))
    if LIBC.prctl(38, 1, 0, 0, 0) or LIBC.prctl(22, 2, ctypes.c_char_p(header), 0, 0):
        raise OSError(ctypes.get_errno(), "no seccomp filter")
