"""The only training loop. Everything random in it derives from (seed, step, ...); its whole state is the step."""

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn
from torch.utils.data import Dataset

from raylib import checkpoint
from raylib.config import Config
from raylib.data.loading import load_batches
from raylib.engine import DeepSpeedEngine, TorchEngine
from raylib.errors import NotFinite, UserError
from raylib.optim import LayerRates, OptimConfig, learning_rate
from raylib.randomness import hash64
from raylib.runtime import Runtime
from raylib.track import Backend, Tracker

PLANNING = ("index", "lengths", "positions")


class FitConfig(Config):
    """How long, how often. Intervals are in steps; 0 means only at the end."""

    steps: NonNegativeInt = 0  # fine-tuning sets it, and the intervals, from its epochs
    seed: int = 0
    log_every: PositiveInt = 10
    eval_every: NonNegativeInt = 0
    save_every: NonNegativeInt = 0
    keep: PositiveInt = 2
    bf16: bool | None = None  # autocast; None: where the hardware multiplies bf16
    zero: bool | None = None  # DeepSpeed ZeRO-2; None: on Ray
    loader_workers: NonNegativeInt = 1
    track: tuple[Backend, ...] = ()
    stop_after: PositiveInt | None = None  # stop at this step, as an interruption would; the run stays unfinished

    def uses_bf16(self, device: torch.device) -> bool:
        """What `bf16` comes to on `device`."""
        return has_bf16(device) if self.bf16 is None else self.bf16


class Clock:
    """Seconds by activity: start, data, step, evaluation, checkpoint."""

    def __init__(self, spent: dict[str, float]):
        self.spent = dict(spent)
        self.last = time.perf_counter()

    def lap(self, activity: str) -> None:
        """Book the time since the last lap."""
        now = time.perf_counter()
        self.spent[activity] = self.spent.get(activity, 0.0) + now - self.last
        self.last = now


def fit(
    objective: nn.Module,
    batches: Dataset,
    runtime: Runtime,
    config: FitConfig,
    optim: OptimConfig,
    evaluate: Callable[[nn.Module], dict[str, float]],
    describe: dict[str, Any],
    rates: LayerRates | None = None,
) -> dict[str, Any]:
    """Train `objective` from the run's newest checkpoint, or from the start, to `config.steps`.

    Args:
        objective: `forward(batch)` -> (loss, {term: mean over the global batch}); `.model` is what is exported.
        batches: `batches[step]` is this worker's part of the global batch of `step`.
        evaluate: called by every worker; `{"score": ..., name: value}`, the highest score is the best checkpoint.
        describe: what `meta.json` should say besides.
        rates: factor of the learning rate of each depth in each step; then `objective.model` has `depth_of(name)`.
    Returns:
        {"steps", "seconds", "times", "losses", "evaluation", "peak_memory_gb", "samples_per_second", ...}.
    """
    clock, start = Clock({}), runtime.newest()
    meta = checkpoint.read_meta(start) if start else {"step": 0, "times": {}}
    clock.spent = dict(meta["times"])
    on_gpu = runtime.device.type == "cuda"
    bf16 = config.uses_bf16(runtime.device)
    zero = type(runtime).__name__ == "OnRay" if config.zero is None else config.zero
    engine = (DeepSpeedEngine if zero else TorchEngine)(objective, optim, runtime.device, bf16, start, rates)
    first, last = meta["step"], min(config.steps, config.stop_after or config.steps)
    tracker = Tracker(runtime.run, config.track, first) if runtime.rank == 0 else None
    meta_of_run = {**describe, "workers": runtime.world, "engine": engine.name}
    saver = _Saver(runtime, engine, objective, meta_of_run, clock, config.steps)
    losses, evaluation = meta.get("losses", {}), meta.get("evaluation", {})
    stream = load_batches(batches, first, last, config.loader_workers, pin=on_gpu)
    progress = _Progress(config.steps, first)
    for step in range(first, last):
        batch = to_device(next(stream), runtime.device)
        clock.lap("data" if step > first else "start")  # the first batch waits for the loaders' own start
        if step == first:
            saver.ready = time.time()
        torch.manual_seed(int(hash64(config.seed, step, runtime.rank, "dropout")) >> 1)
        objective.train()
        lr = learning_rate(step, config.steps, optim)
        try:
            terms = engine.step(batch, step, lr)
        except RuntimeError as e:
            if isinstance(e, torch.OutOfMemoryError) or "can't allocate memory" in str(e):
                raise _does_not_fit(step, batch, runtime) from e
            raise
        done = step + 1
        if done % config.log_every == 0 or done == last:
            losses = _read(terms, done)  # waits for the device
            clock.lap("step")
            if tracker:
                values = {"lr": lr, **{f"loss/{k}": v for k, v in losses.items()}, **progress.rate(done, batch)}
                tracker.log(done, values)
                progress.show(done, values)
        clock.lap("step")
        if _due(done, config.eval_every, config.steps):
            evaluation = _evaluate(objective, evaluate, clock)
            if tracker:
                tracker.log(done, {f"eval/{k}": v for k, v in evaluation.items()})
                progress.note(done, evaluation)
        if _due(done, config.save_every, config.steps) or done == last:
            saver.save(done, losses, evaluation)
    if tracker:
        tracker.close()
    return {
        "steps": last, "finished": last == config.steps, "workers": runtime.world, "engine": engine.name,
        "bf16": bf16, "seconds": sum(clock.spent.values()), "times": clock.spent, "losses": losses, "evaluation": evaluation,
        "peak_memory_gb": _peak_memory(runtime.device), "samples_per_second": progress.overall(last, clock),
    }  # fmt: skip


class _Saver:
    """Writes a checkpoint: this worker's engine shard; from worker 0 the model and `meta.json` too."""

    def __init__(self, runtime: Runtime, engine, objective: nn.Module, describe: dict, clock: Clock, steps: int):
        self.runtime, self.engine, self.objective, self.describe, self.clock = runtime, engine, objective, describe, clock
        self.steps, self.ready = steps, 0.0  # when the first batch was there, by the clock on the wall

    def save(self, step: int, losses: dict, evaluation: dict) -> None:
        score = evaluation.get("score")
        meta = {**self.describe, "step": step, "score": score, "losses": losses, "evaluation": evaluation}

        def write(folder: Path) -> None:
            self.engine.save(folder, self.runtime.rank)
            if self.runtime.rank == 0:
                self.objective.model.save(folder)
                meta["times"] = self.clock.spent
                (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")

        self.runtime.save(step, write, {"step": step, "steps": self.steps, "ready": self.ready, **evaluation,
                                        **{f"loss/{k}": v for k, v in losses.items()}})  # fmt: skip
        self.clock.lap("checkpoint")


class _Progress:
    """The live line: step, losses, samples a second, time left."""

    def __init__(self, steps: int, first: int):
        self.steps, self.first, self.samples = steps, first, 0
        self.began = self.last = time.perf_counter()
        self.last_step = first

    def rate(self, step: int, batch: dict) -> dict[str, float]:
        """Samples of all workers a second since the last line."""
        now = time.perf_counter()
        self.samples = batch.get("samples", 0)
        rate = (step - self.last_step) * self.samples / (now - self.last)
        self.last, self.last_step = now, step
        return {"samples_per_second": rate}

    def show(self, step: int, values: dict[str, float]) -> None:
        left = (time.perf_counter() - self.began) / (step - self.first) * (self.steps - step)
        losses = " ".join(f"{k.removeprefix('loss/')} {v:.3f}" for k, v in values.items() if k.startswith("loss/"))
        rate = values["samples_per_second"]
        print(f"step {step}/{self.steps}  {losses}  {rate:.0f} samples/s  ETA {_minutes(left)}", flush=True)

    def note(self, step: int, evaluation: dict[str, float]) -> None:
        print(f"step {step}/{self.steps}  " + "  ".join(f"{k} {v:.4f}" for k, v in evaluation.items()), flush=True)

    def overall(self, step: int, clock: Clock) -> float:
        spent = clock.spent.get("step", 0.0) + clock.spent.get("data", 0.0)
        return step * self.samples / spent if spent else 0.0


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch's tensors on `device`, but for those that plan the step, which stay on the CPU (`raylib.ragged`)."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {k: v if k in PLANNING else to_device(v, device) for k, v in batch.items()}
    if isinstance(batch, tuple):
        return type(batch)(**to_device(batch._asdict(), device))
    return batch


def _due(done: int, every: int, steps: int) -> bool:
    return done == steps or (every > 0 and done % every == 0)


def _evaluate(objective: nn.Module, evaluate: Callable, clock: Clock) -> dict[str, float]:
    objective.eval()
    with torch.inference_mode():
        values = evaluate(objective.model)
    clock.lap("evaluation")
    return values


def _read(terms: dict[str, Tensor], step: int) -> dict[str, float]:
    values = {k: float(v) for k, v in terms.items()}
    bad = [k for k, v in values.items() if v != v or abs(v) == float("inf")]
    if bad:
        raise NotFinite(f"step {step}: {', '.join(bad)} not finite; lower optim.lr, or resume from an older checkpoint")
    return values


def _does_not_fit(step: int, batch: dict, runtime: Runtime) -> UserError:
    """What to do when memory runs out. Splitting the batch is no way out: it would change the contrastive negatives."""
    sizes = ", ".join(f"{name} {len(part['index'])}" for name, part in batch.items() if isinstance(part, dict))
    return UserError(
        f"step {step}: a worker's part of the batch ({sizes}) does not fit the memory of {runtime.device}; "
        f"give it more than workers={runtime.world}, or lower data.*.batch, or take a smaller model"
    )


def has_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16 faster than float32. Of CPUs: with AMX, and AMD's with AVX-512 BF16; Intel's
    without AMX run these instructions at half the rate of float32 (`benchmarks/README.md`)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_amx_tile_supported() or (torch.cpu._is_avx512_bf16_supported() and _vendor() == "AuthenticAMD")


def _vendor() -> str:
    """Who made the CPU, as Linux says; "" elsewhere."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def _peak_memory(device: torch.device) -> float:
    """Of this worker: GPU memory, else resident memory, in GB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
