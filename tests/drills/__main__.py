"""Break runs on purpose, and see that nothing is lost: a table, a row a drill.

python -m tests.drills [ROW ...] [--quick] [--only TEXT] [--seed N] [--list] [--keep]

Rows are printed as they end, and appended to benchmarks/results/drills.jsonl (those of --quick are not); the
table in docs/cluster.md is written from there (`python -m benchmarks.record`). The exit code is 1 if a row
fails, or could not be run here.
"""

import argparse
import os
import platform
import shutil
import signal
import sys
import tempfile
import textwrap
import threading
import time
import traceback
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.results import RESULTS, commit
from raylib.fileio import append_jsonl
from tests.drills import commands, damage, disks, ends, kills, ray_rows, search_rows
from tests.drills.harness import ROWS, Drill, NotRun, Workshop
from tests.drills.runs import build_data, finetuning, preload, pretraining

FILE = RESULTS / "drills.jsonl"
MODULES = (
    kills,
    disks,
    commands,
    ends,
    damage,
    ray_rows,
    search_rows,
)  # whose rows are in the table, in this order


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("row", nargs="*", help="rows to run (all)")
    parser.add_argument("--quick", action="store_true", help="a small part of each, for a first look")
    parser.add_argument("--only", default="", metavar="TEXT", help="only at places whose name holds TEXT")
    parser.add_argument("--seed", type=int, default=0, help="of what is random (%(default)s)")
    parser.add_argument("--list", action="store_true", help="say what each row does")
    parser.add_argument("--keep", action="store_true", help="keep the folder of all runs")
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.row if name not in ROWS]:
        parser.error(f"no row {', '.join(unknown)}; there are: {', '.join(ROWS)}")
    names = given.row or list(ROWS)
    # of rows that send it, even where this runs in the background of a shell, in which it is ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if given.list:
        for name in names:
            print(textwrap.fill(f"{name}: {describe(name)}", 110, subsequent_indent="    "))
        return 0
    if reason := disks.enter_mount_namespace():
        print(f"rows that mount disks will not run: {reason}")
    folder = Path(tempfile.mkdtemp(prefix="drills-"))
    print(f"seed {given.seed}; runs in {folder}", flush=True)
    workshop = prepare(folder)
    print(f"{'row':<34}{'done':>6}{'seconds':>9}  verdict", flush=True)
    verdicts = [run_row(name, workshop, given) for name in names]
    if given.keep or not all(verdicts):
        print(f"kept: {folder}")
    else:
        shutil.rmtree(folder)
    return 0 if all(verdicts) else 1


def prepare(folder: Path) -> Workshop:
    """Build what the rows share, and import what their runs need, so that these start in milliseconds."""
    workshop = Workshop(folder, build_data(folder))
    for case in (pretraining(workshop.data), finetuning(workshop.data)):
        (folder / f"first-{case.stage}").mkdir()
        preload(case, folder / f"first-{case.stage}")
    # a process with threads does not fork well
    assert threading.active_count() == 1, threading.enumerate()
    return workshop


def describe(name: str) -> str:
    """Return a row's docstring in one line."""
    return " ".join((ROWS[name].__doc__ or "").split())


def run_row(name: str, workshop: Workshop, given: argparse.Namespace) -> bool:
    """Run a row, print its line and record it; return whether it passed."""
    began, drill = time.perf_counter(), Drill(name, workshop, given.seed, given.quick, given.only)
    try:
        ROWS[name](drill)
        verdict = "ok"
    except NotRun as reason:
        verdict = f"not run: {reason}"
    except AssertionError as failure:
        verdict = f"FAILED: {failure}"
    except Exception as error:
        verdict = f"FAILED: {type(error).__name__}: {error}"
        (drill.folder / "traceback.txt").write_text(traceback.format_exc())
    seconds = time.perf_counter() - began
    print(f"{name:<34}{drill.count:>6}{seconds:>9.0f}  {verdict}", flush=True)
    if verdict.startswith("FAILED"):
        print(f"    again: python -m tests.drills {name} --seed {given.seed} --keep", flush=True)
    if not (given.quick or given.only):
        append_jsonl(
            FILE,
            {
                "row": name,
                "what": describe(name).partition(". ")[0],
                "count": drill.count,
                "seconds": round(seconds, 1),
                "verdict": verdict.partition(": ")[0],
                "seed": given.seed,
                "git": commit(),
                "date": time.strftime("%Y-%m-%d"),
                "machine": f"{os.cpu_count()} CPUs, {platform.system()} {platform.machine()}",
            },
        )
    return verdict == "ok"


if __name__ == "__main__":
    sys.exit(main())
