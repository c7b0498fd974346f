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
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
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


def measure_checkpoint(size: int, rounds: int, place: Path) -> dict[str, Any]:
    """{"bytes", "steps", "plain": seconds of the steps alone, "ways": {way: {"first": its stall when it must
    get its memory, "stall": median seconds of later saves, "cpu": of them the training thread's, "saved"}}}.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # the peer wants one
    with tempfile.TemporaryDirectory(dir=place) as folder:
        bench = Bench(size, Path(folder))
        found: dict[str | None, list[dict[str, float]]] = {}
        # in turns, so that a slow minute of the machine is everybody's
        for _ in range(rounds + 1):
            for way in (None, OURS, IN_LINE, PEER, BEFORE):
                found.setdefault(way, []).append(bench.measure(way))
        written = num_bytes(bench.files())
    dist.destroy_process_group()
    alone = found.pop(None)[1:]
    plain, plain_cpu = (median(run[kind] for run in alone) for kind in ("seconds", "cpu"))
    ways = {
        way: {
            "first": runs[0]["seconds"] - plain,
            "stall": median(run["seconds"] for run in runs[1:]) - plain,
            "cpu": median(run["cpu"] for run in runs[1:]) - plain_cpu,
            "saved": median(run["saved"] for run in runs[1:]),
        }
        for way, runs in found.items()
    }
    return {"bytes": written, "steps": STEPS, "rounds": rounds, "plain": plain, "ways": ways}


def table(record: dict[str, Any]) -> str:
    """Markdown of what a checkpoint costs."""
    head = ("stall", "of that in line", "CPU of the training thread", "first stall", "on disk after")
    rows = [[f"a checkpoint of {record['bytes'] / 1e9:.2f} GB", *head]]
    in_line = record["ways"][IN_LINE]["stall"]
    for way, found in record["ways"].items():
        share = f"{100 * found['stall'] / in_line:.0f} %"
        seconds = [f"{found[kind]:.2f} s" for kind in ("stall", "cpu", "first", "saved")]
        rows.append([way, seconds[0], share, *seconds[1:]])
    rows.append([f"{record['steps']} steps without a save", f"{record['plain']:.2f} s", "", "", "", ""])
    return markdown_table(rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of weights and moments")
    parser.add_argument("--rounds", type=int, default=5)
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
