"""Evaluation of a run: of its dev sets after each epoch, of its test sets at the end."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.build import (
    dev_sets,
    find_task,
    languages_of,
    open_visual_for,
    read_split,
    test_split,
    with_stored_code,
)
from finetune.config import FinetuneConfig
from finetune.tasks.base import Pipeline, Reading
from raylib import checkpoint
from raylib.errors import UserError
from raylib.finite import require_finite_values
from raylib.provenance import provenance
from raylib.runtime import peak_memory


class Validation:
    """Scores after each epoch: of the dev sets, of which the first chooses the checkpoint; with `test_too` of
    the test sets as well."""

    def __init__(self, pipeline: Pipeline, dev: Mapping[str, list], run: Path, test_too: bool):
        self.pipeline, self.dev, self.folder, self.test_too = pipeline, dev, run / "dev", test_too

    def __call__(self, model: nn.Module) -> dict[str, float]:
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
            tested = task.evaluate(pipeline, test_sets(config), self.folder / "predictions")
            for code, found in tested.items():
                values[f"test/{code}"] = task.test_score(found)
                values |= {f"test/{code}/{kind}": value for kind, value in found.get("by_type", {}).items()}
        return values


def load_dev_items(config: FinetuneConfig, language: str | None) -> dict[str, list]:
    """{language: items} of `dev_sets`."""
    sets = dev_sets(config, language)
    return {code: read_split(config, name, code, config.test_limit).load() for code, name in sets.items()}


def test_sets(config: FinetuneConfig) -> dict[str, Reading]:
    """{language: its test set, read as a stream}."""
    return {
        code: read_split(config, test_split(config, code), code, config.test_limit)
        for code in languages_of(config)
    }


def dev_result(source: Path, device: torch.device) -> dict[str, Any]:
    """{"dev": {language: score of its dev set}, "interval": {language: its 95 % interval}}, of what the
    checkpoint `source` was judged by, and what made it (`test_result`)."""
    values = checkpoint.read_meta(source)["evaluation"]
    require_finite_values(f"{source}/meta.json", values)
    dev = {name.removeprefix("dev/"): value for name, value in values.items() if name.startswith("dev/")}
    ends = [name.split("/") for name in values if name.startswith("interval/")]
    intervals = {code: [values[f"interval/{code}/{end}"] for end in ("low", "high")] for _, code, _ in ends}
    return {"dev": dev, "interval": intervals, **_runtime_facts(device)}


def test_result(pipeline: Pipeline, run: Path) -> dict[str, Any]:
    """Evaluate the model as it is. Returns {"languages": {code: figures}}, and "evaluation_seconds",
    "evaluated_per_second" (questions or captions), "peak_memory_gb", `raylib.provenance`."""
    config, folder = pipeline.config, run / "predictions"
    task, start = find_task(config), time.perf_counter()
    figures = task.evaluate(pipeline, test_sets(config), folder)
    seconds = time.perf_counter() - start
    items = sum(values.get("captions", values["n"]) for values in figures.values())
    return {
        "languages": task.test_details(config, figures, folder),
        "evaluation_seconds": seconds,
        "evaluated_per_second": items / seconds,
        **_runtime_facts(next(pipeline.model.parameters()).device),
    }


def _runtime_facts(device: torch.device) -> dict[str, Any]:
    return {**provenance(device), "peak_memory_gb": peak_memory(device)}


def trained_config(config: FinetuneConfig, run: Path) -> FinetuneConfig:
    """`config` of the part whose folder is `run`, with what it has trained as its model: a checkpoint and the
    tokenizer beside it are all that this needs, whatever became of the weights and files it started from."""
    run = run.absolute()
    location = {"model": str(run), "vision": None, "runs": str(run.parent), "name": run.name}
    return with_stored_code(config.model_copy(update=location))


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
