"""Processes that read damaged files, and may die of them; another takes the place of one that did."""

import importlib
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from tests.fuzz import child, mutate
from tests.fuzz.child import Outcome
from tests.fuzz.reader import Reader

ROOT = Path(__file__).resolve().parents[2]
FILES_A_PROCESS = 300  # then a new one takes its place: libraries keep things
FORK = multiprocessing.get_context("fork")


class Job(NamedTuple):
    """Damaged example `number` of a reader; or what lies in a folder that was kept."""

    reader: str
    number: int
    kept: Path | None = None


class Result(NamedTuple):
    """What came of a job. mutation: the kind of damage. target: the damaged file's name."""

    job: Job
    mutation: str
    target: str
    outcome: Outcome


@dataclass
class Examples:
    """The valid example of every reader, below `folder`."""

    readers: dict[str, Reader]
    folder: Path
    seed: int = 0
    inside: dict[str, Path] = field(default_factory=dict)  # reader -> what is read, below its folder
    bytes: list[bytes] = field(default_factory=list)  # of a file of each

    def build(self) -> dict[str, str]:
        """Write the examples, in processes of their own. Returns {reader: why its example was not made}."""
        faults = {}
        for name in self.readers:
            with Worker(self, self.folder / "make") as worker:
                worker.send(("build", name))
                answer = worker.receive(120)
            shutil.rmtree(self.folder / "make", ignore_errors=True)
            if isinstance(answer, tuple):
                self.inside[name], modules, data = answer
                self.bytes.append(data)
                for module in modules:  # once here, and not again in each process
                    importlib.import_module(module)
            else:
                faults[name] = answer
        return faults

    def make(self, job: Job, folder: Path) -> mutate.Case:
        """Write a damaged example into `folder`."""
        reader, inside = self.readers[job.reader], self.inside[job.reader]
        example = self.folder / job.reader
        others = self.bytes
        if job.kept:
            shutil.copytree(job.kept, folder, symlinks=True)
            return mutate.Case(folder / inside, folder / inside, "kept")
        return mutate.make_case(reader, example, inside, self.seed, job.number, others, folder)


class Worker:
    """A process that does what it is sent."""

    def __init__(self, examples: Examples, folder: Path):
        self.connection, theirs = FORK.Pipe()
        self.folder, self.done = folder, 0
        self.job: Any = None
        self.case: mutate.Case | None = None  # that it has begun to read
        self.phase = ""  # "oracle": the product has read it
        self.process = FORK.Process(target=_serve, args=(examples, folder, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.cpu, self.moved, self.began = 0.0, time.monotonic(), 0.0

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, order: tuple[str, Any]) -> None:
        self.connection.send(order)
        self.job, self.phase = order[1], ""
        self.began, self.moved = self._cpu()[0], time.monotonic()
        self.cpu = self.began

    def receive(self, seconds: float) -> Any:
        try:
            return self.connection.recv() if self.connection.poll(seconds) else "no answer"
        except EOFError:
            return f"the process ended: {self._death()}"

    def close(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()

    def _death(self) -> str:
        self.process.join(10)
        code = self.process.exitcode or 0
        words = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        # `faulthandler` wrote where
        log = (self.folder / "stderr.txt").read_bytes()[-20_000:].decode(errors="replace")
        lines = re.findall(r'File ".*?([^/"]+)", line (\d+)', log[log.rfind("Fatal Python error") :])
        return " < ".join([words, *(f"{file}:{line}" for file, line in lines[:3])])

    def _cpu(self) -> tuple[float, str]:
        """(seconds of the CPU that the process used, its state)."""
        try:
            words = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0, "Z"
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK"), words[0]

    def hangs(self, limit: float) -> str:
        """Say that it has used the CPU for too long, or waits for something; "" if it does not."""
        cpu, state = self._cpu()
        if cpu > self.cpu or state == "R":
            self.cpu, self.moved = cpu, time.monotonic()
        if cpu - self.began > limit:
            return f"{cpu - self.began:.1f} s of the CPU"
        waits = time.monotonic() - self.moved
        return f"waits for {waits:.0f} s (state {state})" if waits > 5 else ""


def _serve(examples: Examples, folder: Path, connection: Connection) -> None:
    """Answer what is sent, until the other end is closed."""
    watch = child.enter(folder)
    for number in range(1_000_000):
        try:
            order, what = connection.recv()
        except EOFError:
            return
        own = folder / str(number)
        own.mkdir()
        child.use_temporary_folder(own / "tmp")
        try:
            if order == "build":
                connection.send(_build(examples, what, own / "files"))
            elif order == "save":
                job, to = what
                connection.send(examples.make(job, to))
            elif order == "trace":
                case = examples.make(what, own / "files")
                connection.send(child.called_functions(examples.readers[what.reader], case, ROOT))
            else:
                case = examples.make(what, own / "files")
                # so that a process that dies has said of what
                connection.send(case)
                reader = examples.readers[what.reader]
                tell = lambda word: connection.send((word,))  # noqa: E731
                outcome = child.judge(reader, case.path, case.target, own, watch, tell)
                connection.send(outcome)
        except Exception as e:
            connection.send(f"{type(e).__name__}: {e}; {traceback.format_exc()[-1500:]}")
        shutil.rmtree(own, ignore_errors=True)


def _build(examples: Examples, name: str, copy: Path) -> tuple[Path, list[str], bytes]:
    """Write an example, and read a copy. Returns (what is read, the modules that this imported, bytes of one
    of its files)."""
    before = set(sys.modules)
    folder, reader = examples.folder / name, examples.readers[name]
    folder.mkdir(parents=True)
    path = reader.example(folder)
    inside = path.relative_to(folder)
    files = sorted(file for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())
    data = files[0].read_bytes()[: 1 << 20]
    shutil.copytree(folder, copy, symlinks=True)
    reader.read(copy / inside)
    reader.oracle(copy / inside)
    return inside, [m for m in sys.modules if m not in before and not m.startswith(("ray.", "__"))], data


def run(
    examples: Examples, jobs: Iterable[Job], num_workers: int, folder: Path, until: float
) -> Iterator[Result]:
    """Do all jobs, `num_workers` at a time, while `time.monotonic()` is below `until`."""
    queue, names = iter(jobs), iter(range(1_000_000))
    workers: list[Worker] = []
    try:
        while True:
            while len(workers) < num_workers and time.monotonic() < until:
                if (job := next(queue, None)) is None:
                    break
                worker = Worker(examples, folder / f"process-{next(names)}")
                workers.append(worker)
                worker.send(("read", job))
            if not workers:
                return
            ready = wait([worker.connection for worker in workers], timeout=0.25)
            for worker in list(workers):
                ended = _advance(worker, examples, worker.connection in ready)
                if ended is None:
                    continue
                yield ended
                job = next(queue, None) if time.monotonic() < until else None
                alive = ended.outcome.kind not in ("signal", "hang") and worker.process.is_alive()
                if job is not None and alive and worker.done < FILES_A_PROCESS:
                    worker.send(("read", job))
                    continue
                worker.close()
                shutil.rmtree(worker.folder, ignore_errors=True)
                workers.remove(worker)
                if job is not None:
                    fresh = Worker(examples, folder / f"process-{next(names)}")
                    workers.append(fresh)
                    fresh.send(("read", job))
    finally:
        for worker in workers:
            worker.close()


def _advance(worker: Worker, examples: Examples, is_ready: bool) -> Result | None:
    """Take what a process has to say; None: it is still at it."""
    job: Job = worker.job
    case = worker.case
    if is_ready:
        try:
            answer = worker.connection.recv()
        except (EOFError, OSError):
            if worker.phase == "oracle":
                return _result(job, case, Outcome("accepted and wrong", f"the oracle: {worker._death()}"))
            return _result(job, case, Outcome("signal", worker._death()))
        if answer == ("oracle",):
            worker.phase = "oracle"
            return None
        if isinstance(answer, mutate.Case):
            worker.case, worker.began = answer, worker._cpu()[0]
            return None
        worker.case, worker.done = None, worker.done + 1
        if isinstance(answer, str):
            raise RuntimeError(f"{job.reader} {job.number}: {answer}")
        return _result(job, case, answer)
    if why := worker.hangs(examples.readers[job.reader].seconds):
        return _result(job, case, Outcome("hang", why))
    return None


def _result(job: Job, case: mutate.Case | None, outcome: Outcome) -> Result:
    return Result(job, case.mutation if case else "", case.target.name if case else "", outcome)
