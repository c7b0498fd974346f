"""The only training loop. Everything random in it derives from (seed, step, ...); its whole state is the
step."""

import copy
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from raylib import checkpoint
from raylib.data.loading import BatchStream, StepDataset, to_device
from raylib.distributed import all_reduce, barrier, broadcast_from_rank0
from raylib.engine import (
    Engine,
    LayerRates,
    Objective,
    StepGuard,
    TorchEngine,
    learning_rate,
)
from raylib.engine_state import state_files
from raylib.engine_zero import DeepSpeedEngine
from raylib.errors import NotFinite, RunLost, UserError
from raylib.finite import StepMonitor, finite_values, require_finite_values
from raylib.lock import find_lock, require_owned
from raylib.monitoring import MetricsLog, ProgressLog, StallWatch
from raylib.notice import StopVote, notice_name, short_grace, stop_line
from raylib.randomness import hash64
from raylib.runtime import MemoryAdvice, Runtime, advise_on_memory, peak_flops, peak_memory
from raylib.saving import CheckpointWriter
from raylib.settings import FitConfig, OptimConfig


class Meter:
    """Counts what a training takes: seconds by activity (start, data, step, evaluation, checkpoint); of this
    process, samples of all workers, tokens of this one, and, where the device's `peak` is known, FLOP of its
    first step.

    seconds: of earlier starts.
    """

    def __init__(self, seconds: dict[str, float], peak: float | None = None):
        self.seconds, self.peak = dict(seconds), peak
        self.last = time.perf_counter()
        self.samples = self.tokens = 0
        self.flops_per_token: float | None = None

    @property
    def working_seconds(self) -> float:
        """Seconds of steps and of waiting for their data."""
        return self.seconds.get("step", 0.0) + self.seconds.get("data", 0.0)

    def lap(self, activity: str) -> None:
        """Book the time since the last lap."""
        now = time.perf_counter()
        self.seconds[activity] = self.seconds.get(activity, 0.0) + now - self.last
        self.last = now

    def count(self, batch: dict) -> None:
        """Count a batch."""
        self.samples += batch.get("samples", 0)
        self.tokens += batch.get("tokens", 0)

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
        of their lane, since they could not be used, "peak_memory_gb", "samples_per_second", ...}.
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
    meter = Meter(meta["times"], peak_flops(device) if bf16 else None)
    engine = _build_engine(objective, runtime, config, optim, start, meta, rates)
    first, last = meta["step"], min(config.steps, config.stop_after or config.steps)
    is_evaluation_due = meta.get("evaluation_due", False)
    metrics_log = MetricsLog(runtime.run, first, not is_evaluation_due) if runtime.rank == 0 else None
    progress = ProgressLog(describe["run"], config.steps, first, batches, meter, runtime, metrics_log)
    writer = CheckpointWriter(
        runtime.run, runtime.keep, runtime.rank, runtime.world_size, device, config.async_save
    )
    if on_gpu:
        engine.before_update = writer.before_update
    saver = _Saver(runtime, engine, writer, describe, meter, config.steps, meta.get("samples_replaced", 0))
    losses, evaluation = (finite_values(meta.get(name, {})) for name in ("losses", "evaluation"))
    replay = _Replay(objective, batches, config, runtime)
    monitor = StepMonitor(engine.guard, engine, replay, writer.find_newest)
    vote = StopVote(runtime.world_size)
    evaluator = _Evaluator(objective, evaluate, saver, monitor, vote, progress, advice)
    # whatever a step draws or reads follows from its number: a resumed run asks for steps from `first` on,
    # and goes through the very batches that it would have had
    stream = BatchStream(batches, first, last, config.loader_workers, device, runtime.cpus, runtime.rank > 0)
    lock, done = find_lock(runtime.run), first
    with StallWatch(runtime) as watch, writer, runtime.notices_to(vote.receive):
        if start and is_evaluation_due and (scores := evaluator.catch_up(start, losses)):
            evaluation = scores
        elif start and meta.get("is_scheduled", True):
            saver.report(first, losses, evaluation)  # it may have died between checkpoint and report
        for step in range(first, last if not vote.agreed else first):
            if lock and lock.problem:
                raise RunLost(lock.problem)
            watch.start(step)
            batch = next(stream)
            saver.count(batch)
            meter.lap("data" if step > first else "start")  # the first batch waits for the loaders' own start
            replay.start(step, batch)
            lr, done = learning_rate(step, config.steps, optim), step + 1
            terms = _step(engine, batch, step, lr, runtime, meter, advice)
            (logs, evaluates, saves), stops = config.due_after(done, last), vote.at_boundary() > 0
            # a GPU works ahead of the host, which would wait here; on the CPU nothing waits, and DeepSpeed
            # has waited in its step
            if logs or evaluates or saves or stops or engine.waits or not on_gpu:
                monitor.read()
            meter.lap("step")
            watch.stop()
            if logs:
                losses = _all_finite(terms) or losses
                means = engine.guard.interval.means(ends=done % config.log_every == 0)
                stream.warn_of_waiting(done, progress.log(done, lr, means, monitor.counts.skipped))
            if logs or runtime.world_size == 1:
                writer.check()
            # weights are looked at before they are evaluated or kept, never after
            if evaluates or saves or stops:
                monitor.require_usable_weights(done)
                saver.add_up()
                batches.check_replaced(saver.total_replaced)
            if evaluates and not stops:
                scores = evaluator(done, losses, evaluation, saves)
                if scores is None:
                    break
                evaluation = scores
            if saves or stops:
                due, is_last = evaluates and stops, stops or done == last
                saver.save(done, losses, evaluation, monitor, saves, due, is_last)
            if stops:
                break
        notice = vote.at_end()
    vote.require_heeded()
    stop = {"notice": notice, "stopped_by": notice and notice_name(notice), "total_steps": config.steps}
    return {
        "steps": done,
        "finished": done == config.steps and not notice,
        "bf16": bf16,
        "samples_per_second": progress.mean_rate(done),
        **saver.summary(losses, evaluation, monitor),
        **(stop if notice else {}),
    }


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


class _Saver:
    """Gives `writer` what a checkpoint consists of: this worker's part of the engine's state; from worker 0
    the model and `meta.json` too."""

    def __init__(
        self,
        runtime: Runtime,
        engine: Engine,
        writer: CheckpointWriter,
        describe: dict,
        meter: Meter,
        steps: int,
        total_replaced: int,
    ):
        self.runtime, self.engine, self.writer = runtime, engine, writer
        self.meter, self.steps = meter, steps
        self.engine_facts = {"workers": runtime.world_size, "engine": engine.name}
        self.describe = {**describe, **self.engine_facts}
        self.first_batch_time = 0.0  # when the first batch was there, by the clock on the wall
        # samples that others took the place of: on all workers, up to the last save; on this one since then
        self.total_replaced, self.num_replaced = total_replaced, 0
        self.save_seconds: float | None = None  # of the last save

    def count(self, batch: dict) -> None:
        """Count a batch, and those of its samples that others took the place of."""
        self.meter.count(batch)
        self.first_batch_time = self.first_batch_time or time.time()
        self.num_replaced += batch.get("bad", 0)

    def state(self, losses: dict, evaluation: dict, monitor: StepMonitor) -> dict[str, Any]:
        """Return what the training came to so far."""
        return {
            "losses": losses,
            "evaluation": evaluation,
            "skipped_steps": monitor.counts.skipped,
            "samples_replaced": self.total_replaced,
        }

    def summary(self, losses: dict, evaluation: dict, monitor: StepMonitor) -> dict[str, Any]:
        """Return what the training came to, and what it cost."""
        return {
            **self.engine_facts,
            **self.state(losses, evaluation, monitor),
            "seconds": sum(self.meter.seconds.values()),
            "times": self.meter.seconds,
            "peak_memory_gb": peak_memory(self.runtime.device),
        }

    def add_up(self) -> None:
        """Add up what the workers have counted since the last time; all of them call it."""
        self.total_replaced += int(all_reduce(torch.tensor(self.num_replaced, device=self.runtime.device)))
        self.num_replaced = 0

    def save(
        self,
        step: int,
        losses: dict,
        evaluation: dict,
        monitor: StepMonitor,
        is_scheduled: bool = True,
        evaluation_due: bool = False,
        is_last: bool = True,
    ) -> None:
        """Save what `step` steps came to; the last one is there when this returns.

        is_scheduled: settings ask for a checkpoint here; else a notice does, and `best` never looks at it.
        evaluation_due: it stopped before the end of this step's evaluation: whoever goes on evaluates first.
        """
        is_judged, began = is_scheduled and not evaluation_due, time.perf_counter()
        meta = {
            **self.describe,
            **self.state(losses, evaluation, monitor),
            "step": step,
            "total_steps": self.steps,
            "score": evaluation.get("score") if is_judged else None,
            "evaluation_due": evaluation_due,
            "is_scheduled": is_scheduled,
            "save_seconds": self.save_seconds,
            "skipped_in_a_row": monitor.counts.in_a_row,
            "interval": monitor.guard.interval.state(),
        }

        files = state_files(self.engine.state(), self.runtime.rank)
        if self.runtime.rank == 0:
            text = json.dumps(meta | {"times": self.meter.seconds}, indent=1, allow_nan=False)
            files |= self.engine.objective.model.files() | {"meta.json": text.encode()}

        def then() -> None:
            self._measure(time.perf_counter() - began)
            if is_judged:
                self.report(step, losses, evaluation)

        self.writer.save(step, files, then, is_last or self.runtime.waits_for_saves)
        self.meter.lap("checkpoint")

    def _measure(self, seconds: float) -> None:
        """Keep how long a save took until it was on the disk, and say once if a stop leaves less."""
        warned, self.save_seconds = self.save_seconds is not None, seconds
        if not warned and self.runtime.rank == 0 and (note := short_grace(seconds)):
            print(note, flush=True)

    def add_scores(self, folder: Path, step: int, losses: dict, scores: dict) -> None:
        """Add the scores to the checkpoint of `step`, which was saved without them; it is judged by them now,
        if settings asked for it."""
        is_scheduled, runtime = checkpoint.read_meta(folder)["is_scheduled"], self.runtime
        if runtime.rank == 0:
            require_owned(runtime.run)
            checkpoint.add_scores(folder, scores, is_scheduled)
            checkpoint.register(runtime.run, folder.name, runtime.keep)
        barrier()
        if is_scheduled:
            self.report(step, losses, scores)

    def report(self, step: int, losses: dict, evaluation: dict) -> None:
        """Report a checkpoint to the search that this is a trial of, which may have heard of it before."""
        folder = self.runtime.run / checkpoint.FOLDER / checkpoint.step_name(step)
        ready = self.first_batch_time or time.time()
        named = {f"loss/{name}": value for name, value in losses.items()}
        values = {"step": step, "steps": self.steps, "ready": ready, **evaluation, **named}
        self.runtime.report(values, folder)


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


class _Evaluator:
    """The scores after a step, unless a notice ends the evaluation: then the state is saved without them."""

    def __init__(
        self,
        objective: Objective,
        evaluate: Callable[[Any], dict[str, float]],
        saver: _Saver,
        monitor: StepMonitor,
        vote: StopVote,
        progress: ProgressLog,
        advice: MemoryAdvice,
    ):
        self.objective, self.evaluate, self.saver, self.monitor = objective, evaluate, saver, monitor
        self.vote, self.progress, self.advice = vote, progress, advice

    def __call__(self, done: int, losses: dict, before: dict, is_scheduled: bool) -> dict[str, float] | None:
        """The scores after `done` steps, logged; None if they were not waited for.

        before: those of the last evaluation. is_scheduled: a checkpoint is due after this step too.

        Raises:
            NotFinite: embeddings, logits or a score are not finite (named).
        """
        save = partial(self.saver.save, done, losses, before, self.monitor, is_scheduled, True)
        scores = self.vote.evaluate(partial(self._scores, done), save, partial(self._leave, done))
        if scores is not None:
            self.progress.log_evaluation(done, scores)
        return scores

    def catch_up(self, start: Path, losses: dict) -> dict[str, float] | None:
        """As a call, of the checkpoint `start`, which was saved without its scores: it gets them, and is
        judged by them now."""
        done = checkpoint.read_meta(start)["step"]
        scores = self.vote.evaluate(partial(self._scores, done), lambda: None, partial(self._leave, done))
        if scores is not None:
            self.progress.log_evaluation(done, scores)
            self.saver.add_scores(start, done, losses, scores)
        return scores

    def _scores(self, done: int) -> dict[str, float]:
        self.objective.eval()
        where = f"step {done}: the evaluation", self.monitor.guard.device
        try:
            with torch.inference_mode(), advise_on_memory(*where, lambda: self.advice.evaluation):
                values = self.evaluate(self.objective.model)
            require_finite_values("evaluation", values)
        except NotFinite as e:
            raise NotFinite(f"step {done}: {e}; {self.monitor.advice()}") from None
        self.saver.meter.lap("evaluation")
        return values

    def _leave(self, done: int) -> None:
        """End this worker's process: its evaluation waits for one that has ended."""
        if self.saver.runtime.rank == 0:
            print(stop_line(self.vote.agreed, done, self.saver.steps), file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(128 + self.vote.agreed)
