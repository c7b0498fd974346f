"""The log of a search's trials, from which a search goes on: JSON lines in trials.jsonl, written by its
driver.

    {"at", "seconds", "trial", "setting"}          begun; the setting has its marks (`REPEAT_OF`, `REPLICATE`)
    {"at", "seconds", "trial", "state", "error"}   ended: finished, stopped or failed

seconds: that the search has been under way, over all of its starts. Scores are in the trials' own logs of
reports (`raylib.search.trial`). No pickle of Tune's is read: Tune runs what this log, the reports and
Optuna's journal leave to be run.
"""

import json
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel
from ray.tune.experiment import Trial

from raylib.errors import UserError
from raylib.fileio import append_jsonl, read_json, read_jsonl, repair_jsonl
from raylib.finite import finite_values
from raylib.lock import make_folder
from raylib.search.space import Setting
from raylib.search.trial import (
    REPEAT_OF,
    REPLICATE,
    SETTING,
    TrialResult,
    read_reports,
    repair_reports,
    without_marks,
)
from raylib.strict_json import PlainName

TRIALS = "trials.jsonl"


class Outcome(NamedTuple):
    """state: finished, stopped or failed; error: of a failed one, with its traceback."""

    state: str
    error: str | None = None


class EndedTrial(NamedTuple):
    """A trial of an earlier start, as the table shows Tune's: its state by Tune's word for it."""

    trial_id: str
    config: Setting
    status: str
    last_result: dict[str, Any]


class StoredBegin(BaseModel):
    """The line of a trial that begins."""

    at: float
    seconds: float
    trial: PlainName
    setting: dict[str, Any]


class StoredEnd(BaseModel):
    """The line of a trial that has ended."""

    at: float
    seconds: float
    trial: PlainName
    state: Literal["finished", "stopped", "failed"]
    error: str | None


class TrialLog:
    """The trials of the search in `folder`.

    settings: {trial: setting, with its marks}, in the order in which they began. outcomes: {trial: what
    became of it}, of those that have ended. notes: in words, what a crash had left of the search's files.
    """

    def __init__(self, folder: Path):
        self.path, self.runs = folder / TRIALS, folder / "trials"
        self.notes = repair_jsonl(self.path, "at")
        self.settings: dict[str, Setting] = {}
        self.outcomes: dict[str, Outcome] = {}
        self._seconds, self._began = 0.0, time.monotonic()
        for record in read_jsonl(self.path, StoredBegin | StoredEnd):
            self._enter(record)
            self._seconds = max(self._seconds, record["seconds"])
        for run in sorted(self.runs.glob("*")):
            self.notes += repair_reports(run)

    def restore(self, name: str, setting: Setting, why: str) -> None:
        """Enter a trial that the log lacks, and say so."""
        self.notes.append(f"{self.path}: it lacks trial {name}, which is restored from {why}")
        self.begin(name, setting)

    def restore_from_folders(self, earlier: Path) -> None:
        """Enter what the log lacks of trials that have trained, from their own folders; of a population that
        an earlier version of this code began, from the settings that Tune wrote into `earlier` as JSON.

        Raises:
            UserError: neither has the setting of one.
        """
        for run in sorted(self.runs.glob("*")):
            if run.name in self.settings or not (reports := read_reports(run)):
                continue
            for file in (run / SETTING, earlier / run.name / "params.json"):
                if (setting := _read_setting(file)) is not None:
                    self.restore(run.name, setting, str(file))
                    break
            else:
                raise UserError(
                    f"{run}: a trial that has trained, {len(reports)} reports, and whose setting neither "
                    f"{self.path} nor the journal has; give the search another name="
                )

    def begin(self, trial: str, setting: Setting) -> None:
        """Enter a trial that is about to begin."""
        self._append({"trial": trial, "setting": setting})

    def end(self, trial: str, state: str, error: str | None = None) -> None:
        """Enter what became of a trial, once."""
        if trial not in self.outcomes:
            self._append({"trial": trial, "state": state, "error": error})

    def seconds(self) -> float:
        """Return how long this search has been under way, over all of its starts."""
        return self._seconds + time.monotonic() - self._began

    def reports(self, trial: str) -> list[dict[str, Any]]:
        """Return the reports of a trial, in their order."""
        return read_reports(self.runs / trial)

    def results(self, metrics: tuple[str, ...]) -> list[TrialResult]:
        """Return the results of the trials that have ended, in the order in which they began, with their
        scores `metrics`; a repeat's are those of the trial whose score it takes.

        Raises:
            UserError: the folder of one is gone, and its scores with it.
        """
        results = {trial: self._result(trial, metrics) for trial in self.settings if trial in self.outcomes}
        return [
            result._replace(
                state=first.state,
                scores=first.scores,
                epoch=first.epoch,
                epochs=first.epochs,
                error=first.error,
            )
            if (first := results.get(result.repeat_of or ""))
            else result
            for result in results.values()
        ]

    def ended_trials(self) -> list[EndedTrial]:
        """Return the trials that have ended, with their last reports."""
        return [
            EndedTrial(
                name,
                self.settings[name],
                Trial.ERROR if state == "failed" else Trial.TERMINATED,
                (self.reports(name) or [{REPEAT_OF: self.settings[name].get(REPEAT_OF)}])[-1],
            )
            for name, (state, _) in self.outcomes.items()
            if name in self.settings
        ]

    def _result(self, trial: str, metrics: tuple[str, ...]) -> TrialResult:
        """Return a trial's result by its last report: of a stopped one, that at which it was stopped."""
        setting, (state, error) = self.settings[trial], self.outcomes[trial]
        if state != "failed" and REPEAT_OF not in setting and not (self.runs / trial).is_dir():
            raise UserError(
                f"{self.runs / trial}: the folder of a trial that has {state} is gone, with its scores; "
                "put it back, or give the search another name="
            )
        reports = self.reports(trial)
        last = reports[-1] if reports else {}
        scores = {m: last[m] for m in metrics if m in last}
        finite = finite_values(scores)
        not_finite = ", ".join(scores.keys() - finite.keys())  # as earlier versions wrote it
        return TrialResult(
            id=trial,
            state=state,
            setting=without_marks(setting),
            scores=finite,
            epoch=last.get("epoch", 0),
            epochs=last.get("epochs", 0),
            seconds=last.get("spent", 0.0),
            start_seconds=last.get("start_seconds"),
            error=error or last.get("trouble") or (f"{not_finite} not finite" if not_finite else None),
            repeat_of=setting.get(REPEAT_OF),
            replicate=setting.get(REPLICATE, 0),
        )

    def _append(self, record: dict[str, Any]) -> None:
        record = {"at": time.time(), "seconds": self.seconds(), **record}
        make_folder(self.path.parent)
        append_jsonl(self.path, record, durable=True)
        # as it will be read again: JSON has lists alone
        self._enter(json.loads(json.dumps(record)))

    def _enter(self, record: dict[str, Any]) -> None:
        if "setting" in record:
            self.settings[record["trial"]] = record["setting"]
        else:
            self.outcomes[record["trial"]] = Outcome(record["state"], record["error"])


def _read_setting(file: Path) -> Setting | None:
    """Return a setting; None: it is not there, or not whole."""
    try:
        return read_json(file, shape=dict[str, Any])
    except (OSError, UserError):
        return None
