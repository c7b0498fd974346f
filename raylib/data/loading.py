"""The way of a batch from loader processes to the device of the training process.

A batch is dicts and named tuples of tensors, three dozen of them. torch hands each over as a file of shared
memory of its own (9 ms a batch in the training process, as long as building it took); here it travels as one
tensor (2 ms), and goes to a GPU in one copy.
"""

import itertools
import math
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from raylib.errors import MachineError, UserError, error_line
from raylib.notice import STOP_SIGNALS
from raylib.packed import Ragged, Sentences, TreeLayout, pack_tree, unpack_tree

T = TypeVar("T")
SHARED_MEMORY = "/dev/shm"
PREFETCH = 4  # batches that each loader process works ahead
CALIBRATION = 8  # steps whose times say how many loader processes it takes
HEADROOM = 1.25  # of these over what the times say
MUCH_WAITING = 0.1  # share of the time that is worth a warning
CPU = torch.device("cpu")
# tensors of a batch by which the host plans the step (`raylib.packed`): reading them on a GPU would make the
# host wait for it
CPU_KEYS = ("index", "lengths", "positions", "text_id", "image_id", "state_rows")


class StepDataset(Dataset):
    """`batches[step]`: this worker's part of the global batch of a step, which says how many "samples" the
    global batch has, and, where known, "tokens" its own part.

    batch_bytes: the most that a part takes; 0 if that is not known. image_tokens: tokens that the model makes
    of an image.
    """

    batch_bytes = 0
    image_tokens = 0

    def check_replaced(self, count: int, steps: int) -> None:
        """Raise UserError where too many samples have given their place to others: `count`, of all workers,
        in the run's first `steps` steps."""

    def find_changed_file(self) -> str | None:
        """Say which of the files that are read has another size than it had; None: none."""
        return None

    def epoch(self, steps: int) -> float | None:
        """Return how often the samples have been gone through after so many steps; None: they never end."""
        return None

    def count_tokens(self, batch: Any) -> int:
        """Count the tokens of a batch that are no padding: of texts, with specials; regions, or states, of
        images; images as the model cuts them."""
        if isinstance(batch, Ragged | Sentences):
            return int(batch.lengths.sum())
        if isinstance(batch, dict):
            images = len(batch["images"]) if "images" in batch else 0
            return images * self.image_tokens + sum(map(self.count_tokens, batch.values()))
        return 0


class BatchStream:
    """Iterator over `batches[first]` ... `batches[last - 1]` on `device`, read ahead by loader processes. The
    batches do not depend on how many there are.

    Args:
        workers: loader processes; 0: this process; None: one, and after `CALIBRATION` steps as many as it
            takes to make a batch in a step's time, at most one for each of this worker's `cpus` but one.
        is_quiet: say nothing of that choice, and of steps that wait.

    Raises:
        UserError, MachineError: no shared memory, or too little; as one line, what a loader process raised
            that is no bug, or the signal that ended it.
    """

    def __init__(
        self,
        batches: StepDataset,
        first: int,
        last: int,
        workers: int | None = None,
        device: torch.device = CPU,
        cpus: float = 1,
        is_quiet: bool = False,
    ):
        self.batches, self.device, self.cpus, self.is_quiet = batches, device, cpus, is_quiet
        self.workers, self.chooses = 1 if workers is None else workers, workers is None
        self.seconds: deque[tuple[float, float]] = deque(maxlen=CALIBRATION)  # of a batch; of its step
        self.warned = False
        self.loaders: list[BaseProcess] = []
        self._step, self._last = first, last  # the next step that comes; the end of those that are made
        self._stream = self._run(last)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            return next(self._stream)
        except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as e:
            # but for the first, they come of reading what a process that has died left to be fetched
            is_lost = not isinstance(e, RuntimeError) or "DataLoader worker" in str(e)
            dead = self._find_dead() if is_lost and self.loaders else None
            if dead is None:
                raise
            raise self._explain(*dead) from e

    def _find_dead(self) -> tuple[str, int] | None:
        """(name, exit code) of a loader process that was ended; PyTorch, which blames the shared memory for
        SIGBUS and says nothing of SIGKILL, does not tell how. None: none was."""
        ending = wait([loader.sentinel for loader in self.loaders], timeout=5)
        for loader in self.loaders:
            if loader.sentinel in ending:
                loader.join()
        # SIGTERM is what the others get when one has died
        dead = sorted((x for x in self.loaders if x.exitcode), key=lambda x: x.exitcode == -signal.SIGTERM)
        return (f"loader process {dead[0].pid}", dead[0].exitcode or 0) if dead else None

    def _explain(self, process: str, code: int) -> UserError | MachineError:
        if code == -signal.SIGBUS and (changed := self.batches.find_changed_file()):
            return UserError(f"{changed}; restore it, and start again")
        if code == -signal.SIGBUS:
            return MachineError(
                f"{process} was ended by SIGBUS: {SHARED_MEMORY} is full ({_free_shared_memory() >> 20} MB "
                "free), or a file that it had mapped was cut off; give the container more shared memory "
                "(docker run --shm-size), or set fit.loader_workers=0"
            )
        if code == -signal.SIGKILL:
            return MachineError(
                f"{process} was ended by SIGKILL, as the kernel does where the memory is full (see dmesg, "
                "its log); give the machine or container more memory, or lower "
                f"fit.loader_workers={self.workers}"
            )
        name = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return MachineError(f"{process} ended with {name}; fit.loader_workers=0 reads in the main process")

    def _run(self, last: int) -> Iterator[Any]:
        while self._step < last:
            self._last = last
            for layout, data, seconds in self._read_ahead():
                if isinstance(layout, Exception):
                    raise layout
                self._step += 1
                began = time.perf_counter()
                yield _unpack(layout, data, self.device)
                if self.chooses and self.device.type == "cuda":  # whose host is ahead of it
                    torch.cuda.synchronize(self.device)
                self.seconds.append((seconds, time.perf_counter() - began))
                if self.chooses and len(self.seconds) == CALIBRATION:
                    self._choose()

    def _read_ahead(self) -> Iterator[tuple["TreeLayout | Exception", Tensor, float]]:
        """The batches of the steps up to `_last`, packed, each with the seconds that it took to make."""
        if self.workers:
            _check_shared_memory(self.workers * PREFETCH * self.batches.batch_bytes)
        packed = DataLoader(
            _PackedBatches(self.batches),
            batch_size=None,
            sampler=self._steps(self._step),  # type: ignore[arg-type]  # what it iterates over once
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            prefetch_factor=PREFETCH if self.workers else None,
            worker_init_fn=_start_loader,
        )
        others, handler = multiprocessing.active_children(), signal.getsignal(signal.SIGCHLD)
        read = iter(packed)
        # PyTorch's handler would raise wherever the main thread is when a loader dies, be it in a checkpoint;
        # without it, whoever waits for the next batch is told
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
        self.loaders = [child for child in multiprocessing.active_children() if child not in others]
        # to hand over a file of shared memory, torch shakes hands with the process that wrote it, which takes
        # milliseconds where all cores are busy: a thread does it meanwhile
        return prefetch(read) if self.workers else read

    def _steps(self, step: int) -> Iterator[int]:
        while step < self._last:
            yield step
            step += 1

    def _choose(self) -> None:
        """Choose the number of loader processes, by the times of the last steps."""
        self.chooses = False
        batch, step = (median(times) for times in zip(*self.seconds, strict=True))
        wanted, most = self._count_needed(batch, step), max(1, int(self.cpus) - 1)
        if self.batches.batch_bytes:
            most = max(1, min(most, _free_shared_memory() // (PREFETCH * self.batches.batch_bytes)))
        chosen = min(wanted, most)
        more = f"; {wanted} would be needed, {self.cpus:g} CPUs are this worker's" if chosen < wanted else ""
        self._print(
            f"{chosen} loader process{'es' if chosen > 1 else ''}: a batch takes {1000 * batch:.3g} ms, a "
            f"step {1000 * step:.3g} ms{more}"
        )
        if chosen != self.workers:
            # what is under way comes first; then others go on from there
            self.workers, self._last = chosen, self._step

    def _print(self, line: str) -> None:
        if not self.is_quiet:
            print(line, flush=True)

    def _count_needed(self, batch: float, step: float) -> int:
        return max(1, math.ceil(HEADROOM * batch / step))

    def warn_of_waiting(self, step: int, waiting: float) -> None:
        """Say once that steps wait for their data, where `waiting`, the share of the time before `step`, is
        much."""
        if self.chooses or self.warned or waiting < MUCH_WAITING or len(self.seconds) < CALIBRATION:
            return
        self.warned = True
        batch, seconds = (median(times) for times in zip(*self.seconds, strict=True))
        wanted = max(self.workers + 1, self._count_needed(batch, seconds))
        self._print(
            f"step {step}: steps wait {100 * waiting:.0f} % of their time for data, of which a batch takes "
            f"{1000 * batch:.3g} ms, a step {1000 * seconds:.3g} ms; set fit.loader_workers={wanted} (now "
            f"{self.workers}), and give each worker a CPU more than that (now {self.cpus:g})"
        )


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """`items` in lists of `size`, the last perhaps shorter."""
    source = iter(items)
    while batch := list(itertools.islice(source, size)):
        yield batch


def prefetch(items: Iterable[T]) -> Iterator[T]:
    """`items`, the next one fetched by a thread while the last is used."""
    source = iter(items)
    end: Any = object()
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(next, source, end)
        while (item := future.result()) is not end:
            future = thread.submit(next, source, end)
            yield item


def _start_loader(worker: int) -> None:
    """Let a loader process end by its parent's word alone: Ctrl-C, Slurm and torchrun signal all processes of
    a group, and a training that is to save needs its batches a step longer."""
    for number in STOP_SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    # torch ends a loader by SIGTERM; a handler in Python does not learn who has sent a signal, a wait for it
    # does
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_by_parent, args=(os.getppid(),), daemon=True).start()


def _end_by_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


class _PackedBatches(Dataset):
    """Batches as one tensor each; an error that one line tells as a value, since torch would wrap it in the
    worker's traceback."""

    def __init__(self, batches: StepDataset):
        self.batches = batches

    def __getitem__(self, step: int) -> tuple["TreeLayout | Exception", Tensor, float]:
        began = time.perf_counter()
        try:
            layout, data = pack_tree(self.batches[step])
        except Exception as error:
            if (line := error_line(error)) is None:
                raise
            return line, torch.empty(0), 0.0
        return layout, data, time.perf_counter() - began


def _unpack(layout: TreeLayout, data: Tensor, device: torch.device) -> Any:
    """A packed batch on `device`, which all of it reaches in one copy, but for the tensors of `CPU_KEYS`."""
    host = unpack_tree(layout, data)
    if device.type == "cpu":
        return host
    return _without_cpu_keys(unpack_tree(layout, data.to(device, non_blocking=True)), host)


def _without_cpu_keys(tree: Any, host: Any) -> Any:
    """Return `tree` with those tensors of its copy on the host that stay there."""
    if isinstance(tree, dict):
        return {k: host[k] if k in CPU_KEYS else _without_cpu_keys(v, host[k]) for k, v in tree.items()}
    if isinstance(tree, tuple):
        named: Any = tree
        return type(tree)(**_without_cpu_keys(named._asdict(), host._asdict()))
    return tree


def to_device(batch: Any, device: torch.device) -> Any:
    """Return a batch whose tensors are on `device`, but for those of `CPU_KEYS`. A GPU's copies are made
    while the host goes on."""
    if isinstance(batch, Tensor):
        if device.type == "cuda" and batch.device.type == "cpu" and not batch.is_pinned():
            batch = batch.pin_memory()  # from other memory the host would wait for the copy
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {k: v if k in CPU_KEYS else to_device(v, device) for k, v in batch.items()}
    if isinstance(batch, tuple):
        named: Any = batch
        return type(batch)(**to_device(named._asdict(), device))
    return batch


def to_host(parts: Iterable[Tensor]) -> Iterator[Tensor]:
    """The tensors of `parts` on the host, each after the next has been asked for: a GPU computes that one
    while the host uses this."""
    # one behind: waiting for a copy that was begun before the last computation costs no time, as it is over
    last = None
    for part in parts:
        copied = _copy_to_host(part)
        if last is not None:
            yield _copied(*last)
        last = copied
    if last is not None:
        yield _copied(*last)


def _copy_to_host(part: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Begin the copy of a tensor. Returns it with what tells its end."""
    if part.device.type != "cuda":
        return part, None
    copy = torch.empty(part.shape, dtype=part.dtype, pin_memory=True).copy_(part, non_blocking=True)
    end = torch.cuda.Event()
    end.record()
    return copy, end


def _copied(copy: Tensor, end: torch.cuda.Event | None) -> Tensor:
    if end is not None:
        end.synchronize()
    return copy


def _free_shared_memory() -> int:
    try:
        space = os.statvfs(SHARED_MEMORY)
    except OSError:
        raise UserError(
            f"no shared memory at {SHARED_MEMORY} for loader processes; set fit.loader_workers=0"
        ) from None
    return space.f_bavail * space.f_frsize


def _check_shared_memory(num_bytes: int) -> None:
    free = _free_shared_memory()
    if free < num_bytes:
        raise UserError(
            f"{SHARED_MEMORY} has {free >> 20} MB free, loader processes need {num_bytes >> 20}; set "
            "fit.loader_workers=0 or give the container more (docker run --shm-size)"
        )
