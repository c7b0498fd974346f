"""The data path of one core beside its peers: `python -m benchmarks.data` (half a minute).

Reading: our indexed shards, at random, beside `webdataset` streaming the same tars. Images: decode, random
crop and (ours only) RandAugment to uint8, beside `open_clip`'s training transform re-stated in PIL and NumPy
(RandomResizedCrop 0.9-1, bicubic, float32, normalised). Text: packed ids beside `webdataset` streaming one
sentence a member and tokenising. The variants of a row run by turns in one process; figures are medians of
samples per second of processor time. Prints a Markdown table and appends a line to
`benchmarks/results/data.jsonl`. The images are made here: noise of the spectrum of photographs.
"""

import argparse
import io
import json
import math
import platform
import random
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import cv2
import numpy as np
import webdataset
from PIL import Image

from benchmarks.results import RESULTS
from raylib.data.augmentation import augment_image, count_uniforms
from raylib.data.images import decode_image
from raylib.data.shards import ShardWriter
from raylib.data.sources import Source
from raylib.fileio import append_jsonl
from raylib.randomness import permutation, uniform
from raylib.sample import DATA
from raylib.settings import AugmentConfig
from raylib.text import Tokenizer

FILE = RESULTS / "data.jsonl"
TOKENIZER = DATA / "tokenizer.model"
SIZE = 256  # pixels a side that the model sees
ROUNDS = 5
CROP = AugmentConfig(scale=(0.9, 1.0), operations=0)
RANDAUGMENT = AugmentConfig(scale=(0.9, 1.0))
MEAN, STD = np.array([0.481, 0.458, 0.408], np.float32), np.array([0.269, 0.261, 0.276], np.float32)  # CLIP's


def make_photo(side: int, seed: int) -> bytes:
    """A JPEG of noise whose amplitude falls as 1 / frequency, as in photographs."""
    rng = np.random.default_rng(seed)
    layers = sum(
        cv2.resize(rng.normal(0, 1, (n, n, 3)), (side, side), interpolation=cv2.INTER_CUBIC) / n**0.5
        for n in (2, 4, 8, 16, 32, 64, 128)
    )
    image = np.clip(128 + 60 * layers, 0, 255).astype(np.uint8)
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()


def open_clip_transform(data: bytes) -> np.ndarray:
    """`open_clip.image_transform(256, is_train=True)`: (3, 256, 256) float32."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = image.size
    area = random.uniform(0.9, 1.0) * width * height
    aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
    w, h = min(width, round(math.sqrt(area * aspect))), min(height, round(math.sqrt(area / aspect)))
    left, top = random.randint(0, width - w), random.randint(0, height - h)
    image = image.crop((left, top, left + w, top + h)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return ((np.asarray(image, np.float32) / 255 - MEAN) / STD).transpose(2, 0, 1).copy()


def write_images(folder: Path, side: int, distinct: int, count: int) -> Path:
    photos = [make_photo(side, seed) for seed in range(distinct)]
    with ShardWriter(folder, "image_text") as writer:
        for number in range(count):
            caption = json.dumps({"captions": {"en": ["an image of noise in many colours"]}}).encode()
            writer.write(f"{number:06d}", {"json": caption, "jpg": photos[number % distinct]})
    return folder


def write_sentences(folder: Path, tokenizer: Tokenizer, count: int) -> tuple[Path, Path]:
    words = re.findall(r"[a-z]{2,}", __doc__.lower())
    rng = random.Random(0)
    texts = [" ".join(rng.choices(words, k=rng.randint(4, 16))) for _ in range(count)]
    with ShardWriter(folder / "packed", "text", tokenizer) as writer:
        writer.write_rows("en", tokenizer.encode(texts))
    with ShardWriter(folder / "members", "image_text", max_samples=count) as writer:
        for number, text in enumerate(texts):
            writer.write(f"{number:06d}", {"txt": text.encode()})
    return folder / "packed", folder / "members"


def stream(folder: Path):
    """Samples as webdataset reads them."""
    return webdataset.WebDataset([str(path) for path in sorted(folder.glob("*.tar"))], shardshuffle=False)


def ours(folder: Path, config: AugmentConfig | None) -> Callable[[], int]:
    """Reads every sample once at random; decodes and augments unless `config` is None."""

    def run() -> int:
        source = Source(folder)
        order = permutation(len(source), "order")
        draws = uniform("draws", order[:, None], np.arange(count_uniforms(config))) if config else None
        for number in order.tolist():
            sample = source.sample("en", number)
            data = sample.read("json"), sample.read("jpg")
            if config:
                augment_image(decode_image(data[1]), SIZE, config, draws[number])
        return len(order)

    return run


def peer(folder: Path, transform: bool) -> Callable[[], int]:
    def run() -> int:
        count = 0
        for sample in stream(folder):
            if transform:
                open_clip_transform(sample["jpg"])
            count += 1
        return count

    return run


def packed_rows(folder: Path) -> int:
    source = Source(folder)
    for number in permutation(len(source), "order").tolist():
        source.row("en", number)
    return len(source)


def tokenised_members(folder: Path, tokenizer: Tokenizer) -> int:
    texts = [sample["txt"].decode() for sample in stream(folder)]
    return sum(len(tokenizer.encode(texts[start : start + 256])) for start in range(0, len(texts), 256))


def measure(variants: dict[str, Callable[[], int]]) -> dict[str, float]:
    """Samples per second of processor time: medians over rounds in which the variants take turns."""
    rates: dict[str, list[float]] = {name: [] for name in variants}
    for round_number in range(ROUNDS + 1):
        for name, run in variants.items():
            start = time.process_time()
            count = run()
            if round_number:  # the first warms caches
                rates[name].append(count / (time.process_time() - start))
    return {name: median(values) for name, values in rates.items()}


def main(arguments: list[str] | None = None) -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(arguments)
    random.seed(0)
    tokenizer = Tokenizer.load(TOKENIZER)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        small = write_images(root / "288", 288, 50, 1000)
        small_subset = write_images(root / "288 few", 288, 50, 100)
        large = write_images(root / "640", 640, 20, 60)
        packed, members = write_sentences(root, tokenizer, 5000)
        rows = {
            "raw bytes of 288 px JPEGs": {"webdataset": peer(small, False), "ours": ours(small, None)},
            "sentences": {
                "webdataset + SentencePiece": lambda: tokenised_members(members, tokenizer),
                "ours, packed": lambda: packed_rows(packed),
            },
        }
        for side, folder in ((288, small_subset), (640, large)):
            rows[f"images of {side} px to {SIZE}"] = {
                "webdataset + open_clip's transform": peer(folder, True),
                "ours, crop": ours(folder, CROP),
                "ours, crop and RandAugment": ours(folder, RANDAUGMENT),
            }
        results = {name: measure(variants) for name, variants in rows.items()}
    print("| one core | samples/s | ratio |\n|-|-|-|")
    for name, rates in results.items():
        base = next(iter(rates.values()))
        for variant, rate in rates.items():
            print(f"| {name}: {variant} | {rate:,.0f} | {rate / base:.2f}x |")
    versions = {
        "python": platform.python_version(),
        "webdataset": webdataset.__version__,
        "opencv": cv2.__version__,
    }
    append_jsonl(FILE, {"benchmark": "data", **versions, "samples_per_second": results})


if __name__ == "__main__":
    main()
