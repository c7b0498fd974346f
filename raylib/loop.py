"""The only training loop. Everything random in it derives from (seed, step, ...); its whole state is the
step."""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from raylib import checkpoint
from raylib.after_step import Evaluation, Evaluator, Saver
from raylib.data.loading import BatchStream, StepDataset, to_device
from raylib.distributed import broadcast_from_rank0, exchange_seconds
from raylib.engine import (
    Engine,
    LayerRates,
    Objective,
    StepGuard,
    TorchEngine,
    learning_rate,
)
from raylib.engine_zero import DeepSpeedEngine
from raylib.errors import UserError
from raylib.finite import StepMonitor, finite_values
from raylib.lock import stop_if_lost
from raylib.monitoring import MetricsLog, ProgressLog, StallWatch
from raylib.notice import StopVote, notice_name
from raylib.randomness import hash64
from raylib.runtime import MemoryAdvice, Runtime, advise_on_memory, peak_flops
from raylib.saving import CheckpointWriter
from raylib.settings import FitConfig, OptimConfig


class Meter:
    """Counts what a training takes: seconds by activity (start, data, step, evaluation, checkpoint); of this
    process, samples of all workers, tokens of this one, and, where the device's `peak` is known, FLOP of its
    first step.

    seconds: of earlier starts. forward_seconds: see `time_forward`. total_replaced: samples that others took
    the place of, on all workers and in earlier starts too, as of the last time that the workers met;
    num_replaced: on this one since then.
    """

    def __init__(self, seconds: dict[str, float], peak: float | None = None, total_replaced: int = 0):
        self.seconds, self.peak = dict(seconds), peak
        self.last = time.perf_counter()
        self.samples = self.tokens = 0
        self.total_replaced, self.num_replaced = total_replaced, 0
        self.first_batch_time = 0.0  # when it was there, by the clock on the wall
        self.forward_seconds = 0.0
        self.flops_per_token: float | None = None

    @property
    def working_seconds(self) -> float:
        """Seconds of steps and of waiting for their data."""
        return self.seconds.get("step", 0.0) + self.seconds.get("data", 0.0)

    def time_forward(self, objective: Objective) -> None:
        """Add up, from now on, the time of its forward passes in which this worker works by itself, without
        its exchanges with others: steps take all workers equally long, and this tells who is slow. It is the
        host's time, also of a GPU's worker."""
        began = 0.0

        def begin(*_: Any) -> None:
            nonlocal began
            began = time.perf_counter() - exchange_seconds()

        def end(module: Objective, *_: Any) -> None:
            if module.training:
                self.forward_seconds += time.perf_counter() - exchange_seconds() - began

        objective.register_forward_pre_hook(begin)
        objective.register_forward_hook(end)

    def lap(self, activity: str) -> None:
        """Book the time since the last lap."""
        now = time.perf_counter()
        self.seconds[activity] = self.seconds.get(activity, 0.0) + now - self.last
        self.last = now

    def count(self, batch: dict) -> None:
        """Count a batch."""
        self.samples += batch.get("samples", 0)
        self.tokens += batch.get("tokens", 0)
        self.num_replaced += batch.get("bad", 0)
        self.first_batch_time = self.first_batch_time or time.time()

    def add_replaced(self, count: int) -> int:
        """Add what all workers have replaced since they last met; returns the total."""
        self.total_replaced, self.num_replaced = self.total_replaced + count, 0
        return self.total_replaced

    @contextmanager
    def count_flops(self, batch: dict) -> Iterator[None]:
        """Count the matrix products of the first step, backward ones too, in the block."""
        if self.peak is None or self.flops_per_token is not None or not batch.get("tokens"):
            yield
            return
        with FlopCounterMode(display=False) as counter:
            yield
        self.flops_per_token = counter.get_total_flops() / batch["tokens"]

    def copy(self) -> "Meter":
        """Return the counts as they are now."""
        now = copy.copy(self)
        now.seconds = dict(self.seconds)
        return now


def fit(
    objective: Objective,
    batches: StepDataset,
    runtime: Runtime,
    config: FitConfig,
    optim: OptimConfig,
    evaluate: Callable[[Any], dict[str, float]],
    describe: dict[str, Any],
    rates: LayerRates | None = None,
    advice: MemoryAdvice | None = None,
) -> dict[str, Any]:
    """Train `objective` from the run's newest checkpoint, or from the start, to `config.steps`.

    Args:
        batches: `batches[step]` is this worker's part of the global batch of `step`.
        evaluate: called by every worker; `{"score": ..., name: value}`, the highest score is the best
            checkpoint.
        describe: what `meta.json` should say besides.
        rates: factor of the learning rate of each depth in each step; then `objective.model` has
            `depth_of(name)`.
        advice: what to set where a batch, or an evaluation, does not fit the memory.
    Returns:
        {"steps", "seconds", "times", "losses", "evaluation", "skipped_steps", "samples_replaced": by others
        of their lane, since they could not be used, "peak_memory_gb", "samples_per_second", ...}; of a run
        that a notice has stopped also "stopped_by", "notice", "total_steps".
    Raises:
        NotFinite: more steps in a row were skipped than `config.max_skipped`; weights, or scores, that are
            not finite. Nothing is saved of them.
    """
    # on a shared disk, workers may see files at different times
    start = broadcast_from_rank0(checkpoint.find_newest(runtime.run))
    device, advice = runtime.device, advice or MemoryAdvice()
    meta: dict[str, Any] = checkpoint.read_meta(start) if start else {"step": 0, "times": {}}
    on_gpu, bf16 = device.type == "cuda", config.uses_bf16(device)
    if (note := config.set_precision(objective, device)) and runtime.rank == 0:
        print(note, flush=True)
    meter = Meter(meta["times"], peak_flops(device) if bf16 else None, meta.get("samples_replaced", 0))
    engine = _build_engine(objective, runtime, config, optim, start, meta, rates)
    if runtime.world_size > 1:
        meter.time_forward(objective)
    first, last = meta["step"], min(config.steps, config.stop_after or config.steps)
    is_evaluation_due = meta.get("evaluation_due", False)
    metrics_log = MetricsLog(runtime.run, first, not is_evaluation_due) if runtime.rank == 0 else None
    progress = ProgressLog(describe["run"], config.steps, first, batches, meter, runtime, metrics_log)
    saver = _build_saver(runtime, engine, describe, meter, config)
    losses, scores = (finite_values(meta.get(name, {})) for name in ("losses", "evaluation"))
    evaluation = Evaluation(meta.get("evaluation_step", first), scores)  # earlier versions do not say
    replay = _Replay(objective, batches, config, runtime)
    monitor = StepMonitor(engine.guard, engine, replay, saver.writer.find_newest)
    vote = StopVote(runtime.world_size)
    evaluator = Evaluator(objective, evaluate, saver, monitor, vote, progress, advice, evaluation)
    # whatever a step draws or reads follows from its number: a resumed run asks for steps from `first` on,
    # and goes through the very batches that it would have had
    stream = BatchStream(batches, first, last, config.loader_workers, device, runtime.cpus, runtime.rank > 0)
    done = first
    with StallWatch(runtime) as watch, saver.writer, vote, runtime.notices_to(vote.receive):
        if start and is_evaluation_due:
            evaluator.catch_up(start, first, losses)
        elif start and meta.get("is_scheduled", True):
            saver.report(
                first, losses, evaluation.scores_of(first)
            )  # it may have died between checkpoint and report
        for step in range(first, last if not vote.agreed else first):
            stop_if_lost(runtime.run)
            watch.start(step)
            batch = next(stream)
            meter.count(batch)
            meter.lap("data" if step > first else "start")  # the first batch waits for the loaders' own start
            replay.start(step, batch)
            lr, done = learning_rate(step, config.steps, optim), step + 1
            terms = _step(engine, batch, step, lr, runtime, meter, advice)
            logs, *due = config.due_after(done, last)
            stops = vote.at_boundary() > 0
            # a GPU works ahead of the host, which would wait here; on the CPU nothing waits, and DeepSpeed
            # has waited in its step
            if logs or any(due) or stops or engine.waits or not on_gpu:
                monitor.read()
            meter.lap("step")
            watch.stop()
            if logs:
                losses = _all_finite(terms) or losses
                means = engine.guard.interval.means(ends=done % config.log_every == 0)
                stream.warn_of_waiting(done, progress.log(done, lr, means, monitor.counts.skipped))
            if logs or runtime.world_size == 1:
                saver.writer.check()
            if not evaluator.after_step(done, losses, due, stops, done == last):
                break
        notice = vote.at_end()
    vote.require_heeded()
    stop = (
        {"stopped_by": notice_name(notice), "notice": notice, "total_steps": config.steps} if notice else {}
    )
    return {
        "steps": done,
        "finished": done == config.steps and not notice,
        "bf16": bf16,
        "samples_per_second": progress.mean_rate(done),
        **saver.summary(losses, evaluator.last, monitor),
        **stop,
    }


def _build_saver(runtime: Runtime, engine: Engine, describe: dict, meter: Meter, config: FitConfig) -> Saver:
    """Return the saver of checkpoints of `engine`."""
    device = runtime.device
    writer = CheckpointWriter(
        runtime.run, runtime.keep, runtime.rank, runtime.world_size, device, config.async_save
    )
    if device.type == "cuda":
        engine.before_update = writer.before_update
    return Saver(runtime, engine, writer, describe, meter, config.steps)


def _build_engine(
    objective: Objective,
    runtime: Runtime,
    config: FitConfig,
    optim: OptimConfig,
    start: Path | None,
    meta: dict[str, Any],
    rates: LayerRates | None,
) -> Engine:
    """The engine that the settings name, as it was in the checkpoint `start`, of which `meta` tells."""
    device = runtime.device
    counts = meta.get("skipped_steps", 0), meta.get("skipped_in_a_row", 0), meta.get("interval")
    guard = StepGuard(device, config.max_skipped, *counts)
    kind = DeepSpeedEngine if (config.sharding or runtime.sharding) == "zero2" else TorchEngine
    bf16 = config.uses_bf16(device)
    return kind(objective, optim, device, bf16, start, rates, guard, config.gradient_dtype)


class _Replay:
    """Steps to be gone through again: `replay(step)` is this worker's batch of `step`, dropout seeded as it
    was."""

    def __init__(self, objective: Objective, batches: StepDataset, config: FitConfig, runtime: Runtime):
        self.objective, self.batches, self.config, self.runtime = objective, batches, config, runtime
        self.last: tuple[int, dict] | None = None  # the step under way, and its batch

    def start(self, step: int, batch: dict) -> None:
        """Begin `step`: dropout is a function of (seed, step, rank)."""
        self.last = step, batch
        torch.manual_seed(int(hash64(self.config.seed, step, self.runtime.rank, "dropout")) >> 1)
        self.objective.train()

    def __call__(self, step: int) -> dict:
        under_way, batch = self.last or (None, {})
        if under_way != step:
            batch = to_device(self.batches[step], self.runtime.device)
        self.start(step, batch)
        return batch


def _step(
    engine: Engine,
    batch: dict,
    step: int,
    lr: float,
    runtime: Runtime,
    meter: Meter,
    advice: MemoryAdvice,
) -> dict[str, Tensor]:
    try:
        with meter.count_flops(batch):
            return engine.step(batch, step, lr)
    except RuntimeError as e:
        if torch.are_deterministic_algorithms_enabled() and "deterministic" in str(e):
            what = str(e).partition(",")[0]
            raise UserError(f"step {step}: {what}; fit.deterministic=false goes on without") from e
        rows = [f"{name} {len(part['index'])}" for name, part in batch.items() if isinstance(part, dict)]
        what = f"step {step}: a worker's part of the batch ({', '.join(rows)})"
        with advise_on_memory(what, runtime.device, lambda: advice.step(batch)):
            raise


def _all_finite(terms: dict[str, Tensor]) -> dict[str, float]:
    """Wait for the device, and return the terms of a step; none if one is not finite."""
    values = {name: float(value) for name, value in terms.items()}
    return values if values == finite_values(values) else {}
