"""Rows: SIGKILL, and a power failure, at every file operation of a run, and at random moments."""

from pathlib import Path

from tests.drills.harness import Drill, row
from tests.drills.runs import (
    Case,
    Group,
    finetuning,
    outcome,
    pretraining,
    require_equal,
    run_to_end,
    samples_of,
)
from tests.drills.tracer import Operation, torn_writes, trace

RANDOM_KILLS = 50
ROUND = 5  # kills of one run, after which it is left to end


def require_undisturbed(
    drill: Drill, case: Case, runs: Path, world: int = 1, notes: Path | None = None
) -> None:
    """Raises AssertionError: the run below `runs` did not come to what it comes to undisturbed: losses,
    weights, best, predictions, to the bit; each sample once; no file more or less."""
    reference = drill.workshop.reference(case, world)
    require_equal(outcome(runs / "run"), reference.outcome)
    assert samples_of(notes or runs, world) == reference.samples, "other samples"


def list_points(case: Case, drill: Drill, world: int) -> list[tuple[int, Operation]]:
    """(worker, operation) of every operation of an undisturbed run, and of every half of a write."""
    runs = drill.folder / "traced"
    runs.mkdir()
    done = trace(case.workers(runs, world=world), runs / "run", runs / "log.txt")
    assert done.codes == [0] * world, f"exit codes {done.codes}; {runs}/log.txt"
    points = [
        (worker, operation)
        for worker, operations in enumerate(done.operations)
        for operation in (*operations, *torn_writes(operations))
    ]
    (drill.folder / "operations.txt").write_text("".join(f"{worker} {op}\n" for worker, op in points))
    return points


def kill_everywhere(
    drill: Drill, case: Case, world: int = 1, power_fails: bool = False, every: int = 1
) -> None:
    """Kill runs of `case`, one at each operation (or each `every`-th), and let each go on."""
    drill.workshop.reference(case, world)
    for worker, operation in drill.some(list_points(case, drill, world)[::every]):

        def disturb(runs: Path, point=(worker, operation)) -> None:
            works = case.workers(runs, world=world)
            done = trace(works, runs / "run", runs / "log.txt", point, power_fails=power_fails)
            if not done.reached:
                # of threads, or workers, that took turns in another order; that run has ended
                assert done.codes == [0] * world, f"exit codes {done.codes}"
                return
            drill.count += 1
            run_to_end(case, runs, world=world)
            require_undisturbed(drill, case, runs, world)

        drill.attempt(f"worker {worker}, {operation}" if world > 1 else operation, disturb)
    drill.finish()
    assert drill.count >= 0.9 * drill.tried, f"only {drill.count} of {drill.tried} operations came again"


def kill_at_random(drill: Drill, case: Case, world: int = 1, few: bool = False) -> None:
    """Kill runs of `case` at random moments, several times each, then let them end."""
    reference = drill.workshop.reference(case, world)
    wanted = ROUND if drill.quick or few else RANDOM_KILLS

    def disturb(runs: Path) -> None:
        for _ in range(ROUND):
            moment = drill.rng.uniform(0, 1.1 * reference.seconds)
            with Group(case.workers(runs, world=world), runs / "log.txt") as group:
                try:
                    codes = group.wait(moment)
                except AssertionError:
                    drill.count += 1
                else:
                    assert codes == [0] * world, f"exit codes {codes}; {runs}/log.txt"
                    break
        run_to_end(case, runs, world=world)
        require_undisturbed(drill, case, runs, world)

    while drill.count < wanted and drill.tried < wanted:
        drill.attempt(f"run {drill.tried + 1}", disturb)
    drill.finish()


@row
def kill_pretraining(drill: Drill) -> None:
    """SIGKILL at every file operation of a pretraining run, and in the middle of every write. It goes on, and
    ends as the undisturbed one: losses, weights, optimizer, best, scores, files; each sample once."""
    kill_everywhere(drill, pretraining(drill.data))


@row
def kill_finetuning(drill: Drill) -> None:
    """SIGKILL at every file operation of a fine-tuning run, and in the middle of every write. As of
    pretraining, and predictions too."""
    kill_everywhere(drill, finetuning(drill.data))


@row
def kill_pretraining_on_two(drill: Drill) -> None:
    """SIGKILL of both of 2 workers (as of torchrun) at every third file operation of either, pretraining."""
    kill_everywhere(drill, pretraining(drill.data), world=2, every=3)


@row
def kill_finetuning_on_two(drill: Drill) -> None:
    """SIGKILL of both of 2 workers (as of torchrun) at every third file operation of either, fine-tuning."""
    kill_everywhere(drill, finetuning(drill.data), world=2, every=3)


@row
def power_failure_in_pretraining(drill: Drill) -> None:
    """Power failure at every file operation of a pretraining run: what was not synced is lost, of every file.
    It goes on as after a kill."""
    kill_everywhere(drill, pretraining(drill.data), power_fails=True)


@row
def power_failure_in_finetuning(drill: Drill) -> None:
    """Power failure at every file operation of a fine-tuning run: what was not synced is lost, of every file.
    It goes on as after a kill."""
    kill_everywhere(drill, finetuning(drill.data), power_fails=True)


@row
def random_kills_of_pretraining(drill: Drill) -> None:
    """50 SIGKILLs of pretraining runs at random moments, five of each run."""
    kill_at_random(drill, pretraining(drill.data))


@row
def random_kills_of_finetuning(drill: Drill) -> None:
    """50 SIGKILLs of fine-tuning runs at random moments, five of each run."""
    kill_at_random(drill, finetuning(drill.data))


@row
def random_kills_of_two_workers(drill: Drill) -> None:
    """50 SIGKILLs of pretraining on 2 workers (as of torchrun) at random moments, five of each run."""
    kill_at_random(drill, pretraining(drill.data), world=2)
