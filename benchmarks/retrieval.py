"""Two-stage retrieval of N images with a caption each: CPU-seconds, and how often an image is encoded and
projected, beside another working tree.

    python -m benchmarks.retrieval [--beside TREE] [--repeat 3]

Every measurement is a process of its own, on one thread, the trees in turn. Results are appended to
results/retrieval.jsonl, of which docs/performance.md shows the newest (`python -m benchmarks.record`).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.results import RESULTS, ROOT, newest
from finetune.batches import encode_texts
from finetune.formats import Captioned
from finetune.stores.images import ImageSource
from finetune.tasks.ranking import retrieve
from raylib.display import markdown_table
from raylib.models.unified import ModelConfig, UnifiedModel
from raylib.randomness import permutation, uniform
from raylib.sample import DATA
from raylib.text import Tokenizer

FILE = RESULTS / "retrieval.jsonl"
SIZES, CANDIDATES = (500, 1000, 2000), 16
MODEL = ModelConfig(
    vocabulary=12000,
    width=128,
    heads=4,
    feedforward=512,
    text_layers=2,
    fusion_layers=2,
    vision_layers=2,
    image_size=128,
    positions=64,
    embedding=64,
)


class ColouredImages(ImageSource):
    """Images of 4 x 4 coloured fields, each a function of its name."""

    def __init__(self) -> None:
        self.size, self.config = MODEL.image_size, None

    def read(self, names: Any, draws: Any = None) -> dict[str, Any]:
        fields = [uniform(int(name), "fields", np.arange(48)).reshape(4, 4, 3) for name in names]
        pixels = (256 * np.stack(fields)).astype(np.uint8)
        return {"images": torch.from_numpy(pixels.repeat(self.size // 4, 1).repeat(self.size // 4, 2))}


def make_captions(count: int, tokenizer: Tokenizer) -> list[str]:
    """Captions of 4 to 16 pieces of the vocabulary."""
    pieces = tokenizer.pieces(np.arange(100, 8000))
    words = [piece[1:] for piece in pieces if len(piece) > 3 and piece[0] == "▁" and piece[1:].isalpha()]
    order = [permutation(len(words), i, "caption")[: 4 + i % 13] for i in range(count)]
    return [" ".join(words[j] for j in row) for row in order]


@torch.inference_mode()
def spread_vectors(model: UnifiedModel, items: list[Captioned], tokenizer: Tokenizer) -> None:
    """Take the mean vector off all: those of an untrained model are nearly one, and all queries would have
    the same candidates."""
    images = model.encode_images(ColouredImages().read([item.image for item in items])["images"])
    texts = encode_texts([item.captions[0] for item in items], tokenizer, 40)
    model.image_projection.bias -= model.embed_images(images, normalize=False).mean(0)
    model.text_projection.bias -= model.embed_text(texts, normalize=False).mean(0)


def measure(count: int) -> dict[str, Any]:
    """CPU-seconds of one retrieval, its recall, and how often an image is encoded and projected."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = UnifiedModel(MODEL).eval()
    tokenizer = Tokenizer.load(DATA / "tokenizer.model")
    items = [Captioned(str(i), (text,)) for i, text in enumerate(make_captions(count, tokenizer))]
    spread_vectors(model, items[:200], tokenizer)
    tokens = {"encoded": 0, "projected": 0}

    def count_images(module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        tokens["encoded"] += len(arguments[0])

    def count_projected(module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        tokens["projected"] += len(arguments[0])

    model.vision.register_forward_pre_hook(count_images)
    model.fusion.blocks[0].cross_attention.key_value.register_forward_pre_hook(count_projected)
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        found = retrieve(
            model,
            items,
            ColouredImages(),
            tokenizer,
            40,
            CANDIDATES,
            Path(folder) / "states",
        )
        seconds = time.process_time() - start
    states_per_image = 1 + (MODEL.image_size // MODEL.patch) ** 2
    return {
        "n": count,
        "seconds": seconds,
        "encoded_per_image": tokens["encoded"] / count,
        "projected_per_image": tokens["projected"] / states_per_image / count,
        "pairs_per_image": found["pairs"] / count,
        "mean_recall": found["mean_recall"],
    }


def run_in(tree: Path, count: int) -> dict[str, Any]:
    """`measure` by the code of a working tree."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--measure", str(count)]
    return json.loads(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)


def table(records: list[dict[str, Any]]) -> str:
    """Markdown of the newest measurement of each size, beside the other tree."""
    rows = [["images", "CPU-s before", "now", "time", "image encoded", "projected before", "now"]]
    by_size: dict[int, dict[str, dict[str, Any]]] = {}
    for record in newest(records, "tree", "n"):
        by_size.setdefault(record["n"], {})[record["tree"]] = record
    for size, trees in sorted(by_size.items()):
        if "beside" not in trees:
            continue
        now, before = trees["here"], trees["beside"]
        seconds, old_seconds = (statistics.median(record["seconds"]) for record in (now, before))
        counts = now["encoded_per_image"], before["projected_per_image"], now["projected_per_image"]
        cells = [f"{old_seconds:.2f}", f"{seconds:.2f}", f"{seconds / old_seconds:.2f}x"]
        rows.append([f"{size:,}", *cells, *(f"{count:.3g}" for count in counts)])
    return markdown_table(rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--beside", type=Path, help="another working tree of the project")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.measure:
        print(json.dumps(measure(given.measure)))
        return
    trees = {"here": ROOT, **({"beside": given.beside.absolute()} if given.beside else {})}
    rows = [["N", "tree", "CPU-s", "ms an image", "encoded", "projected", "mean recall"]]
    for count in SIZES:
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in trees}
        for _ in range(given.repeat):
            for name, tree in trees.items():
                runs[name].append(run_in(tree, count))
        for name, found in runs.items():
            record = {**found[0], "seconds": [run["seconds"] for run in found]}
            line = {"benchmark": "retrieval", "tree": name, "torch": torch.__version__, **record}
            with open(FILE, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            seconds = statistics.median(record["seconds"])
            numbers = (record["encoded_per_image"], record["projected_per_image"], record["mean_recall"])
            rows.append(
                [str(count), name, f"{seconds:.2f}", f"{1000 * seconds / count:.2f}"]
                + [f"{number:.3f}" for number in numbers]
            )
    print(markdown_table(rows))


if __name__ == "__main__":
    main()
