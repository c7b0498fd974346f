"""Measure the pretraining step on a GPU, or count what it asks of one: `python -m benchmarks.gpu`.

python -m benchmarks.gpu [--out DIR] [--seconds 480] [--only PART ...]   on a machine with a GPU
python -m benchmarks.gpu --device cpu                               rehearse it: tiny models, no figure counts
python -m benchmarks.gpu --dry [--size base] [--batch 64 256 256] [--set PATH=VALUE ...]   count without a GPU
python -m benchmarks.gpu --dry --record NAME                        and append it to results/dry.jsonl

The parts of a measurement (`benchmarks.gpu_parts`) run in their order until the seconds are over, and
DIR/gpu.json is written after each figure; `python -m benchmarks.record --gpu DIR/gpu.json` enters it into
results/gpu.jsonl. A bare machine gets what it lacks from `benchmarks/wheels.sh`.
"""

import argparse
import time
import traceback
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.device import GPU
from benchmarks.dry import Counter, dry_run
from benchmarks.gpu_parts import PARTS, SIZES, Report
from benchmarks.gpu_steps import BATCH, Setting
from benchmarks.gpu_tables import FORMAT
from benchmarks.results import RESULTS, commit
from benchmarks.step import make_batch
from benchmarks.twin import OBJECTIVE
from pretrain.recipes import RECIPES
from raylib.config import override
from raylib.data.loading import to_device
from raylib.display import markdown_table
from raylib.fileio import append_jsonl, write_json
from raylib.models.recompute import set_recomputation
from raylib.models.unified import UnifiedModel
from raylib.objectives.pretraining import UnifiedObjective
from raylib.precision import set_residual

DRY_FILE = RESULTS / "dry.jsonl"


def count(size: str, batch: Sequence[int], changes: Sequence[str] = ()) -> Counter:
    """Count what one step, forward and backward under bf16 autocast, asks of a GPU; its batch is there.
    `changes`: settings, "path=value"."""
    torch.manual_seed(0)
    config = override(RECIPES[size]().model_copy(update={"objective": OBJECTIVE}), changes)
    with torch.device("meta"):
        model = UnifiedModel(config.model)
    set_residual(model, config.fit.residual)
    set_recomputation(model, config.model.checkpointing, config.fit.micro_batches)
    on_host = make_batch(config.model, tuple(batch))
    with dry_run() as counter:
        objective = UnifiedObjective(model.to(GPU).train(), config.objective)
        on_device = to_device(on_host, GPU)
        counter.clear()
        with torch.autocast("cuda", torch.bfloat16):
            loss, _ = objective(on_device)
        counter.phase = "backward"
        loss.backward()
    return counter


def dry_report(counter: Counter, rows: int = 20) -> str:
    """Markdown: the sums, the waits by line, the operators that move most, the regions that may be fused."""
    figures = counter.summary()
    copies = ", ".join(
        f"{figures[way]['copies']} copies {name} ({figures[way]['bytes'] / 1e6:.1f} MB)"
        for way, name in (("host_to_device", "to the device"), ("device_to_host", "to the host"))
    )
    operators = figures["operators"]
    lines = [
        f"{sum(operators.values()):,} operators ({operators['forward']:,} forward), "
        f"{figures['attention_calls']:,} of them attention; {figures['gb']:.1f} GB, "
        f"{figures['tflop']:.2f} TFLOP; {copies}",
        "",
        markdown_table(
            [["waits", "where"], *([f"{n}", where] for where, n in figures["waits"].items())], words=2
        ),
        "",
    ]
    table = [["operator", "calls", "TFLOP", "GB"]]
    table += [
        [name, f"{n:,}", f"{flops:.2f}", f"{size:.2f}"] for name, n, flops, size in counter.by_name()[:rows]
    ]
    fused = [
        [
            "fused by fit.compile (Triton; products stay cuBLAS's)",
            "calls",
            "operators",
            "products",
            "GB of the rest",
        ]
    ]
    fused += [[name, *map(str, counts), f"{size:.2f}"] for name, *counts, size in counter.regions()]
    return "\n".join([*lines, markdown_table(table), "", markdown_table(fused)])


def dry(options: argparse.Namespace) -> None:
    """Count, print, and record if asked to."""
    counter = count(options.size, options.batch, options.set)
    print(dry_report(counter))
    if options.record:
        record: dict[str, Any] = {
            "date": date.today().isoformat(),
            "commit": commit(),
            "name": options.record,
        }
        record |= {"size": options.size, "batch": list(options.batch), "torch": torch.__version__}
        append_jsonl(DRY_FILE, record | counter.summary())


def measure(device: torch.device, folder: Path, seconds: float, only: Sequence[str] = ()) -> dict[str, Any]:
    """Run the parts, or those that are named, while there is time. Returns what DIR/gpu.json says."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {"format": FORMAT, "date": date.today().isoformat(), "commit": commit(), "parts": {}}
    report = Report(Setting(device), lambda parts: write_json(folder / "gpu.json", about | {"parts": parts}))
    ends = time.monotonic() + seconds
    for part, limit in PARTS.items():
        name, report.part = part.__name__, part.__name__
        if only and name not in {"machine", *only}:
            continue
        start = time.monotonic()
        report.ends = ends if report.setting.is_rehearsal else min(start + limit, ends)
        try:
            if report.has_time("part"):
                part(report)
        except Exception as error:  # of whatever kind: the parts that follow do not depend on it
            traceback.print_exc()
            report.note("part", {"failed": f"{type(error).__name__}: {error}"[:400]})
        report.note("seconds", round(time.monotonic() - start, 1))
    return about | {"parts": report.figures}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of gpu.json")
    parser.add_argument("--seconds", type=float, default=480, help="start no part later than this")
    names = [part.__name__ for part in PARTS]
    parser.add_argument("--only", nargs="*", choices=names, default=(), metavar="PART", help=", ".join(names))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal")
    parser.add_argument("--dry", action="store_true", help="count, without a GPU")
    parser.add_argument("--size", choices=SIZES, default="base", help="of --dry")
    parser.add_argument(
        "--batch", type=int, nargs=3, default=BATCH, help="pairs, translations, sentences of --dry"
    )
    parser.add_argument("--set", nargs="*", default=(), metavar="PATH=VALUE", help="settings of --dry")
    parser.add_argument("--record", metavar="NAME", help="record what --dry counts, by this name")
    options = parser.parse_args(arguments)
    if options.dry:
        dry(options)
    elif options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU here: --dry counts without one, --device cpu rehearses")
    else:
        device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
        measure(device, options.out, options.seconds, options.only)


if __name__ == "__main__":
    main()
