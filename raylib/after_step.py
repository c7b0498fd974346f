"""Work after some steps of a training: the evaluation of the model, and its checkpoint; neither keeps a
worker waiting that is told to stop."""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from raylib import checkpoint
from raylib.distributed import all_reduce, barrier
from raylib.engine import Engine, Objective
from raylib.engine_state import state_files
from raylib.errors import NotFinite
from raylib.finite import StepMonitor, require_finite_values
from raylib.lock import require_owned
from raylib.monitoring import ProgressLog
from raylib.notice import StopVote, short_grace, stop_line
from raylib.runtime import MemoryAdvice, Runtime, advise_on_memory, peak_memory
from raylib.saving import CheckpointWriter

if TYPE_CHECKING:
    from raylib.loop import Meter


class Evaluation(NamedTuple):
    """The scores of the weights of a step; of none yet, the step is 0."""

    step: int = 0
    scores: Mapping[str, float] = {}

    def scores_of(self, step: int) -> Mapping[str, float]:
        """Return the scores of the weights of `step`, if it is of them."""
        return self.scores if step == self.step else {}


class Saver:
    """Gives `writer` what a checkpoint consists of: this worker's part of the engine's state; from worker 0
    the model and `meta.json` too."""

    def __init__(
        self,
        runtime: Runtime,
        engine: Engine,
        writer: CheckpointWriter,
        describe: dict,
        meter: "Meter",
        steps: int,
    ):
        self.runtime, self.engine, self.writer = runtime, engine, writer
        self.meter, self.steps = meter, steps
        self.engine_facts = {"workers": runtime.world_size, "engine": engine.name}
        self.describe = {**describe, **self.engine_facts}
        self.save_seconds: float | None = None  # of the last save

    def state(self, losses: dict, evaluation: Evaluation, monitor: StepMonitor) -> dict[str, Any]:
        """Return what the training came to so far."""
        return {
            "losses": losses,
            "evaluation": evaluation.scores,
            "evaluation_step": evaluation.step,
            "skipped_steps": monitor.counts.skipped,
            "samples_replaced": self.meter.total_replaced,
        }

    def summary(self, losses: dict, evaluation: Evaluation, monitor: StepMonitor) -> dict[str, Any]:
        """Return what the training came to, and what it cost."""
        return {
            **self.engine_facts,
            **self.state(losses, evaluation, monitor),
            "seconds": sum(self.meter.seconds.values()),
            "times": self.meter.seconds,
            "peak_memory_gb": peak_memory(self.runtime.device),
        }

    def add_up(self) -> int:
        """Add up what the workers have counted since they last met, all of which call it; returns how many
        samples others took the place of."""
        count = all_reduce(torch.tensor(self.meter.num_replaced, device=self.runtime.device))
        return self.meter.add_replaced(int(count))

    def save(
        self,
        step: int,
        losses: dict,
        evaluation: Evaluation,
        monitor: StepMonitor,
        is_scheduled: bool = True,
        evaluation_due: bool = False,
        is_last: bool = True,
    ) -> None:
        """Save what `step` steps came to; the last one is there when this returns. Its score is that of
        its own weights: none, where the last evaluation was another step's.

        is_scheduled: settings ask for a checkpoint here; else a notice does, and `best` never looks at it.
        evaluation_due: it stopped before the end of this step's evaluation: whoever goes on evaluates first.
        """
        scores, began = evaluation.scores_of(step), time.perf_counter()
        meta = {
            **self.describe,
            **self.state(losses, evaluation, monitor),
            "step": step,
            "total_steps": self.steps,
            "score": scores.get("score") if is_scheduled else None,
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
            if is_scheduled and not evaluation_due:
                self.report(step, losses, scores)

        self.writer.save(step, files, then, is_last or self.runtime.waits_for_saves)
        self.meter.lap("checkpoint")

    def _measure(self, seconds: float) -> None:
        """Keep how long a save took until it was on the disk, and say once if a stop leaves less."""
        is_first, self.save_seconds = self.save_seconds is None, seconds
        if is_first and self.runtime.rank == 0 and (note := short_grace(seconds)):
            print(note, flush=True)

    def add_scores(self, folder: Path, step: int, losses: dict, scores: dict) -> None:
        """Add the scores to the checkpoint of `step`, which was saved without them; it is judged by them now,
        if settings asked for it."""
        is_scheduled, runtime = checkpoint.read_meta(folder)["is_scheduled"], self.runtime
        if runtime.rank == 0:
            require_owned(runtime.run)
            checkpoint.add_scores(folder, step, scores, is_scheduled)
            checkpoint.register(runtime.run, folder.name, runtime.keep)
        barrier()
        if is_scheduled:
            self.report(step, losses, scores)

    def report(self, step: int, losses: dict, scores: Mapping[str, float]) -> None:
        """Report a checkpoint to the search that this is a trial of, which may have heard of it before."""
        folder = self.runtime.run / checkpoint.FOLDER / checkpoint.step_name(step)
        ready = self.meter.first_batch_time or time.time()
        named = {f"loss/{name}": value for name, value in losses.items()}
        values = {"step": step, "steps": self.steps, "ready": ready, **scores, **named}
        self.runtime.report(values, folder)


class Evaluator:
    """Evaluates and saves after a step. last: the last evaluation."""

    def __init__(
        self,
        objective: Objective,
        evaluate: Callable[[Any], dict[str, float]],
        saver: Saver,
        monitor: StepMonitor,
        vote: StopVote,
        progress: ProgressLog,
        advice: MemoryAdvice,
        last: Evaluation,
    ):
        self.objective, self.evaluate, self.saver, self.monitor = objective, evaluate, saver, monitor
        self.vote, self.progress, self.advice, self.last = vote, progress, advice, last

    def after_step(self, done: int, losses: dict, due: Sequence[bool], stops: bool, is_last: bool) -> bool:
        """Evaluate and save after `done` steps, as `due`; returns whether training goes on. A notice that
        `stops` it, or comes while it evaluates, leaves a checkpoint without the scores of this step; the last
        step leaves one in any case.

        Raises:
            NotFinite: weights, embeddings, logits or a score are not finite (named).
        """
        evaluates, saves = due
        if not (evaluates or saves or stops or is_last):
            return True
        # weights are looked at before they are evaluated or kept, never after
        self.monitor.require_usable_weights(done)
        self.progress.batches.check_replaced(self.saver.add_up(), done)
        if evaluates and not stops:
            save = partial(self.saver.save, done, losses, self.last, self.monitor, saves, True)
            scores = self.vote.evaluate(partial(self._evaluate, done), save, partial(self._leave, done))
            if scores is None:
                return False
            self.last = Evaluation(done, scores)
            self.progress.log_evaluation(done, scores)
        if saves or stops or is_last:
            is_due = evaluates and stops
            self.saver.save(done, losses, self.last, self.monitor, saves, is_due, is_last or stops)
        return not stops

    def catch_up(self, start: Path, done: int, losses: dict) -> None:
        """Evaluate the checkpoint `start`, of `done` steps, which was saved without its scores: it gets them,
        and is judged by them now."""
        scores = self.vote.evaluate(partial(self._evaluate, done), lambda: None, partial(self._leave, done))
        if scores is not None:
            self.last = Evaluation(done, scores)
            self.progress.log_evaluation(done, scores)
            self.saver.add_scores(start, done, losses, scores)

    def _evaluate(self, done: int) -> dict[str, float]:
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
        os._exit(self.vote.agreed)
