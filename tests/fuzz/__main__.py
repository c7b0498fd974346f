"""Read damaged, foreign and hostile files by every reader of the product, and count what comes of them.

python -m tests.fuzz [--readers NAME ...] [--files N] [--seed S] [--keep DIR] [--record] [--list]
python -m tests.fuzz --again DIR/READER-NUMBER ...

Right is one line that names the file, or values that json, numpy, h5py, Pillow, tarfile ... read from the
same bytes too. Anything else is a fault: its file is kept in a folder, with the command that reads it again.
The exit code is 1 if there is one, or if the time was not enough for all files.
"""

import argparse
import collections
import importlib
import json
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.results import RESULTS, commit
from raylib.fileio import append_jsonl
from tests.fuzz import bombs
from tests.fuzz.child import OUTCOMES, RIGHT
from tests.fuzz.contract import uncovered
from tests.fuzz.pool import Examples, Job, Result, Worker, run
from tests.fuzz.readers import AREAS, READERS

FILE = RESULTS / "fuzz.jsonl"
ALL_COVERED = {function for reader in READERS.values() for function in reader.covers}
FILES = 12_000  # of all readers together
TRACED = 40  # damaged files of a reader, in which each function that it covers is called
NOTE = "case.json"  # in the folder of a damaged file that was kept


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--readers", nargs="+", default=[], metavar="NAME", help="these, or those of an area (all)"
    )
    parser.add_argument("--files", type=int, metavar="N", help=f"in all ({FILES:,}, or these readers' part)")
    parser.add_argument("--seed", type=int, default=0, help="of all chance (%(default)s)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where faults are kept (a new folder)")
    parser.add_argument("--again", nargs="+", type=Path, metavar="FOLDER", help="read these, which were kept")
    parser.add_argument("--minutes", type=float, default=60, help="stop after so many (%(default)s)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="at a time (%(default)s)")
    parser.add_argument(
        "--record",
        action="store_true",
        help=f"append the counts to {FILE.relative_to(RESULTS.parent.parent)}",
    )
    parser.add_argument("--list", action="store_true", help="say which readers there are")
    parser.add_argument(
        "--trace", action="store_true", help="also see that each example calls what its record covers"
    )
    parser.add_argument("--uncovered", action="store_true", help="say which functions no record covers yet")
    given = parser.parse_args(arguments)
    notes = [json.loads((folder / NOTE).read_text()) for folder in given.again or []]
    names = [note["reader"] for note in notes] or choose(given.readers, parser)
    if given.list:
        for name in names:
            print(f"{name:<32}{' '.join(READERS[name].covers)}")
        return 0
    if given.uncovered:
        for function, calls in uncovered(ALL_COVERED).items():
            print(f"{function:<60}{calls[0]}")
        return 0
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    keep = given.keep or Path(tempfile.gettempdir()) / f"{folder.name}-faults"
    try:
        examples, faults = prepare(names, folder / "examples", given.seed)
        if given.again:
            jobs = [
                Job(note["reader"], note["number"], path.absolute() / "files")
                for note, path in zip(notes, given.again, strict=True)
            ]
        else:
            jobs = list_jobs(list(examples.inside), given.files or FILES * len(names) // len(READERS))
        if given.trace:
            faults |= trace(examples, folder / "trace")
        until = time.monotonic() + 60 * given.minutes
        results = collect(run(examples, jobs, given.processes, folder, until), examples, folder, keep, given)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for name, fault in faults.items():
        print(f"{name}: its example is not read: {fault}")
    print_table(results)
    num_wrong = sum(result.outcome.kind not in RIGHT for result in results)
    if num_wrong:
        print(f"{num_wrong} faults; kept in {keep}")
    if len(results) < len(jobs):
        print(f"stopped after {given.minutes:g} minutes: {len(results):,} of {len(jobs):,} files")
    if given.record and not given.again:
        record(results, given.seed)
    return 1 if num_wrong or faults or len(results) < len(jobs) else 0


def choose(words: list[str], parser: argparse.ArgumentParser) -> list[str]:
    """Names of readers that the command line names, by themselves or by their area."""
    names = []
    for word in words:
        found = [word] if word in READERS else [r.name for r in _area(word)]
        if not found:
            parser.error(f"no reader or area {word}; there are: {', '.join(READERS)}")
        names += found
    return list(dict.fromkeys(names)) or list(READERS)


def _area(word: str) -> list:
    try:
        return importlib.import_module(f"tests.fuzz.readers.{word}").READERS
    except ImportError:
        return []


def prepare(names: list[str], folder: Path, seed: int) -> tuple[Examples, dict[str, str]]:
    """Import what the readers need, so that a new process begins in milliseconds; write their examples.
    Returns (the examples, {reader: why it has none})."""
    chosen = {name: READERS[name] for name in names}
    for reader in chosen.values():
        for function in reader.covers:
            importlib.import_module(function.partition(":")[0])
        reader.setup()
    bombs.foreign_files()
    examples = Examples(chosen, folder, seed)
    faults = examples.build()
    # a process with threads does not fork well
    assert threading.active_count() == 1, threading.enumerate()
    return examples, faults


def trace(examples: Examples, folder: Path) -> dict[str, str]:
    """{reader: which functions that it covers are called neither by its example, nor by some damaged
    ones}."""
    faults = {}
    with Worker(examples, folder) as worker:
        for name in examples.inside:
            missing = set(examples.readers[name].covers)
            for number in range(TRACED):
                worker.send(("trace", Job(name, number)))
                called = worker.receive(60)
                missing -= called if isinstance(called, set) else set()
                if not missing:
                    break
            else:
                faults[name] = f"not called: {', '.join(sorted(missing))}"
    return faults


def list_jobs(names: list[str], files: int) -> list[Job]:
    """Equally many of each reader, the undamaged example first, in turns."""
    each = max(1, -(-files // max(1, len(names))))
    return [Job(name, number) for number in range(each) for name in names]


def collect(results, examples: Examples, folder: Path, keep: Path, given: argparse.Namespace) -> list[Result]:
    """Take all results; print each fault, and keep its file."""
    found = []
    for result in results:
        found.append(result)
        if result.outcome.kind in RIGHT and not given.again:
            continue
        job, kept = result.job, keep / f"{result.job.reader}-{result.job.number}"
        where = f"{job.reader} {job.number} ({result.mutation} {result.target})"
        print(f"{where}: {result.outcome.kind}: {result.outcome.detail}", flush=True)
        if given.again:
            continue
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(parents=True)
        with Worker(examples, folder / "save") as worker:
            worker.send(("save", (job, kept / "files")))
            worker.receive(60)
        shutil.rmtree(folder / "save", ignore_errors=True)
        note = {"reader": job.reader, "number": job.number, "seed": given.seed, "mutation": result.mutation}
        (kept / NOTE).write_text(json.dumps({**note, **result.outcome._asdict()}) + "\n")
        print(f"    again: python -m tests.fuzz --again {kept}", flush=True)
    return found


def count(results: list[Result]) -> dict[str, dict]:
    """{reader: {files, seconds, peak_mib, counts by outcome}}."""
    rows: dict[str, dict] = {}
    for result in results:
        row = rows.setdefault(
            result.job.reader, {"files": 0, "seconds": 0.0, "peak_mib": 0.0, "outcomes": {}}
        )
        row["files"] += 1
        row["seconds"] += result.outcome.seconds
        row["peak_mib"] = max(row["peak_mib"], result.outcome.peak / (1 << 20))
        row["outcomes"][result.outcome.kind] = row["outcomes"].get(result.outcome.kind, 0) + 1
    return rows


def print_table(results: list[Result]) -> None:
    print(f"{'reader':<32}{'files':>7}{'one line':>10}{'right':>7}{'faults':>8}{'CPU s':>8}{'MiB':>6}")
    rows = count(results)
    for name, row in sorted(rows.items()):
        faults = {kind: row["outcomes"][kind] for kind in OUTCOMES[2:] if kind in row["outcomes"]}
        words = ", ".join(f"{number} {kind}" for kind, number in faults.items())
        lines, right = (row["outcomes"].get(kind, 0) for kind in RIGHT)
        print(
            f"{name:<32}{row['files']:>7}{lines:>10}{right:>7}{sum(faults.values()):>8}{row['seconds']:>8.1f}"
            f"{row['peak_mib']:>6.0f}  {words}"
        )
    kinds = collections.Counter(result.outcome.kind for result in results)
    words = ", ".join(f"{number:,} {kind}" for kind, number in kinds.items())
    print(f"{len(results):,} files, {len(rows)} readers: {words}")


def record(results: list[Result], seed: int) -> None:
    facts = {
        "seed": seed,
        "git": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} CPUs, {platform.system()} {platform.machine()}",
    }
    for name, row in count(results).items():
        rounded = {"seconds": round(row["seconds"], 1), "peak_mib": round(row["peak_mib"])}
        area = next(a.__name__ for a in AREAS if name in {reader.name for reader in a.READERS})
        append_jsonl(FILE, {"reader": name, "area": area.split(".")[-1], **row, **rounded, **facts})


if __name__ == "__main__":
    sys.exit(main())
