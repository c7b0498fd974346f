"""Tracking of a run: what it logs is sent to the services of `fit.track`.

The process that starts a run sends the lines of its metrics.jsonl on, from a thread, whichever worker writes
them. So training waits for no server, and whatever ends the run (an error, Ctrl-C, a worker that was killed)
is told. RUN/tracking.json has each tracker's id of the run and the last step of each metric that it got: a
run that goes on is the same run there, and a step that comes again is not logged again.
"""

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from raylib.errors import MachineError, UserError, hide_secrets
from raylib.fileio import read_json, write_json
from raylib.finite import finite_values
from raylib.provenance import code_version, commit, has_local_changes
from raylib.strict_json import Count, check_shape, parse_json
from raylib.trackers import TRACKERS, Backend, ExperimentTracker, Figures, Point, RunFacts, Status

TRACKING = "tracking.json"
SECONDS = 1.0  # between looks at metrics.jsonl
# files of a run that are sent with its results
RESULTS = ("config.json", "result.json", "result.md", "curve.png", "result.png")


class StoredTracker(BaseModel):
    """As `tracking.json` has it."""

    address: str
    id: str
    steps: dict[str, Count]


class NewLines:
    """The points of a metrics.jsonl that were appended since the last look; all of them, where it was written
    anew: a worker that goes on from a checkpoint has dropped the lines after it."""

    def __init__(self, path: Path):
        self.path, self.inode, self.offset = path, 0, 0

    def read(self) -> list[Point]:
        """Return the new points, but for one whose line is still being written."""
        if not self.path.is_file():
            return []
        with open(self.path, "rb") as file:
            status = os.fstat(file.fileno())
            if status.st_ino != self.inode or status.st_size < self.offset:
                self.inode, self.offset = status.st_ino, 0
            file.seek(self.offset)
            data = file.read()
        data = data[: data.rfind(b"\n") + 1]
        self.offset += len(data)
        points, now = [], int(1000 * time.time())
        for line in data.splitlines():
            with suppress(ValueError, KeyError):  # what a crash cut off
                record = parse_json(line, finite=False)
                check_shape(record, dict[str, float])
                points.append(Point(now, record.pop("step"), record))
        return points


def new_points(points: Sequence[Point], steps: Mapping[str, int]) -> tuple[list[Point], dict[str, int]]:
    """Return (of `points` what is later than `steps`, {metric: the last step that was logged}; the same dict
    after these). What is not finite, which earlier versions wrote, is left out."""
    new, steps = [], dict(steps)
    for point in points:
        values = {k: v for k, v in finite_values(point.values).items() if point.step > steps.get(k, -1)}
        steps |= dict.fromkeys(values, point.step)
        if values:
            new.append(point._replace(values=values))
    return new, steps


class RunTracking:
    """The trackers of a run, and the thread that sends them the lines of its metrics.jsonl. `status`: as the
    trackers will be told at the end."""

    def __init__(self, facts: RunFacts, backends: Sequence[Backend]):
        self.facts, self.path = facts, facts.folder / TRACKING
        self.status: Status = "finished"
        self.stored: dict[str, dict[str, Any]] = {}
        if os.path.lexists(self.path):
            what, advice = "the places where the run is tracked", "delete it to begin new runs there"
            self.stored = read_json(self.path, what, advice, shape=dict[str, StoredTracker])
        for entry in self.stored.values():  # earlier versions stored addresses as they were given
            entry["address"] = hide_secrets(entry["address"])
        self.lines, self.pending = NewLines(facts.folder / "metrics.jsonl"), list[Point]()
        self.trackers: dict[Backend, ExperimentTracker] = {}
        self.failing: set[Backend] = set()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="trackers", daemon=True)
        try:
            for name in backends:
                self.trackers[name] = self._open(name)
        except UserError:
            self._close_trackers("failed")
            raise
        if self.trackers:
            write_json(self.path, self.stored)
            self.thread.start()

    def _open(self, name: Backend) -> ExperimentTracker:
        stored = self.stored.get(name, {})
        try:
            tracker = TRACKERS[name](self.facts, stored)
        except ImportError as e:
            raise UserError(
                f"fit.track: {name} needs a package that is not installed ({e}): pip install -e .[track], or "
                "leave it out of fit.track"
            ) from None
        except Exception as e:  # whatever its client makes of an address, a key, a run that is gone
            raise UserError(
                f"fit.track: {name} does not take the run ({_first_line(e)}); mend that, or leave {name} "
                f"out of fit.track; to begin a new run there, delete {self.path}"
            ) from e
        if (stored.get("address"), stored.get("id")) != (tracker.address, tracker.id):
            self.stored[name] = {"address": tracker.address, "id": tracker.id, "steps": {}}
        return tracker

    def _watch(self) -> None:
        while not self.ended.wait(SECONDS):
            self._send()

    def _send(self) -> None:
        """Send what is new. What a tracker does not take is kept, and sent to it the next time."""
        self.pending += self.lines.read()
        before = [entry["steps"] for entry in self.stored.values()]
        for name, tracker in self.trackers.items():
            points, steps = new_points(self.pending, self.stored[name]["steps"])
            try:
                tracker.log(points)
            except Exception as e:  # a network, a server: training goes on without it
                if name not in self.failing:
                    self.failing.add(name)
                    print(f"note: fit.track: {name} takes no metrics now ({_first_line(e)})", flush=True)
            else:
                self.failing.discard(name)
                self.stored[name]["steps"] = steps
        if not self.failing:
            self.pending.clear()
        if before != [entry["steps"] for entry in self.stored.values()]:
            try:
                write_json(self.path, self.stored)
            except (OSError, MachineError) as e:  # a full disk: what training itself writes says more of it
                print(f"note: fit.track: {self.path} is not written ({_first_line(e)})", flush=True)

    def log_results(self, split: str, figures: Figures) -> None:
        """Log what the run came to: `figures` of its `split` (test, dev), and the files in its folder."""
        result_files = [path for name in RESULTS if (path := self.facts.folder / name).is_file()]
        for name, tracker in self.trackers.items():
            with _failures_noted(name, "has not got the results"):
                tracker.log_results(split, figures, result_files)

    def close(self) -> None:
        """Send the rest, and tell the trackers how the run ended."""
        if self.trackers:
            self.ended.set()
            self.thread.join()
            self._send()
        self._close_trackers(self.status)

    def _close_trackers(self, status: Status) -> None:
        for name, tracker in self.trackers.items():
            with _failures_noted(name, f"has not heard that the run is {status}"):
                tracker.close(status)


_open: dict[Path, RunTracking] = {}  # of this process, by folder; a part's is inside its run's


@contextmanager
def track_run(
    folder: Path, kind: str, config: dict[str, Any], tags: dict[str, str], backends: Sequence[Backend]
) -> Iterator[RunTracking]:
    """Track the run in `folder` while the block lasts; inside the block of the same run, by the trackers that
    are open already.

    Raises:
        UserError: a tracker is not installed, or does not take the run.
    """
    if folder in _open:
        yield _open[folder]
        return
    outer = next((tracking for other, tracking in _open.items() if other in folder.parents), None)
    search = next((parent for parent in folder.parents if (parent / "search.json").is_file()), None)
    code = {"git": commit(), "local_changes": has_local_changes(), "code": code_version()}
    tags |= {name: str(value) for name, value in code.items() if value is not None}
    tags |= {"search": search.name, "trial": folder.name} if search else {}
    parents = {name: tracker.id for name, tracker in outer.trackers.items()} if outer else {}
    top = search or (outer.facts.top if outer else folder)
    tracking = RunTracking(RunFacts(folder, kind, config, tags, top, parents), backends)
    _open[folder] = tracking
    try:
        yield tracking
    except BaseException as e:
        tracking.status = "failed" if isinstance(e, Exception) else "stopped"
        raise
    finally:
        del _open[folder]
        tracking.close()


@contextmanager
def _failures_noted(name: str, what: str) -> Iterator[None]:
    """Print that the tracker `name` failed at `what` in the block: a run that is done stays done."""
    try:
        yield
    except Exception as e:
        print(f"note: fit.track: {name} {what} ({_first_line(e)})", flush=True)


def _first_line(error: Exception) -> str:
    return hide_secrets((str(error).strip() or type(error).__name__).splitlines()[0])
