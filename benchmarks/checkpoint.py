"""Cost of a checkpoint for the training: `python -m benchmarks.checkpoint` (some minutes, a quiet machine).

The stall of a save is the extra wall time of the step at which it falls due and of the 20 steps after it,
beside as many steps without a save. An objective of linear layers is trained by the engine of a run, on one
CPU thread; weights and both moments of AdamW are 1 GB. Peers: the same writer in line
(`fit.async_save=false`), PyTorch's `torch.distributed.checkpoint.async_save` of the same state, and the way
of earlier versions of ours: `torch.save` into a temporary folder, read again for its hash, copied. Prints a
Markdown table and appends a line to `benchmarks/results/checkpoint.jsonl`.
"""

import argparse
import hashlib
import multiprocessing
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from benchmarks.results import RESULTS, commit
from raylib.checkpoint import FOLDER
from raylib.display import markdown_table
from raylib.engine import Objective, OptimConfig, TorchEngine
from raylib.engine_state import state_files
from raylib.fileio import append_jsonl, read_jsonl
from raylib.runtime import device_name
from raylib.saving import CheckpointWriter, num_bytes

FILE = RESULTS / "checkpoint.jsonl"
STEPS = 20  # after a save
WIDTH = 2048
# Freed memory stays with the process, as on a GPU: given back to the system and taken anew in every step of
# AdamW, it made steps alone take 5.1 s in one process and 6.9 s in the next
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
OURS, IN_LINE, PEER, BEFORE = (
    "ours",
    "ours, in line",
    "torch.distributed.checkpoint.async_save",
    "torch.save, copy",
)


class Stack(Objective):
    """Linear layers with as many parameters as a number of bytes of weights and moments hold."""

    has_unused_parameters = False

    def __init__(self, size: int):
        super().__init__()
        layers = max(1, round(size / (12 * WIDTH**2)))
        self.model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))

    def forward(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self.model(batch["x"]).square().mean()
        return loss, {"loss": loss.detach()}


class Bench:
    """An engine that has taken a step, and the ways to save it into folders of `folder`."""

    def __init__(self, size: int, folder: Path):
        self.device, self.folder = torch.device("cpu"), folder
        self.engine = TorchEngine(Stack(size), OptimConfig(), self.device, False, None)
        self.batch = {"x": torch.randn(8, WIDTH)}
        self.engine.step(self.batch, 0, 1e-4)
        self.writers = {}
        for name, in_background in ((OURS, True), (IN_LINE, False)):
            (folder / name / FOLDER).mkdir(parents=True)
            self.writers[name] = CheckpointWriter(folder / name, 1, 0, 1, self.device, in_background)
        self.number = 0

    def files(self) -> dict[str, Any]:
        meta = b'{"step": 1, "workers": 1, "score": null}'
        weights = {"model.safetensors": dict(self.engine.objective.model.state_dict())}
        return {**state_files(self.engine.state(), 0), **weights, "meta.json": meta}

    def save(self, way: str) -> Callable[[], Any]:
        """Save; returns what waits until the checkpoint is on the disk."""
        self.number += 1
        if way in self.writers:
            self.writers[way].save(self.number, self.files(), lambda: None)
            return self.writers[way].wait
        state = {name: content for name, content in self.files().items() if isinstance(content, dict)}
        if way == PEER:
            return dcp.async_save(state, checkpoint_id=str(self.folder / f"peer{self.number}")).result
        with tempfile.TemporaryDirectory() as temporary:
            for name, tensors in state.items():
                torch.save(tensors, Path(temporary) / f"{name}.pt")
                with open(Path(temporary) / f"{name}.pt", "rb") as file:
                    hashlib.file_digest(file, "sha256")
            shutil.copytree(temporary, self.folder / f"before{self.number}")
        return lambda: None

    def measure(self, way: str | None) -> dict[str, float]:
        """{"seconds": of a save and 20 steps, "cpu": of them those that the training thread had a CPU,
        "saved": seconds until it is on the disk}."""
        os.sync()
        start, cpu, wait = time.perf_counter(), time.thread_time(), lambda: None
        if way:
            wait = self.save(way)
        for step in range(1, STEPS + 1):
            self.engine.step(self.batch, step, 1e-4)
        seconds, cpu = time.perf_counter() - start, time.thread_time() - cpu
        wait()
        saved = time.perf_counter() - start
        for folder in (*self.folder.glob("peer*"), *self.folder.glob("before*")):
            shutil.rmtree(folder)
        return {"seconds": seconds, "cpu": cpu, "saved": saved}


def measure_way(way: str, size: int, rounds: int, place: Path) -> dict[str, float]:
    """Save one way, each save beside as many steps without one; {"first": the stall of the save that must get
    its memory, "stall": median seconds of later saves, "cpu": of them the training thread's, "saved": until
    it is on the disk, "plain": the steps alone, "bytes"}."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # the peer wants one
    with tempfile.TemporaryDirectory(dir=place) as folder:
        bench = Bench(size, Path(folder))
        bench.measure(None)
        pairs = []
        for turn in range(rounds + 1):
            pairs.append((bench.measure(None), saving := bench.measure(way)))
            seconds = f"{saving['seconds']:.2f} s, on disk after {saving['saved']:.2f} s"
            alone = f"steps alone {pairs[-1][0]['seconds']:.2f} s"
            print(f"{way}, save {turn}: {seconds}; {alone}", flush=True)
        written = num_bytes(bench.files())
    dist.destroy_process_group()
    stalls, cpu = ([saving[key] - alone[key] for alone, saving in pairs] for key in ("seconds", "cpu"))
    return {
        "first": stalls[0],
        "stall": median(stalls[1:]),
        "lowest": min(stalls[1:]),
        "highest": max(stalls[1:]),
        "cpu": median(cpu[1:]),
        "saved": median(saving["saved"] for _, saving in pairs[1:]),
        "plain": median(alone["seconds"] for alone, _ in pairs[1:]),
        "bytes": written,
    }


def measure_checkpoint(size: int, rounds: int, place: Path) -> dict[str, Any]:
    """{"bytes", "steps", "plain": seconds of the steps alone, "ways": {way: as of `measure_way`}}."""
    ways = {}
    os.environ |= KEEP_MEMORY  # read by glibc where a process starts
    for way in (OURS, IN_LINE, PEER, BEFORE):
        # a process each: what a way lets go of changes how the allocator serves the next one's steps
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            ways[way] = pool.submit(measure_way, way, size, rounds, place).result()
    plain = median(found["plain"] for found in ways.values())
    return {"bytes": ways[OURS]["bytes"], "steps": STEPS, "rounds": rounds, "plain": plain, "ways": ways}


def table(record: dict[str, Any]) -> str:
    """Markdown of what a checkpoint costs."""
    head = (
        "stall",
        "lowest to highest",
        "of that in line",
        "CPU of the training thread",
        "first stall",
        "on disk after",
    )
    rows = [[f"a checkpoint of {record['bytes'] / 1e9:.2f} GB", *head]]
    in_line = record["ways"][IN_LINE]["stall"]
    for way, found in record["ways"].items():
        share = f"{100 * found['stall'] / in_line:.0f} %"
        spread = f"{found['lowest']:.2f} to {found['highest']:.2f} s"
        seconds = [f"{found[kind]:.2f} s" for kind in ("stall", "cpu", "first", "saved")]
        rows.append([way, seconds[0], spread, share, *seconds[1:]])
    rows.append([f"{record['steps']} steps without a save", f"{record['plain']:.2f} s", *[""] * 5])
    return markdown_table(rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of weights and moments")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--place", type=Path, default=Path("runs"), help="folder on the disk to save on")
    options = parser.parse_args(arguments)
    options.place.mkdir(exist_ok=True)
    versions = {
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": device_name(torch.device("cpu")),
        "cpus": os.cpu_count(),
    }
    found = measure_checkpoint(int(options.gigabytes * 1e9), options.rounds, options.place)
    append_jsonl(FILE, {"benchmark": "checkpoint", **versions, **found})
    print(table(read_jsonl(FILE)[-1]))


if __name__ == "__main__":
    main()
