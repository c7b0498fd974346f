"""The stages as a search sees them: fine-tuning runs, pretraining runs (`raylib.search.config.SearchJob`)."""

import copy
import math
from pathlib import Path
from typing import Any

import torch

from finetune.build import build_model, build_strategies, dev_split, find_task, languages_of
from finetune.config import FinetuneConfig
from finetune.recipes import RECIPES as FINETUNE
from finetune.report import scores_of
from finetune.train import check, epochs_of, evaluate_run, final_training, finetuning_files
from finetune.train import run as finetune
from pretrain.batches import StepBatches
from pretrain.dev_losses import dev_batches
from pretrain.evaluate import summarize_recall
from pretrain.recipes import RECIPES as PRETRAIN
from pretrain.train import PretrainConfig, pretraining_files, resolve_data, with_vocabulary
from pretrain.train import run as pretrain
from raylib.config import change_settings, dump_config, lookup
from raylib.errors import UserError
from raylib.fileio import read_json
from raylib.launch import LaunchConfig, count_workers, run_folder
from raylib.metrics import mean_or_zero
from raylib.models.finetuned import FinetuneModel
from raylib.provenance import DataFile
from raylib.runtime import Reporter
from raylib.search.config import GOALS, DevSets, SearchJob


class FinetuneSearchJob(SearchJob):
    """Searches over fine-tuning. A score is the accuracy, or the recall that `select_metric` says, of the
    model that the run leaves."""

    command = "finetune"
    more_epochs_hint = "more epochs="
    mutable_paths: tuple[str, ...] = ("optim.lr", "optim.weight_decay", "optim.clip", "head_dropout")

    def __init__(self):
        self.num_layers: dict[str, int] = {}  # of each model
        # (settings without strategies, the model built by them), the last ones
        self.built: tuple[str, Any] | None = None

    def trial_config(self, config: FinetuneConfig, dev_sets: DevSets) -> FinetuneConfig:
        if not config.trains:
            raise UserError(f"setting={config.setting} does not train: there is nothing to search")
        for name, folder in (("model", config.model), ("data", config.data)):
            if not folder:
                raise UserError(f"{name}= is missing: give a folder")
        if dev_sets != "target_dev" and not _english_says_something(config):
            raise UserError(
                f"setting={config.setting} trains a model for each language, of which English development "
                "scores say little; set dev_sets=target_dev"
            )
        apart = ("en", *config.held_out_languages)
        targets = (
            tuple(code for code in languages_of(config) if code not in apart)
            if dev_sets != "english_dev"
            else ()
        )
        if dev_sets != "target_dev":
            dev_split(config, "en")
        return config.model_copy(
            update={"run_test": False, "dev_languages": targets, "eval_each_epoch": False}
        )

    def mutable_paths_of(self, config: FinetuneConfig) -> tuple[str, ...]:
        return (*self.mutable_paths, *config.strategies.declared_paths("mutable_fields"))

    def population_config(self, config: FinetuneConfig) -> FinetuneConfig:
        # its best checkpoint may be of settings that a member no longer has
        return change_settings(config, {"select": "last"})

    def final_config(self, config: FinetuneConfig) -> FinetuneConfig:
        return config.model_copy(update={"run_test": True, "dev_languages": ()})

    def describe_selection(self, dev_sets: DevSets) -> str:
        return {
            "english_dev": "the English development set alone, so other languages have chosen nothing",
            "target_dev": (
                "**the target languages' development sets**, so nothing here is zero-shot selection"
            ),
            "both": "the English **and the target languages'** development sets, as two goals",
        }[dev_sets]

    def metric_names(self, config: FinetuneConfig, dev_sets: DevSets) -> tuple[str, ...]:
        english = () if dev_sets == "target_dev" else ("english_dev",)
        targets = [f"dev/{code}" for code in config.dev_languages]
        return (*english, *(("target_dev", *targets) if targets else ()))

    def check_config(self, config: FinetuneConfig) -> None:
        checked = check(config)
        for code in config.dev_languages:
            dev_split(config, code)
        bare = config.model_copy(
            update={"strategies": type(config.strategies)(), "optim": type(config.optim)()}
        )
        # A model takes seconds to build, and a space is checked by dozens of settings, few of which change
        # it: strategies and the optimizer never do.
        if self.built is None or self.built[0] != dump_config(bare):
            self.built = dump_config(bare), build_model(bare)
        model: Any = self.built[1]
        self.num_layers[config.model] = model.num_layers
        last = final_training(config)  # the training that is judged
        adapted = copy.deepcopy(model)  # whose weights the strategies may freeze or replace
        (checked.strategies_of(last) or build_strategies(last)).adapt(adapted)
        _check_head(last, model, adapted)

    def release(self) -> None:
        self.built = None

    def stage_epochs(self, config: FinetuneConfig) -> int:
        return epochs_of(config) - config.epochs

    def num_runs(self, config: FinetuneConfig) -> int:
        if not config.trains_apart:
            return 1
        return sum(config.setting == "single_language" or code != "en" for code in languages_of(config))

    def epochs_per_run(self, config: FinetuneConfig) -> int:
        return epochs_of(config)

    def warmup_epochs(self, config: FinetuneConfig) -> int:
        """Stages before the run's own training come first; then frozen layers thaw, or a head is trained
        before the rest."""
        num_layers = self.num_layers[config.model]
        warmups = [strategy.warmup_epochs(num_layers) for strategy in config.strategies.active().values()]
        return self.stage_epochs(config) + max([1, *warmups])

    def parse_report(self, config: FinetuneConfig, metrics: dict[str, Any]) -> tuple[float, dict[str, float]]:
        dev = {name.removeprefix("dev/"): value for name, value in metrics.items() if name.startswith("dev/")}
        epochs = metrics.get("epochs", config.epochs)  # a training before the run's own has others
        return round(metrics["step"] / metrics["steps"] * epochs, 6), self._scores(config, dev)

    def data_files(self, config: FinetuneConfig) -> list[DataFile]:
        return finetuning_files(config)

    def verifies_content(self, config: FinetuneConfig) -> bool:
        return config.verify

    def run(self, config: FinetuneConfig, reporter: Reporter) -> dict[str, float]:
        return self._scores(config, finetune(config, reporter)["dev"])

    def evaluate_tests(self, folder: str) -> dict[str, float]:
        result = evaluate_run(Path(folder))
        return {"English": scores_of(result).get("en"), "targets": result["mean_targets"]}

    def _scores(self, config: FinetuneConfig, dev: dict[str, float]) -> dict[str, float]:
        scores = {}
        if "en" in dev and _english_says_something(config):
            scores["english_dev"] = dev["en"]
        targets = {f"dev/{code}": dev[code] for code in config.dev_languages if code in dev}
        if targets:
            scores["target_dev"] = mean_or_zero(targets.values())
        return scores | targets


def _english_says_something(config: FinetuneConfig) -> bool:
    """Return whether the English dev set tells trials apart: of one model for all languages, of English's own
    alone, or where few-shot checkpoints are chosen by it, as IGLUE does where it has no other."""
    if not config.trains_apart or languages_of(config) == ("en",):
        return True
    return config.setting == "few_shot" and "shots_dev" not in find_task(config).splits


def _check_head(config: FinetuneConfig, before: torch.nn.Module, adapted: torch.nn.Module) -> None:
    """Check that something trains the head of the `adapted` model, or has: `before` is as the seed drew it.

    Raises:
        UserError: trials would be ranked by a head that is random, and stays so.
    """
    if config.continues or not (isinstance(before, FinetuneModel) and isinstance(adapted, FinetuneModel)):
        return
    random = dict(before.head.named_parameters())
    if all(
        not p.requires_grad and p.equal(random.get(name, p[:0]))
        for name, p in adapted.head.named_parameters()
    ):
        raise UserError(
            "nothing trains the head, which trials are ranked by: it is random; train it in the same run, as "
            "recipe p3_kd_classify does, or start from a trained one"
        )


class PretrainSearchJob(SearchJob):
    """Searches over pretraining. A score is recall@1 of zero-shot retrieval on the corpus's retrieval set;
    there is no other to test on."""

    command = "pretrain"
    more_epochs_hint = "a smaller fit.eval_every="
    mutable_paths: tuple[str, ...] = ("optim.lr", "optim.weight_decay", "optim.clip")

    def trial_config(self, config: PretrainConfig, dev_sets: DevSets) -> PretrainConfig:
        if not (config.data.retrieval or resolve_data(config).retrieval):
            raise UserError(f"corpus={config.corpus} has no retrieval set to choose by; set data.retrieval=")
        every = config.fit.eval_every or config.fit.steps
        return config.model_copy(
            update={"fit": config.fit.model_copy(update={"eval_every": every, "save_every": every})}
        )

    def describe_selection(self, dev_sets: DevSets) -> str:
        part = {
            "english_dev": "English",
            "target_dev": "all languages but English",
            "both": "English and the others, two goals",
        }
        return (
            f"{part[dev_sets]}, of the retrieval set **that results of pretraining are told of too**: "
            "there is no other"
        )

    def metric_names(self, config: PretrainConfig, dev_sets: DevSets) -> tuple[str, ...]:
        return GOALS[dev_sets]

    def check_config(self, config: PretrainConfig) -> None:
        config.check_workers(count_workers(config))
        data = resolve_data(config)
        StepBatches(data, config.model.image_size, config.fit.seed)
        with_vocabulary(config, data)

    def epochs_per_run(self, config: PretrainConfig) -> int:
        """Evaluations: pretraining has no epochs to judge by."""
        return math.ceil(config.fit.steps / config.fit.eval_every)

    def parse_report(self, config: PretrainConfig, metrics: dict[str, Any]) -> tuple[float, dict[str, float]]:
        return math.ceil(metrics["step"] / config.fit.eval_every), _recalls(metrics)

    def data_files(self, config: PretrainConfig) -> list[DataFile]:
        data = resolve_data(config)
        shape = config.model.image_size, config.fit.seed
        return pretraining_files(config, data, StepBatches(data, *shape), dev_batches(data, *shape))

    def verifies_content(self, config: PretrainConfig) -> bool:
        return config.data.verify

    def run(self, config: PretrainConfig, reporter: Reporter) -> dict[str, float]:
        pretrain(config, reporter)
        return _recalls(summarize_recall(read_json(run_folder(config) / "result.json")))


def _recalls(values: dict[str, float]) -> dict[str, float]:
    return {
        ours: values[name]
        for ours, name in (("english_dev", "en_r1"), ("target_dev", "others_r1"))
        if name in values
    }


def find_job(recipe: str) -> tuple[SearchJob, LaunchConfig]:
    """Return the job that a recipe belongs to, and its config.

    Raises:
        UserError: neither stage has such a recipe.
    """
    hint = "`python -m finetune --help` and `python -m pretrain --help` list all"
    config = lookup(recipe, {**FINETUNE, **PRETRAIN}, "recipe", hint)()
    return (FinetuneSearchJob() if isinstance(config, FinetuneConfig) else PretrainSearchJob()), config
