"""Rows: signals, and two starts of one run."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from raylib import checkpoint
from tests.drills.disks import require_one_line, require_whole
from tests.drills.harness import ROOT, Drill, row
from tests.drills.kills import list_points, require_undisturbed
from tests.drills.runs import Case, Group, finetuning, free_port, last_lines, pretraining, run_to_end
from tests.drills.tracer import Operation, trace


def steps_done(runs: Path) -> int:
    """The highest step that a run has begun, by the log of its samples."""
    return max((int(line[1:].partition(",")[0]) for line in _sample_lines(runs)), default=-1) + 1


def _sample_lines(runs: Path) -> list[str]:
    return [line for path in runs.glob("samples-*.jsonl") for line in path.read_text().splitlines()]


def signal_at_steps(drill: Drill, case: Case, number: int, code: int, word: str, world: int = 1) -> None:
    """Send a signal to every worker of runs of `case`, one at each operation of metrics.jsonl (each step
    writes one): the run saves at the end of the step, says so, ends with `code`, and goes on as if
    undisturbed."""
    drill.workshop.reference(case, world)
    points = [
        (worker, operation)
        for worker, operation in list_points(case, drill, world)
        if operation.path == "metrics.jsonl" and operation.call == "write" and not operation.torn
    ]
    assert points, "no step writes a line"
    for point in drill.some(points):

        def disturb(runs: Path, point: tuple[int, Operation] = point) -> None:
            def interrupt(pids: list[int]) -> None:
                for pid in pids:
                    os.kill(pid, number)

            log = runs / "log.txt"
            done = trace(case.workers(runs, world=world), runs / "run", log, point, interrupt)
            assert done.reached, "the operation did not come again"
            drill.count += 1
            if done.codes != [0] * world:  # 0: it came after the last step
                text = log.read_text()
                assert "Traceback" not in text, f"a traceback: {last_lines(log)}"
                assert set(done.codes) == {code}, f"exit codes {done.codes} in place of {code}"
                assert word in text, f"no '{word}' in what it printed: {last_lines(log)}"
                newest = checkpoint.find_newest(runs / "run")
                saved = checkpoint.verify(newest)["step"] if newest else 0
                assert saved == steps_done(runs), f"saved at step {saved} of {steps_done(runs)} begun"
            run_to_end(case, runs, world=world)
            require_undisturbed(drill, case, runs, world)

        drill.attempt(f"step {points.index(point) + 1}", disturb)
    drill.finish()


@row
def sigterm_in_pretraining(drill: Drill) -> None:
    """SIGTERM in every step of a pretraining run. It saves at the end of that step, ends with exit code 143,
    and goes on to what it comes to undisturbed."""
    signal_at_steps(drill, pretraining(drill.data), signal.SIGTERM, 143, "SIGTERM")


@row
def sigterm_in_finetuning(drill: Drill) -> None:
    """SIGTERM in every step of a fine-tuning run. As in pretraining."""
    signal_at_steps(drill, finetuning(drill.data), signal.SIGTERM, 143, "SIGTERM")


@row
def sigterm_of_two_workers(drill: Drill) -> None:
    """SIGTERM in every step of a pretraining run on 2 workers (as of torchrun). As on one."""
    signal_at_steps(drill, pretraining(drill.data), signal.SIGTERM, 143, "SIGTERM", world=2)


@row
def ctrl_c(drill: Drill) -> None:
    """Ctrl-C in every step of a pretraining run. It saves at the end of that step, ends with exit code 130,
    and goes on."""
    signal_at_steps(drill, pretraining(drill.data), signal.SIGINT, 130, "Ctrl-C")


@row
def second_ctrl_c(drill: Drill) -> None:
    """Ctrl-C twice at once, in every step of a pretraining run. It ends with exit code 130 and no traceback,
    and goes on from its last checkpoint."""
    case = pretraining(drill.data)

    def disturb(runs: Path, number: int) -> None:
        def interrupt(pids: list[int]) -> None:
            for _ in range(2):
                os.kill(pids[0], signal.SIGINT)

        point = (0, Operation("write", "metrics.jsonl", number))
        done = trace(case.workers(runs), runs / "run", runs / "log.txt", point, interrupt)
        assert done.reached and done.codes in ([130], [-signal.SIGINT]), f"exit codes {done.codes}"
        assert "Traceback" not in (runs / "log.txt").read_text()
        drill.count += 1
        require_whole(runs / "run")
        run_to_end(case, runs)
        require_undisturbed(drill, case, runs)

    drill.workshop.reference(case)
    for number in drill.some(range(1, case.steps + 1)):
        drill.attempt(f"step {number}", lambda runs, number=number: disturb(runs, number))
    drill.finish()


@row
def sigterm_of_torchrun(drill: Drill) -> None:
    """SIGTERM of a real `torchrun` of 2 processes, as Slurm sends it. It has saved when it ends, and goes on
    under torchrun to what it comes to undisturbed."""
    case = pretraining(drill.data, "fit.steps=40", "fit.save_every=10", "fit.eval_every=10")._replace(
        steps=40
    )
    reference = drill.workshop.reference(case, 2)
    runs = drill.folder / "torchrun"
    runs.mkdir()
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"),
        *(f"--master-port={free_port()}", "-m", *case.command(runs)),
    ]
    with open(runs / "log.txt", "w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    wait_for_lines(runs / "run" / "metrics.jsonl", 15, process)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    drill.count += 1
    newest = checkpoint.find_newest(runs / "run")
    saved = checkpoint.verify(newest)["step"] if newest else 0
    lines = (runs / "run" / "metrics.jsonl").read_text().count('"lr"')
    assert saved >= 15 and saved >= lines, f"saved at step {saved} of {lines}; {last_lines(runs / 'log.txt')}"
    with open(runs / "log.txt", "a") as log:
        done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, timeout=300)
    assert done.returncode == 0, last_lines(runs / "log.txt")
    from tests.drills.runs import outcome, require_equal

    require_equal(outcome(runs / "run"), reference.outcome)


@row
def two_owners(drill: Drill) -> None:
    """A second start of a run at every tenth file operation of the first. It ends with exit code 2 and one
    line that names host and process; the first comes to what it comes to undisturbed."""
    case = pretraining(drill.data)
    drill.workshop.reference(case)
    points = [point for point in list_points(case, drill, 1) if not point[1].torn]
    begun = next(i for i, (_, operation) in enumerate(points) if operation.path == "metrics.jsonl")
    # the last of them lets go of the run: a start after it finds a run that has ended
    freed = next(i for i, (_, operation) in enumerate(points) if operation[:2] == ("unlink", "lock.json"))
    for point in drill.some(points[begun:freed:10]):

        def disturb(runs: Path, point: tuple[int, Operation] = point) -> None:
            second = runs / "second"
            second.mkdir()
            pids: list[int] = []

            def start_again(workers: list[int]) -> None:
                pids.extend(workers)
                with Group(case.workers(runs, notes=second), second / "log.txt") as group:
                    codes = group.wait()
                require_one_line(
                    (second / "log.txt").read_text(), codes, (2,), str(workers[0]), os.uname().nodename
                )

            done = trace(case.workers(runs), runs / "run", runs / "log.txt", point, start_again)
            drill.count += 1
            assert done.reached and done.codes == [0], f"exit codes {done.codes} of the first"
            require_undisturbed(drill, case, runs)

        drill.attempt(point[1], disturb)
    drill.finish()


@row
def owner_is_gone(drill: Drill) -> None:
    """A start right after the SIGKILL of the one before, of a process that still has the same number, or that
    is another's. It goes on, and says whose lock it takes."""
    case = pretraining(drill.data)
    drill.workshop.reference(case)
    for number in drill.some(range(1, case.steps + 1)):

        def disturb(runs: Path, number: int = number) -> None:
            point = (0, Operation("write", "metrics.jsonl", number))
            done = trace(case.workers(runs), runs / "run", runs / "log.txt", point)
            assert done.reached and done.codes == [-signal.SIGKILL]
            drill.count += 1
            printed = run_to_end(case, runs)
            assert re.search(r"lock|owner|taken over|takes over", printed), "not a word of the lock it took"
            require_undisturbed(drill, case, runs)

        drill.attempt(f"step {number}", disturb)
    drill.finish()


def wait_for_lines(path: Path, count: int, process: subprocess.Popen, seconds: float = 120.0) -> None:
    """Wait until a log has so many lines.

    Raises:
        AssertionError: the process ended before, or it took longer.
    """
    import time

    end = time.monotonic() + seconds
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, f"it ended with {process.returncode}"
        assert time.monotonic() < end, f"{path}: no {count} lines in {seconds:.0f} s"
        time.sleep(0.02)
