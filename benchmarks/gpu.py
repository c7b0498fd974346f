"""Measure the pretraining step on a GPU, or count what it asks of one: `python -m benchmarks.gpu`.

python -m benchmarks.gpu --dry [--size base] [--batch 64 256 256]   count without a GPU (`benchmarks.dry`)
python -m benchmarks.gpu --dry --record NAME                        and append it to results/dry.jsonl
"""

import argparse
from collections.abc import Sequence
from datetime import date
from typing import Any

import torch

from benchmarks.device import GPU
from benchmarks.dry import Counter, dry_run
from benchmarks.results import RESULTS, commit
from benchmarks.step import make_batch
from pretrain.recipes import base, small, tiny
from raylib.data.loading import to_device
from raylib.display import markdown_table
from raylib.fileio import append_jsonl
from raylib.models.unified import UnifiedModel
from raylib.objectives.pretraining import ObjectiveConfig, UnifiedObjective

MODELS = {"tiny": tiny().model, "small": small().model, "base": base().model}
BATCH = (64, 256, 256)  # image-text pairs, translations, sentences: one of eight GPUs' share of the paper's
DRY_FILE = RESULTS / "dry.jsonl"


def count(size: str, batch: Sequence[int]) -> Counter:
    """Count what one step, forward and backward under bf16 autocast, asks of a GPU; its batch is there."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = UnifiedModel(MODELS[size])
    on_host = make_batch(MODELS[size], tuple(batch))
    with dry_run() as counter:
        objective = UnifiedObjective(model.to(GPU).train(), ObjectiveConfig())
        on_device = to_device(on_host, GPU)
        counter.clear()
        with torch.autocast("cuda", torch.bfloat16):
            loss, _ = objective(on_device)
        counter.phase = "backward"
        loss.backward()
    return counter


def dry_report(counter: Counter, rows: int = 20) -> str:
    """Markdown: the sums, the waits by line, the operators that move most."""
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
    return "\n".join([*lines, markdown_table(table)])


def dry(options: argparse.Namespace) -> None:
    counter = count(options.size, options.batch)
    print(dry_report(counter))
    if options.record:
        record: dict[str, Any] = {
            "date": date.today().isoformat(),
            "commit": commit(),
            "name": options.record,
        }
        record |= {"size": options.size, "batch": list(options.batch), "torch": torch.__version__}
        append_jsonl(DRY_FILE, record | counter.summary())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry", action="store_true", help="count, without a GPU")
    parser.add_argument("--size", choices=MODELS, default="base", help="of --dry")
    parser.add_argument(
        "--batch", type=int, nargs=3, default=BATCH, help="pairs, translations, sentences of --dry"
    )
    parser.add_argument("--record", metavar="NAME", help="record what --dry counts, by this name")
    options = parser.parse_args(arguments)
    if options.dry:
        dry(options)


if __name__ == "__main__":
    main()
