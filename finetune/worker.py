"""What each worker of a run does: build the model, train it, evaluate it."""

import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from finetune.batches import BatchOrder
from finetune.build import build_model, build_strategies, open_visual_for, tokenizer_of
from finetune.config import FinetuneConfig
from finetune.data import dev_sets, find_task, languages_of, read_split, test_split, training_examples
from finetune.model import load_weights
from finetune.stores.images import ImageSource, PrecomputedFeatures, precompute_features
from finetune.strategies import Strategies, TrainingSetup
from finetune.tasks.base import Pipeline
from raylib import cache, checkpoint
from raylib.data.states import fingerprint_module
from raylib.device import peak_memory
from raylib.distributed import world_size
from raylib.errors import UserError
from raylib.finite import require_finite_values
from raylib.launch import no_log
from raylib.loop import fit
from raylib.models import peft
from raylib.provenance import provenance
from raylib.runtime import Runtime
from raylib.text import Tokenizer


class FinetuneJob:
    """`job(runtime, config)` on a worker; an object, so that it can be sent there.

    language: of a part that has one language of its own. epochs: stop after so many, and evaluate nothing (a
    pruning round). start: a checkpoint whose weights training starts from in place of the model's.
    """

    def __init__(self, language: str | None = None, epochs: int | None = None, start: Path | None = None):
        self.language, self.epochs, self.start = language, epochs, start

    def __call__(self, runtime: Runtime, config: FinetuneConfig) -> dict[str, Any]:
        """{"languages": {code: figures}, "params", "trainable", "finished", ...}."""
        model = build_model(config).to(runtime.device)
        strategies = build_strategies(config, print if runtime.rank == 0 else no_log)
        strategies.adapt(model)
        if self.start:
            load_weights(model, self.start)
        tokenizer = strategies.wrap_tokenizer(Tokenizer.load(tokenizer_of(config)), model)
        pipeline = Pipeline(config, model, tokenizer, open_visual_for(config, model))
        trainable = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        counts = {"params": sum(p.numel() for p in model.parameters()), "trainable": sum(trainable.values())}
        if model.backbone.tuning:
            counts |= dict(zip(("share", "share_with_heads"), peft.shares(model), strict=True))
        if not config.trains:
            result = {"finished": True, "steps": 0, "seconds": 0.0}
        else:
            result = self._train(runtime, pipeline, strategies)
            if not result["finished"] or self.epochs:
                return result
            if world_size() > 1:
                dist.barrier()
            source = find_trained(config, runtime.run, runtime.find_newest())
            load_weights(model, source)
            if model.backbone.tuning and runtime.rank == 0:
                peft.write(model, trainable.keys(), runtime.run / "tuned.safetensors")
            if not config.run_test:
                return {**result, **counts, **dev_result(source), **_made_by(runtime.device)}
        return {**result, **counts, **evaluate_test_sets(pipeline, runtime.run)}

    def _train(self, runtime: Runtime, pipeline: Pipeline, strategies: Strategies) -> dict[str, Any]:
        config, model, tokenizer, _ = pipeline
        task, fit_config = find_task(config), config.fit
        examples, unknown = task.training_items(training_examples(config, self.language), model)
        dev = {} if self.epochs else _dev_items(config, self.language)
        every = [*examples, *(item for items in dev.values() for item in items)]
        # trials of a search, rounds of pruning and the parts of a run share image states
        home = Path(config.runs).absolute() if self.epochs or self.language else runtime.run
        if shared := cache.get_cache():
            getattr(tokenizer, "plain", tokenizer).remember([text for item in every for text in item.texts])
            home = shared.folder
        pipeline = cache_image_states(pipeline, every, home)
        images = (config.regions, config.images)
        strategies.begin(TrainingSetup(pipeline, examples, home, images))
        objective = task.objective(config, model, strategies.loss_terms(model))
        order = BatchOrder(
            config.batch,
            fit_config.seed,
            runtime.rank,
            runtime.world_size,
            strategies.example_change(),
            config.last_batch == "keep",
        )
        batches = task.batches(pipeline, examples, order, strategies.batch_inputs())
        steps = batches.epoch_steps
        end = (self.epochs or config.epochs) * steps
        stop_after = min(end, fit_config.stop_after or end)
        fit_config = fit_config.model_copy(
            update={
                "steps": config.epochs * steps,
                "eval_every": steps,
                "save_every": steps,
                "stop_after": stop_after,
            }
        )
        validate = _Validation(pipeline, dev, runtime.run, config.eval_each_epoch and self.epochs is None)
        rates = strategies.layer_rates(model.num_layers, steps, config.epochs)
        describe = {"run": config.name, "ties": config.select_ties}
        result = fit(objective, batches, runtime, fit_config, config.optim, validate, describe, rates)
        return {
            **result,
            "finished": result["steps"] == end,
            "examples": len(examples),
            "unknown_training_answers": unknown,
        }


class _Validation:
    """Scores after each epoch: of the dev sets, of which the first chooses the checkpoint; with `test_too` of
    the test sets as well."""

    def __init__(self, pipeline: Pipeline, dev: dict[str, list], run: Path, test_too: bool):
        self.pipeline, self.dev, self.folder, self.test_too = pipeline, dev, run / "dev", test_too

    def __call__(self, model) -> dict[str, float]:
        """{"score", "dev/LANGUAGE": the score that chooses; of a run without tests "interval/LANGUAGE/low",
        "/high"; with `test_too` "test/LANGUAGE", "test/LANGUAGE/TYPE"}."""
        pipeline = self.pipeline._replace(model=model)
        config, task = pipeline.config, find_task(pipeline.config)
        figures = task.evaluate(pipeline, self.dev, self.folder) if self.dev else {}
        scores = {code: task.dev_score(config, found) for code, found in figures.items()}
        values = {f"dev/{code}": score.value for code, score in scores.items()}
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
            # images as they are: states that were cached are of training and dev images alone
            pipeline = pipeline._replace(visual=open_visual_for(config, model))
            for code, found in task.evaluate(
                pipeline, _test_sets(config), self.folder / "predictions"
            ).items():
                values[f"test/{code}"] = task.test_score(found)
                values |= {f"test/{code}/{kind}": value for kind, value in found.get("by_type", {}).items()}
        return values


def dev_result(source: Path) -> dict[str, dict[str, Any]]:
    """{"dev": {language: score of its dev set}, "interval": {language: its 95 % interval}}, of what the
    checkpoint `source` was judged by."""
    values = checkpoint.read_meta(source)["evaluation"]
    require_finite_values(f"{source}/meta.json", values)
    dev = {name.removeprefix("dev/"): value for name, value in values.items() if name.startswith("dev/")}
    ends = {
        tuple(name.split("/")[1:]): value for name, value in values.items() if name.startswith("interval/")
    }
    intervals = {code: [low, ends[code, "high"]] for (code, end), low in ends.items() if end == "low"}
    return {"dev": dev, "interval": intervals}


def _dev_items(config: FinetuneConfig, language: str | None) -> dict[str, list]:
    """{language: items} of `dev_sets`."""
    sets = dev_sets(config, language)
    return {code: read_split(config, name, code, config.test_limit).load() for code, name in sets.items()}


def _test_sets(config: FinetuneConfig) -> dict[str, Any]:
    """{language: its test set, read as a stream}."""
    return {
        code: read_split(config, test_split(config, code), code, config.test_limit)
        for code in languages_of(config)
    }


def cache_image_states(pipeline: Pipeline, items: list, home: Path) -> Pipeline:
    """The pipeline with the states of all images of `items` in the images' place, if the image encoder never
    changes; they are kept in `home` for other runs with the same one."""
    config, model, _, visual = pipeline
    if not (isinstance(visual, ImageSource) and config.cache_image_states and "vision" in config.freeze):
        return pipeline
    names = sorted({name for item in items for name in item.images})
    backbone = model.backbone
    key = (visual.size, str(visual.store.path), names, pipeline.bf16)
    folder = home / "encoded" / fingerprint_module(backbone.image_encoder, *key)
    states = precompute_features(backbone, visual, names, folder, pipeline.bf16)
    return pipeline._replace(visual=PrecomputedFeatures(states, visual.store))


def evaluate_test_sets(pipeline: Pipeline, run: Path) -> dict[str, Any]:
    """Evaluate the model as it is. Returns {"languages": {code: figures}}, and "evaluation_seconds",
    "evaluated_per_second" (questions or captions), "peak_memory_gb", `raylib.provenance`."""
    config, folder = pipeline.config, run / "predictions"
    task, start = find_task(config), time.perf_counter()
    figures = task.evaluate(pipeline, _test_sets(config), folder)
    seconds = time.perf_counter() - start
    items = sum(values.get("captions", values["n"]) for values in figures.values())
    return {
        "languages": task.test_details(config, figures, folder),
        "evaluation_seconds": seconds,
        "evaluated_per_second": items / seconds,
        **_made_by(next(pipeline.model.parameters()).device),
    }


def _made_by(device) -> dict[str, Any]:
    return {**provenance(device), "peak_memory_gb": peak_memory(device)}


def find_trained(config: FinetuneConfig, run: Path, newest: Path | None) -> Path:
    """The checkpoint that results come from: the best on the dev set, or the newest.

    Raises:
        UserError: there is none yet.
    """
    best = run / checkpoint.BEST
    source = best if config.select == "best" and best.is_dir() else newest
    if source is None:
        raise UserError(f"{run}: no checkpoint to evaluate; finish the run first")
    return source
