"""A fine-tuning run: train (in each part that its setting asks for), evaluate every language, leave the results."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from finetune import report
from finetune.batches import CaptionBatches, ExampleBatches
from finetune.config import FinetuneConfig
from finetune.data import (
    find_task,
    labels_of,
    languages_of,
    merge,
    open_seen,
    read_split,
    test_split,
    training_examples,
    with_known_answers,
)  # fmt: skip
from finetune.evaluate import evaluate
from finetune.model import FinetuneModel, fill, freeze, load_finetuned, load_unified, resize
from finetune.objective import ClassificationObjective
from finetune.pictures import Encoded, Pictures, Pixels, encode_pictures, fingerprint
from finetune.retrieval import retrieve
from raylib import checkpoint
from raylib.collective import world_size
from raylib.config import load
from raylib.errors import UserError
from raylib.launch import launch, leads, open_run, run_folder
from raylib.loop import fit, has_bf16
from raylib.model.folder import find_model, find_tokenizer
from raylib.model.unified import UnifiedModel
from raylib.objective import ObjectiveConfig, UnifiedObjective, Weights
from raylib.randomness import hash64
from raylib.runtime import Runtime
from raylib.text import Tokenizer

RETRIEVAL = ObjectiveConfig(  # image-text contrast and matching on whole sentences
    weights=Weights(ucl_translation=0, vlm=0, tlm=0, xmlm=0), ucl_text="clean", itm_text="clean", temperature=(0.001, 10.0)
)


def run(config: FinetuneConfig) -> dict[str, Any]:
    """Run `config` where it says, or say that it is complete. Returns the result, and prints its table.

    Raises:
        UserError: whatever is wrong with settings, data or a model, before any worker starts where possible.
    """
    _check(config)
    folder, say = run_folder(config), print if leads(config) else _silent
    if leads(config):
        open_run(config)
    if (folder / "result.json").is_file() and config.resume == "newest":
        say(f"run '{config.name}' is complete: {folder}/result.json (another name= starts another run)")
        return json.loads((folder / "result.json").read_text(encoding="utf-8"))
    parts = _parts(config)
    say(f"run '{config.name}' in {folder}: {config.task}, {config.setting}, {config.method}", flush=True)
    results = [_run_part(part, language) for part, language in parts]
    if any(not result["finished"] for result in results):
        say("stopped before the end; the same command goes on from there")
        return results[-1]
    result = report.summarise(config, results)
    if leads(config):
        report.write(folder, result)
        for trained in {run_folder(part) for part, _ in parts if config.setting != "translate_test"}:
            report.draw_curve(trained)
    say(report.table(result))
    say(f"{folder}/result.json, result.md, result.png; curve.png beside each checkpoint", flush=True)
    return result


def _silent(*parts, **options) -> None:
    """What workers beside the first say."""


def _check(config: FinetuneConfig) -> None:
    """Find mistakes before anything starts."""
    task = find_task(config)
    for name in ("model", "data"):
        if not getattr(config, name):
            raise UserError(f"{name}= is missing: give a folder")
    if config.regions and task.kind == "retrieval":
        raise UserError("retrieval wants pictures: the model's image encoder makes the vectors that are compared")
    for language in languages_of(config):
        split = test_split(config) if language != "en" else config.split
        reading = read_split(config, split, language, 1)
        if config.setting == "few_shot" and language != "en":
            next(iter(read_split(config, "shots", language, 1)), None)
        if not next(iter(reading), None):
            raise UserError(f"{reading.path}: empty")


def _parts(config: FinetuneConfig) -> list[tuple[FinetuneConfig, str | None]]:
    """The trainings of a setting: one, or one a language in a folder of its own."""
    if config.setting not in ("few_shot", "single_language"):
        return [(config, None)]
    targets = [code for code in languages_of(config) if config.setting == "single_language" or code != "en"]
    return [(config.model_copy(update={"name": code, "runs": str(run_folder(config)), "languages": (code,)}), code)
            for code in targets]  # fmt: skip


def _run_part(config: FinetuneConfig, language: str | None) -> dict[str, Any]:
    folder = run_folder(config)
    done = folder / "part.json"
    if done.is_file() and config.resume == "newest":
        return json.loads(done.read_text(encoding="utf-8"))
    if leads(config):
        if language:
            open_run(config)
        tokenizer = tokenizer_of(config)
        shutil.copy2(tokenizer, folder / tokenizer.name)  # so that the run is a model for others
    result = launch(_Part(language), config, folder)
    if result["finished"] and leads(config):
        checkpoint.write_atomically(done, json.dumps(result, ensure_ascii=False))
    return result


class _Part:
    """`finetune` of one language's part; an object, so that it can be sent to workers."""

    def __init__(self, language: str | None):
        self.language = language

    def __call__(self, runtime: Runtime, config: FinetuneConfig) -> dict[str, Any]:
        return finetune(runtime, config, self.language)


def finetune(runtime: Runtime, config: FinetuneConfig, language: str | None) -> dict[str, Any]:
    """Train on this worker and evaluate; returns {"languages": {code: figures}, "params", "trainable", ...}."""
    torch.manual_seed(int(hash64(config.fit.seed, "head")) >> 1)
    model = build_model(config).to(runtime.device)
    tokenizer = Tokenizer.load(tokenizer_of(config))
    pictures = open_seen(config, unified_of(model).config.image_size) if needs_pictures(config) else None
    counts = {"params": sum(p.numel() for p in model.parameters()),
              "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad)}  # fmt: skip
    if config.setting == "translate_test":
        result = {"finished": True, "steps": 0, "seconds": 0.0}
    else:
        result = _train(runtime, config, model, tokenizer, pictures, language)
        if not result["finished"]:
            return result
        if world_size() > 1:
            dist.barrier()
        best = runtime.run / checkpoint.BEST
        fill(model, best if config.select == "best" and best.is_dir() else runtime.newest())
    figures = evaluate_model(config, model, tokenizer, pictures, runtime.run)
    return {**result, **counts, "languages": figures}


def build_model(config: FinetuneConfig) -> FinetuneModel | UnifiedModel:
    """The model that training starts from: pretrained with a new head, or, where a setting goes on from it, fine-tuned."""
    task = find_task(config)
    on = config.setting in ("few_shot", "translate_test")
    if task.kind == "retrieval":
        model = unified = load_unified(config.model, config.vision)
    else:
        labels = labels_of(config)
        if on:
            model = load_finetuned(config.model, labels)
        else:
            width = _region_width(config)
            model = FinetuneModel(load_unified(config.model, config.vision), labels, task.pictures, config.head_dropout, width)
        unified = model.unified
    if config.image_size:
        resize(unified, config.image_size)
    freeze(unified, config.freeze)
    return model


def tokenizer_of(config: FinetuneConfig) -> Path:
    """The tokenizer file of `config.model`."""
    folder = Path(config.model)
    return find_tokenizer(folder if (folder / "config.json").is_file() else find_model(folder))


def unified_of(model: FinetuneModel | UnifiedModel) -> UnifiedModel:
    """The pretrained part of a model."""
    return model.unified if isinstance(model, FinetuneModel) else model


def needs_pictures(config: FinetuneConfig) -> bool:
    """Whether any text of the task is about a picture."""
    return find_task(config).kind == "retrieval" or any(
        example.images for split in ("train", config.split) for example in read_split(config, split, "en", 1)
    )


def _region_width(config: FinetuneConfig) -> int | None:
    if not config.regions:
        return None
    first = next(iter(read_split(config, "train", "en", 1)))
    return open_seen(config, 0).store.read(first.images[0]).features.shape[1]


def _train(runtime: Runtime, config: FinetuneConfig, model, tokenizer: Tokenizer, pictures, language: str | None) -> dict:
    task, fit_config = find_task(config), config.fit
    examples, unknown = training_examples(config, language), 0
    if task.kind != "retrieval":
        examples, unknown = with_known_answers(examples, model.labels)
    dev = _dev(config)
    pictures = encoded(config, model, pictures, [*examples, *dev], runtime.run)
    place = (tokenizer, config.length)
    order = (config.batch, config.fit.seed, runtime.rank, runtime.world)
    if task.kind == "retrieval":
        batches = CaptionBatches(examples, pictures, *place, *order)
        retrieval = RETRIEVAL.model_copy(update={"train_vision": "vision" not in config.freeze})
        objective = UnifiedObjective(model, retrieval, config.length)
    else:
        batches = ExampleBatches(examples, model.labels, pictures, *place, config.loss == "bce", *order)
        objective = ClassificationObjective(model, config.loss)
    every = {"steps": config.epochs * batches.steps, "eval_every": batches.steps, "save_every": batches.steps}
    bf16 = has_bf16(runtime.device) if fit_config.bf16 is None else fit_config.bf16

    def validate(model) -> dict[str, float]:
        if not dev:
            return {}
        folder = runtime.run / "dev"
        if task.kind == "retrieval":
            figures = retrieve(model, dev, pictures, tokenizer, config.length, config.candidates, folder / "states", bf16)
            return {"score": figures["mean_recall"], "dev_mean_recall": figures["mean_recall"]}
        score = evaluate(model, {"en": dev}, pictures, tokenizer, config.length, folder, None, bf16)["en"]["accuracy"]
        return {"score": score, "dev_accuracy": score}

    result = fit(objective, batches, runtime, fit_config.model_copy(update=every), config.optim, validate, {"run": config.name})
    return {**result, "examples": len(examples), "unknown_training_answers": unknown}


def _dev(config: FinetuneConfig) -> list:
    """The English dev set, which chooses the checkpoint; with select=last nothing is looked at."""
    task = find_task(config)
    if config.select == "last" or "dev" not in task.splits:
        return []
    items = list(read_split(config, "dev", "en", config.test_limit))
    return merge(items) if task.kind == "retrieval" else items


def encoded(config: FinetuneConfig, model, pictures: Pictures | None, items: list, run: Path) -> Pictures | None:
    """`pictures`, encoded once and for all if the image encoder never changes; kept for other runs with the same one."""
    if not (isinstance(pictures, Pixels) and config.encoded and "vision" in config.freeze):
        return pictures
    names = sorted({name for item in items for name in ([item.image] if hasattr(item, "image") else item.images)})
    unified = unified_of(model)
    bf16 = has_bf16(unified.match_head.weight.device) if config.fit.bf16 is None else config.fit.bf16
    facts = (pictures.size, str(pictures.store.path), names, bf16)
    return Encoded(encode_pictures(unified, pictures, names, run / "encoded" / fingerprint(unified, *facts), bf16))


def evaluate_model(config: FinetuneConfig, model, tokenizer: Tokenizer, pictures, run: Path) -> dict[str, dict[str, Any]]:
    """{language: figures} of the languages of this run, from the model as it is."""
    task = find_task(config)
    sets = {code: read_split(config, test_split(config) if code != "en" else config.split, code, config.test_limit)
            for code in languages_of(config)}  # fmt: skip
    bf16 = has_bf16(next(model.parameters()).device) if config.fit.bf16 is None else config.fit.bf16
    if task.kind == "retrieval":
        return {code: retrieve(model, merge(list(items)), pictures, tokenizer, config.length, config.candidates,
                               run / "predictions" / f".{code}", bf16) for code, items in sets.items()}  # fmt: skip
    return evaluate(model, sets, pictures, tokenizer, config.length, run / "predictions", task.bleu, bf16)


def evaluate_run(folder: Path) -> dict[str, Any]:
    """Evaluate a finished run's model again, in this process, and write its results anew."""
    config = load(FinetuneConfig, folder / "config.json")
    stored = json.loads((folder / "result.json").read_text(encoding="utf-8")) if (folder / "result.json").is_file() else {}
    results = []
    for part, _ in _parts(config):
        run = run_folder(part) if part is not config else folder
        model = build_model(part)
        if config.setting != "translate_test":
            best = run / checkpoint.BEST
            source = best if config.select == "best" and best.is_dir() else checkpoint.newest(run)
            if source is None:
                raise UserError(f"{run}: no checkpoint to evaluate; finish the run first")
            fill(model, source)
        tokenizer = Tokenizer.load(tokenizer_of(config))
        pictures = open_seen(part, unified_of(model).config.image_size) if needs_pictures(part) else None
        before = json.loads((run / "part.json").read_text(encoding="utf-8")) if (run / "part.json").is_file() else {}
        results.append({**before, "languages": evaluate_model(part, model, tokenizer, pictures, run)})
    result = {**stored, **report.summarise(config, results)}
    report.write(folder, result)
    return result

