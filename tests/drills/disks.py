"""Rows: a disk that is full, turns read-only, or vanishes, at many file operations of a run."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from raylib import checkpoint
from raylib.errors import UserError
from tests.drills.harness import Drill, NotRun, row
from tests.drills.kills import list_points, require_undisturbed
from tests.drills.runs import Case, finetuning, pretraining, run_to_end
from tests.drills.tracer import trace

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000


def enter_mount_namespace() -> str:
    """Give this process mounts of its own, which go with it; who is not root has a user namespace too.
    Returns why that cannot be, or ""."""
    libc, uid, gid = ctypes.CDLL(None, use_errno=True), os.geteuid(), os.getegid()
    if libc.unshare(CLONE_NEWNS if uid == 0 else CLONE_NEWNS | CLONE_NEWUSER):
        return f"no mounts of its own for a process here ({os.strerror(ctypes.get_errno())})"
    if uid:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
            Path(f"/proc/self/{name}").write_text(text)
    done = subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True, text=True)
    return done.stderr.strip()


def mount(*arguments: object) -> None:
    """Call mount(8).

    Raises:
        NotRun: it is not allowed here.
    """
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise NotRun(f"mount {' '.join(map(str, arguments))}: {done.stderr.strip()}")


@contextmanager
def small_disk(folder: Path, megabytes: int = 64) -> Iterator[Path]:
    """A disk of its own below `folder`: {folder}/disk shows what is in {folder}/kept."""
    kept, disk = folder / "kept", folder / "disk"
    for path in (kept, disk):
        path.mkdir()
    mount("-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", kept)
    mount("--bind", kept, disk)
    try:
        yield disk
    finally:
        for path in (disk, kept):
            while os.path.ismount(path):
                subprocess.run(["umount", "-l", path], check=True)


def fill(disk: Path) -> None:
    """Take all room that is left."""
    space = os.statvfs(disk)
    file = os.open(disk / "filler", os.O_WRONLY | os.O_CREAT)
    os.posix_fallocate(file, 0, space.f_bavail * space.f_frsize)
    os.close(file)


def require_one_line(log: str, codes: list[int], allowed: tuple[int, ...], *words: str) -> None:
    """Raises AssertionError: a run did not end with one of these codes and one error line that has all
    `words`."""
    errors = [line for line in log.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in log, f"a traceback: {' / '.join(log.strip().splitlines()[-3:])}"
    assert {*codes} <= {*allowed}, f"exit codes {codes} in place of {allowed}; {errors}"
    assert len(errors) == 1, f"{len(errors)} error lines: {errors}"
    assert all(word in errors[0] for word in words), f"{words} not in: {errors[0]}"


def require_whole(run: Path) -> None:
    """Raises AssertionError: the newest checkpoint of a run is not whole."""
    try:
        newest = checkpoint.find_newest(run)
        if newest is not None:
            checkpoint.verify(newest)
    except (UserError, OSError, ValueError) as error:
        raise AssertionError(f"the last checkpoint is not whole: {error}") from None


def disturb_disk(
    drill: Drill,
    case: Case,
    breaks: Callable[[Path], object],
    mends: Callable[[Path], object],
    every: int,
    words: tuple[str, ...] = (),
    allowed: tuple[int, ...] = (1,),
) -> None:
    """Break the disk at every so many-th operation of runs of `case` that have begun: each ends with one of
    the `allowed` exit codes and one line; with the disk mended it goes on."""
    drill.workshop.reference(case)
    points = [point for point in list_points(case, drill, 1) if not point[1].torn]
    begun = next(i for i, (_, operation) in enumerate(points) if operation.path == "metrics.jsonl")
    for worker, operation in drill.some(points[begun::every]):

        def disturb(folder: Path, point=(worker, operation)) -> None:
            with small_disk(folder) as disk:
                log = folder / "log.txt"
                works = case.workers(disk, notes=folder)
                done = trace(works, disk / "run", log, point, lambda _: breaks(disk))
                assert done.reached, "the operation did not come again"
                drill.count += 1
                mends(disk)
                if done.codes != [0]:
                    require_one_line(log.read_text(), done.codes, allowed, *words)
                    require_whole(disk / "run")
                run_to_end(case, disk, notes=folder)
                require_undisturbed(drill, case, disk, notes=folder)

        drill.attempt(operation, disturb)
    drill.finish()


def make_read_only(disk: Path) -> None:
    """Let all that is opened from now on be read-only."""
    mount("--bind", disk, disk)
    mount("-o", "remount,ro,bind", disk)


def unmount(disk: Path) -> None:
    """Take the disk away."""
    subprocess.run(["umount", "-l", disk], check=True)


def mount_again(disk: Path) -> None:
    """Bring the disk back."""
    left = list(disk.iterdir())
    mount("--bind", disk.parent / "kept", disk)
    assert not left, f"written where the disk had been: {[path.name for path in left]}"


def make_room(disk: Path) -> None:
    """Give the room back that `fill` took."""
    (disk / "filler").unlink()


def move_away(disk: Path) -> None:
    """Rename the run's folder."""
    (disk / "run").rename(disk / "moved")


def move_back(disk: Path) -> None:
    """Give it its name again."""
    left = [str(path.relative_to(disk)) for path in (disk / "run").rglob("*")]
    shutil.rmtree(disk / "run", ignore_errors=True)
    (disk / "moved").rename(disk / "run")
    assert not left, f"written where the run's folder had been: {left[:3]}"


@row
def full_disk_in_pretraining(drill: Drill) -> None:
    """A disk that fills up at every second file operation of a pretraining run. It ends with exit code 1 and
    one line with path and room, keeps its last checkpoint, and goes on when there is room."""
    disturb_disk(drill, pretraining(drill.data), fill, make_room, 2, ("no space left",))


@row
def full_disk_in_finetuning(drill: Drill) -> None:
    """A disk that fills up at every second file operation of a fine-tuning run. As in pretraining."""
    disturb_disk(drill, finetuning(drill.data), fill, make_room, 2, ("no space left",))


@row
def read_only_disk(drill: Drill) -> None:
    """A disk that turns read-only at every fifth file operation of a pretraining run. It ends with exit code
    1 and one line, and goes on when the disk is mended."""
    disturb_disk(drill, pretraining(drill.data), make_read_only, unmount, 5, ("read-only",))


@row
def vanished_disk(drill: Drill) -> None:
    """A disk that is gone (umount -l) at every fifth file operation of a pretraining run. It ends with an
    error of one line, writes nothing where the disk was, and goes on when it is back."""
    disturb_disk(drill, pretraining(drill.data), unmount, mount_again, 5, allowed=(1, 2))


@row
def vanished_folder(drill: Drill) -> None:
    """A run's folder that is moved away at every fifth file operation. It ends with an error of one line, and
    goes on when it is moved back."""
    disturb_disk(drill, pretraining(drill.data), move_away, move_back, 5, allowed=(1, 2))
