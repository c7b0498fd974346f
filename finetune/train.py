"""A fine-tuning run: train (in each part that its setting asks for), evaluate every language, leave the
results."""

import functools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from finetune import report
from finetune.build import (
    build_model,
    build_pipeline,
    build_strategies,
    check_images,
    code_files,
    dev_sets,
    dev_split,
    extra_tests,
    find_task,
    languages_of,
    read_split,
    reported_split,
    run_files,
    test_sets,
    test_split,
    tokenizer_of,
    with_language_model,
    with_stored_code,
)
from finetune.config import FinetuneConfig
from finetune.evaluation import check_shuffled, test_result
from finetune.lineage import load_run_config, method_of, runs_behind
from finetune.overlap import check_overlap
from finetune.strategies import Need, Strategies, check_strategies
from finetune.strategies.base import Stage, StageRun
from finetune.worker import FinetuneJob, trained_config
from raylib import checkpoint
from raylib.config import load_config, user_files
from raylib.errors import NotFinite, UserError
from raylib.fileio import copy_atomically, read_json_object, write_json
from raylib.finite import require_finite_values
from raylib.launch import (
    config_hash,
    count_workers,
    drop_unneeded,
    hold,
    is_main_process,
    launch,
    no_log,
    open_run,
    run_folder,
    tracked,
)
from raylib.lock import LOCK, hold_run, require_owned, unwatch_files
from raylib.models import find_backbone
from raylib.models.base import load_weights
from raylib.provenance import DataFile, combined_hash, compare_data, data_hash
from raylib.runtime import Reporter


def run(config: FinetuneConfig, reporter: Reporter | None = None) -> dict[str, Any]:
    """Run `config` where it says, or report that it is complete. Returns the result, and prints its table; a
    search's `reporter` is told of each epoch.

    Raises:
        UserError: whatever is wrong with settings, data or a model, before any worker starts where possible.
    """
    checked = check(config)
    if not user_files(config.backbone):
        config = with_stored_code(config)
    folder, log = run_folder(config), print if is_main_process(config) else no_log
    for shared in checked.overlap:
        log(
            f"published overlap: {shared['first']['file']} shares {shared['images']} images and "
            f"{shared['items']} items with {shared['second']['file']} ({shared['declared']})"
        )
    with hold(config) as is_new:
        with _removed_on_mistake(folder) if is_new else nullcontext():
            result = _run_in(folder, config, checked, reporter, log)
        if result.get("finished", True):
            drop_unneeded(config)
    return result


def _run_in(
    folder: Path,
    config: FinetuneConfig,
    checked: "Checked",
    reporter: Reporter | None,
    log: Callable[..., None],
) -> dict[str, Any]:
    """`run`, once everything is checked."""
    if is_main_process(config):
        _open_run(config, finetuning_files(config))
    stored = _stored_result(folder)
    if stored and stored.get("finished", True) and config.resume == "newest":
        log(f"run '{config.name}' is complete: {folder}/result.json (another name= starts another run)")
        return stored
    parts = _parts(config)
    log(f"run '{config.name}' in {folder}: {config.task}, {config.setting}, {method_of(config)}", flush=True)
    if (
        config.trains
        and config.select == "best"
        and not all(dev_sets(part, language) for part, language in parts)
    ):
        log(f"{config.task} has no dev set that could choose a checkpoint: the last epoch's is evaluated")
    with tracked(config) as tracking:
        epochs = epochs_of(config)
        results = [
            _run_part(part, language, checked, reporter and reporter.after(i * epochs))
            for i, (part, language) in enumerate(parts)
        ]
        if any(not result["finished"] for result in results):
            tracking.status = "stopped"
            log("stopped before the end; the same command goes on from there")
            return results[-1]
        identity = {**_identity(config, folder), "overlap": checked.overlap}
        if not config.run_test:
            result = {**report.of_dev_sets(config, results), **identity}
            require_finite_values(f"{folder}/result.json", result)
            write_json(folder / "result.json", result)
            tracking.log_results("dev", {code: {"score": v} for code, v in result["dev"].items()})
            return result
        result = {**report.summarise(config, results), **identity}
        require_owned(folder)
        if is_main_process(config):
            trained_folders = dict.fromkeys(run_folder(part) for part, _ in parts if config.trains)
            for trained_folder in trained_folders:
                report.draw_curve(trained_folder)
            if epochs_found := report.read_epochs(trained_folders):
                result["epochs"] = epochs_found
            report.write(folder, result)  # last: result.json says that the run is complete
            tracking.log_results("test", report.figures_of(result))
    log(report.table(result))
    log(f"{folder}/result.json, result.md, result.png; curve.png beside each checkpoint", flush=True)
    return result


@contextmanager
def _removed_on_mistake(folder: Path) -> Iterator[None]:
    """Empty the folder of a new run if a mistake ends it before any checkpoint: so the corrected command can
    have its name."""
    try:
        yield
    except UserError as e:
        # of numbers that are not finite the log says more
        if not isinstance(e, NotFinite) and not any(folder.rglob("meta.json")):
            unwatch_files(folder)
            for path in folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != LOCK:  # which goes last
                    path.unlink()
        raise


def finetuning_files(config: FinetuneConfig) -> list[DataFile]:
    """Return the files that a run of `config` reads."""
    return run_files(config, {language: part for part, language in _parts(config)})


def _open_run(config: FinetuneConfig, files: Iterable[DataFile] = ()) -> None:
    """Open the run's folder, with copies of the user's own files in it: evaluation reads what ran."""
    open_run(config, files, config.verify, code_files(config))


def _identity(config: FinetuneConfig, folder: Path) -> dict[str, str | None]:
    return {"config_sha256": config_hash(config), "data_sha256": data_hash(folder)}


class Checked(NamedTuple):
    """A checked run. overlap: of its sets, as published (`finetune.overlap`). strategies: as the check has
    built them, to see that they can be."""

    config: FinetuneConfig
    overlap: list[dict[str, Any]]
    strategies: Strategies

    def strategies_of(self, config: FinetuneConfig) -> Strategies | None:
        """Return the built strategies, for a training of the same settings in this process."""
        same = self.config.model_copy(update={"backbone": config.backbone})  # may name a stored copy by now
        return self.strategies if same.model_dump() == config.model_dump() else None


def check(config: FinetuneConfig) -> Checked:
    """Find mistakes before anything starts."""
    task = find_task(config)
    for name in ("model", "data"):
        if not getattr(config, name):
            raise UserError(f"{name}= is missing: give a folder")
    if config.split == "testdev":
        _check_testdev(config)
    if config.trains and config.batch < (workers := count_workers(config)):
        raise UserError(
            f"batch={config.batch} is smaller than workers={workers}, each of which has an example of every "
            f"batch; set workers={config.batch}, or a larger batch"
        )
    for language in languages_of(config):
        try:
            _check_language(config, language)
        except UserError as e:
            if language in task.languages:
                raise
            raise UserError(
                f"{config.task} is in {', '.join(task.languages)}: languages= names '{language}' too ({e}); "
                f"set languages={','.join(task.languages)}"
            ) from None
    for code in config.held_out_languages:
        path = read_split(config, test_split(config, code), code).path
        if not path.exists():
            raise UserError(f"held_out_languages={code}: {config.task} has no test set in it: {path}")
    notes = _check_extra_tests(config)
    report.read_baselines(config)
    if config.trains_apart and config.resume != "newest":
        raise UserError(
            f"resume={config.resume}: setting={config.setting} trains a part for each language; "
            "resume=newest alone"
        )
    if config.wordnet and not Path(config.wordnet).is_dir():
        raise UserError(f"wordnet={config.wordnet}: no such folder")
    find_backbone(config.backbone)
    task.check(config)
    check_strategies(config, offered_needs(config), config.trains)
    strategies = build_strategies(config)
    if not is_main_process(config):
        return Checked(config, [], strategies)
    parts = {language: part for part, language in _parts(config)}
    overlap = check_overlap(config, parts)
    for line in (*notes, *check_images(config, parts)):
        print(line, flush=True)
    return Checked(config, overlap, strategies)


def _check_extra_tests(config: FinetuneConfig) -> list[str]:
    """Read the first items of the `extra_tests`, and see that images can change places where these are to be
    shuffled. Returns what is to be told.

    Raises:
        UserError: there are none; a text is about no image; all are about the same.
    """
    notes = []
    for name, extra in extra_tests(config).items():
        for reading in test_sets(extra).values():
            if not next(iter(reading), None):
                raise UserError(f"{reading.path}: empty")
        if missing := [code for code in languages_of(config) if code not in extra.languages]:
            notes.append(f"note: extra_tests.{name}: {extra.data} has no test set in {', '.join(missing)}")
    for reading in test_sets(config).values() if config.shuffled_images else ():
        check_shuffled(reading, str(reading.path))
    return notes


def _check_language(config: FinetuneConfig, language: str) -> None:
    """Read the first items of a language's sets.

    Raises:
        UserError: there are none, or none of this language.
    """
    task, split = find_task(config), test_split(config, language)
    if language not in task.languages and task.source(split, language) == task.source(
        split, task.languages[0]
    ):
        raise UserError(f"its {split} set is that of '{task.languages[0]}'")
    if language in config.dev_languages:
        dev = read_split(config, dev_split(config, language), language, 1)
        if not next(iter(dev), None):
            raise UserError(f"{dev.path}: empty")
    if config.setting == "few_shot" and language != "en":
        next(iter(read_split(config, "shots", language, 1)), None)
    reading = read_split(config, split, language, 1)
    if not next(iter(reading), None):
        raise UserError(f"{reading.path}: empty")


def offered_needs(config: FinetuneConfig) -> frozenset[Need]:
    """Return what a run of `config` has by itself of what strategies may need."""
    task = find_task(config)
    offered: set[Need] = {*task.provides, "dense_weights"}
    if config.setting == "zero_shot":  # on English alone
        offered.discard("captions")
        offered.add("english_texts")
    if task.num_images == 1:
        offered.add("one_image")
    return frozenset(offered)


def _check_testdev(config: FinetuneConfig) -> None:
    """The testdev questions of xGQA hold all of its shots and few-shot dev sets.

    Raises:
        UserError: the run, or one that it goes on from, trains on these or chooses by them.
    """
    read_split(config, "testdev", "en", 1)  # another task has no such split
    for name, values in [("this run", config.model_dump(mode="json")), *runs_behind(config)]:
        few_shot = values.get("task") == "xgqa" and (
            values.get("setting") == "few_shot" or values.get("dev_languages")
        )
        if few_shot or values.get("task") == "xgqa_translated":  # whose dev sets are the few-shot ones
            raise UserError(
                f"split=testdev holds every question of the few-shot files, and {name} trains on some or is "
                "chosen by some; leave split= out: few_shot/LANGUAGE/test.json has none of them"
            )


def _parts(config: FinetuneConfig) -> list[tuple[FinetuneConfig, str | None]]:
    """The trainings of a setting: one, or one a language in a folder of its own."""
    if not config.trains_apart:
        return [(config, None)]
    targets = [code for code in languages_of(config) if config.setting == "single_language" or code != "en"]
    place = {"runs": str(run_folder(config))}
    return [
        (
            with_language_model(config, code).model_copy(
                update={"name": code, "languages": (code,), **place}
            ),
            code,
        )
        for code in targets
    ]


def _english(config: FinetuneConfig) -> str:
    languages = languages_of(config)
    return "en" if "en" in languages else languages[0]


def epochs_of(config: FinetuneConfig) -> int:
    """Epochs that a part of a run trains, with those of the stages that come before."""
    return config.epochs + sum(strategy.stage_epochs for strategy in config.strategies.active().values())


def final_training(config: FinetuneConfig) -> FinetuneConfig:
    """Return the config of a run's own training, without the stages that come before it."""
    return config.model_copy(update={"strategies": config.strategies.during("run")})


def _run_part(
    config: FinetuneConfig, language: str | None, checked: Checked, reporter: Reporter | None
) -> dict[str, Any]:
    """Train and evaluate a part, after the stages of its strategies; or read what that came to before."""
    folder, is_main = run_folder(config), is_main_process(config)
    done = folder / "part.json"
    if os.path.lexists(done) and config.resume == "newest":
        return report.read_part(done)
    if is_main:
        if language:
            _open_run(config)
        tokenizer = tokenizer_of(config)
        copy_atomically(tokenizer, folder / tokenizer.name)  # so that the run is a model for others
    stages = _Stages(config, language, reporter)
    try:
        last, start = stages.run()
    except _StoppedEarly as stopped:
        return {**stopped.args[0], **stages.spent}
    reporter = reporter and reporter.after(epochs_of(config) - config.epochs)
    # a worker of Ray builds its own, in a process of its own
    strategies = checked.strategies_of(last) if config.runtime == "local" else None
    job = FinetuneJob(language, start=start, strategies=strategies)
    result = launch(job, last, folder, reporter)
    result |= {name: before + result.get(name, 0) for name, before in stages.spent.items()}
    result |= {"sparsity": None, **stages.figures}
    if result["finished"] and is_main:
        require_owned(folder)
        require_finite_values(str(done), result)
        write_json(done, result)
    return result


class _StoppedEarly(Exception):
    """A stage was stopped before its end, with this result."""


class _Stages:
    """The trainings before a part's own, which its strategies ask for, in folders below its own.

    spent: what all of them took. figures: what the part's result has of them.
    """

    def __init__(self, config: FinetuneConfig, language: str | None, reporter: Reporter | None):
        self.config, self.language, self.reporter = config, language, reporter
        self.spent: dict[str, float] = {"seconds": 0.0, "steps": 0, "skipped_steps": 0}
        self.figures: dict[str, Any] = {}
        self.settings: dict[str, Mapping[str, Any]] = {}  # of strategies whose stages are done
        self.epochs = 0

    def run(self) -> tuple[FinetuneConfig, Path | None]:
        """(the config of the part's own training, the checkpoint that it starts from).

        Raises:
            _StoppedEarly: a stage was stopped.
        """
        config, start = self.config, None
        last = final_training(config)
        folder, is_main = run_folder(config), is_main_process(config)
        for name, strategy in config.strategies.active().items() if config.trains else ():
            train = functools.partial(self._train, name)
            run = StageRun(folder, is_main, lambda: build_model(config), train, config.optim, start)
            outcome = strategy.stages_before(run)
            self.settings[name] = outcome.strategy_settings
            last, start = _with_settings(last, name, outcome.strategy_settings), outcome.start or start
            self.figures |= outcome.figures
        return last, start

    def _train(self, name: str, stage: Stage) -> Path:
        """Train a stage of the strategy `name`, unless it is done. Returns its last checkpoint."""
        place = {"name": stage.name, "runs": str(run_folder(self.config)), "resume": "newest"}
        strategies = self.config.strategies.during(stage.purpose)
        part = self.config.model_copy(update={"strategies": strategies, **stage.run_settings, **place})
        folder, is_main = run_folder(part), is_main_process(part)
        done = folder / "part.json"
        if os.path.lexists(done):
            result = report.read_part(done)
        else:
            if is_main:
                _open_run(part)
            reporter = self.reporter and self.reporter.after(self.epochs, stage.run_settings.get("epochs"))
            # the folder's config is without the strategy's own settings: files that they name may move
            launched = part
            for other, settings in {**self.settings, name: stage.strategy_settings}.items():
                launched = _with_settings(launched, other, settings)
            job = FinetuneJob(self.language, stage.epochs, stage.start, selects=stage.selects)
            result = launch(job, launched, folder, reporter)
            if result["finished"] and is_main:
                write_json(done, result)
        # an older part.json has no skipped_steps
        self.spent = {key: value + result.get(key, 0) for key, value in self.spent.items()}
        if not result["finished"]:
            raise _StoppedEarly(result)
        self.epochs += stage.epochs
        return checkpoint.find_trained(folder, part.select if stage.selects else "last")


def _with_settings(config: FinetuneConfig, name: str, settings: Mapping[str, Any]) -> FinetuneConfig:
    """`config` with other `settings` of its strategy `name`."""
    if not settings:
        return config
    changed = {name: config.strategies.active()[name].model_copy(update=dict(settings))}
    return config.model_copy(update={"strategies": config.strategies.model_copy(update=changed)})


def evaluate_run(folder: Path) -> dict[str, Any]:
    """Evaluate a run's model again, in this process, and write its results anew. Those of a run that was
    stopped say so, and do not keep it from going on. Data that changed since the run read it are told, and
    the result has their hash."""
    as_stored = load_config(FinetuneConfig, folder / "config.json")  # what results tell of, and hashes
    with hold_run(folder):
        return _evaluate_in(folder, as_stored)


def _evaluate_in(folder: Path, as_stored: FinetuneConfig) -> dict[str, Any]:
    """`evaluate_run`, in a folder that it holds."""
    config, stored, results = load_run_config(folder), _stored_result(folder), []
    now = reported_split(config)
    then = stored.get("split", now)
    print(
        f"evaluates '{config.name}' on the {now} split, such as "
        f"{read_split(config, config.split, _english(config)).path}"
        + (f"; its result was of what was then called '{then}'" if then != now else "")
    )
    data, different = compare_data(folder, finetuning_files(config), config.verify)
    if different:
        print(f"note: evaluates on other data than the run began with: {', '.join(different)}", flush=True)
    for line in check_images(config, {language: part for part, language in _parts(config)}, ["test"]):
        print(line, flush=True)
    for part, _ in _parts(config):
        run = folder / part.name if part is not config else folder
        part = final_training(part)
        if config.trains:
            part = trained_config(part, run)
        pipeline = build_pipeline(part, build_strategies(part))
        if config.trains:
            load_weights(pipeline.model, checkpoint.find_trained(run, config.select))
        done = run / "part.json"
        before = _so_far(pipeline.model, run) if config.trains and not os.path.lexists(done) else {}
        if os.path.lexists(done):
            before = report.read_part(done)
        results.append({**before, **test_result(pipeline, run)})
    hashes = {"config_sha256": config_hash(as_stored), "data_sha256": combined_hash(data)}
    result = {**stored, **report.summarise(as_stored, results), **hashes}
    result.pop("dev", None)  # of a search's run, which is tested now
    report.write(folder, result)
    return result


def _stored_result(folder: Path) -> dict[str, Any]:
    """The run's result.json; empty if it has none."""
    path = folder / "result.json"
    return read_json_object(path, (), "the result of a run", finite=False) if os.path.lexists(path) else {}


def _so_far(model, run: Path) -> dict[str, Any]:
    """Return what is known of a training that was stopped, as a finished part would have it."""
    newest = checkpoint.find_newest(run)
    assert newest is not None, "a training that has stopped has saved"
    meta = checkpoint.read_meta(newest)
    return {
        "finished": False,
        "steps": meta["step"],
        "seconds": sum(meta["times"].values()),
        "params": sum(p.numel() for p in model.parameters()),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
