"""What a trial tells Ray Tune while it trains, wherever it trains."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

# shape(what a checkpoint reports, epochs trained before this training) -> what Tune is told
Shape = Callable[[dict[str, Any], int], dict[str, Any]]


class Reporter:
    """`reporter(metrics, checkpoint)` tells Tune `shape(metrics, before)`: of a training in the trial's own process. One by Ray
    Train, inside the trial, has `callback()` in its `RunConfig`. `keep`: Tune keeps the checkpoints too (population-based
    training copies them from trial to trial)."""

    def __init__(self, shape: Shape, keep: bool = False, before: int = 0):
        self.shape, self.keep, self.before = shape, keep, before

    def __call__(self, metrics: dict[str, Any], checkpoint: Path) -> None:
        from ray import tune

        kept = tune.Checkpoint.from_directory(checkpoint) if self.keep else None
        tune.report(self.shape(metrics, self.before), checkpoint=kept)

    def after(self, epochs: int) -> "Reporter":
        """The reporter of the training that follows so many more epochs of the same trial."""
        return Reporter(self.shape, self.keep, self.before + epochs)

    def callback(self):
        """For `ray.train.RunConfig`: reports from Ray Train's controller."""
        from ray.tune.integration.ray_train import TuneReportCallback

        shape, before = self.shape, self.before

        class Shaped(TuneReportCallback):
            def after_report(self, run_context, metrics, checkpoint) -> None:
                self._training_actor_item_queue.put(shape(metrics[0], before))

        return Shaped()
