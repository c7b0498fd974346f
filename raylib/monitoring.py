"""A training while it runs: a line of progress; the same figures in `metrics.jsonl`, from which
`raylib.tracking` has them, and in Ray's metrics; a word when a step hangs, with the stacks of all workers."""

import json
import os
import platform
import shutil
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import BaseModel

from raylib.data.loading import StepDataset
from raylib.distributed import all_gather
from raylib.fileio import append_jsonl, read_jsonl, repair_jsonl, write_atomically
from raylib.finite import finite_values
from raylib.lock import require_owned, watch_file
from raylib.runtime import Runtime, peak_memory
from raylib.strict_json import Count

if TYPE_CHECKING:
    from raylib.loop import Meter


class StoredMetrics(BaseModel, extra="allow"):
    """A line of metrics.jsonl: numbers by name."""

    step: Count
    __pydantic_extra__: dict[str, float]


class MetricsLog:
    """Appends one line a record. A resumed run drops the lines of steps that it will do again, and of others
    what is not finite, which earlier versions wrote as NaN: JSON has no such word.

    start: the step that it goes on from; is_evaluated: the evaluation there does not come again.
    """

    def __init__(self, run: Path, start: int, is_evaluated: bool = True):
        self.path, self.name = run / "metrics.jsonl", run.name
        for note in repair_jsonl(self.path, "step"):
            print(note, flush=True)

        # a run that crashed has logged steps after its newest checkpoint, which come again
        def stays(record: dict) -> bool:
            is_evaluation = any(name.startswith("eval/") for name in record)
            return record["step"] < start or (record["step"] == start and (is_evaluated or not is_evaluation))

        lines = [json.dumps(finite_values(r)) + "\n" for r in read_metrics(run) if stays(r)]
        write_atomically(self.path, "".join(lines))
        watch_file(self.path)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Finite values at `step`; names with a slash group: "loss/itm", "retrieval/de"."""
        require_owned(self.path)  # or a folder that is gone, or its file, would be made anew
        append_jsonl(self.path, {"step": step, **values})


def read_metrics(run: Path) -> list[dict]:
    """Return all records of a run, in order; a last line cut off by a crash is dropped."""
    return read_jsonl(run / "metrics.jsonl", StoredMetrics)


def list_losses(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """List the losses in the records of a run, `loss/NAME`, without what stands beside them."""
    names = {name for record in records for name in record if name.startswith("loss/")}
    return sorted(names - {"loss/grad_norm", "loss/itm_accuracy"})


class ProgressLog:
    """Logs what the training `run` of `steps` steps reaches, from step `first` on, in epochs where `batches`
    has some. All workers take part, the one with a `metrics_log` speaks. It names a worker whose own part of
    a step takes longer than the others', by their median: `SLOW` times as long, `SLOW_SECONDS` and
    `SLOW_SHARE` of a step more, in `SLOW_WINDOWS` windows of `SLOW_STEPS` and more in a row."""

    # a machine that others use too makes one window slow, or a step of milliseconds; neither is worth a word
    SLOW, SLOW_SECONDS, SLOW_SHARE, SLOW_STEPS, SLOW_WINDOWS = 1.5, 0.01, 0.05, 10, 2

    def __init__(
        self,
        run: str,
        steps: int,
        first: int,
        batches: StepDataset,
        meter: "Meter",
        runtime: Runtime,
        metrics_log: MetricsLog | None,
    ):
        self.run, self.steps, self.first, self.batches = run, steps, first, batches
        self.meter, self.runtime, self.metrics_log = meter, runtime, metrics_log
        self.before = self.last = meter.copy()
        # of the window since `window_step`: seconds of each worker's own part, of all steps
        self.forward, self.worked, self.window_step = np.zeros(runtime.world_size), 0.0, first
        self.slow_worker, self.slow_windows = -1, 0  # none; windows in a row in which it was slow

    def log(self, step: int, lr: float, losses: dict[str, float], skipped: int) -> float:
        """Log step `step`: the means of the losses, how many steps have been skipped so far, and what the
        steps since the last line took. JSON has no NaN: a loss that is not finite is in the printed line
        alone. Returns the share of the time in which the slowest worker waited for data.

        Raises:
            UserError: too many samples cannot be used.
        """
        now, last, self.last = self.meter.copy(), self.last, self.meter.copy()
        worked = now.working_seconds - last.working_seconds
        waited = now.seconds.get("data", 0.0) - last.seconds.get("data", 0.0)
        memory = peak_memory(self.runtime.device)
        # one gather of what workers differ in: the slowest reader and the fullest memory count
        forward = now.forward_seconds - last.forward_seconds
        local = torch.tensor(
            [now.tokens - last.tokens, waited, memory, forward, now.num_replaced], dtype=torch.float64
        )
        found = all_gather(local.to(self.runtime.device), [len(local)] * self.runtime.world_size)
        tokens, waits, memories, forwards, replaced = found.view(-1, len(local)).T.tolist()
        self.batches.check_replaced(self.meter.add_replaced(int(sum(replaced))), step)
        waiting = max(waits) / worked
        if not self.metrics_log:
            return waiting
        figures = {
            "samples_per_second": (now.samples - last.samples) / worked,
            "tokens_per_second": sum(tokens) / worked,
            "memory_gb": max(memories),
            "waiting": waiting,
            "eta_seconds": self._seconds_left(step),
        }
        if epoch := self.batches.epoch(step):
            figures["epoch"] = epoch
        if now.peak and now.flops_per_token:
            reached = now.flops_per_token * figures["tokens_per_second"]
            figures["share_of_peak"] = reached / (now.peak * self.runtime.world_size)
        named = {f"loss/{k}": v for k, v in finite_values(losses).items()}
        self._record(step, {"lr": lr, **named, "skipped": skipped, **figures})
        self._print(step, _describe(losses, lr, skipped, figures), epoch)
        self._name_slow_worker(step, forwards, worked)
        return waiting

    def _name_slow_worker(self, step: int, forwards: list[float], worked: float) -> None:
        """Say once that a worker is slow: with two, beside the other one."""
        self.forward += forwards
        self.worked += worked
        steps = step - self.window_step
        if self.runtime.world_size == 1 or steps < self.SLOW_STEPS:
            return
        slowest = int(self.forward.argmax())
        own, usual = self.forward[slowest], median(np.delete(self.forward, slowest).tolist())
        least = max(self.SLOW_SECONDS * steps, self.SLOW_SHARE * self.worked)
        slow_worker = slowest if own > self.SLOW * usual and own - usual > least else -1
        self.slow_windows = self.slow_windows + 1 if slow_worker == self.slow_worker else 1
        if slow_worker != -1 and self.slow_windows == self.SLOW_WINDOWS:
            self._print(
                step,
                [
                    f"worker {slowest} is slow: its own part of a step takes {own / steps:.2g} s, that of "
                    f"other workers {usual / steps:.2g} s, and they wait for it"
                ],
            )
        self.slow_worker, self.window_step = slow_worker, step
        self.forward[:], self.worked = 0.0, 0.0

    def log_evaluation(self, step: int, scores: dict[str, float]) -> None:
        """Log the scores after `step` steps; names with a slash are grouped."""
        if self.metrics_log and scores:
            self._record(step, {f"eval/{k}": v for k, v in scores.items()})
            groups: dict[str, list[str]] = {}
            for name, value in scores.items():
                group, _, rest = name.rpartition("/")
                groups.setdefault(group, []).append(f"{rest} {value:.4f}")
            self._print(step, [" ".join([group, *parts]).strip() for group, parts in groups.items()])

    def mean_rate(self, step: int) -> float:
        """Return samples a second over all of the `step` steps, of earlier starts too."""
        spent, samples = self.meter.working_seconds, self.meter.samples - self.before.samples
        return step * samples / max(1, step - self.first) / spent if spent else 0.0

    def _record(self, step: int, metrics: dict[str, float]) -> None:
        assert self.metrics_log is not None
        self.metrics_log.log(step, metrics)
        self.runtime.publish(metrics)

    def _seconds_left(self, step: int) -> float:
        """By the mean of this process's steps, with evaluations and checkpoints, without its start."""
        spent = sum(self.meter.seconds.values()) - sum(self.before.seconds.values())
        start = self.meter.seconds.get("start", 0.0) - self.before.seconds.get("start", 0.0)
        return (spent - start) / (step - self.first) * (self.steps - step)

    def _print(self, step: int, groups: list[str], epoch: float | None = None) -> None:
        place = f"{self.run} step {step}/{self.steps}" + ("" if epoch is None else f" epoch {epoch:.2f}")
        print(layout([place, *groups]), flush=True)


def _describe(losses: dict[str, float], lr: float, skipped: int, figures: dict[str, float]) -> list[str]:
    """The groups of a line of progress."""
    speed = f"{short(figures['samples_per_second'])} samples/s"
    if figures["tokens_per_second"]:
        speed += f" {short(figures['tokens_per_second'])} tokens/s"
    if "share_of_peak" in figures:
        speed += f" {100 * figures['share_of_peak']:.0f} % of peak"
    groups = [
        " ".join(f"{name} {value:.3f}" for name, value in losses.items()),
        f"lr {lr:.2e}",
        *([f"skipped {skipped}"] if skipped else []),
        speed,
        f"{figures['memory_gb']:.1f} GB",
        f"waiting {100 * figures['waiting']:.0f} %",
        f"ETA {duration(figures['eta_seconds'])}",
    ]
    return [group for group in groups if group]


def layout(groups: list[str]) -> str:
    """Join the groups of a line. A terminal that is narrower gets several, cut between groups, or between
    words of a long one."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    lines = [groups[0]]
    for group in groups[1:]:
        if len(lines[-1]) + len(group) + 3 <= width:
            lines[-1] += f" | {group}"
            continue
        lines.append(" ")
        for word in group.split(" "):
            if len(lines[-1]) + len(word) + 1 > width:
                lines.append(" ")
            lines[-1] += f" {word}"
    return "\n".join(lines)


def short(number: float) -> str:
    """Write a rate with three digits: "9.32", "512", "12.3k", "1.20M"."""
    unit = "" if number < 999.5 else "k" if number < 999_500 else "M"
    number /= {"": 1, "k": 1e3, "M": 1e6}[unit]
    return f"{number:.{0 if number >= 99.95 else 1 if number >= 9.995 else 2}f}{unit}"


def duration(seconds: float) -> str:
    """Write a time that is left: "12:05", "1:02:03", "3 d 04:12"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, of_day = divmod(hours, 24)
    if days:
        return f"{days} d {of_day:02d}:{minutes:02d}"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class StallWatch:
    """Tells of a step that takes `FACTOR` times the median of the last ones and `LEAST_SECONDS` at least
    (`FIRST_SECONDS` if it is one of the first `WARMUP`), while it still hangs: one line on stderr, and the
    Python stacks of every worker in RUN/stacks-STEP.txt, once a step. Both
    name the files that the worker, or a loader process of it, waits for: of a file system that does not
    answer.

    The stacks are the process's own, read by a thread of it: nothing has to attach from outside, which
    containers forbid (ptrace, so py-spy).
    """

    FACTOR, LEAST_SECONDS, FIRST_SECONDS, WARMUP = 20, 10.0, 600.0, 10

    def __init__(self, runtime: Runtime, interval: float = 1.0):
        self.runtime, self.interval = runtime, interval
        self.durations: deque[float] = deque(maxlen=100)
        self.under_way: tuple[int, float] | None = None  # a step, and when it began
        self.ended = threading.Event()
        self.thread: threading.Thread | None = None

    def __enter__(self) -> "StallWatch":
        return self

    def __exit__(self, *error: object) -> None:
        self.ended.set()
        if self.thread:
            self.thread.join()

    def start(self, step: int) -> None:
        """Begin a step."""
        # loader processes fork with the first batch: the thread comes after it
        if self.thread is None and self.durations:
            self.thread = threading.Thread(target=self._watch, name="stall watch", daemon=True)
            self.thread.start()
        self.under_way = step, time.perf_counter()

    def stop(self) -> None:
        """End a step: what follows is an evaluation, a checkpoint or the next one."""
        if self.under_way:
            self.durations.append(time.perf_counter() - self.under_way[1])
            self.under_way = None

    def _watch(self) -> None:
        reported = -1
        while not self.ended.wait(self.interval):
            known = list(self.durations)
            usual = median(known)
            limit = max(self.LEAST_SECONDS, self.FACTOR * usual)
            limit = limit if len(known) >= self.WARMUP else self.FIRST_SECONDS
            step, began = self.under_way or (reported, 0.0)
            seconds = time.perf_counter() - began
            if step != reported and seconds > limit:
                reported = step
                self._report(step + 1, seconds, usual)

    def _report(self, step: int, seconds: float, usual: float) -> None:
        path = self.runtime.run / f"stacks-{step}.txt"
        where = f"worker {self.runtime.rank} on {socket.gethostname()}, process {os.getpid()}"
        waits = [f"process {process} waits for {file}" for process, file in sorted(set(find_waits()))]
        # in one call, for the other workers append to the same file
        with open(path, "a", encoding="utf-8") as file:
            lines = [f"==== {where}: {seconds:.0f} s in step {step}", *waits, format_stacks()]
            file.write("\n".join(lines) + "\n")
        if self.runtime.rank == 0:
            parts = [f"step {step} hangs: {seconds:.0f} s so far, others take {usual:.2g} s", *waits[:2]]
            line = "; ".join([*parts, "all workers' stacks"])
            print(f"{line}: {path}", file=sys.stderr, flush=True)


# System calls that read a file: by the number of an open one, or by its name
READS, NAMED_READS = {
    "x86_64": ({0, 17, 19, 295}, {257, 262, 332}),  # read, pread, readv, preadv; openat, fstatat, statx
    "aarch64": ({63, 67, 65, 69}, {56, 79, 291}),
}.get(platform.machine(), (set(), set()))


def find_waits() -> Iterator[tuple[int, str]]:
    """Yield (process, file) of each thread of this process and its children that is in a system call that
    reads a file. Nothing where the system does not tell (it is Linux's /proc)."""
    processes = [os.getpid()]
    for task in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):
            processes += map(int, task.read_text().split())
    for process in processes:
        for task in Path(f"/proc/{process}/task").glob("*"):
            with suppress(OSError, ValueError):  # it has ended, or is not in a call
                number, *arguments = (int(word, 0) for word in (task / "syscall").read_text().split())
                if number in READS:
                    file = os.readlink(f"/proc/{process}/fd/{arguments[0]}")
                elif number in NAMED_READS:
                    with open(f"/proc/{process}/mem", "rb", buffering=0) as memory:
                        memory.seek(arguments[1])
                        file = os.fsdecode(memory.read(4096).partition(b"\0")[0])
                else:
                    continue
                if not file.startswith(("/dev/", "/proc/")) and "/" in file:
                    yield process, file


def format_stacks() -> str:
    """Return the stacks of all threads of this process but the calling one, the main one first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main, this_thread = threading.main_thread().ident, threading.get_ident()
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] != main)
    return "\n".join(
        f"thread {names.get(ident, ident)}\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in frames
        if ident != this_thread
    )
