"""What loader processes cost beside each other: `python -m benchmarks.processes` (some minutes).

Opening the indices of shards, mapped and as JSON, as earlier versions did; items of a data set, as bytes in
one array and as Python objects; taking a batch that another process has ready. Memory is what a process has
written itself (`Private_Dirty` in /proc/PID/smaps_rollup). Prints a Markdown table and appends a line to
`benchmarks/results/processes.jsonl`.
"""

import argparse
import gc
import multiprocessing
import os
import platform
import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.results import RESULTS
from finetune.formats import Example
from finetune.formats.items import ItemList
from raylib.data.index import IndexedSample, index_path, json_path, open_index, write_index
from raylib.data.loading import BatchStream, StepDataset
from raylib.display import markdown_table
from raylib.fileio import append_jsonl, read_json, read_jsonl
from raylib.randomness import permutation
from raylib.runtime import device_name

FILE = RESULTS / "processes.jsonl"


def in_processes(count: int, work: Callable[[int], Any]) -> list[tuple[Any, float]]:
    """[(what `work(number)` returns, GB that are this process's alone)] of forked processes, which wait for
    each other before they are looked at."""
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(count), context.SimpleQueue()

    def run(number: int) -> None:
        before = private_memory()
        kept = work(number)
        barrier.wait()
        results.put((kept.seconds, private_memory() - before))
        barrier.wait()

    processes = [context.Process(target=run, args=(number,)) for number in range(count)]
    # a collection of garbage would write to all objects of the first process, and so copy them
    gc.collect()
    gc.freeze()
    for process in processes:
        process.start()
    gc.unfreeze()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return found


class Kept(NamedTuple):
    """seconds: of processor time, for each of what was opened or read. things: stay in memory."""

    seconds: float
    things: Any


def private_memory() -> float:
    """GB that this process has written itself; pages of files that it maps belong to the system's cache."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines[1:]}
    return sizes["Private_Dirty"] / 1e6


def write_indices(folder: Path, shards: int, samples: int) -> None:
    """Both indices of so many shards, whose tars are not needed."""
    folder.mkdir()
    members = [{"jpg": [512 * i, 30_000, hash(i)], "json": [512 * i + 256, 99]} for i in range(samples)]
    first = folder / "en-000000.tar"
    write_index(first, 1 << 30, [IndexedSample(f"{i:09d}", m, 1) for i, m in enumerate(members)])
    time_ns = json_path(first).stat().st_mtime_ns
    for number in range(1, shards):
        shard = folder / f"en-{number:06d}.tar"
        for path in (json_path, index_path):
            shutil.copyfile(path(first), path(shard))
        os.utime(json_path(shard), ns=(time_ns, time_ns))


def open_indices(folder: Path, shards: int, mapped: bool) -> Callable[[int], Kept]:
    """Opens the indices of so many shards, and reads a sample of each."""

    def from_json(shard: Path) -> tuple:
        """As the version before had it in memory."""
        samples = read_json(json_path(shard))["samples"]
        places = [(0, *place, -1)[:4] for _, of, _ in samples for place in of.values()]
        return [key for key, _, _ in samples], np.cumsum([0, *(len(s[1]) for s in samples)]), np.array(places)

    def work(number: int) -> Kept:
        start, things = time.process_time(), []
        for shard in (folder / f"en-{i:06d}.tar" for i in range(shards)):
            things.append(open_index(shard, folder) if mapped else from_json(shard))
            if mapped:
                things[-1].read(number)
        return Kept((time.process_time() - start) / shards, things)

    return work


def make_items(count: int) -> Iterator[Example]:
    rng, words = random.Random(0), re.findall(r"[a-z]{2,}", __doc__.lower())
    for i in range(count):
        text, image = " ".join(rng.choices(words, k=9)), f"{rng.randrange(10**7):07d}"
        yield Example(
            f"{i:08d}", (text,), (image,), {rng.choice(words): 1.0}, rng.choice(["verify", "query"])
        )


def read_items(items: Sequence[Example], processes: int) -> Callable[[int], Kept]:
    """Reads a share of the items at random."""

    def work(number: int) -> Kept:
        order = permutation(len(items), "items")[number::processes].tolist()
        start = time.process_time()
        for place in order:
            items[place].texts  # noqa: B018 - read
        return Kept((time.process_time() - start) / len(order), items)

    return work


class OneBatch(StepDataset):
    """The same batch in every step, as large as `pairs` images of 256 pixels with three dozen tensors."""

    def __init__(self, pairs: int):
        self.batch = {"images": torch.zeros(pairs, 256, 256, 3, dtype=torch.uint8)}
        self.batch |= {f"{i}": torch.zeros(1000, dtype=torch.int64) for i in range(36)}

    def __getitem__(self, step: int) -> dict:
        return self.batch


def take_batches(pairs: int, steps: int = 40) -> float:
    """Median seconds that a process waits for a batch that another has ready."""
    stream, waits = BatchStream(OneBatch(pairs), 0, steps, workers=1), []
    for _ in range(steps):
        start = time.perf_counter()
        next(stream)
        waits.append(time.perf_counter() - start)
        time.sleep(0.05)
    return median(waits[steps // 4 :])


def measure_processes(shards: int = 1000, samples: int = 10_000, items: int = 1_000_000) -> dict[str, Any]:
    """{"index": {kind: {"shards", "ms": to open one, "mb": of a process for each}}, "items": {kind: {"gb": in
    the first process, "loader_gb": more in each of four loaders, "us": to read one}}, "batch_ms": {pairs:
    ...}}."""
    result: dict[str, Any] = {"shards": shards, "samples": samples, "items_count": items}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "shards"
        write_indices(folder, shards, samples)
        result["index"] = {}
        for kind, mapped, count in (("JSON", False, shards // 20), ("mapped", True, shards)):
            found = in_processes(2, open_indices(folder, count, mapped))
            ms, mb = (1000 * median(values) for values in zip(*found, strict=True))
            result["index"][kind] = {"shards": count, "ms": ms, "mb": mb / count}
    result["items"] = {}
    for kind, build in (("objects", list), ("bytes in one array", ItemList)):
        before = private_memory()
        kept = build(make_items(items))
        size = private_memory() - before
        found = in_processes(4, read_items(kept, 4))
        seconds, more = (median(values) for values in zip(*found, strict=True))
        result["items"][kind] = {"gb": size, "loader_gb": more, "us": 1e6 * seconds}
        del kept
    result["batch_ms"] = {str(pairs): 1000 * take_batches(pairs) for pairs in (4, 64)}
    return result


def table(record: dict[str, Any]) -> str:
    """Markdown of what loader processes cost."""
    rows = [["a loader process", "time", "memory of its own"]]
    for kind, index in record["index"].items():
        name = f"index of a shard of {record['samples']:,} samples, {kind}"
        rows.append([name, f"{index['ms']:.3g} ms", f"{index['mb']:.3g} MB"])
    for kind, items in record["items"].items():
        name = f"{record['items_count']:,} items, {kind} ({items['gb']:.2f} GB in their worker)"
        rows.append([name, f"{items['us']:.1f} us an item", f"{items['loader_gb']:.2f} GB"])
    for pairs, ms in record["batch_ms"].items():
        rows.append([f"a batch of {pairs} images that is ready, to the training process", f"{ms:.1f} ms", ""])
    return markdown_table(rows)


def main(arguments: list[str] | None = None) -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(arguments)
    versions = {"python": platform.python_version(), "cpu": device_name(torch.device("cpu"))}
    append_jsonl(FILE, {"benchmark": "processes", **versions, **measure_processes()})
    print(table(read_jsonl(FILE)[-1]))


if __name__ == "__main__":
    main()
