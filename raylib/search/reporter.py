"""What a trial tells Ray Tune while it trains, wherever it trains."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

# shape(what a checkpoint reports, epochs trained before this training) -> what Tune is told
Shape = Callable[[dict[str, Any], int], dict[str, Any]]


class Reporter:
    """`reporter(metrics, checkpoint)` tells Tune `shape(metrics, before)`: of a training in the trial's own
    process. One by Ray Train, inside the trial, has `callback()` in its `RunConfig`. `keep`: Tune keeps the
    checkpoints too (population-based training copies them from trial to trial)."""

    def __init__(self, shape: Shape, keep: bool = False, before: int = 0, epochs: int | None = None):
        self.shape, self.keep, self.before, self.epochs = shape, keep, before, epochs

    def __call__(self, metrics: dict[str, Any], checkpoint: Path) -> None:
        from ray import tune

        kept = tune.Checkpoint.from_directory(checkpoint) if self.keep else None
        tune.report(self.shape(self._known(metrics), self.before), checkpoint=kept)

    def after(self, epochs: int, own: int | None = None) -> "Reporter":
        """The reporter of the training that follows so many more epochs of the same trial, and has `own`
        epochs itself; None: as many as the trial's config says."""
        return Reporter(self.shape, self.keep, self.before + epochs, own)

    def _known(self, metrics: dict[str, Any]) -> dict[str, Any]:
        return metrics if self.epochs is None else {**metrics, "epochs": self.epochs}

    def callback(self):
        """For `ray.train.RunConfig`: reports from Ray Train's controller."""
        from ray.tune.integration.ray_train import TuneReportCallback

        shape, before, known = self.shape, self.before, self._known

        class Shaped(TuneReportCallback):
            def after_report(self, run_context, metrics, checkpoint) -> None:
                self._training_actor_item_queue.put(shape(known(metrics[0]), before))

        return Shaped()
