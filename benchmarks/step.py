"""One step (forward and backward) of `UnifiedObjective` beside its plain padded twin: `python -m
benchmarks.step`.

Losses and gradients are compared first. Then CPU-seconds: float32, one thread, the variants by turns, medians
(other work on the machine stretches the clock, hardly the CPU-seconds). Then the peak of resident memory
above the model, each in a process of its own. Prints a Markdown table of ratios and appends every figure as
one JSON line to `benchmarks/results/step.jsonl`.

With `--device cuda` (bf16 autocast, the paper's micro-batch of one GPU) it also says what share of the GPU's
own measured matmul peak the step reaches, and leaves out the twin that computes all positions: its logits
need over 60 GB. That part has not been run: the machine this was written on has no GPU.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.results import RESULTS
from benchmarks.twin import LENGTHS, OBJECTIVE, PaddedTwin
from pretrain.recipes import base, tiny
from raylib.data.loading import to_device
from raylib.fileio import append_jsonl
from raylib.models.unified import ModelConfig, UnifiedModel
from raylib.objectives.pretraining import UnifiedObjective
from raylib.packed import Sentences

MODELS = {"tiny": tiny().model, "base": base().model}
# pairs, translations, mono sentences a step: the paper's proportion 1 : 4 : 4
BATCHES = {("tiny", "cpu"): (64, 256, 256), ("base", "cpu"): (4, 16, 16)}
GPU_BATCH = (64, 256, 256)
MEANS = {"image_text": 13, "parallel": 30, "text": 25}  # tokens a sentence, of at most `LENGTHS`
REPEATS = {"tiny": 7, "base": 3}
VARIANTS = {
    "ours": lambda model: UnifiedObjective(model, OBJECTIVE),
    "twin, masked positions": lambda model: PaddedTwin(model, "masked"),
    "twin, all positions": lambda model: PaddedTwin(model, "all"),
}
FILE = RESULTS / "step.jsonl"


def draw_lengths(
    n: int, mean: float, longest: int, generator: torch.Generator, other: Tensor | None = None
) -> Tensor:
    """(n,) lengths of this mean, log-normal, cut at `longest`; close to those of `other`, its translations,
    if given.

    They are evenly spaced quantiles in random order, so that four sentences are spread like four thousand.
    """
    quantiles = (torch.arange(n) + 0.5) / n
    normal = torch.special.ndtri(quantiles)
    if other is None:
        order = torch.randperm(n, generator=generator)
    else:  # rank correlation of about 0.9
        ranks = other.float().argsort(stable=True).argsort().float() / n
        order = (ranks + 0.15 * torch.randn(n, generator=generator)).argsort().argsort()
    spread, low, high = (0.45 * normal).exp()[order], 0.0, 4.0 * mean
    for _ in range(40):  # the scale at which the cut lengths have the wanted mean
        scale = (low + high) / 2
        lengths = (scale * spread).round().clamp(4, longest).long()
        low, high = (scale, high) if lengths.float().mean() < mean else (low, scale)
    return lengths


def make_sentences(lengths: Tensor, vocabulary: int, generator: torch.Generator) -> Sentences:
    """Sentences of Zipf-like ids; 15 % of the inner tokens masked."""
    tokens = int(lengths.sum())
    ends = lengths.cumsum(0)
    inner = torch.ones(tokens, dtype=torch.bool)
    inner[ends - lengths] = inner[ends - 1] = False
    zipf = (vocabulary - 5) ** torch.rand(tokens, generator=generator)
    ids = torch.where(inner, zipf.long() + 4, 2)
    ids[ends - lengths] = 0
    is_masked = (torch.rand(tokens, generator=generator) < 0.15) & inner
    masked = torch.where(is_masked, 4, ids)
    return Sentences(
        ids, masked, lengths, is_masked.nonzero().squeeze(1), ids[is_masked], torch.arange(len(lengths))
    )


def draw_fresh_lengths(n: int, mean: float, longest: int, generator: torch.Generator, other=None) -> Tensor:
    """As `draw_lengths`, but drawn, as a corpus gives them: another number of each length in every batch."""
    noise = torch.randn(n, generator=generator)
    lengths = 0.92 * mean * (0.45 * noise).exp() if other is None else other + 0.2 * other * noise
    return lengths.round().clamp(4, longest).long()


def make_batch(
    config: ModelConfig,
    counts: tuple[int, int, int],
    seed: int = 0,
    fresh: bool = False,
    images: Tensor | None = None,
) -> dict:
    """A batch with the length statistics of `MEANS`; `fresh`: lengths of `draw_fresh_lengths`. `images`: to
    be taken, in another order; else they are drawn."""
    g = torch.Generator().manual_seed(seed)
    pairs, translations, mono = counts
    draw = draw_fresh_lengths if fresh else draw_lengths
    lengths = {name: draw(n, MEANS[name], LENGTHS[name], g) for name, n in zip(MEANS, counts, strict=True)}
    translated = draw(translations, MEANS["parallel"], LENGTHS["parallel"], g, lengths["parallel"])
    size, v = config.image_size, config.vocabulary
    if images is None:
        images = torch.randint(0, 256, (pairs, size, size, 3), dtype=torch.uint8, generator=g)
    else:
        images = images[torch.randperm(pairs, generator=g)]
    return {
        "step": 0,
        "image_text": {
            "size": pairs,
            "index": torch.arange(pairs),
            "images": images,
            "image_id": torch.arange(pairs),
            "text": make_sentences(lengths["image_text"], v, g),
            "negative_uniforms": torch.rand(pairs, 2, generator=g),
        },
        "parallel": {
            "size": translations,
            "index": torch.arange(translations),
            "source": make_sentences(lengths["parallel"], v, g),
            "target": make_sentences(translated, v, g),
        },
        "text": {"size": mono, "index": torch.arange(mono), "text": make_sentences(lengths["text"], v, g)},
    }


class Bench:
    """A model and its batch on a device."""

    def __init__(self, size: str, device: str):
        torch.manual_seed(0)
        self.device = torch.device(device)
        self.counts = BATCHES.get((size, device), GPU_BATCH)
        self.model = UnifiedModel(MODELS[size].model_copy(update={"dropout": 0.0})).to(self.device).train()
        self.batch = to_device(make_batch(MODELS[size], self.counts), self.device)

    def step(self, variant: str) -> tuple[float, dict[str, Tensor]]:
        """Seconds of one forward and backward, and the terms; gradients are left in the model."""
        clock = time.perf_counter if self.device.type == "cuda" else time.process_time
        self.model.zero_grad(set_to_none=True)
        module = VARIANTS[variant](self.model)
        self._wait()
        start = clock()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss, terms = module(self.batch)
        loss.backward()
        self._wait()
        return clock() - start, terms

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def deviation(self, variants: list[str]) -> dict[str, float]:
        """Compare the others' terms and gradients with the first's: the largest relative error of a term,
        and of a parameter's gradient (norm of the difference by norm)."""
        _, ours = self.step(variants[0])
        gradients = {name: p.grad for name, p in self.model.named_parameters()}
        far = {"terms": 0.0, "gradients": 0.0}
        for variant in variants[1:]:
            _, terms = self.step(variant)
            far["terms"] = max(far["terms"], *(float(abs(ours[k] / terms[k] - 1)) for k in terms))
            errors = [
                float((gradients[n] - p.grad).norm() / p.grad.norm())
                for n, p in self.model.named_parameters()
            ]
            far["gradients"] = max(far["gradients"], *errors)
        return far

    def times(self, variants: list[str], repeats: int) -> dict[str, list[float]]:
        """Seconds of each repeat, the variants by turns."""
        seconds = {variant: [] for variant in variants}
        for _ in range(repeats):
            for variant in variants:
                seconds[variant].append(self.step(variant)[0])
        return seconds

    def peak(self, variant: str) -> float:
        """GB that one step holds at most above the model. On the CPU: resident memory, in a fresh process
        (Linux)."""
        if self.device.type == "cuda":
            self.model.zero_grad(set_to_none=True)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.step(variant)
            return (torch.cuda.max_memory_allocated() - before) / 1e9
        before = _resident("VmRSS")
        self.step(variant)
        return (_resident("VmHWM") - before) / 1e9

    def share_of_peak(self, seconds: float) -> dict[str, float]:
        """TFLOP/s of our step and of a large bf16 matmul here."""
        with FlopCounterMode(display=False) as counter:
            self.step("ours")
        a = torch.randn(8192, 8192, device=self.device, dtype=torch.bfloat16)
        rounds = []
        for _ in range(20):
            self._wait()
            start = time.perf_counter()
            for _ in range(10):
                a @ a
            self._wait()
            rounds.append((time.perf_counter() - start) / 10)
        reached, peak = counter.get_total_flops() / seconds / 1e12, 2 * 8192**3 / median(rounds) / 1e12
        return {"tflops": reached, "peak_tflops": peak, "share": reached / peak}


def _resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most so far."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def _peak_apart(size: str, variant: str) -> float:
    command = [sys.executable, "-m", "benchmarks.step", "--size", size, "--peak", variant]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(size: str, device: str, repeats: int) -> dict:
    """All figures of one size."""
    variants = list(VARIANTS)[: 3 if device == "cpu" else 2]
    # before the model is made here, so that two models never have to fit
    peaks = {v: _peak_apart(size, v) for v in variants} if device == "cpu" else {}
    bench = Bench(size, device)
    deviation = bench.deviation(variants)
    seconds = bench.times(variants, repeats)
    out = {
        "size": size,
        "device": device,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "batch": bench.counts,
        "deviation": deviation,
        "seconds": seconds,
        "peak_gb": peaks or {v: bench.peak(v) for v in variants},
    }
    if device == "cuda":
        out["gpu"] = {"name": torch.cuda.get_device_name(), **bench.share_of_peak(median(seconds["ours"]))}
    return out


def table(figures: dict) -> str:
    """Markdown: each variant's time and memory, and how many times ours they are."""
    seconds = {v: median(s) for v, s in figures["seconds"].items()}
    peaks, (pairs, translations, mono) = figures["peak_gb"], figures["batch"]
    lines = [
        f"The model of `{figures['size']}` on a {figures['device']}: {pairs} pairs, {translations} "
        f"translations, {mono} texts. The twin differs by at most {figures['deviation']['terms']:.0e} in a "
        f"loss, {figures['deviation']['gradients']:.0e} in a gradient.",
        "",
        "| step | seconds | time | peak GB above the model | memory |",
        "|-|-|-|-|-|",
    ]
    for variant, s in seconds.items():
        time_ratio, memory_ratio = s / seconds["ours"], peaks[variant] / peaks["ours"]
        lines.append(
            f"| {variant} | {s:.3g} | {time_ratio:.2f}x | {peaks[variant]:.2f} | {memory_ratio:.2f}x |"
        )
    if "gpu" in figures:
        gpu = figures["gpu"]
        lines += [
            "",
            f"{gpu['tflops']:.0f} TFLOP/s, {gpu['share']:.0%} of {gpu['peak_tflops']:.0f} on {gpu['name']}",
        ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=MODELS, action="append", help="tiny, base; both when not given")
    parser.add_argument("--quick", action="store_true", help="one repeat, nothing recorded")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--peak", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.peak:
        print(Bench(options.size[0], "cpu").peak(options.peak))
        return
    for size in options.size or MODELS:
        figures = measure(size, options.device, 1 if options.quick else REPEATS[size])
        print(table(figures), end="\n\n", flush=True)
        if not options.quick:
            append_jsonl(FILE, figures)


if __name__ == "__main__":
    main()
