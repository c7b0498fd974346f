"""One piece of the work of `benchmarks.claims`: a choice of settings, a pretraining, a run of a seed; each a
command of ours in a process of its own, and a record of what it came to."""

import contextlib
import csv
import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from benchmarks.claims_search import contest_settings, read_contest
from benchmarks.claims_table import EXPERIMENTS, PRETRAININGS, pretraining_command, space_of
from benchmarks.claims_work import TRIAL_SEED, Lab, Work, find, identity, tuner_of
from benchmarks.results import commit
from finetune.config import SHUFFLED_IMAGES
from finetune.one_answer import marks_of
from finetune.report import extra_scores, scores_of
from raylib.fileio import append_jsonl, file_lock, read_json_object, write_json

FAILED = "failed"  # kind of the record of a try that failed
AGAIN = "again"  # of one that was made again, for others to go on from it
LOOK_SECONDS = 2.0  # between two looks at what an experiment's processes have used
# glibc keeps freed memory. Otherwise each step gives its own back and takes it anew, page by page: 120 steps
# of scenes_xgqa take 1.4 and 1.5 CPU-seconds in the kernel without, 0.4 and 0.8 with these (in turns).
MALLOC = {"MALLOC_TRIM_THRESHOLD_": str(1 << 34), "MALLOC_MMAP_THRESHOLD_": str(1 << 31)}


def do(lab: Lab, work: Work, again: bool = False) -> bool:
    """Do a piece of work and record it; return whether it went well. `again`: what is recorded already, and
    gone; the record then tells of its cost alone."""
    outcome = make(lab, work)
    record = {
        **work.key(),
        "kind": FAILED if outcome.status else AGAIN if again else work.kind,
        "settings": work.settings(),
        **identity(lab.model, lab.scenes),
        **outcome.figures,
        "cpu_seconds": round(outcome.cpu_seconds, 1),
        "seconds": round(outcome.seconds, 1),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }
    if outcome.status or again:
        record["of"] = work.kind
    if outcome.status:
        lines = lab.log(work).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        error = lines[-1].replace(str(lab.folder), lab.folder.name)[:300] if lines else ""  # no place of ours
        record |= {"status": outcome.status, "error": error}
    append_jsonl(lab.records, record, durable=True)
    return not outcome.status


class Outcome(NamedTuple):
    """The end of a piece of work: exit status, CPU-seconds, seconds, what the record tells of it."""

    status: int
    cpu_seconds: float
    seconds: float
    figures: dict[str, Any]


def spawn(log: Path, *arguments: object) -> Outcome:
    """Run a module of ours on one thread; its output is appended to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with open(log, "ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *map(str, arguments)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**MALLOC, **os.environ, "OMP_NUM_THREADS": "1"},
        )
        family: dict[int, float] = {}  # CPU-seconds of the process and of those below it
        while (ended := os.wait4(process.pid, os.WNOHANG))[0] == 0:
            family |= _cpu_seconds(process.pid)
            time.sleep(LOOK_SECONDS)
    _, status, usage = ended
    process.returncode = os.waitstatus_to_exitcode(status)
    # Ray's workers are no children that are waited for, so what they used is in the samples alone
    cpu_seconds = max(usage.ru_utime + usage.ru_stime, sum(family.values()))
    return Outcome(process.returncode, cpu_seconds, time.monotonic() - began, {})


def _cpu_seconds(pid: int) -> dict[int, float]:
    """Return {process: CPU-seconds} of a process and of all below it."""
    found = {}
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                found[process.pid] = sum(process.cpu_times()[:2])
    return found


def settings_of(lab: Lab, name: str, seed: int) -> list[str]:
    """Return the settings of an experiment's run or trial, but for those that are chosen."""
    experiment = EXPERIMENTS[name]
    model = lab.model
    if experiment.pretraining:
        model = exported(lab, Work("pretraining", experiment.pretraining, seed))
    if experiment.after:
        model = lab.result(experiment.after, seed).parent
    scenes = lab.scenes / f"errors{experiment.errors}" if experiment.errors else lab.scenes
    settings = [f"model={model}", f"data={scenes}", f"fit.seed={seed}"]
    if experiment.teacher:
        settings.append(f"strategies.distillation.teacher={lab.result(experiment.teacher, seed).parent}")
    return [*settings, "fit.loader_workers=0", "keep_optimizer=false", *experiment.settings, *lab.limits]


def share_states(lab: Lab, run_folder: Path) -> None:
    """Let a run or a search keep the states of images where all of them find them: the same encoder reads the
    same images."""
    states = lab.folder.absolute() / "encoded"
    states.mkdir(parents=True, exist_ok=True)
    run_folder.mkdir(parents=True, exist_ok=True)
    if not (run_folder / "encoded").exists():
        (run_folder / "encoded").symlink_to(states)


def exported(lab: Lab, work: Work) -> Path:
    """Return where the model of a pretraining goes."""
    return lab.folder / f"{work.label}_model"


def is_made(lab: Lab, work: Work) -> bool:
    """Return whether the folder of a run or a pretraining holds what the work is now, and whole."""
    end = exported(lab, work) if work.kind == "pretraining" else lab.result(work.name, work.seed)
    return end.exists() and _made_of(lab, work) == facts_of(lab, work)


def facts_of(lab: Lab, work: Work) -> dict[str, Any]:
    """Return all that what is made for a piece of work hangs on."""
    return {**work.key(), **identity(lab.model, lab.scenes), "limits": list(lab.limits)}


def _made_of(lab: Lab, work: Work) -> dict[str, Any]:
    note = lab.folder / f"{work.label}.json"
    return dict(read_json_object(note)) if note.is_file() else {}


def clear_folder(lab: Lab, work: Work) -> None:
    """Remove from a work's folder what was made there of another recipe, model or benchmark: runs refuse to
    go on with other settings."""
    if _made_of(lab, work) != facts_of(lab, work):
        for folder in (lab.folder / work.label, exported(lab, work)):
            if folder.exists():
                shutil.rmtree(folder)
        write_json(lab.folder / f"{work.label}.json", facts_of(lab, work))


def make_needed(lab: Lab, work: Work) -> None:
    """Make the runs and models that this one goes on from anew, if their folders are gone, or of another
    recipe, since they were recorded."""
    for other in work.needs():
        if other.kind != "choice" and not is_made(lab, other):
            with file_lock(lab.folder / f"{other.label}.made.lock"):
                if not is_made(lab, other):
                    do(lab, other, again=True)


def make(lab: Lab, work: Work) -> Outcome:
    """Do a piece of work."""
    clear_folder(lab, work)
    return {"run": run, "choice": choose, "pretraining": pretrain, "search": search}[work.kind](lab, work)


def run(lab: Lab, work: Work) -> Outcome:
    """Train a seed of an experiment, and test it."""
    make_needed(lab, work)
    chosen: dict[str, Any] = {}
    if tuner := tuner_of(work.name):
        choice = find(lab.read(), Work("choice", tuner))
        assert choice is not None, f"{work.label}: its settings are chosen before"
        chosen = choice["chosen"]
    settings = [*settings_of(lab, work.name, work.seed), *(f"{k}={json.dumps(v)}" for k, v in chosen.items())]
    place = [f"name={work.label}", f"runs={lab.folder}"]
    share_states(lab, lab.folder / work.label)
    recipe = EXPERIMENTS[work.name].recipe
    outcome = spawn(lab.log(work), "finetune", recipe, *place, *settings)
    if outcome.status:
        return outcome._replace(figures={"chosen": chosen})
    if not any(work.name in (e.after, e.teacher) for e in EXPERIMENTS.values()):
        for checkpoints in list((lab.folder / work.label).rglob("checkpoints")):
            shutil.rmtree(checkpoints)  # nothing goes on from them
    return outcome._replace(figures={"chosen": chosen, **read_figures(lab.result(work.name, work.seed))})


def choose(lab: Lab, work: Work) -> Outcome:
    """Search for an experiment's settings, on development sets."""
    make_needed(lab, work)
    experiment = EXPERIMENTS[work.name]
    outcome = spawn_search(
        lab,
        work,
        "claims_table",
        "space_of",
        f"recipe={experiment.recipe}",
        "algorithm=grid",
        "early_stopping=none",
        "final_seeds=0",
        f"dev_sets={'english_dev' if experiment.recipe.startswith('scenes_') else 'target_dev'}",
        *settings_of(lab, work.name, TRIAL_SEED),
    )
    if outcome.status:
        return outcome
    trials = read_trials(lab.folder / work.label, list(space_of(work.name).knobs))
    best = max(trials, key=lambda trial: trial["score"])
    return outcome._replace(figures={"chosen": best["setting"], "trials": trials})


def spawn_search(lab: Lab, work: Work, module: str, maker: str, *settings: str) -> Outcome:
    """Run a search, one trial at a time, of the space that `benchmarks.module.maker` makes for the work."""
    path = lab.folder / "spaces" / f"{work.label}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = f"from benchmarks.{module} import {maker}\n\nSPACE = {maker}({work.name!r})\n"
    path.write_text(text, encoding="utf-8")
    share_states(lab, lab.folder / work.label)
    place = [f"name={work.label}", f"runs={lab.folder}", "max_concurrent=1"]
    return spawn(lab.log(work), "tune_spaces", path, *place, *settings)


def search(lab: Lab, work: Work) -> Outcome:
    """Run a contestant of `benchmarks.claims_search`."""
    task, seed = work.name.split("/")[0], work.seed
    # the seeds of trials and those of final runs, which are the next ones, are nobody else's
    own = [f"model={lab.model}", f"data={lab.scenes}", f"seed={seed}", f"fit.seed={10 * (TRIAL_SEED + seed)}"]
    recipe = [f"recipe=scenes_{task}", *contest_settings(work.name), "fit.loader_workers=0", *lab.limits]
    outcome = spawn_search(lab, work, "claims_search", "contest_space", *own, *recipe)
    if outcome.status:
        return outcome
    return outcome._replace(figures=read_contest(lab.folder / work.label))


def read_trials(folder: Path, knobs: Sequence[str]) -> list[dict[str, Any]]:
    """Return setting and score of each trial that finished, of a search."""
    with open(folder / "trials.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    goal = "english_dev" if "english_dev" in rows[0] else "target_dev"
    return [
        {"setting": {knob: json.loads(row[knob]) for knob in knobs}, "score": float(row[goal])}
        for row in rows
        if row["state"] == "finished"
    ]


def unfused_model(lab: Lab) -> Path:
    """Return where the lab's model lies with fusion layers, and a head for matching, of random weights."""
    import torch

    from raylib.models.unified import UnifiedModel

    folder = lab.folder / f"unfused_{identity(lab.model, lab.scenes)['weights']}"
    with file_lock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            model = UnifiedModel.from_pretrained(lab.model)
            torch.manual_seed(0)
            new = UnifiedModel(model.config)
            model.fusion.load_state_dict(new.fusion.state_dict())
            model.match_head.load_state_dict(new.match_head.state_dict())
            model.save(folder)
    return folder


def pretrain(lab: Lab, work: Work) -> Outcome:
    """Pretrain an ablation, and export it."""
    place = [f"name={work.label}", f"runs={lab.folder}", f"fit.seed={work.seed}"]
    outcome = spawn(lab.log(work), *pretraining_command(unfused_model(lab)), *place, *PRETRAININGS[work.name])
    export = exported(lab, work)
    if not outcome.status and not export.is_dir():
        exporting = spawn(lab.log(work), "pretrain", "export", lab.folder / work.label, export)
        return exporting._replace(cpu_seconds=outcome.cpu_seconds + exporting.cpu_seconds)
    return outcome


def read_figures(path: Path) -> dict[str, Any]:
    """Return of a result what claims are judged by, scores by language; and what it was made with."""
    result = read_json_object(path, (), "the result of a run")
    figures: dict[str, Any] = {"scores": scores_of(result)}
    if "retrieval" in result:
        figures["r1"] = result["recall_at_1"]
    for name in ("by_type", "synonym_accuracy", "epochs", "trainable", "params", "baselines"):
        if result.get(name):
            figures[name] = result[name]
    figures |= extra_scores(result)
    shuffled = result.get("extra_tests", {}).get(SHUFFLED_IMAGES, {})
    if by_type := {code: values["by_type"] for code, values in shuffled.items() if values.get("by_type")}:
        figures["shuffled_by_type"] = by_type
    figures["marks"] = {
        code: marks for code, of in result.get("answers", {}).items() if (marks := marks_of(of))
    }
    return figures | {"precision": result["evaluation_precision"], "code": result["code"]}
