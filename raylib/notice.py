"""Notices that a run must stop: a signal from Slurm, Kubernetes, `ray job stop` or the keyboard, or Ray's
word that a node goes away. A training answers one by a checkpoint at its next step boundary.

1. `signals_handled`: a command's main thread takes signals. They end it at once,
2. `notices_to(receive)`: but within this block, the first one is handed to `receive` instead.
3. `StopVote`: the training loop's `receive`; all workers agree on the step after which they stop.
4. `NoticeBoard` brings a notice from a Ray driver to its workers.
"""

import asyncio
import ctypes
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NamedTuple, Self, TypeVar

T = TypeVar("T")

# Slurm users send the last two: sbatch --signal=B:USR1@300
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # environment variable of the driver of a submitted job
STOP_SECONDS = "POLYGLANCE_STOP_SECONDS"  # environment variable: what `known_grace` returns
# a notice: that Ray takes a node away; above it, of a signal, the exit code that a shell knows of it
PREEMPTION, SIGNALLED = 1, 128
SECOND_CTRL_C = b"Ctrl-C: saves after this step, and stops; a second one ends at once\n"

_receivers: list[Callable[[int], None]] = []  # the innermost block of `notices_to` is last
_received: list[int] = []  # signals of the command under way


class Interrupted(KeyboardInterrupt):
    """A command ends because of a signal. exit_code: of its notice. line: says where it stood; "": another
    process says so; None: there is nothing to say of that."""

    def __init__(self, exit_code: int, line: str | None = None):
        super().__init__(exit_code, line)
        self.exit_code, self.line = exit_code, line

    def describe(self, restart_hint: str) -> str:
        """Return the line of a command that had nothing to save."""
        is_ctrl_c = self.exit_code == notice_of(signal.SIGINT)
        what = "interrupted" if is_ctrl_c else f"stopped by {notice_name(self.exit_code)}"
        return "; ".join(filter(None, (what, restart_hint)))


def notice_of(number: int) -> int:
    """Return the notice of a signal."""
    return SIGNALLED + number


def notice_name(notice: int) -> str:
    """Return "Ctrl-C", "SIGTERM" ... of a notice."""
    if notice == PREEMPTION:
        return "Ray's preemption notice"
    number = signal.Signals(notice - SIGNALLED)
    words = {signal.SIGINT: "Ctrl-C", signal.SIGHUP: "SIGHUP (its terminal was closed)"}
    return words.get(number, number.name)


def last_notice() -> int:
    """Return the notice that ends this command, for an exception that does not say so: Ray and Tune take
    Ctrl-C themselves."""
    return notice_of(_received[-1] if _received else signal.SIGINT)


@contextmanager
def signals_handled() -> Iterator[None]:
    """Take the signals that ask a command to end, within the block, where this is the main thread; who calls
    a command from Python has them as before after it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # a shell starts what runs in its background with Ctrl-C ignored, nohup a command with SIGHUP: it stays so
    taken = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _receive) for number in taken}
    _received.clear()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _receive(number: int, frame: FrameType | None) -> None:
    is_second_ctrl_c = number == signal.SIGINT and signal.SIGINT in _received
    if _received and number != signal.SIGINT:
        return  # both Slurm and torchrun may send one: the command is ending already
    _received.append(number)
    if number == signal.SIGHUP:
        _drop_closed_terminal()
    if _receivers and not is_second_ctrl_c:
        if number == signal.SIGINT:
            os.write(2, SECOND_CTRL_C)  # `print` may be what the signal has interrupted
        _receivers[-1](notice_of(number))
    elif number != signal.SIGINT and signal.getsignal(signal.SIGINT) not in (_receive, signal.SIG_IGN):
        signal.raise_signal(signal.SIGINT)  # Tune takes Ctrl-C itself, to end its trials in order
    else:
        raise Interrupted(notice_of(number))


def _drop_closed_terminal() -> None:
    """Write into nothing what would go to a terminal that is closed: each line of a run that has still to
    save would be an error."""
    for output in (1, 2):
        try:
            os.write(output, b"")
        except OSError:
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, output)
            os.close(nothing)


@contextmanager
def notices_to(receive: Callable[[int], None]) -> Iterator[None]:
    """Hand the notice of the first signal to `receive`, called in the main thread between any two of its
    instructions, while the block lasts; a second Ctrl-C still ends the command at once."""
    _receivers.append(receive)
    try:
        yield
    finally:
        _receivers.remove(receive)


def stop_line(notice: int, step: int, steps: int) -> str:
    """Return the line with which a stopped training ends."""
    where = f"step {step} of {steps}"
    return f"stopped by {notice_name(notice)} at {where}; saved; the same command goes on from there"


class Grace(NamedTuple):
    """Seconds between a notice and the end of this process by force, as far as they are known; setting: the
    environment variable that says so."""

    seconds: float
    setting: str


def known_grace() -> Grace | None:
    """Return how long whoever stops this process will wait for it to save; None: nothing says so."""
    for name in (STOP_SECONDS, "RAY_JOB_STOP_WAIT_TIME_S"):
        with suppress(KeyError, ValueError):
            return Grace(float(os.environ[name]), name)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        name = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
        return Grace(float(os.environ.get(name, 30)), name)
    if JOB_CONFIG in os.environ:
        return Grace(3.0, "RAY_JOB_STOP_WAIT_TIME_S")
    return None


def short_grace(seconds: float) -> str | None:
    """Return a line about a save of so many `seconds`, if a stop may not leave it the time."""
    grace = known_grace()
    if grace is None or seconds < grace.seconds:
        return None
    stop = f"a save took {seconds:.1f} s, but a stop leaves this run {grace.seconds:g} s"
    setting = f"{grace.setting} to {2 * math.ceil(seconds) + 10} or more"
    return f"note: {stop}: set {setting} (docs/cluster.md), or a notice loses what came after the last save"


class EvaluationStopped(BaseException):
    """Raised inside an evaluation that a notice ends: no `except Exception` of its code takes it."""


class StopVote:
    """The workers' agreement on the step after which they stop, whoever of them got the notice.

    Each step boundary starts an all_reduce of notices on the CPU, which the next boundary reads: nobody waits
    for a device, and all see the same notice at the same step. One worker alone needs none of it. An
    evaluation is no place to wait for its end, nor one that all workers can leave together: a thread votes
    meanwhile, and has the state saved (`evaluate`).

    agreed: the notice that all stop for; 0: none so far. error: what saving amid an evaluation has come to.
    """

    VOTE_SECONDS, LEAVE_SECONDS = 0.2, 3.0  # between votes; for an evaluation to be left

    def __init__(self, world_size: int):
        self.notice = self.agreed = 0
        self.lock = threading.RLock()  # a signal's handler runs in the thread that may hold it
        self.evaluating: int | None = None  # the thread that evaluates
        self.is_raised = False  # `EvaluationStopped`, there, by another thread
        self.error: Exception | None = None
        self.group: Any = None
        self.work: Any = None
        self.flag: Any = None
        if world_size > 1:
            import torch.distributed as dist

            self.group = dist.new_group(backend="gloo")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None and self.group is not None:
            import torch.distributed as dist

            dist.destroy_process_group(self.group)
            self.group = None

    def receive(self, notice: int) -> None:
        """Take a notice, in any thread. A signal outranks a preemption: the run ends, and is not moved."""
        self.notice = max(self.notice, notice)
        if self.group is None:
            self._end_evaluation()

    def at_boundary(self) -> int:
        """Return the notice for which all workers stop after this step, or 0. All workers call it after each
        step."""
        if self.group is None:
            self.agreed = self.notice
        elif not self._read():
            self._start()
        return self.agreed

    def at_end(self) -> int:
        """As `at_boundary`, after the last step: what has come since then counts too, and no vote is left
        open."""
        if self.group is not None and not self._read():
            self._start()
            self._read()
        self.agreed = self.agreed or (self.notice if self.group is None else 0)
        return self.agreed

    def require_heeded(self) -> None:
        """End the command by a signal that came when no step was left to stop after. A preemption ends
        nothing then: what follows the training goes on for as long as there are its nodes.

        Raises:
            Interrupted: there is one.
        """
        if self.notice > PREEMPTION and not self.agreed:
            raise Interrupted(self.notice)

    def _start(self) -> None:
        import torch
        import torch.distributed as dist

        self.flag = torch.tensor([self.notice])
        self.work = dist.all_reduce(self.flag, dist.ReduceOp.MAX, self.group, async_op=True)

    def _read(self) -> int:
        if self.work is not None:
            self.work.wait()
            # this vote is from before an evaluation in which another may have been taken
            self.agreed, self.work = max(self.agreed, int(self.flag)), None
        return self.agreed

    def evaluate(
        self, evaluation: Callable[[], T], save: Callable[[], object], leave: Callable[[], object]
    ) -> T | None:
        """Return `evaluation()`; None if a notice has ended it, after `save()`, which keeps the state without
        its scores.

        save: with several workers called in a thread while the evaluation may still run: it must not use the
            default process group.
        leave: ends this process, where the evaluation waits for workers that have left theirs.
        Raises:
            MachineError, UserError: what `save` has met.
        """
        done = threading.Event()
        voters = threading.Thread(target=self._vote_until, args=(done, save, leave), daemon=True)
        try:
            with self.lock:
                self.evaluating, self.is_raised = threading.get_ident(), False
            if self.group is not None:
                voters.start()
            elif self.notice:
                raise EvaluationStopped
            value = evaluation()
            with self.lock:
                self.evaluating = None  # from now on, nothing is raised here
            if self.is_raised:
                # raised at the next turn of a loop: here, and in nothing that comes later
                for _ in range(10):
                    time.sleep(0)
            done.set()
        except BaseException as e:
            self.evaluating = None
            done.set()
            if self.group is None and isinstance(e, EvaluationStopped):
                save()
                self.agreed = self.notice
                return None
            if self.group is not None:  # other workers have left, and this one has lost them
                voters.join(self.LEAVE_SECONDS)
            if self.error:
                raise self.error from None
            if not self.agreed:
                raise
            return None
        if self.group is not None:
            voters.join()
        if self.error:
            raise self.error
        return None if self.agreed else value

    def _vote_until(
        self, done: threading.Event, save: Callable[[], object], leave: Callable[[], object]
    ) -> None:
        import torch
        import torch.distributed as dist

        while True:
            done.wait(self.VOTE_SECONDS)
            flags = torch.tensor([self.notice, not done.is_set()])
            dist.all_reduce(flags, dist.ReduceOp.MAX, self.group)
            notice, is_any_evaluating = flags.tolist()
            if notice:
                try:
                    save()
                    self.agreed = notice
                except Exception as e:  # raised where the evaluation ends
                    self.error = e
                self._end_evaluation()
                if not done.wait(self.LEAVE_SECONDS) and not self.error:
                    leave()
                return
            if not is_any_evaluating:
                return

    def _end_evaluation(self) -> None:
        with self.lock:
            thread, self.evaluating = self.evaluating, None
            if thread == threading.get_ident():
                raise EvaluationStopped
            if thread is not None:
                self.is_raised = True
                _raise_in_thread(thread, EvaluationStopped)


def _raise_in_thread(thread: int, kind: type[BaseException]) -> None:
    """Raise `kind` between two instructions of a thread's Python code. To take it back with NULL would leave
    CPython 3.11 looking for it at every call, and under a profiler or debugger for ever."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(kind))


class NoticeBoard:
    """The actor between the driver of a run and its workers.

    nodes: on which workers train. is_listening: worker 0 is in its training loop.
    """

    def __init__(self) -> None:
        self.changed = asyncio.Condition()
        self.notice, self.is_listening = 0, False
        self.nodes: set[str] = set()
        self.controller: Any = None

    async def enter(self, node: str, is_first: bool) -> None:
        """Take part from `node` on; the first worker listens."""
        self.nodes.add(node)
        self.is_listening |= is_first

    async def leave(self) -> int:
        """Listen no more; returns the last notice."""
        async with self.changed:
            self.is_listening = False
            self.changed.notify_all()
        return self.notice

    async def wait(self, known: int) -> int:
        """Return the notice that outranks `known`, once there is one; 0 when nobody listens any more."""
        async with self.changed:
            await self.changed.wait_for(lambda: self.notice > known or not self.is_listening)
        return self.notice if self.is_listening else 0

    async def post(self, notice: int) -> bool:
        """Give notice; returns whether somebody listens."""
        async with self.changed:
            self.notice = max(self.notice, notice)
            self.changed.notify_all()
        return self.is_listening

    async def nodes_of_workers(self) -> set[str]:
        """Return the nodes of the workers that train."""
        return self.nodes

    async def set_controller(self, actor: Any) -> None:
        """Keep the actor by which Ray Train controls this attempt."""
        self.controller = actor

    async def get_controller(self) -> Any:
        """Return that actor; None: it has not begun."""
        return self.controller
