"""Optuna's study of a search in its journal, and evidence from another search."""

import contextlib
import json
import math
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend
from optuna.trial import FixedTrial, FrozenTrial, TrialState, create_trial

from raylib.config import differing_paths, validate
from raylib.errors import UserError, error_line, name_some, reading
from raylib.fileio import read_jsonl, repair_jsonl
from raylib.launch import MUTABLE_SETTINGS
from raylib.search.config import SearchConfig, read_search
from raylib.search.space import DefineByRun, Knobs, Space, config_changes
from raylib.search.trial import without_marks
from raylib.search.trial_log import TrialLog

JOURNAL = "optuna.journal"  # of a study, in the search's folder
STATES = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "stopped", TrialState.FAIL: "failed"}


def trial_state(result: dict | None, error: bool, names: Sequence[str] = ()) -> TrialState:
    """Return the state of a trial by its last report: finished, stopped (PRUNED) or failed, as one is whose
    scores `names` are not finite."""
    if error or not result or result.get("trouble"):
        return TrialState.FAIL
    if not all(math.isfinite(result[name]) for name in names if name in result):
        return TrialState.FAIL
    return TrialState.COMPLETE if result.get("finished") else TrialState.PRUNED


def open_study(log: TrialLog, name: str, goals: Sequence[str]) -> optuna.Study:
    """Return the study of a search, after dropping from its journal what a crash left; one that contradicts
    the log is set aside, and is made anew."""
    path = log.path.with_name(JOURNAL)
    # the lock of a driver that was killed, for which Optuna would wait half a minute
    for lock in path.parent.glob(f"{JOURNAL}.lock*"):
        lock.unlink()
    log.notes += repair_jsonl(path, "op_code")
    try:
        study = _create_study(path.parent, name, goals)
        settings = {t.user_attrs.get("trial"): t.params for t in study.get_trials(deepcopy=False)}
        own = {trial: without_marks(setting) for trial, setting in log.settings.items() if trial in settings}
        is_ours = all(json.loads(json.dumps(settings[trial])) == setting for trial, setting in own.items())
    except Exception as e:  # whatever Optuna makes of records that are damaged
        if error_line(e, path) is not None:
            raise
        is_ours = False
    if not is_ours:
        damaged = path.with_name(f"{JOURNAL}.damaged-{len([*path.parent.glob(f'{JOURNAL}.damaged-*')]) + 1}")
        path.rename(damaged)
        log.notes.append(
            f"{path}: it contradicts {log.path.name}, and is made anew; it is {damaged.name} now"
        )
        study = _create_study(path.parent, name, goals)
    return study


def _create_study(folder: Path, name: str, goals: Sequence[str]) -> optuna.Study:
    study = optuna.create_study(
        study_name=name,
        storage=open_journal(folder),
        pruner=optuna.pruners.NopPruner(),
        directions=["maximize"] * len(goals),
        load_if_exists=True,
    )
    study.set_metric_names(list(goals))
    return study


def open_journal(folder: Path) -> optuna.storages.JournalStorage:
    """Return Optuna's storage of the search in `folder`."""
    return optuna.storages.JournalStorage(JournalFileBackend(str(folder / JOURNAL)))


class JournalReader(BaseJournalBackend):
    """The whole lines of another search's journal, as they are now; writes nothing."""

    def __init__(self, path: Path):
        self.records = read_jsonl(path)

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any]]:
        yield from self.records[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        raise NotImplementedError("another search's journal is only read")


def load_evidence(folder: Path, study_name: str, knobs: Knobs) -> tuple[list[FrozenTrial], int]:
    """Return (the finished trials of the search in `folder` that lie in the space, as trials of another
    study; how many finished ones do not).

    Raises:
        UserError: it has no study.
    """
    if not (folder / JOURNAL).is_file():
        raise UserError(f"warm_start={folder}: no {JOURNAL} there; give the folder of a search")
    with reading(folder / JOURNAL, "a journal of Optuna", "give another search"):
        journal = optuna.storages.JournalStorage(JournalReader(folder / JOURNAL))
        study = optuna.load_study(study_name=study_name, storage=journal)
        finished = study.get_trials(states=(TrialState.COMPLETE,))
    evidence = []
    for trial in finished:
        with contextlib.suppress(UserError):  # it lies outside of the space
            config_changes(knobs, trial.params)
            fixed = FixedTrial(trial.params)
            DefineByRun(knobs)(fixed)
            attributes = {"warm_start": str(folder), "trial": trial.user_attrs.get("trial", trial.number)}
            evidence.append(
                create_trial(
                    params=trial.params,
                    distributions=fixed.distributions,
                    values=trial.values,
                    user_attrs=attributes,
                )
            )
    return evidence, len(finished) - len(evidence)


class WarmStart(NamedTuple):
    """Trials of another search that this one learns from, and in words which, and what was else there."""

    trials: list[FrozenTrial]
    description: str


def load_warm_start(
    config: SearchConfig, space: Space, fingerprint: dict[str, Any], recipe: type
) -> WarmStart:
    """Return what `config.warm_start` has for this search.

    Raises:
        UserError: it is no search of the same goal, or none of its trials lies in the space.
    """
    if config.warm_start is None:
        return WarmStart([], "")
    folder = Path(config.warm_start).absolute()
    try:
        stored = read_search(folder, recipe, fingerprint)
    except UserError as e:
        raise UserError(f"warm_start={config.warm_start}: {e}") from None
    if stored is None:
        raise UserError(f"warm_start={config.warm_start}: no search.json there; give the folder of a search")
    other = validate(SearchConfig, stored["search"], f"{folder}/search.json")
    if other.goals != config.goals:
        raise UserError(
            f"warm_start={config.warm_start}: it searched for {' and '.join(other.goals)}, this one for "
            f"{' and '.join(config.goals)}: its scores say nothing here"
        )
    trials, num_outside = load_evidence(folder, other.name, space.knobs)
    if not trials:
        raise UserError(
            f"warm_start={config.warm_start}: none of its {num_outside} finished trials lies in this space"
        )
    here = {"name", *MUTABLE_SETTINGS}
    differing = [
        path for path in differing_paths(stored["recipe"], fingerprint["recipe"]) if path not in here
    ]
    outside = f"; {num_outside} lie outside of this space" if num_outside else ""
    settings = f"other settings there: {name_some(differing)}" if differing else "the same settings there"
    return WarmStart(
        trials, f"warm start from {len(trials)} finished trials of {folder}{outside}; {settings}"
    )
