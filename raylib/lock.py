"""The lock of a run: one owner at a time, and workers that stop when it is gone.

    RUN/lock.json      {"token", "host", "boot", "pid_namespace", "pid", "start", "locks", "since", "command",
                        "ray"}

The process that starts a run (a Ray driver, worker 0 of torchrun, a search's driver) owns its folder and all
below, as long as the file has its token; at its end the file goes. A second start finds out whether the owner
still lives: by its process, on the same machine; by `flock`, which the owner holds on the file and the system
drops with it, where the file system carries it to other machines; by its Ray job, where the cluster can be
asked. If it is gone, the start takes over, with a new token.

Workers of the old owner may live on for some seconds: each looks every `WATCH_SECONDS` whether token and
owner are those that it began with, and worker 0 once more right before it registers a checkpoint
(`require_owned`). The same look finds that the run's folder is gone, or a file that it cannot do
without (`watch_file`).
"""

import errno
import json
import os
import secrets
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, Field

from raylib.errors import MachineError, RunLost, UserError, name_errors
from raylib.fileio import open_plain
from raylib.processes import (
    has_rebooted,
    is_same_file,
    may_live,
    process_lives,
    reach_of_locks,
    sees_locks,
    this_command,
    this_process,
    try_lock,
)
from raylib.strict_json import check_shape, parse_json

LOCK = "lock.json"
WATCH_SECONDS = 1.0  # between looks
# until a process that should have ended by itself is interrupted, and until it is ended
GRACE_SECONDS, INTERRUPT_SECONDS = 5.0, 20.0
LONGEST = 1 << 16  # bytes of a record that are read
RETRY_SECONDS = 3.0  # a lock that is just being looked at, or written, is free or whole by then

Record = Mapping[str, Any]
JobHasEnded = Callable[[Record], bool | None]  # None: the cluster cannot be asked


class StoredJob(BaseModel, extra="allow"):
    """The Ray job of a run, in its lock."""

    job: str
    node: str = ""
    pid: int = 0


class StoredLock(BaseModel, extra="allow"):
    """A lock as its file has it; what is none counts as torn."""

    token: str
    pid: Annotated[int, Field(gt=0, lt=1 << 31)]
    start: str | None
    since: str
    ray: StoredJob | None
    host: str = ""
    boot: str = ""
    locks: str = ""
    command: str = ""


class Owner(NamedTuple):
    """A lock as workers get it. folder: of the run, or of the search around it."""

    folder: Path
    token: str


class RunLock:
    """The lock of `owner.folder`, in its owner (which has an open `descriptor`) or in one of its workers.
    `problem`: why this process must not go on with the run; "": nothing."""

    def __init__(self, owner: Owner, descriptor: int | None = None):
        self.owner, self.descriptor = owner, descriptor
        self.path, self.problem = owner.folder / LOCK, ""
        self.files: dict[Path, int] = {}  # that must stay: their sizes
        self.parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="lock", daemon=True)

    def look(self) -> str:
        """Look for a problem, and return it."""
        self.problem = self.problem or self._find_problem()
        return self.problem

    def _find_problem(self) -> str:
        gone = "gone while the run was under way; it ends here"
        try:
            record = _read_record(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return f"{self.path if self.owner.folder.is_dir() else self.owner.folder}: {gone}"
        if record.get("token") != self.owner.token:
            return f"{self.owner.folder}: {_describe(record)} has taken the run over; this process ends"
        if self.descriptor is None and not may_live(record, self.path):
            return f"{self.owner.folder}: its owner, {_describe(record)}, is gone; this worker ends"
        if self.parent not in (None, os.getppid()):
            return f"{self.owner.folder}: torchrun, which started this worker, is gone; it ends"
        for path, size in list(self.files.items()):
            try:
                if path.stat().st_size < size:
                    return f"{path}: cut off while the run was under way; it ends here"
            except (FileNotFoundError, NotADirectoryError):
                return f"{path}: {gone}"
        return ""

    def _watch(self) -> None:
        while not self.problem:
            if self.ended.wait(WATCH_SECONDS):
                return
            with suppress(OSError):  # a file system that does not answer just now
                self.look()
        if self.ended.wait(GRACE_SECONDS):
            return
        if self.descriptor is not None:  # a driver waits for its workers: as Ctrl-C would
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            if self.ended.wait(INTERRUPT_SECONDS):
                return
        print(f"error: {self.problem}", file=sys.stderr, flush=True)
        os._exit(MachineError.exit_code)

    def release(self) -> None:
        """Give the lock up."""
        self.ended.set()
        if self.descriptor is not None:
            with suppress(OSError):  # the folder is gone, or cannot be written any more
                if _read_record(self.path).get("token") == self.owner.token:
                    # still locked: who has opened it meanwhile sees that it is no longer this file
                    self.path.unlink()
            os.close(self.descriptor)
            self.descriptor = None


_locks: dict[Path, RunLock] = {}  # of this process, by folder


def _close_in_child() -> None:
    """Let go of the locks in a forked process, such as a loader: it would keep those of an owner that was
    killed."""
    for lock in _locks.values():
        if lock.descriptor is not None:
            os.close(lock.descriptor)
            lock.descriptor = None


os.register_at_fork(after_in_child=_close_in_child)


def find_lock(folder: Path) -> RunLock | None:
    """Return the lock that this process has of `folder` or of one around it, such as the search that a trial
    is of; None: it has none."""
    folder = folder.absolute()
    return next((_locks[path] for path in (folder, *folder.parents) if path in _locks), None)


def is_under_way(folder: Path) -> bool:
    """Return whether a live process owns the run in `folder`."""
    paths = (place / LOCK for place in (folder, *folder.absolute().parents))
    return any(path.is_file() and may_live(_read_record(path), path) for path in paths)


def owner_of(folder: Path) -> Owner | None:
    """Return the owner of `find_lock`, for a worker; None: there is no lock."""
    lock = find_lock(folder)
    return lock.owner if lock else None


def require_owned(folder: Path) -> None:
    """Look whether the run in `folder` is still this process's, as right before a checkpoint is registered.
    Without a lock (a loop that a program calls by itself) there is nothing to look at.

    Raises:
        RunLost: it is not.
    """
    if (lock := find_lock(folder)) and lock.look():
        raise RunLost(lock.problem)


def make_folder(path: Path) -> None:
    """Make a folder of a run, and those around it; of a run that is gone nothing is made anew.

    Raises:
        RunLost: the run is not this process's any more.
    """
    require_owned(path)
    path.mkdir(parents=True, exist_ok=True)


def stop_if_lost(folder: Path) -> None:
    """Go by what the watch has seen so far, which costs nothing: for each step.

    Raises:
        RunLost: the run is not this process's any more.
    """
    if (lock := find_lock(folder)) and lock.problem:
        raise RunLost(lock.problem)


def watch_file(path: Path) -> None:
    """End the run if this file of it goes, or gets shorter than it is now."""
    if lock := find_lock(path):
        lock.files[path] = path.stat().st_size


def unwatch_files(folder: Path) -> None:
    """Let this process remove what `watch_file` was told of below `folder`."""
    if lock := find_lock(folder):
        for path in [path for path in lock.files if path.is_relative_to(folder)]:
            del lock.files[path]


@contextmanager
def hold_run(folder: Path, job_has_ended: JobHasEnded = lambda record: None) -> Iterator[bool]:
    """Own `folder` in the block: a run, or a search with all of its trials; inside the block of the same or
    of one around it, by the lock that is there. Yields whether the folder is new.

    Raises:
        UserError: another process owns it; nothing was changed.
        RunLost: in the block, the run was taken over, or its folder went.
    """
    folder = folder.absolute()
    if find_lock(folder):
        yield not folder.exists()
        return
    for parent in folder.parents:
        if (parent / LOCK).is_file() and may_live(record := _read_record(parent / LOCK), parent / LOCK):
            raise _in_use(f"{folder}: a part of {parent}, which is in use", record)
    is_new = _make_folder(folder)
    try:
        with _registered(_acquire(folder, job_has_ended)):
            yield is_new
    finally:
        if is_new:
            with suppress(OSError):  # a run that has begun is not empty
                folder.rmdir()


@contextmanager
def work_for(owner: Owner | None) -> Iterator[None]:
    """Work for the owner of a run in the block, as a worker; None: it has no lock.

    Raises:
        RunLost: the owner is gone, or it went in the block.
    """
    if owner is None or find_lock(owner.folder):
        yield
        return
    lock = RunLock(owner)
    if lock.look():
        raise RunLost(lock.problem)
    with _registered(lock):
        yield


@contextmanager
def _registered(lock: RunLock) -> Iterator[None]:
    _locks[lock.owner.folder] = lock
    lock.thread.start()
    try:
        yield
    except BaseException as e:
        # whatever went wrong did so because the run is lost: a file that is gone, the interrupt of the watch
        with suppress(OSError):
            lock.look()
        if lock.problem and not isinstance(e, RunLost):
            raise RunLost(lock.problem) from e
        raise
    finally:
        lock.release()
        del _locks[lock.owner.folder]


def stored_owner(folder: Path) -> Owner | None:
    """Return the owner of a run by the file that worker 0 of torchrun wrote; None: there is none."""
    folder = folder.absolute()
    owned = next((path for path in (folder, *folder.parents) if (path / LOCK).is_file()), None)
    return Owner(owned, _read_record(owned / LOCK).get("token", "")) if owned else None


def add_ray_job(folder: Path, job: Record) -> None:
    """Store the Ray job of a run that this process owns, by which a start elsewhere can ask about it."""
    lock = find_lock(folder)
    if lock and lock.descriptor is not None:
        with name_errors(lock.path):
            _write_record(lock.descriptor, {**_read_record(lock.path), "ray": dict(job)})


def _describe(record: Record) -> str:
    job = f", Ray job {record['ray']['job']}" if record.get("ray") else ""
    return f"process {record.get('pid', '?')} on {record.get('host', '?')}{job}"


def _in_use(what: str, record: Record, advice: str = "") -> UserError:
    command = f" (`{record['command']}`)" if record.get("command") else ""
    since = f", since {record['since']}" if record else ""
    return UserError(f"{what} by {_describe(record)}{command}{since}; wait for its end, or stop it{advice}")


def _make_folder(folder: Path) -> bool:
    """Make a run's folder, and those around it; return whether it was not there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir()
    except FileExistsError:
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from None
        return False
    return True


def _acquire(folder: Path, job_has_ended: JobHasEnded) -> RunLock:
    path, limit = folder / LOCK, time.monotonic() + RETRY_SECONDS
    while True:
        if path.is_symlink():
            raise UserError(f"{path}: no lock of a run, whose name it has; remove it")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise UserError(f"{path}: no lock of a run, whose name it has; remove it")
            is_free, record = try_lock(descriptor), _parse(os.pread(descriptor, LONGEST, 0))
            # an owner that has just ended has removed the file that was opened
            if is_free is not False and is_same_file(descriptor, path):
                _require_gone(folder, record, is_free, job_has_ended)
                return _take(folder, descriptor, record)
            # of a process that is gone, or not written yet: another is just starting, or looks at it
            if is_free is False and (process_lives(record) or time.monotonic() > limit):
                raise _in_use(f"{folder}: in use", record)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        time.sleep(0.1)


def _require_gone(folder: Path, record: Record, is_free: bool | None, job_has_ended: JobHasEnded) -> None:
    """Raises UserError: the owner by the file, which no process here has locked, lives, or may live."""
    lives = process_lives(record)
    # nobody's, or torn by a crash; or of this process, which was another program before
    if not record or (lives and record["pid"] == os.getpid()):
        return
    if lives is None and (has_rebooted(record) or (is_free and sees_locks(folder / LOCK, record))):
        lives = False
    if lives is None and record["ray"] and (has_ended := job_has_ended(record)) is not None:
        lives = not has_ended
    if lives is not False:
        # a copy of a run under way has a copy of its lock, which nobody holds
        state = f"{folder} is a copy of its run" if lives else "it is gone"
        advice = "" if lives and not is_free else f"; if {state}, remove {folder / LOCK}"
        raise _in_use(f"{folder}: in use", record, advice)
    print(f"{folder}: taken over from {_describe(record)}, which is gone", flush=True)


def _take(folder: Path, descriptor: int, before: Record) -> RunLock:
    path, token = folder / LOCK, secrets.token_hex(8)
    since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    facts = {"locks": reach_of_locks(path), "since": since, "command": this_command(), "ray": None}
    try:
        with name_errors(path):
            _write_record(descriptor, {"token": token, **this_process(), **facts})
    except BaseException:
        if not before:
            path.unlink(missing_ok=True)
        raise
    # where the file system has no locks, the last of two that start at once has it
    if (written := _read_record(path)).get("token") != token:
        raise _in_use(f"{folder}: in use", written)
    return RunLock(Owner(folder, token), descriptor)


def _parse(data: bytes) -> dict[str, Any]:
    """Return a record; {} of one that a crash has torn, or that is just being written."""
    with suppress(ValueError):
        record = parse_json(data)
        check_shape(record, StoredLock)
        return record
    return {}


def _read_start(path: Path) -> bytes:
    with open_plain(path) as file:
        return file.read(LONGEST)


def _read_record(path: Path) -> dict[str, Any]:
    """Return the record of a lock, which its owner may be writing just now; {}: it is torn."""
    for _ in range(3):
        if record := _parse(_read_start(path)):
            return record
        time.sleep(0.05)
    return {}


def _write_record(descriptor: int, record: Record) -> None:
    data = json.dumps(record).encode()
    os.pwrite(descriptor, data, 0)  # over the old one: a full disk may have no other room
    os.ftruncate(descriptor, len(data))
    os.fsync(descriptor)
