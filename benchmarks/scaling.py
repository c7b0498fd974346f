"""A model of cost of a pretraining step of `base` on 8 to 512 GPUs; ZeRO-2 beside DDP on two CPU workers.

    python -m benchmarks.scaling              write benchmarks/scaling.md from what is recorded and assumed
    python -m benchmarks.scaling --measure 9  first time so many steps of both engines on 2 gloo workers, and
                                              append them to results/sharding.jsonl

What one GPU does was measured (results/gpu.jsonl); what travels is counted from the shapes of the model; how
long that takes is assumed, by the constants below.
"""

import argparse
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.results import RESULTS, ROOT
from raylib.display import markdown_table
from raylib.engine_zero import DeepSpeedEngine, zero_settings
from raylib.fileio import append_jsonl, read_jsonl, write_atomically
from raylib.models.unified import UnifiedModel
from raylib.settings import FitConfig

FILE, PAGE = RESULTS / "sharding.jsonl", ROOT / "benchmarks" / "scaling.md"

GPUS_PER_NODE = 8
NVLINK = 450e9  # bytes/s a GPU and direction: 900 GB/s both ways (NVIDIA's data sheet of the H100 SXM)
NETWORK = 50e9  # bytes/s a GPU and direction: one NDR InfiniBand port of 400 Gb/s each
LINK_SHARE = 0.8  # of these that collectives reach with large messages: assumed
LATENCY = 20e-6  # seconds a collective, times log2 of the workers: assumed
PEAK = 989e12  # bf16 FLOP/s of an H100 (data sheet)
GOAL = 0.35  # of it, which the step is to reach on one GPU
BACKWARD = 2 / 3  # share of a step in which gradients can travel unseen
BATCH = 512, 2048, 2048  # pairs, translations, sentences of a step (paper 2)
CAPTION, LONGEST = 13, 35  # tokens of a caption: mean, and what captions were padded to
WORKERS = 8, 64, 512


class Traffic(NamedTuple):
    """A collective of a step: bytes that a GPU receives; whether they come from any workers (all_to_all) and
    not round a ring; whether backward goes on meanwhile."""

    name: str
    received: float
    scattered: bool = False
    hidden: bool = False


class Shapes(NamedTuple):
    """Numbers of `base`: parameters, those of the word table, states of an image, width of states and of
    embeddings."""

    parameters: int
    words: int
    states: int
    width: int
    embedding: int


def shapes() -> Shapes:
    with torch.device("meta"):
        model = UnifiedModel(UnifiedModel.sizes["base"])
    c = model.config
    return Shapes(
        sum(p.numel() for p in model.parameters()),
        model.embedding.word.weight.numel(),
        (c.image_size // c.patch) ** 2 + 1,
        c.width,
        c.embedding,
    )


def before(s: Shapes, workers: int, pairs: int) -> list[Traffic]:
    """ZeRO-2 and gathers as they were: nothing overlaps, all states go everywhere."""
    others = (workers - 1) / workers
    total = pairs * workers
    gathered = [
        ("states of images", total * s.states * s.width * 4),
        ("states of captions", total * LONGEST * s.width * 4),
        ("embeddings", _embeddings(s, total)),
    ]
    # linear layers' gradients in bf16, as DeepSpeed does under autocast, all-reduced; then all weights
    gradients = s.words * 4 + (s.parameters - s.words) * 2
    return [
        *(Traffic(name, 3 * size * others) for name, size in gathered),  # gathered, and all-reduced backward
        Traffic("gradients", 2 * gradients * others),
        Traffic("weights", s.parameters * 4 * others),
    ]


def after(s: Shapes, workers: int, pairs: int, zero: bool, size: int) -> list[Traffic]:
    """As it is now; `size`: bytes of a gradient on its way."""
    others = (workers - 1) / workers
    # ZeRO reduces each bucket to its owners while these are few; DDP all-reduces
    times = 2
    if zero and not zero_settings(s.parameters, workers)["use_multi_rank_bucket_allreduce"]:
        times = 1
    # a word's gradient is whole only at the end of backward: its row is the head's too
    return [
        Traffic("states of images", 2 * pairs * s.states * s.width * 2 * others, scattered=True),
        Traffic("states of captions", 2 * pairs * CAPTION * s.width * 2 * others, scattered=True),
        Traffic("embeddings", 2 * _embeddings(s, pairs * workers) * others),
        Traffic("gradients, of words", times * s.words * size * others),
        Traffic("gradients, of others", times * (s.parameters - s.words) * size * others, hidden=True),
        *([Traffic("weights", s.parameters * 4 * others)] if zero else []),
    ]


def _embeddings(s: Shapes, pairs: int) -> float:
    """Bytes of both sides' unit vectors of `pairs` pairs and of the translations with them."""
    return (pairs + pairs * BATCH[1] / BATCH[0]) * 2 * s.embedding * 4


def seconds(traffic: Traffic, workers: int) -> float:
    """Time of a collective. Round a ring, each network port carries an eighth of what its node receives; what
    comes from one worker alone comes through the GPU's own port."""
    inside = traffic.received / (NVLINK * LINK_SHARE)
    outside = 0.0
    if workers > GPUS_PER_NODE:
        share = (workers - GPUS_PER_NODE) / workers if traffic.scattered else 1 / GPUS_PER_NODE
        outside = traffic.received * share / (NETWORK * LINK_SHARE)
    return max(inside, outside) + LATENCY * math.log2(workers)


def exposed_seconds(traffics: list[Traffic], workers: int, computing: float) -> float:
    """What a step waits for: all of a collective that is waited for, of others what outlasts backward."""
    hidden = sum(seconds(t, workers) for t in traffics if t.hidden)
    waited = sum(seconds(t, workers) for t in traffics if not t.hidden)
    return waited + max(0.0, hidden - BACKWARD * computing)


class Computing(NamedTuple):
    """Seconds of one GPU at 64 pairs, and of its host, which no smaller batch shortens."""

    name: str
    gpu: float
    host: float

    def of(self, pairs: float) -> float:
        return max(self.host, self.gpu * pairs / 64)


def computing() -> list[Computing]:
    """As measured, with one call of attention a layer; and at the goal."""
    record = next(r for r in read_jsonl(RESULTS / "gpu.jsonl") if "lever varlen_attn" in r)
    busy, wall = record["profile"]["busy_ms"] / 1e3, record["lever varlen_attn"]["median_ms"] / 1e3
    goal = record["tflop of a step"] * 1e12 / (GOAL * PEAK)
    return [Computing("as measured", busy, wall), Computing("at the goal", goal, goal / 2)]


KINDS: dict[str, Callable[[Shapes, int, int], list[Traffic]]] = {
    "before": before,
    "zero2": lambda s, workers, pairs: after(s, workers, pairs, True, 4),
    "none": lambda s, workers, pairs: after(s, workers, pairs, False, 4),
    "none, bf16 gradients": lambda s, workers, pairs: after(s, workers, pairs, False, 2),
}
BATCHES = {
    "the paper's batch of 512 pairs, shared": lambda workers: BATCH[0] // workers,
    "64 pairs a GPU": lambda workers: 64,
}


def traffic_table(s: Shapes, pairs_of: Callable[[int], int]) -> str:
    """Markdown: GB that a GPU receives in a step."""
    rows = [["a GPU receives, GB", *(f"{w}: {kind}" for w in WORKERS for kind in ("before", "now, zero2"))]]
    table: dict[str, dict[tuple[int, str], float]] = {}
    for workers in WORKERS:
        for kind in ("before", "zero2"):
            for traffic in KINDS[kind](s, workers, pairs_of(workers)):
                cells = table.setdefault(traffic.name.partition(",")[0], {})
                cells[workers, kind] = cells.get((workers, kind), 0.0) + traffic.received
    table["in all"] = {key: sum(cells[key] for cells in table.values()) for key in next(iter(table.values()))}
    for name, cells in table.items():
        rows.append([name, *(f"{cells[w, kind] / 1e9:.3g}" for w in WORKERS for kind in ("before", "zero2"))])
    return markdown_table(rows)


def time_table(s: Shapes, pairs_of: Callable[[int], int]) -> str:
    """Markdown: ms that a step computes and waits, and what a GPU gets done."""
    rows = [["computing", "GPUs", "computes, ms", *(f"{kind}: waits, ms" for kind in KINDS)]]
    for machine in computing():
        for workers in WORKERS:
            pairs = pairs_of(workers)
            work = machine.of(pairs)
            cells = []
            for kind in KINDS.values():
                waits = exposed_seconds(kind(s, workers, pairs), workers, work)
                done = pairs / 64 * machine.of(64) / (work + waits)
                cells.append(f"{waits * 1e3:.3g} ({done:.0%})")
            rows.append([machine.name, str(workers), f"{work * 1e3:.0f}", *cells])
    return markdown_table(rows)


def measured_table() -> str:
    """Markdown: both engines on two CPU workers."""
    record = read_jsonl(FILE)[-1]
    rows = [["`fit.sharding`", "seconds a step", "time"]]
    least = record["seconds"]["none"]
    rows += [[name, f"{spent:.2f}", f"{spent / least:.2f}x"] for name, spent in record["seconds"].items()]
    return markdown_table(rows, words=0)


INTRODUCTION = """# Many GPUs: a model of cost

Written by `python -m benchmarks.scaling`, not by hand. **No step of ours has run on several GPUs.**

- Measured (`results/gpu.jsonl`): what one H100 does with 64 pairs, 256 translations and 256 sentences:
  {busy:.0f} ms busy, {wall:.0f} ms on the clock, for its host is slower. The goal: {goal:.0%} of
  {peak:.0f} TFLOP/s, {goal_ms:.0f} ms, and a host that takes half as long.
- Counted: bytes, from {parameters:.0f} M parameters ({words:.0f} M of them words), {states} states of
  {width} numbers an image, {caption} a caption.
- Assumed: NVLink, {nvlink:.0f} GB/s a GPU and direction, in nodes of {node}; a network port of
  {network:.0f} GB/s each between them; {share:.0%} of both reached; {latency:.0f} µs a collective
  times log2 of the workers.

*Before*: ZeRO-2 whose buckets held the whole model, so that nothing overlapped; image and caption states
of all workers gathered in float32, their gradient all-reduced; gradients of linear layers in bf16
(DeepSpeed's doing). *Now*: of the states only those drawn as hard negatives travel, at most one image and
one caption a pair and way, in bf16; buckets of 25 MB; float32 gradients, or bf16 ones. Nothing hides the
words' gradient, which is whole only when backward ends: their table is the head's too."""
WAITS = """By `fit.sharding`, what a step waits for, and in brackets what a GPU gets done, as a share of what
one does alone with 64 pairs:"""
CONCLUSION = """The paper's batch is too small for 64 GPUs: the host's time is the limit, which no batch
shortens. A batch that grows with the GPUs keeps them busy. What a step waits for is then the words' gradient
(`fit.gradient_dtype=bfloat16` halves it) and, under ZeRO-2, the weights.

## ZeRO-2 beside DDP, on two CPU workers

Measured: `tiny`, 2 gloo workers on one machine, float32, median. On a CPU nothing travels while something
else computes: this is the engines' own work, and says nothing of a GPU's links."""


def page() -> str:
    """The text of scaling.md."""
    s, (measured, goal) = shapes(), computing()
    figures = {
        "busy": measured.gpu * 1e3,
        "wall": measured.host * 1e3,
        "goal": GOAL,
        "peak": PEAK / 1e12,
        "goal_ms": goal.gpu * 1e3,
        "parameters": s.parameters / 1e6,
        "words": s.words / 1e6,
        "states": s.states,
        "width": s.width,
        "caption": CAPTION,
        "nvlink": NVLINK / 1e9,
        "node": GPUS_PER_NODE,
        "network": NETWORK / 1e9,
        "share": LINK_SHARE,
        "latency": LATENCY * 1e6,
    }
    parts = [INTRODUCTION.format(**figures)]
    for name, pairs_of in BATCHES.items():
        parts += [f"## {name[0].upper()}{name[1:]}", traffic_table(s, pairs_of)]
        parts += [WAITS, time_table(s, pairs_of)]
    parts += [CONCLUSION, measured_table()]
    return "\n\n".join(parts) + "\n"


# ---- both engines on two CPU workers


def measure(steps: int) -> dict[str, float]:
    """Median seconds of a step of `tiny` by sharding, on two workers."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_work, (folder, steps), nprocs=2, start_method="spawn")
        return torch.load(f"{folder}/seconds.pt")


def _work(rank: int, folder: str, steps: int) -> None:
    from benchmarks.step import make_batch
    from benchmarks.twin import OBJECTIVE
    from raylib.engine import OptimConfig, TorchEngine
    from raylib.objectives.pretraining import UnifiedObjective

    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    sizes = UnifiedModel.sizes["tiny"]
    engines: dict[str, Any] = {}
    for name, engine in (("none", TorchEngine), ("zero2", DeepSpeedEngine)):
        torch.manual_seed(0)
        objective = UnifiedObjective(UnifiedModel(sizes), OBJECTIVE)
        engines[name] = engine(objective, OptimConfig(), torch.device("cpu"), False, None)
    spent: dict[str, list[float]] = {name: [] for name in engines}
    for step in range(steps + 1):
        for name, engine in engines.items():
            batch = make_batch(sizes, (32, 128, 128), 2 * step + rank)
            for stream in ("image_text", "parallel", "text"):
                part = batch[stream]
                part |= {"size": 2 * part["size"], "index": part["index"] + rank * part["size"]}
            dist.barrier()
            start = time.perf_counter()
            engine.step(batch, step, 1e-4)
            spent[name].append(time.perf_counter() - start)
    if rank == 0:
        torch.save(
            {name: statistics.median(times[1:]) for name, times in spent.items()}, f"{folder}/seconds.pt"
        )
    dist.destroy_process_group()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", type=int, metavar="STEPS", help="time both engines first")
    options = parser.parse_args(arguments)
    if options.measure:
        record = {"workers": 2, "backend": "gloo", "model": "tiny", "seconds": measure(options.measure)}
        append_jsonl(FILE, record | {"gradient_dtype": FitConfig().gradient_dtype})
    write_atomically(PAGE, page())
    print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
