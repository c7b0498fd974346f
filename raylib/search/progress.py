"""Progress of a search: its table in the terminal, its curves and hyper-parameters in TensorBoard."""

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray import tune
from ray.tune.experiment.trial import Trial
from ray.tune.logger import TBXLoggerCallback
from tensorboardX.summary import hparams

from raylib.display import percent
from raylib.search.space import Distribution, describe_setting
from raylib.search.trial import REPEAT_OF

TABLE_SECONDS = 30.0  # between tables
MAX_ROWS = 20


class SearchTable(tune.ProgressReporter):
    """Prints trials with state, epochs, scores and setting, those under way first, then the best; above them
    the best so far. Tune's own table shows neither scores nor settings of a define-by-run search.

    name: of the search; goals: scores that trials report; num_trials: in all; describe: a trial's setting.
    """

    def __init__(
        self,
        name: str,
        goals: Sequence[str],
        num_trials: int,
        describe: Callable[[dict[str, Any]], str] = describe_setting,
    ):
        self.name, self.goals, self.num_trials, self.describe = name, goals, num_trials, describe
        self.began = self.last = time.monotonic()
        self.last_text = ""

    def should_report(self, trials: list[Trial], done: bool = False) -> bool:
        return done or time.monotonic() - self.last >= TABLE_SECONDS

    def report(self, trials: list[Trial], done: bool, *resources: str) -> None:
        self.last = time.monotonic()
        text = self.table(trials)
        if text != self.last_text:
            self.last_text = text
            minutes = (self.last - self.began) / 60
            print(f"{self.name}, {minutes:.1f} min: {text}\n", flush=True)

    def table(self, trials: Sequence[Trial]) -> str:
        """Return the text of the table."""
        states = {trial.trial_id: trial_status(trial) for trial in trials}
        reports = {trial.trial_id: trial.last_result or {} for trial in trials}
        for trial_id, report in list(reports.items()):  # a repeat has the score of the trial that was trained
            if first := reports.get(report.get(REPEAT_OF, "")):
                reports[trial_id] = first

        def score(trial: Trial) -> float:
            return reports[trial.trial_id].get(self.goals[0], -math.inf)

        counts = Counter(state.partition(" ")[0] for state in states.values())
        lines = [
            f"{len(trials)} of {self.num_trials} trials: {', '.join(f'{n} {s}' for s, n in counts.items())}"
        ]
        finished = [trial for trial in trials if states[trial.trial_id] == "finished"]
        if best := max(finished, key=score, default=None):
            lines.append(
                f"best so far: {self._scores(reports[best.trial_id])} by {best.trial_id}, "
                f"{self._setting(best)}"
            )
        order = sorted(trials, key=lambda trial: (states[trial.trial_id] != "running", -score(trial)))
        rows = [["trial", "state", "epoch", *(f"{goal}, %" for goal in self.goals), "setting"]]
        for trial in order[:MAX_ROWS]:
            report = reports[trial.trial_id]
            epoch = f"{report['epoch']:g} of {report['epochs']:g}" if "epochs" in report else ""
            scores = [percent(report.get(goal)) for goal in self.goals]
            rows.append([trial.trial_id, states[trial.trial_id], epoch, *scores, self._setting(trial)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        if len(order) > MAX_ROWS:
            lines.append(f"and {len(order) - MAX_ROWS} more")
        return "\n  ".join(lines)

    def _scores(self, report: dict[str, Any]) -> str:
        return ", ".join(f"{goal} {percent(report[goal])} %" for goal in self.goals if goal in report)

    def _setting(self, trial: Trial) -> str:
        return self.describe({name: value for name, value in trial.config.items() if name != REPEAT_OF})


def trial_status(trial: Trial) -> str:
    """Return "running", "pending", "finished", "stopped", "failed" or "repeat of TRIAL"."""
    last = trial.last_result or {}
    if trial.status == Trial.ERROR or last.get("trouble"):
        return "failed"
    if REPEAT_OF in trial.config:
        return f"repeat of {trial.config[REPEAT_OF]}"
    if trial.status == Trial.TERMINATED:
        return "finished" if last.get("finished") else "stopped"
    return trial.status.lower()


class TensorBoardScores(TBXLoggerCallback):
    """Writes scores and losses of trials over their epochs, and, as a trial ends, its settings and scores as
    hyper-parameters; not the twenty figures that Tune and a report's bookkeeping would add.

    scores: names of the scores that trials report; knobs: by name, of the space.
    """

    def __init__(self, scores: Sequence[str], knobs: Mapping[str, Distribution]):
        super().__init__()
        self.scores, self.knobs = scores, knobs

    def log_trial_result(self, iteration: int, trial: Trial, result: dict[str, Any]) -> None:
        if trial not in self._trial_writer:  # it went on after a restart
            self.log_trial_start(trial)
        scores = {name: result[name] for name in self.scores if name in result}
        losses = {name: value for name, value in result.items() if name.startswith("loss/")}
        if not result.get("finished"):  # the last report is of the best epoch again
            for name, value in (scores | losses).items():
                self._trial_writer[trial].add_scalar(name, value, math.ceil(result["epoch"]))
        self._trial_writer[trial].flush()
        self._trial_result[trial] = {f"final/{name}": value for name, value in scores.items()}

    def log_trial_end(self, trial: Trial, failed: bool = False) -> None:
        for name, value in self._trial_result.get(trial, {}).items():
            self._trial_writer[trial].add_scalar(name, value, 0)  # the page of hyper-parameters looks for it
        super().log_trial_end(trial, failed)

    def _try_log_hparams(self, trial: Trial, result: dict[str, Any]) -> None:
        def columns(values: Mapping[str, Any]) -> dict[str, Any]:
            return {name: v if isinstance(v, int | float) else str(v) for name, v in values.items()}

        # TensorBoard has the columns that one trial names: each names all knobs, not its alternatives' alone
        every = {name: knob.ends[0] for name, knob in self.knobs.items()}
        experiment, _, _ = hparams(columns(every), result)
        _, start, end = hparams(columns({k: v for k, v in trial.config.items() if k in self.knobs}), result)
        for summary in (experiment, start, end) if self.knobs else ():
            self._trial_writer[trial].file_writer.add_summary(summary)
