"""The papers' claims, tried on emoji scenes: every experiment that they need, in the order of
`benchmarks/claims.tsv`, from a budget of core-hours.

    python -m benchmarks.claims [--budget 40] [--processes 2] [--only TEXT]
    python -m benchmarks.claims --left      what is done, what is left, and how long it takes

1. First comes what the model can do by full fine-tuning (`benchmarks.claims_tasks`), then claim after claim,
   each by the next two steps.
2. Each method's learning rate is chosen by the project's own search, 4 trials, on development sets: the
   English one; of methods that train weights for each language apart (P4) the languages' own, as the paper
   does, and the weight of an alignment with it. Doses are the papers'. A variant that differs from a method
   in one thing alone takes the method's settings.
3. Its seeds are run with these settings, and tested: 5 of xgqa, 8 of xvnli, 3 elsewhere.
4. Last come the searches of `benchmarks.claims_search`.

Whatever is finished is appended to results/claims.jsonl at once, failed tries too, and not made again of the
same weights, the same scenes (by their hashes) and the same settings. Each experiment is a process of one
thread; commands that are started beside each other share the work.
"""

import argparse
import os
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import claims_search
from benchmarks.claims_report import Claim, read_claims
from benchmarks.claims_runs import do
from benchmarks.claims_table import EXPERIMENTS
from benchmarks.claims_tasks import ROWS
from benchmarks.claims_work import TRIALS, Lab, Work, find, num_seeds, tuner_of
from finetune.recipes import SCENES_BASE
from raylib.fileio import file_lock

FAILURES = 3  # in a row, after which the command ends
EXPECTED = {"pretraining": 1800.0, "search": 1200.0}  # CPU-seconds, until one is measured
WAIT = 5.0  # seconds between two looks for work, while others do what is needed for the rest
TRY_OUT = ("epochs=1", "train_limit=64", "test_limit=16")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=SCENES_BASE, help="exported model")
    parser.add_argument("--scenes", type=Path, default=Path("runs/scenes"), help="folder of the benchmark")
    parser.add_argument("--folder", type=Path, default=Path("runs/claims"), help="where the runs go")
    parser.add_argument("--budget", type=float, default=40.0, help="core-hours, of all starts together")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="experiments at a time")
    parser.add_argument("--only", default="", metavar="TEXT", help="experiments whose name has this in it")
    parser.add_argument("--left", action="store_true", help="run nothing; say what is done and what is left")
    parser.add_argument("--quick", action="store_true", help="64 items of everything, recorded in --folder")
    given = parser.parse_args(arguments)
    lab = Lab(given.folder.absolute(), given.scenes.absolute(), given.model.absolute())
    for folder, maker in ((lab.scenes, "raylib.sample.scenes"), (lab.model, "make scenes_base")):
        if not folder.is_dir():
            print(f"error: {folder}: no such folder; make claims makes it ({maker})", file=sys.stderr)
            return 2
    if given.quick:
        lab = lab._replace(records=lab.folder / "quick.jsonl", limits=TRY_OUT)
    order = plan(read_claims(), given.only)
    if given.left:
        print(describe_progress(lab.read(), order, given.budget, given.processes))
        return 0
    laboratory = Team(lab, order, given.budget, given.processes)
    with ThreadPoolExecutor(given.processes) as pool:
        list(pool.map(lambda _: laboratory.work(), range(given.processes)))
    print(describe_progress(lab.read(), order, given.budget, given.processes))
    return 1 if laboratory.failed else 0


def plan(claims: Sequence[Claim], only: str = "") -> list[Work]:
    """Return all work: first what the model can do, then claim by claim: the choices of its experiments, then
    seed by seed, so that a budget's end leaves pairs. What others need comes before them."""
    order: dict[Work, None] = {}

    def add(work: Work) -> None:
        for needed in work.needs():
            add(needed)
        order.setdefault(work)

    for group in (list(ROWS), *([name for _, name in claim.terms] for claim in claims)):
        names = [name for name in group if only in name]
        for tuner in filter(None, map(tuner_of, names)):
            add(Work("choice", tuner))
        for seed in range(max(map(num_seeds, names), default=0)):
            for name in names:
                if seed < num_seeds(name):
                    add(Work("run", name, seed))
    for seed in range(claims_search.SEEDS):
        for name in filter(lambda name: only in name, claims_search.contestants()):
            add(Work("search", name, seed))
    return list(order)


class Account(NamedTuple):
    """Core-hours: spent, and those that all that is left is expected to take."""

    spent: float
    left: float


def account(records: Sequence[dict[str, Any]], pending: Sequence[Work]) -> Account:
    """Estimate what is left by what was measured: of the same experiment, or else of all, in proportion to
    what the table expects (`cost`)."""
    runs: dict[str, list[float]] = {}
    for record in records:
        if record["kind"] == "run":
            runs.setdefault(record["name"], []).append(record["cpu_seconds"])
    measured = {name: statistics.fmean(seconds) for name, seconds in runs.items() if name in EXPERIMENTS}
    pace = statistics.median([s / EXPERIMENTS[n].cost for n, s in measured.items()]) if measured else 1.0

    def seconds(work: Work) -> float:
        same = [r["cpu_seconds"] for r in records if (r["kind"], r["name"]) == (work.kind, work.name)]
        if same:
            return statistics.fmean(same)
        if work.kind in EXPECTED:
            return EXPECTED[work.kind]
        one = measured.get(work.name, pace * EXPERIMENTS[work.name].cost)
        return one * (TRIALS if work.kind == "choice" else 1)

    spent = sum(record["cpu_seconds"] for record in records)
    return Account(spent / 3600, sum(map(seconds, pending)) / 3600)


def describe_progress(
    records: Sequence[dict[str, Any]], order: Sequence[Work], budget: float, processes: int
) -> str:
    """Say what is done, what is left, and how long that takes."""
    pending = [work for work in order if find(records, work) is None]
    spent, left = account(records, pending)
    affordable = min(left, max(0.0, budget - spent))
    return (
        f"claims: {len(order) - len(pending)} of {len(order)} pieces of work done, {spent:.1f} of {budget:g} "
        f"core-hours spent; about {left:.1f} left, of which the budget allows {affordable:.1f}: "
        f"{affordable / processes:.1f} h with {processes} at a time"
    )


class Team:
    """Threads, and other processes beside this one, that do the work of `order` together."""

    def __init__(self, lab: Lab, order: Sequence[Work], budget: float, processes: int):
        self.lab, self.order, self.budget, self.processes = lab, order, budget, processes
        self.failed: set[Work] = set()  # not tried again by this process
        self.failures_in_a_row = 0
        self.lock = threading.Lock()

    def work(self) -> None:
        """Do what nobody else is at, until all is done or the budget is spent."""
        while self._do_next():
            pass

    def _do_next(self) -> bool:
        """Do one piece of work, or wait a moment for one; return whether there may be more."""
        records = self.lab.read()
        pending = [w for w in self.order if w not in self.failed and find(records, w) is None]
        if not pending or account(records, pending).spent >= self.budget:
            return False
        if self.failures_in_a_row >= FAILURES:
            return False  # whatever is wrong is wrong with all
        waits, impossible = False, set(self.failed)
        for work in pending:
            needed = [other for other in work.needs() if find(records, other) is None]
            if not impossible.isdisjoint(needed):
                impossible.add(work)
                continue
            if needed:
                waits = True
                continue
            with file_lock(self.lab.folder / f"{work.label}.lock", wait=False) as is_claimed:
                if not is_claimed:
                    waits = True
                    continue
                if find(self.lab.read(), work) is None:
                    self._do(work, records)
                return True
        if waits:
            time.sleep(WAIT)
        return waits

    def _do(self, work: Work, records: Sequence[dict[str, Any]]) -> None:
        progress = describe_progress(records, self.order, self.budget, self.processes)
        print(f"{progress}; now {work.label}", flush=True)
        went_well = do(self.lab, work)
        with self.lock:
            self.failures_in_a_row = 0 if went_well else self.failures_in_a_row + 1
            if not went_well:
                self.failed.add(work)
        if not went_well:
            print(f"error: {work.label} failed: {self.lab.log(work)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
