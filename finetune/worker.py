"""The job of each worker of a run: build the model, train it, evaluate it: on its dev sets after each epoch,
on its test sets at the end."""

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from torch import nn

from finetune.batches import BatchOrder
from finetune.build import (
    build_pipeline,
    build_strategies,
    cache_image_states,
    dev_sets,
    evaluate_sets,
    find_task,
    load_trained,
    measure_parallel,
    open_visual_for,
    parallel_items,
    read_split,
    share_with_trials,
    test_sets,
    training_examples,
    with_stored_code,
)
from finetune.config import FinetuneConfig
from finetune.evaluation import cache_test_states, dev_result, test_result
from finetune.strategies import Strategies, TrainingSetup
from finetune.tasks.base import Pipeline
from raylib import checkpoint
from raylib.distributed import barrier
from raylib.loop import fit
from raylib.models import peft
from raylib.runtime import MemoryAdvice, Runtime


class FinetuneJob:
    """`job(runtime, config)` on a worker; an object, so that it can be sent there.

    language: of a part that has one language of its own. epochs: stop after so many, and evaluate nothing (a
    stage), or, if it `selects`, the dev sets after each epoch. start: a checkpoint whose weights training
    starts from in place of the model's. strategies: of `config`, where this process has built them before.
    """

    def __init__(
        self,
        language: str | None = None,
        epochs: int | None = None,
        start: Path | None = None,
        strategies: Strategies | None = None,
        selects: bool = False,
    ):
        self.language, self.epochs, self.start, self.strategies = language, epochs, start, strategies
        self.selects = selects

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
            if not result["finished"] or (self.epochs and not self.selects):
                return result
            barrier()  # the first worker has written the checkpoint
            trained = load_trained(model, runtime.run, config.select)
            if self.epochs:
                return result
            if model.backbone.tuning and runtime.rank == 0:
                peft.save_tuned(model, trainable.keys(), runtime.run / "tuned.safetensors")
            if not config.run_test:
                scores: Mapping[str, float]
                if config.select == checkpoint.AVERAGE:  # which no epoch has been judged by
                    dev = load_dev_items(config, self.language)
                    scores = Validation(pipeline, dev, runtime.run, test_too=False)(model)
                else:
                    scores = checkpoint.read_evaluation(trained)
                return {**result, **counts, **dev_result(config, scores, runtime.device)}
        return {**result, **counts, **test_result(pipeline, runtime.run)}

    def _train(self, runtime: Runtime, pipeline: Pipeline, strategies: Strategies) -> dict[str, Any]:
        config, model, task = pipeline.config, pipeline.model, find_task(pipeline.config)
        examples, unknown = task.training_items(
            training_examples(config, self.language, pipeline.visual), model
        )
        dev = load_dev_items(config, self.language) if self.selects or not self.epochs else {}
        sets = [examples, *dev.values()]
        # pruning rounds and the parts of a run share what strategies compute once
        folder = Path(config.runs).absolute() if self.epochs or self.language else runtime.run
        folder = share_with_trials(pipeline.tokenizer, chain.from_iterable(sets), folder)
        pipeline = cache_image_states(pipeline, chain.from_iterable(sets))
        strategies.begin(TrainingSetup(pipeline, examples, folder))
        objective = task.objective(config, model, strategies.loss_terms(model))
        change, keep_last = strategies.example, config.last_batch == "keep"
        order = BatchOrder(
            config.batch,
            config.fit.seed,
            runtime.rank,
            runtime.world_size,
            change,
            keep_last,
            config.bad_limit,
        )
        batches = task.batches(pipeline, examples, order, strategies.batch_inputs())
        batches.image_tokens = model.backbone.count_image_tokens()
        epoch_steps = batches.epoch_steps
        end = (self.epochs or config.epochs) * epoch_steps
        every = config.fit.eval_every or epoch_steps
        schedule = {
            "steps": config.epochs * epoch_steps,
            "eval_every": every,
            "save_every": every,
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
            MemoryAdvice(lambda batch: config.less_memory(runtime.world_size), config.less_evaluation_memory),
        )
        return {
            **result,
            "finished": result["steps"] == end and "notice" not in result,
            "examples": len(examples),
            "training_precision": config.fit.describe_precision(runtime.device),
            "unknown_training_answers": len(unknown),
            "unknown_training_answer": next((answer for e in unknown for answer in e.labels), None),
        }


class Validation:
    """Scores after each epoch: of the dev sets, of which the first chooses the checkpoint; with `test_too` of
    the test sets as well."""

    def __init__(self, pipeline: Pipeline, dev: Mapping[str, Sequence], run: Path, test_too: bool):
        self.pipeline, self.dev, self.folder, self.test_too = pipeline, dev, run / "dev", test_too
        # images as they are: states that were cached are of training and dev images alone
        visual = open_visual_for(pipeline.config, pipeline.model) if test_too else None
        self.test_pipeline = cache_test_states(pipeline._replace(visual=visual))
        self.parallel = parallel_items(pipeline.config) if test_too else None

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """{"score", "dev/LANGUAGE": the score that chooses; of a run without tests "interval/LANGUAGE/low",
        "/high"; with `test_too` "test/LANGUAGE", "test/LANGUAGE/TYPE"}."""
        pipeline = self.pipeline._replace(model=model)
        config, task = pipeline.config, find_task(pipeline.config)
        figures = evaluate_sets(pipeline, self.dev, self.folder, "dev") if self.dev else {}
        scores = {code: task.dev_score(config, found) for code, found in figures.items()}
        values = {f"dev/{code}": score.value for code, score in scores.items()}
        values |= {
            f"bad_images/dev/{code}": found["bad_images"]
            for code, found in figures.items()
            if "bad_images" in found
        }
        if not config.run_test:  # the dev sets are the run's result
            values |= {
                f"interval/{code}/{end}": value
                for code, score in scores.items()
                if score.interval
                for end, value in zip(("low", "high"), score.interval, strict=True)
            }
        if scores and config.select == "best":
            values["score"] = next(iter(scores.values())).value
        if self.test_too:
            pipeline = self.test_pipeline._replace(model=model)
            tested = evaluate_sets(pipeline, test_sets(config), self.folder / "predictions", "test")
            for code, found in tested.items():
                values[f"test/{code}"] = task.test_score(found)
                values |= {f"test/{code}/{kind}": value for kind, value in found.get("by_type", {}).items()}
            if self.parallel:
                values |= {f"similarity/{k}": v for k, v in measure_parallel(pipeline, self.parallel).items()}
        return values


def load_dev_items(config: FinetuneConfig, language: str | None) -> dict[str, Sequence]:
    """{language: items} of `dev_sets`."""
    sets = dev_sets(config, language)
    return {code: read_split(config, name, code, config.test_limit).load() for code, name in sets.items()}


def trained_config(config: FinetuneConfig, run: Path) -> FinetuneConfig:
    """`config` of the part whose folder is `run`, with what it has trained as its model: a checkpoint and the
    tokenizer beside it are all that this needs, whatever became of the weights and files it started from."""
    run = run.absolute()
    location = {"model": str(run), "vision": None, "runs": str(run.parent), "name": run.name}
    return with_stored_code(config.model_copy(update=location))
