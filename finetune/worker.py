"""The job of each worker of a run: build the model, train it, evaluate it."""

from pathlib import Path
from typing import Any

from finetune.batches import BatchOrder
from finetune.build import (
    build_pipeline,
    build_strategies,
    cache_image_states,
    find_task,
    share_with_trials,
    training_examples,
)
from finetune.config import FinetuneConfig
from finetune.evaluate import Validation, dev_result, find_trained, load_dev_items, test_result
from finetune.strategies import Strategies, TrainingSetup
from finetune.tasks.base import Pipeline
from raylib.distributed import barrier
from raylib.loop import fit
from raylib.models import peft
from raylib.models.base import load_weights
from raylib.runtime import Runtime


class FinetuneJob:
    """`job(runtime, config)` on a worker; an object, so that it can be sent there.

    language: of a part that has one language of its own. epochs: stop after so many, and evaluate nothing (a
    pruning round). start: a checkpoint whose weights training starts from in place of the model's.
    strategies: of `config`, where this process has built them before.
    """

    def __init__(
        self,
        language: str | None = None,
        epochs: int | None = None,
        start: Path | None = None,
        strategies: Strategies | None = None,
    ):
        self.language, self.epochs, self.start, self.strategies = language, epochs, start, strategies

    def __call__(self, runtime: Runtime, config: FinetuneConfig) -> dict[str, Any]:
        """{"languages": {code: figures}, "params", "trainable", "finished", ...}."""
        strategies = self.strategies or build_strategies(config)
        for note in strategies.notes if runtime.rank == 0 else ():
            print(note)
        pipeline = build_pipeline(config, strategies, runtime.device, self.start)
        model = pipeline.model
        trainable = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        counts = {"params": sum(p.numel() for p in model.parameters()), "trainable": sum(trainable.values())}
        if model.backbone.tuning:
            counts |= dict(zip(("share", "share_with_heads"), peft.trainable_shares(model), strict=True))
        if not config.trains:
            result: dict[str, Any] = {"finished": True, "steps": 0, "seconds": 0.0}
        else:
            result = self._train(runtime, pipeline, strategies)
            if not result["finished"] or self.epochs:
                return result
            barrier()  # the first worker has written the checkpoint
            trained = find_trained(config, runtime.run, runtime.find_newest())
            load_weights(model, trained)
            if model.backbone.tuning and runtime.rank == 0:
                peft.save_tuned(model, trainable.keys(), runtime.run / "tuned.safetensors")
            if not config.run_test:
                return {**result, **counts, **dev_result(trained, runtime.device)}
        return {**result, **counts, **test_result(pipeline, runtime.run)}

    def _train(self, runtime: Runtime, pipeline: Pipeline, strategies: Strategies) -> dict[str, Any]:
        config, model, task = pipeline.config, pipeline.model, find_task(pipeline.config)
        examples, unknown = task.training_items(
            training_examples(config, self.language, pipeline.visual), model
        )
        dev = {} if self.epochs else load_dev_items(config, self.language)
        items = [*examples, *(item for of_language in dev.values() for item in of_language)]
        # pruning rounds and the parts of a run share image states
        folder = Path(config.runs).absolute() if self.epochs or self.language else runtime.run
        folder = share_with_trials(pipeline.tokenizer, items, folder)
        pipeline = cache_image_states(pipeline, items, folder)
        strategies.begin(TrainingSetup(pipeline, examples, folder))
        objective = task.objective(config, model, strategies.loss_terms(model))
        change, keep_last = strategies.example, config.last_batch == "keep"
        order = BatchOrder(config.batch, config.fit.seed, runtime.rank, runtime.world_size, change, keep_last)
        batches = task.batches(pipeline, examples, order, strategies.batch_inputs())
        batches.image_tokens = model.backbone.count_image_tokens()
        epoch_steps = batches.epoch_steps
        end = (self.epochs or config.epochs) * epoch_steps
        schedule = {
            "steps": config.epochs * epoch_steps,
            "eval_every": epoch_steps,
            "save_every": epoch_steps,
            "stop_after": min(end, config.fit.stop_after or end),
        }
        result = fit(
            objective,
            batches,
            runtime,
            config.fit.model_copy(update=schedule),
            config.optim,
            Validation(pipeline, dev, runtime.run, config.eval_each_epoch and self.epochs is None),
            {"run": config.name, "ties": config.select_ties},
            strategies.layer_rates(model.num_layers, epoch_steps, config.epochs),
        )
        return {
            **result,
            "finished": result["steps"] == end,
            "examples": len(examples),
            "unknown_training_answers": len(unknown),
            "unknown_training_answer": next((answer for e in unknown for answer in e.labels), None),
        }
