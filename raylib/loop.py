"""The only training loop. Everything random in it derives from (seed, step, ...); its whole state is the
step."""

import json
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
from raylib.device import has_bf16, out_of_memory_error, peak_memory, to_device
from raylib.distributed import total
from raylib.engine import DeepSpeedEngine, TorchEngine
from raylib.errors import NotFinite
from raylib.finite import StepGuard, Watch, finite_values, require_finite_values
from raylib.optim import LayerRates, OptimConfig, learning_rate
from raylib.randomness import hash64
from raylib.runtime import Runtime
from raylib.track import Backend, Tracker


class FitConfig(Config):
    """How long, how often. Intervals are in steps; 0 means only at the end."""

    steps: NonNegativeInt = 0  # fine-tuning sets it, and the intervals, from its epochs
    seed: int = 0
    log_every: PositiveInt = 10
    eval_every: NonNegativeInt = 0
    save_every: NonNegativeInt = 0
    keep: PositiveInt = 2
    # a step whose loss or gradient is not finite changes nothing; more such steps in a row than this end the
    # run
    max_skipped: NonNegativeInt = 10
    bf16: bool | None = None  # autocast; None: where the hardware multiplies bf16
    zero: bool | None = None  # DeepSpeed ZeRO-2; None: on Ray
    loader_workers: NonNegativeInt = 1
    track: tuple[Backend, ...] = ()
    stop_after: PositiveInt | None = (
        None  # stop at this step, as an interruption would; the run stays unfinished
    )

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
        objective: `forward(batch)` -> (loss, {term: mean over the global batch}); `.model` is what is
        exported. batches: `batches[step]` is this worker's part of the global batch of `step`. evaluate:
        called by every worker; `{"score": ..., name: value}`, the highest score is the best checkpoint.
        describe: what `meta.json` should say besides. rates: factor of the learning rate of each depth in
        each step; then `objective.model` has `depth_of(name)`.
    Returns:
        {"steps", "seconds", "times", "losses", "evaluation", "skipped_steps", "samples_replaced": by others
        of their lane, since they could not be used, "peak_memory_gb", "samples_per_second", ...}.
    Raises:
        NotFinite: more steps in a row were skipped than `config.max_skipped`; weights, or scores, that are
            not finite. Nothing is saved of them.
    """
    clock, start = Clock({}), runtime.newest()
    meta = checkpoint.read_meta(start) if start else {"step": 0, "times": {}}
    clock.spent = dict(meta["times"])
    on_gpu = runtime.device.type == "cuda"
    bf16 = config.uses_bf16(runtime.device)
    zero = type(runtime).__name__ == "OnRay" if config.zero is None else config.zero
    guard = StepGuard(
        runtime.device, config.max_skipped, meta.get("skipped_steps", 0), meta.get("skipped_in_a_row", 0)
    )
    engine = (DeepSpeedEngine if zero else TorchEngine)(
        objective, optim, runtime.device, bf16, start, rates, guard
    )
    first, last = meta["step"], min(config.steps, config.stop_after or config.steps)
    tracker = Tracker(runtime.run, config.track, first) if runtime.rank == 0 else None
    meta_of_run = {**describe, "workers": runtime.world, "engine": engine.name}
    saver = _Saver(
        runtime, engine, objective, meta_of_run, clock, config.steps, meta.get("samples_replaced", 0)
    )
    losses, evaluation = (finite_values(meta.get(name, {})) for name in ("losses", "evaluation"))
    replay = _Replay(objective, batches, config, runtime)
    watch = Watch(guard, engine, replay, start)
    stream = load_batches(batches, first, last, config.loader_workers, pin=on_gpu)
    progress = _Progress(config.steps, first, tracker)
    for step in range(first, last):
        batch = to_device(next(stream), runtime.device)
        saver.replaced += batch.get("bad", 0)
        clock.lap("data" if step > first else "start")  # the first batch waits for the loaders' own start
        if step == first:
            saver.ready = time.time()
        replay.start(step, batch)
        lr = learning_rate(step, config.steps, optim)
        terms, done = _step(engine, batch, step, lr, runtime), step + 1
        logs = done % config.log_every == 0 or done == last
        evaluates = _due(done, config.eval_every, config.steps)
        saves = _due(done, config.save_every, config.steps) or done == last
        # a GPU works ahead of the host, which would wait here; on the CPU nothing waits, and DeepSpeed has
        # waited in its step
        if logs or evaluates or saves or zero or not on_gpu:
            watch.read()
        if logs:
            values = {k: float(v) for k, v in terms.items()}
            losses = values if values == finite_values(values) else losses
            clock.lap("step")
            if tracker:
                progress.log(done, lr, values, watch.skipped, batch)
        clock.lap("step")
        if evaluates or saves:
            watch.require_good_weights(done)
        if evaluates:
            evaluation = _evaluate(objective, evaluate, clock, done, watch)
            if tracker:
                progress.log_evaluation(done, evaluation)
        if saves:
            watch.newest = saver.save(done, losses, evaluation, watch)
    if tracker:
        tracker.close()
    return {
        "steps": last,
        "finished": last == config.steps,
        "workers": runtime.world,
        "engine": engine.name,
        "bf16": bf16,
        "seconds": sum(clock.spent.values()),
        "times": clock.spent,
        "losses": losses,
        "evaluation": evaluation,
        "skipped_steps": watch.skipped,
        "samples_replaced": saver.replaced_by_all,
        "peak_memory_gb": peak_memory(runtime.device),
        "samples_per_second": progress.overall(last, clock),
    }


class _Replay:
    """Steps to be gone through again: `replay(step)` is this worker's batch of `step`, dropout seeded as it
    was."""

    def __init__(self, objective: nn.Module, batches: Dataset, config: FitConfig, runtime: Runtime):
        self.objective, self.batches, self.config, self.runtime = objective, batches, config, runtime
        self.last: tuple[int, dict] | None = None  # the step under way, and its batch

    def start(self, step: int, batch: dict) -> None:
        """Begin `step`: dropout is a function of (seed, step, rank)."""
        self.last = step, batch
        torch.manual_seed(int(hash64(self.config.seed, step, self.runtime.rank, "dropout")) >> 1)
        self.objective.train()

    def __call__(self, step: int) -> dict:
        if self.last is None or self.last[0] != step:
            self.start(step, to_device(self.batches[step], self.runtime.device))
        else:
            self.start(*self.last)
        return self.last[1]


class _Saver:
    """Writes a checkpoint: this worker's engine shard; from worker 0 the model and `meta.json` too."""

    def __init__(
        self,
        runtime: Runtime,
        engine,
        objective: nn.Module,
        describe: dict,
        clock: Clock,
        steps: int,
        replaced: int,
    ):
        self.runtime, self.engine, self.objective, self.describe, self.clock = (
            runtime,
            engine,
            objective,
            describe,
            clock,
        )
        self.steps, self.ready = steps, 0.0  # when the first batch was there, by the clock on the wall
        # samples that others took the place of: on all workers, up to the last save; on this one since then
        self.replaced_by_all, self.replaced = replaced, 0

    def save(self, step: int, losses: dict, evaluation: dict, watch: Watch) -> Path:
        """Save what is left after `step` steps; returns where it will be."""
        score = evaluation.get("score")
        self.replaced_by_all += int(total(torch.tensor(self.replaced, device=self.runtime.device)))
        self.replaced = 0
        counts = {
            "skipped_steps": watch.skipped,
            "skipped_in_a_row": watch.in_a_row,
            "samples_replaced": self.replaced_by_all,
        }
        meta = {
            **self.describe,
            "step": step,
            "score": score,
            "losses": losses,
            "evaluation": evaluation,
            **counts,
        }

        def write(folder: Path) -> None:
            self.engine.save(folder, self.runtime.rank)
            if self.runtime.rank == 0:
                self.objective.model.save(folder)
                meta["times"] = self.clock.spent
                (folder / "meta.json").write_text(
                    json.dumps(meta, indent=1, allow_nan=False), encoding="utf-8"
                )

        self.runtime.save(
            step,
            write,
            {
                "step": step,
                "steps": self.steps,
                "ready": self.ready,
                **evaluation,
                **{f"loss/{k}": v for k, v in losses.items()},
            },
        )
        self.clock.lap("checkpoint")
        return self.runtime.run / checkpoint.FOLDER / checkpoint.step_name(step)


class _Progress:
    """Figures for the tracker, and the live line: step, losses, samples a second, time left."""

    def __init__(self, steps: int, first: int, tracker: Tracker | None):
        self.steps, self.first, self.tracker, self.samples = steps, first, tracker, 0
        self.began = self.last = time.perf_counter()
        self.last_step = first

    def log(self, step: int, lr: float, losses: dict[str, float], skipped: int, batch: dict) -> None:
        """Log step `step`: its losses, how many steps have been skipped so far, samples of all workers a
        second since the last line. JSON has no NaN: a loss that is not finite is in the printed line
        alone."""
        now = time.perf_counter()
        self.samples = batch.get("samples", 0)
        rate = (step - self.last_step) * self.samples / (now - self.last)
        self.last, self.last_step = now, step
        finite = {f"loss/{k}": v for k, v in finite_values(losses).items()}
        self.tracker.log(step, {"lr": lr, **finite, "skipped": skipped, "samples_per_second": rate})
        left = (now - self.began) / (step - self.first) * (self.steps - step)
        line = " ".join(f"{k} {v:.3f}" for k, v in losses.items()) + (
            f"  skipped {skipped}" if skipped else ""
        )
        print(f"step {step}/{self.steps}  {line}  {rate:.0f} samples/s  ETA {_minutes(left)}", flush=True)

    def log_evaluation(self, step: int, scores: dict[str, float]) -> None:
        self.tracker.log(step, {f"eval/{k}": v for k, v in scores.items()})
        print(
            f"step {step}/{self.steps}  " + "  ".join(f"{k} {v:.4f}" for k, v in scores.items()), flush=True
        )

    def overall(self, step: int, clock: Clock) -> float:
        spent = clock.spent.get("step", 0.0) + clock.spent.get("data", 0.0)
        return step * self.samples / spent if spent else 0.0


def _due(done: int, every: int, steps: int) -> bool:
    return done == steps or (every > 0 and done % every == 0)


def _step(
    engine: TorchEngine | DeepSpeedEngine, batch: dict, step: int, lr: float, runtime: Runtime
) -> dict[str, Tensor]:
    """As `engine.step`; says what to do where memory runs out."""
    try:
        return engine.step(batch, step, lr)
    except RuntimeError as e:
        raise out_of_memory_error(e, step, batch, runtime.device, runtime.world) from e


def _evaluate(
    objective: nn.Module, evaluate: Callable, clock: Clock, done: int, watch: Watch
) -> dict[str, float]:
    """The scores after `done` steps.

    Raises:
        NotFinite: embeddings, logits or a score are not finite (named).
    """
    objective.eval()
    try:
        with torch.inference_mode():
            values = evaluate(objective.model)
        require_finite_values("evaluation", values)
    except NotFinite as e:
        raise NotFinite(f"step {done}: {e}; {watch.advice()}") from None
    clock.lap("evaluation")
    return values


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
