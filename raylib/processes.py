"""Processes, told apart on all machines that see a file, and locks of files between them."""

import errno
import fcntl
import multiprocessing
import os
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from raylib.errors import hide_secrets

# of one kernel
LOCAL_FILE_SYSTEMS = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "tmpfs", "ramfs", "overlay", "f2fs")
SHARED_FILE_SYSTEMS = ("nfs", "nfs4", "ceph")  # whose locks all machines see
COMMAND_LENGTH = 60  # characters of a command that a line about its process has


def this_process() -> dict[str, Any]:
    """Return {"host", "boot", "pid_namespace", "pid", "start"} of this process."""
    return {
        "host": os.uname().nodename,
        "boot": _read_text("/proc/sys/kernel/random/boot_id"),
        "pid_namespace": _pid_namespace(),
        "pid": os.getpid(),
        "start": process_start(os.getpid()),
    }


def this_command() -> str:
    """Return the beginning of what the user typed, for others to know the process by."""
    program, *words = sys.argv
    path = Path(program)
    words.insert(0, f"python -m {path.parent.name}" if path.name == "__main__.py" else path.name)
    text = hide_secrets(" ".join(words))
    return text if len(text) <= COMMAND_LENGTH else f"{text[:COMMAND_LENGTH]}..."


def end_with_parent() -> None:
    """Let this process, one of a pool, end as soon as the one that started it has ended, be it killed: it
    would wait for work for ever, and hold its memory."""
    parent = multiprocessing.parent_process()

    def end() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def process_lives(process: Mapping[str, Any]) -> bool | None:
    """Return whether a process, as `this_process` described it, lives; None: that cannot be seen here, for it
    is of another machine, or of a container that numbers its own."""
    here = this_process()
    if not here["start"] or any(process.get(k) != here[k] for k in ("host", "boot", "pid_namespace")):
        return None
    start = process_start(process["pid"])
    return None if start is None else start == process["start"]


def has_rebooted(process: Mapping[str, Any]) -> bool:
    """Return whether the machine of a process, which is this one, has started anew since."""
    here = this_process()
    return process.get("host") == here["host"] and process.get("boot", "") not in ("", here["boot"])


def process_start(pid: int) -> str | None:
    """Return when a process began, in ticks since the start of the machine, for numbers of processes come
    again; "": there is none, or it has ended and waits to be fetched; None: it is hidden from this user."""
    stat = _read_text(f"/proc/{pid}/stat")
    if stat:
        fields = stat.rpartition(")")[2].split()  # the name, in brackets, may have spaces
        return "" if fields[0] in "ZX" else fields[19]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return None


def try_lock(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool | None:
    """Lock a file; return whether it could be had; None: the file system has no locks."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as e:
        if e.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            raise
        return None
    return True


def sees_locks(path: Path, process: Mapping[str, Any]) -> bool:
    """Return whether a lock of the file `path` by a process, which has `reach_of_locks` as "locks", would be
    seen here."""
    if process.get("boot") and process["boot"] == this_process()["boot"]:
        return True  # one kernel, another container
    reach = reach_of_locks(path)
    # the server of a network file system locks a disk of its own: neither it nor its clients see the other's
    return reach != "" and process.get("locks") == reach


def reach_of_locks(path: Path) -> str:
    """Return who sees locks of a file: all machines that have mounted it ("shared"), this one alone
    ("local"), or nobody knows ("")."""
    kind, options = _file_system(path)
    if kind in SHARED_FILE_SYSTEMS:
        local = [o for o in options.split(",") if o == "nolock" or o.startswith("local_lock=")]
        return "shared" if all(option == "local_lock=none" for option in local) else ""
    return "local" if kind in LOCAL_FILE_SYSTEMS else ""


def may_live(process: Mapping[str, Any], path: Path) -> bool:
    """Return whether the process that locked the file `path` lives, as far as that can be seen without taking
    the lock: in doubt, it does."""
    lives = process_lives(process)
    if lives is None and sees_locks(path, process):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            return not try_lock(descriptor, fcntl.LOCK_SH)
        finally:
            os.close(descriptor)
    return lives is not False


def is_same_file(descriptor: int, path: Path) -> bool:
    """Return whether an open file is still the one that `path` names."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _file_system(path: Path) -> tuple[str, str]:
    """Return (kind, options) of the file system that `path` is on, as Linux calls it; ("", "") elsewhere."""
    best, found = "", ("", "")
    for line in _read_text("/proc/self/mountinfo").splitlines():
        fields, _, rest = line.partition(" - ")
        mount, kind = fields.split()[4].replace("\\040", " "), rest.split()
        if len(mount) >= len(best) and path.absolute().is_relative_to(mount):
            best, found = mount, (kind[0], kind[2])
    return found


def _pid_namespace() -> str:
    with suppress(OSError):  # no Linux
        return os.readlink("/proc/self/ns/pid")
    return ""


def _read_text(path: str) -> str:
    with suppress(OSError):  # no Linux, or no such process
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    return ""
