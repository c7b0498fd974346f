"""What each worker of a run does: build the model, train it, evaluate it."""

import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from finetune.batches import CaptionBatches, ExampleBatches
from finetune.build import backbone_of, build_methods, build_model, open_pictures_for, tokenizer_of
from finetune.config import FinetuneConfig
from finetune.contrast import ContrastObjective, MatchingObjective
from finetune.data import (
    dev_sets,
    find_task,
    languages_of,
    merge,
    read_split,
    read_whole,
    test_split,
    training_examples,
    with_known_answers,
    wordnet_of,
)
from finetune.distillation.setup import distil
from finetune.evaluate import evaluate
from finetune.lexicon.confusions import confusions
from finetune.lexicon.wordnet import WordNet
from finetune.metrics import read_predictions
from finetune.model import fill
from finetune.objective import AnswerObjective, ClassificationObjective
from finetune.pictures import Encoded, Pictures, Pixels, encode_pictures
from finetune.retrieval import recall_at_1, retrieve
from raylib import cache, checkpoint
from raylib.data.states import fingerprint
from raylib.distributed import world_size
from raylib.errors import UserError
from raylib.finite import require_finite_values
from raylib.launch import no_log
from raylib.loop import fit, peak_memory
from raylib.models import peft as tuning
from raylib.objectives.pretraining import ObjectiveConfig, TermWeights, UnifiedObjective
from raylib.provenance import provenance
from raylib.runtime import Runtime
from raylib.text import Tokenizer

RETRIEVAL = ObjectiveConfig(  # image-text contrast and matching on whole sentences
    weights=TermWeights(ucl_translation=0, vlm=0, tlm=0, xmlm=0),
    ucl_text="clean",
    itm_text="clean",
    temperature=(0.001, 10.0),
)


class FinetuneJob:
    """`work(runtime, config)` on a worker; an object, so that it can be sent there.

    language: of a part that has one language of its own. epochs: stop after so many, and evaluate nothing (a
    pruning round). start: a checkpoint whose weights training starts from in place of the model's.
    """

    def __init__(self, language: str | None = None, epochs: int | None = None, start: Path | None = None):
        self.language, self.epochs, self.start = language, epochs, start

    def __call__(self, runtime: Runtime, config: FinetuneConfig) -> dict[str, Any]:
        """{"languages": {code: figures}, "params", "trainable", "finished", ...}."""
        model = build_model(config).to(runtime.device)
        methods = build_methods(config, print if runtime.rank == 0 else no_log)
        methods.adapt(model)
        if self.start:
            fill(model, self.start)
        tokenizer = methods.reads(Tokenizer.load(tokenizer_of(config)), model)
        pictures = open_pictures_for(config, model)
        trainable = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        counts = {"params": sum(p.numel() for p in model.parameters()), "trainable": sum(trainable.values())}
        if tuning.described(model):
            counts |= dict(zip(("share", "share_with_heads"), tuning.shares(model), strict=True))
        if not config.trains:
            result = {"finished": True, "steps": 0, "seconds": 0.0}
        else:
            result = self._train(runtime, config, model, methods, tokenizer, pictures)
            if not result["finished"] or self.epochs:
                return result
            if world_size() > 1:
                dist.barrier()
            fill(model, trained(config, runtime.run, runtime.newest()))
            if tuning.described(model) and runtime.rank == 0:
                tuning.write(model, trainable.keys(), runtime.run / "tuned.safetensors")
            if not config.run_test:
                source = trained(config, runtime.run, runtime.newest())
                found = checkpoint.read_meta(source)["evaluation"]
                require_finite_values(f"{source}/meta.json", found)
                made_by = {**provenance(runtime.device), "peak_memory_gb": peak_memory(runtime.device)}
                return {**result, **counts, "dev": _scores(found), "interval": _intervals(found), **made_by}
        return {**result, **counts, **evaluated(config, model, tokenizer, pictures, runtime.run)}

    def _train(
        self, runtime: Runtime, config: FinetuneConfig, model, methods, tokenizer: Tokenizer, pictures
    ) -> dict:
        task, fit_config = find_task(config), config.fit
        examples, unknown = training_examples(config, self.language), 0
        if task.kind != "retrieval":
            examples, unknown = with_known_answers(examples, model.labels)
        dev = {} if self.epochs else _dev(config, self.language)
        if cache.get_cache():
            seen = [*examples, *(item for items in dev.values() for item in items)]
            getattr(tokenizer, "plain", tokenizer).remember([text for item in seen for text in item.texts])
        home = (
            Path(config.runs).absolute() if self.epochs or self.language else runtime.run
        )  # rounds and parts share pictures
        if cache.get_cache():
            home = cache.get_cache().folder  # and so do trials
        pictures = encoded(
            config, model, pictures, [*examples, *(item for items in dev.values() for item in items)], home
        )
        place = (tokenizer, config.length)
        order = (config.batch, fit_config.seed, runtime.rank, runtime.world, methods.draws())
        terms = methods.terms(model)
        if task.kind == "retrieval":
            batches = CaptionBatches(
                examples, pictures, *place, *order, keep_last=config.last_batch == "keep"
            )
            if config.use_itm_head:
                retrieval = RETRIEVAL.model_copy(update={"train_vision": "vision" not in config.freeze})
                objective = UnifiedObjective(model, retrieval, config.length)
                objective = MatchingObjective(objective, terms) if terms else objective
            else:
                objective = ContrastObjective(model, config.temperature, terms)
        else:
            soft = model.spells or config.loss == "bce"
            if model.spells and terms:
                raise UserError(
                    f"strategies: {', '.join(terms)} needs a classifier's logits; head=decoder has none"
                )
            more, objective = (
                None,
                AnswerObjective(model)
                if model.spells
                else ClassificationObjective(model, config.loss, terms),
            )
            if method := methods.all.get("distillation"):
                more, objective = distil(config, method, model, tokenizer, pictures, examples, terms, home)
            batches = ExampleBatches(
                examples, model.labels, pictures, *place, soft, *order, more, config.last_batch == "keep"
            )
        steps = {
            "steps": config.epochs * batches.steps,
            "eval_every": batches.steps,
            "save_every": batches.steps,
        }
        end = (self.epochs or config.epochs) * batches.steps
        fit_config = fit_config.model_copy(
            update={**steps, "stop_after": min(end, fit_config.stop_after or end)}
        )
        validate = _Validation(config, tokenizer, pictures, dev, runtime, self.epochs is None)
        rates = methods.rates(model.num_layers, batches.steps, config.epochs)
        describe = {"run": config.name, "ties": config.select_ties}
        result = fit(objective, batches, runtime, fit_config, config.optim, validate, describe, rates)
        return {
            **result,
            "finished": result["steps"] == end,
            "examples": len(examples),
            "unknown_training_answers": unknown,
        }


class _Validation:
    """Scores after each epoch: of the dev sets, of which the first chooses the checkpoint; with
    `eval_each_epoch` of the test sets too."""

    def __init__(
        self,
        config: FinetuneConfig,
        tokenizer,
        pictures,
        dev: dict[str, list],
        runtime: Runtime,
        curves: bool,
    ):
        self.config, self.tokenizer, self.pictures, self.dev = config, tokenizer, pictures, dev
        self.folder, self.curves = runtime.run / "dev", curves and config.eval_each_epoch
        self.bf16 = config.fit.uses_bf16(runtime.device)

    def __call__(self, model) -> dict[str, float]:
        """{"score", "dev/LANGUAGE": accuracy, or the recall that `select_metric` says; of a run without tests
        "interval/LANGUAGE/low", "/high"; with `eval_each_epoch` "test/LANGUAGE", "test/LANGUAGE/TYPE"}."""
        config, place = self.config, (self.pictures, self.tokenizer, self.config.length)
        if find_task(config).kind == "retrieval":
            place = (*place, config.ranked, self.folder / "states", self.bf16)
            figures = {
                code: retrieve(model, items, *place, (config.fit.seed, code))
                for code, items in self.dev.items()
            }
            first_hits = config.select_metric == "recall_at_1"
            scores = {
                code: recall_at_1(values) if first_hits else values["mean_recall"]
                for code, values in figures.items()
            }
            intervals = {
                code: values["recall_at_1_interval" if first_hits else "interval"]
                for code, values in figures.items()
            }
        else:
            place = (*place, self.folder, None, self.bf16, config.fit.seed)
            figures = evaluate(model, self.dev, *place) if self.dev else {}
            scores = {code: values["accuracy"] for code, values in figures.items()}
            intervals = {code: values["interval"] for code, values in figures.items()}
        values = {f"dev/{code}": score for code, score in scores.items()}
        if not config.run_test:  # the dev sets are the run's result
            values |= {
                f"interval/{code}/{end}": value
                for code, interval in intervals.items()
                if interval
                for end, value in zip(("low", "high"), interval, strict=True)
            }
        if scores and config.select == "best":
            values["score"] = next(iter(scores.values()))
        if self.curves:
            seen = open_pictures_for(config, model)
            for code, figures in evaluate_model(config, model, self.tokenizer, seen, self.folder).items():
                values[f"test/{code}"] = figures.get("accuracy", figures.get("mean_recall"))
                values |= {f"test/{code}/{kind}": value for kind, value in figures.get("by_type", {}).items()}
        return values


def _scores(evaluation: dict[str, float]) -> dict[str, float]:
    """{language: score of its dev set}, of what `_Validation` found."""
    return {name.removeprefix("dev/"): value for name, value in evaluation.items() if name.startswith("dev/")}


def _intervals(evaluation: dict[str, float]) -> dict[str, list[float]]:
    """{language: 95 % interval of its dev set's score}, of what `_Validation` found."""
    names = [name for name in evaluation if name.startswith("interval/")]
    ends = {tuple(name.split("/")[1:]): evaluation[name] for name in names}
    return {code: [low, ends[code, "high"]] for (code, end), low in ends.items() if end == "low"}


def _dev(config: FinetuneConfig, language: str | None) -> dict[str, list]:
    """{language: items} of `dev_sets`."""
    sets = dev_sets(config, language)
    read = {
        code: read_whole(read_split(config, name, code, config.test_limit)) for code, name in sets.items()
    }
    return (
        {code: merge(items) for code, items in read.items()}
        if find_task(config).kind == "retrieval"
        else read
    )


def encoded(
    config: FinetuneConfig, model, pictures: Pictures | None, items: list, run: Path
) -> Pictures | None:
    """`pictures`, encoded once and for all if the image encoder never changes; kept for other runs with the
    same one."""
    if not (isinstance(pictures, Pixels) and config.cache_image_states and "vision" in config.freeze):
        return pictures
    names = sorted(
        {name for item in items for name in ([item.image] if hasattr(item, "image") else item.images)}
    )
    backbone = backbone_of(model)
    bf16 = config.fit.uses_bf16(next(backbone.parameters()).device)
    facts = (pictures.size, str(pictures.store.path), names, bf16)
    folder = run / "encoded" / fingerprint(backbone.vision, *facts)
    return Encoded(encode_pictures(backbone, pictures, names, folder, bf16), pictures.store)


def evaluate_model(
    config: FinetuneConfig, model, tokenizer: Tokenizer, pictures, run: Path
) -> dict[str, dict[str, Any]]:
    """{language: figures} of the languages of this run, from the model as it is."""
    task = find_task(config)
    sets = {
        code: read_split(config, test_split(config, code), code, config.test_limit)
        for code in languages_of(config)
    }
    bf16 = config.fit.uses_bf16(next(model.parameters()).device)
    if task.kind == "retrieval":
        place = (pictures, tokenizer, config.length, config.ranked)
        return {
            code: retrieve(
                model,
                merge(list(items)),
                *place,
                run / "predictions" / f".{code}",
                bf16,
                (config.fit.seed, code),
            )
            for code, items in sets.items()
        }
    return evaluate(
        model, sets, pictures, tokenizer, config.length, run / "predictions", task.bleu, bf16, config.fit.seed
    )


def evaluated(config: FinetuneConfig, model, tokenizer: Tokenizer, pictures, run: Path) -> dict[str, Any]:
    """Return {"languages": {code: figures}} of `evaluate_model`, and "evaluation_seconds",
    "evaluated_per_second" (questions or captions), "peak_memory_gb", `raylib.provenance`."""
    began, device = time.perf_counter(), next(model.parameters()).device
    figures = evaluate_model(config, model, tokenizer, pictures, run)
    seconds = time.perf_counter() - began
    items = sum(values.get("captions", values["n"]) for values in figures.values())
    return {
        "languages": with_confusions(config, figures, run),
        "evaluation_seconds": seconds,
        "evaluated_per_second": items / seconds,
        "peak_memory_gb": peak_memory(device),
        **provenance(device),
    }


def with_confusions(config: FinetuneConfig, figures: dict[str, dict], run: Path) -> dict[str, dict]:
    """Figures of an open set of answers with "synonym_accuracy" and "confusions" of each language (paper 0,
    tables 2 and 3), from the predictions of `run`, if there is a WordNet."""
    folder = wordnet_of(config)
    if find_task(config).kind != "answers" or not folder.is_dir():
        return figures
    wordnet, added = WordNet(folder), {}
    for code, values in figures.items():
        found = confusions(read_predictions(run / "predictions" / f"{code}.jsonl"), wordnet)
        added[code] = {
            **values,
            "synonym_accuracy": found["accuracy_with_synonyms"],
            "confusions": found["confused"],
        }
    return added


def trained(config: FinetuneConfig, run: Path, newest: Path | None) -> Path:
    """The checkpoint that results come from: the best on the dev set, or the newest.

    Raises:
        UserError: there is none yet.
    """
    best = run / checkpoint.BEST
    source = best if config.select == "best" and best.is_dir() else newest
    if source is None:
        raise UserError(f"{run}: no checkpoint to evaluate; finish the run first")
    return source
