"""Rows: a search that is killed at random moments."""

import csv
import importlib
import os
import signal
import time
from pathlib import Path

from raylib.monitoring import read_metrics
from tests.drills.harness import Drill, row
from tests.drills.kills import RANDOM_KILLS, ROUND
from tests.drills.nodes import ray_cluster
from tests.drills.runs import Group, Work, last_lines
from tests.test_search import SMALL

TIMES = ("seconds", "start_seconds", "hours", "started", "ended")  # columns that are never the same
SEARCH_KILLS = 10  # of one search, after which it is left to end


def search(drill: Drill, runs: Path, address: str) -> Work:
    """Return what the driver of a search of four trials does, one after the other, on a cluster."""
    words = [
        *("layer_decay", "recipe=scenes_xvnli", "name=run", f"runs={runs}", f"model={drill.data.model}"),
        *(f"data={drill.data.scenes}", "num_trials=4", "max_concurrent=1", "final_seeds=0"),
        *("early_stopping=none", *SMALL),
    ]

    def work() -> int:
        os.environ.update(RAY_ADDRESS=address, RAY_USAGE_STATS_ENABLED="0")
        return importlib.import_module("tune_spaces.__main__").main(words)

    return work


def trials_of(run: Path) -> list[dict[str, str]]:
    """Return the rows of a search's trials.csv, without names and times."""
    with open(run / "trials.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for trial in rows:
        steps = [line["step"] for line in read_metrics(run / "trials" / trial["trial"]) if "lr" in line]
        assert steps == sorted(set(steps)), f"trial {trial['trial']}: steps {steps}"
    dropped = ("trial", *TIMES)
    return [{k: v for k, v in trial.items() if k not in dropped and "seconds" not in k} for trial in rows]


@row
def random_kills_of_a_search(drill: Drill) -> None:
    """50 SIGKILLs of a search's driver at random moments, ten of each search. Started again it goes on, and
    comes to the trials, settings and scores of the undisturbed one."""
    with ray_cluster(drill.folder, 2) as cluster:
        (drill.folder / "undisturbed").mkdir()
        log = drill.folder / "undisturbed" / "log.txt"
        began = time.monotonic()
        with Group([search(drill, log.parent, cluster.address)], log) as group:
            codes = group.wait(300)
        seconds = time.monotonic() - began
        assert codes == [0], last_lines(log)
        expected = trials_of(log.parent / "run")

        def disturb(runs: Path) -> None:
            for _ in range(ROUND if drill.quick else SEARCH_KILLS):
                with Group([search(drill, runs, cluster.address)], runs / "log.txt") as group:
                    try:
                        codes = group.wait(drill.rng.uniform(0.1, 0.9) * seconds)
                    except AssertionError:
                        drill.count += 1
                    else:
                        assert codes == [0], f"exit codes {codes}; {last_lines(runs / 'log.txt')}"
                        break
            with Group([search(drill, runs, cluster.address)], runs / "log.txt") as group:
                codes = group.wait(300)
            assert codes == [0], f"exit codes {codes}; {last_lines(runs / 'log.txt')}"
            found = trials_of(runs / "run")
            assert found == expected, f"{found} in place of {expected}"

        wanted = ROUND if drill.quick else RANDOM_KILLS
        while drill.count < wanted and drill.tried < wanted:
            drill.attempt(f"search {drill.tried + 1}", disturb)
    drill.finish()


@row
def sigterm_of_a_search(drill: Drill) -> None:
    """SIGTERM of a search's driver in its second trial. It ends with exit code 143 and a line, and goes on to
    the trials of the undisturbed one."""
    with ray_cluster(drill.folder, 2) as cluster:
        outcomes = []
        for name in ("undisturbed", "stopped"):
            runs = drill.folder / name
            runs.mkdir()
            if name == "stopped":
                with Group([search(drill, runs, cluster.address)], runs / "log.txt") as group:
                    end = time.monotonic() + 300
                    while len(list((runs / "run").glob("trials/*/metrics.jsonl"))) < 2:
                        assert not group.has_ended() and time.monotonic() < end, last_lines(runs / "log.txt")
                        time.sleep(0.05)
                    group.signal(signal.SIGTERM)
                    drill.count += 1
                    codes = group.wait(120)
                text = (runs / "log.txt").read_text()
                assert codes == [143] and "Traceback" not in text, f"{codes}; {last_lines(runs / 'log.txt')}"
            with Group([search(drill, runs, cluster.address)], runs / "log.txt") as group:
                codes = group.wait(300)
            assert codes == [0], f"exit codes {codes}; {last_lines(runs / 'log.txt')}"
            outcomes.append(trials_of(runs / "run"))
    assert outcomes[0] == outcomes[1], f"{outcomes[1]} in place of {outcomes[0]}"
