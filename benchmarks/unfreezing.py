"""Savings of scheduled unfreezing in its early epochs: seconds of a fine-tuning step by how many layers are
trained.

    python -m benchmarks.unfreezing [--steps 12]

Embeddings and head are always trained (paper 1), so gradients of activations flow through the frozen layers
all the same: what is saved is the gradients of their weights, and their share of AdamW. Peer: full
fine-tuning, in the same process.
"""

import argparse
import statistics
import time

import torch

from benchmarks.results import RESULTS
from finetune.tasks.classification import ClassificationObjective
from pretrain.recipes import emoji_e5_scenes
from raylib.display import markdown_table
from raylib.engine import OptimConfig, TorchEngine
from raylib.fileio import append_jsonl
from raylib.models.finetuned import FinetuneModel
from raylib.models.unified import UnifiedModel
from raylib.packed import Ragged

BATCH, TOKENS, STATES, LABELS, PIECES = 64, 15, 21, 152, 52_399  # those of scenes_xgqa
FILE = RESULTS / "unfreezing.jsonl"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=12, help="timed steps of each variant")
    steps = parser.parse_args(arguments).steps
    torch.set_num_threads(1)
    sizes = emoji_e5_scenes().model.model_copy(update={"vocabulary": PIECES})
    seconds = {trained: measure(sizes, trained, steps) for trained in (8, 6, 4, 2)}
    append_jsonl(FILE, {"threads": 1, "batch": BATCH, "seconds": seconds})
    print(table(seconds))


def measure(sizes, trained: int, steps: int) -> float:
    """Median CPU-seconds of a step with the top `trained` layers trained."""
    torch.manual_seed(0)
    model = FinetuneModel(UnifiedModel(sizes), tuple(map(str, range(LABELS))), 1, 0.1)
    model.backbone.vision.requires_grad_(False)

    def rates(depth: int | None, step: int) -> float:
        return float(depth in (None, 0) or depth > model.num_layers - trained)

    engine = TorchEngine(
        ClassificationObjective(model, "ce"), OptimConfig(), torch.device("cpu"), False, None, rates
    )
    lengths = torch.randint(TOKENS - 5, TOKENS + 6, (BATCH,))
    states = Ragged(torch.randn(BATCH * STATES, sizes.width), torch.full((BATCH,), STATES))
    part = {
        "index": torch.arange(BATCH),
        "text": Ragged(torch.randint(5, PIECES, (int(lengths.sum()),)), lengths),
        "states": states,
        "answer": torch.randint(0, LABELS, (BATCH,)),
    }
    spent = []
    for step in range(steps + 2):
        start = time.process_time()
        engine.step({"examples": part}, step, 1e-4)
        spent.append(time.process_time() - start)
    return statistics.median(spent[2:])


def table(seconds: dict) -> str:
    """Markdown: ratios to full fine-tuning."""
    full = next(iter(seconds.values()))
    rows = [["layers trained, of 8", "CPU-seconds a step", "time"]]
    rows += [[str(trained), f"{spent:.2f}", f"{spent / full:.2f}x"] for trained, spent in seconds.items()]
    return markdown_table(rows, words=0)


if __name__ == "__main__":
    main()
