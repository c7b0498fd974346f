"""Rows: a search that is killed at random moments."""

import csv
import importlib
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

from tests.drills.harness import Drill, row
from tests.drills.kills import RANDOM_KILLS, ROUND
from tests.drills.nodes import ray_cluster
from tests.drills.runs import Group, Work, last_lines, require_equal

SEARCH_KILLS = 10  # of one search, after which it is left to end


def search(runs: Path, address: str) -> Work:
    """Return what the driver of a search (`tests.curve_search`) does on a cluster."""

    def work() -> int:
        os.environ.update(RAY_ADDRESS=address, RAY_USAGE_STATS_ENABLED="0")
        main = importlib.import_module("tests.curve_search").main
        return main([str(runs), "--", "wait=0.2", "megabytes=1"])

    return work


def outcome_of_search(runs: Path) -> dict[str, Any]:
    """Return what a search came to, but for seconds: its trials with their names, and its report."""
    with open(runs / "search" / "trials.csv", encoding="utf-8") as file:
        rows = [{k: v for k, v in row.items() if "seconds" not in k} for row in csv.DictReader(file)]
    report = (runs / "search" / "report.md").read_text(encoding="utf-8")
    # of its tables the cells that are no time
    tables = [line for line in report.splitlines() if line.startswith("|") and " s " not in line]
    # each is in a folder of its own
    best = re.sub("^runs: .*$", "", (runs / "search" / "best.yaml").read_text(), flags=re.MULTILINE)
    return {"trials": rows, "tables": tables, "best": best}


@row
def random_kills_of_a_search(drill: Drill) -> None:
    """50 SIGKILLs of a search's driver at random moments, ten of each search. Started again it goes on, and
    comes to the trials, settings and scores of the undisturbed one."""
    with ray_cluster(drill.folder, 2) as cluster:
        (drill.folder / "undisturbed").mkdir()
        log = drill.folder / "undisturbed" / "log.txt"
        began = time.monotonic()
        with Group([search(log.parent, cluster.address)], log) as group:
            codes = group.wait(300)
        seconds = time.monotonic() - began
        assert codes == [0], last_lines(log)
        expected = outcome_of_search(log.parent)

        def disturb(runs: Path) -> None:
            for _ in range(ROUND if drill.quick else SEARCH_KILLS):
                with Group([search(runs, cluster.address)], runs / "log.txt") as group:
                    try:
                        codes = group.wait(drill.rng.uniform(0.1, 0.9) * seconds)
                    except AssertionError:
                        drill.count += 1
                    else:
                        assert codes == [0], f"exit codes {codes}; {last_lines(runs / 'log.txt')}"
                        break
            with Group([search(runs, cluster.address)], runs / "log.txt") as group:
                codes = group.wait(300)
            assert codes == [0], f"exit codes {codes}; {last_lines(runs / 'log.txt')}"
            require_equal(outcome_of_search(runs), expected)

        wanted = ROUND if drill.quick else RANDOM_KILLS
        while drill.count < wanted and drill.tried < wanted:
            drill.attempt(f"search {drill.tried + 1}", disturb)
    drill.finish()


@row
def sigterm_of_a_search(drill: Drill) -> None:
    """SIGTERM of a search's driver in its third trial. It ends with exit code 143 and a line, and goes on to
    the trials of the undisturbed one."""
    with ray_cluster(drill.folder, 2) as cluster:
        outcomes = []
        for name in ("undisturbed", "stopped"):
            runs = drill.folder / name
            runs.mkdir()
            if name == "stopped":
                with Group([search(runs, cluster.address)], runs / "log.txt") as group:
                    end = time.monotonic() + 300
                    while len(list((runs / "search").glob("trials/*/result.json"))) < 2:
                        assert not group.has_ended() and time.monotonic() < end, last_lines(runs / "log.txt")
                        time.sleep(0.05)
                    group.signal(signal.SIGTERM)
                    drill.count += 1
                    codes = group.wait(120)
                text = (runs / "log.txt").read_text()
                assert codes == [143] and "Traceback" not in text, f"{codes}; {last_lines(runs / 'log.txt')}"
            with Group([search(runs, cluster.address)], runs / "log.txt") as group:
                codes = group.wait(300)
            assert codes == [0], f"exit codes {codes}; {last_lines(runs / 'log.txt')}"
            outcomes.append(outcome_of_search(runs))
    require_equal(outcomes[1], outcomes[0])
