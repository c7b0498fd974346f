"""Do early scores tell the last ones? Where they do not, trials that were stopped by them were stopped by
chance."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from raylib.search.trial_log import read_told
from raylib.tables import markdown_table

FEWEST, TRUSTED = (
    4,
    8,
)  # trials, below which a rank correlation is not reckoned, below which nothing is advised by it
TELLS = 0.5  # rank correlation from which on an early score is worth stopping by


class Agreement(NamedTuple):
    """After `age` epochs, how the scores of `trials` trials rank as their last ones do: Spearman's rho, from
    -1 to 1."""

    age: int
    rho: float
    trials: int


def agreements(
    runs: Path, last: Mapping[str, float], goal: str, grace: int, reduction: float
) -> list[Agreement]:
    """After one epoch and at the rungs `grace`, `grace` x `reduction`, ...; none where all score alike.

    Args:
        runs: where the trials' folders are, with what they told. last: {trial: score at its end} of those
            that finished.
    """
    from scipy import stats

    curves = [(_curve(runs / name, goal), score) for name, score in last.items()]
    longest = max((age for curve, _ in curves for age in curve), default=0)
    rungs = itertools.takewhile(
        lambda age: age <= longest, (int(grace * reduction**k) for k in itertools.count())
    )
    found = []
    for age in sorted({1, *rungs}):
        both = [(curve[age], score) for curve, score in curves if age in curve]
        if len(both) >= FEWEST and all(len(set(side)) > 1 for side in zip(*both, strict=True)):
            found.append(
                Agreement(age, float(stats.spearmanr(*zip(*both, strict=True)).statistic), len(both))
            )
    return found


def _curve(run: Path, goal: str) -> dict[int, float]:
    """{epoch, without pruning rounds: score} where the trial may be judged."""
    judged = [
        line for line in read_told(run) if line.get("judged") and math.isfinite(line.get(goal, math.nan))
    ]
    return {int(line["age"]): line[goal] for line in judged}


def told(found: Sequence[Agreement], grace: int | None) -> str:
    """`found` as a table, with what to set if trials were stopped from their epoch `grace` on by scores that
    tell little; `grace`: None where none was. Nothing of nothing."""
    if not found:
        return ""
    lines = [["after epoch", "rank correlation with the last score", "trials"]]
    text = markdown_table([*lines, *([str(a.age), f"{a.rho:.2f}", str(a.trials)] for a in found)], words=0)
    text += "\n\nSpearman's, of the trials that finished."
    if grace is not None:
        text += " With those that were stopped it may be more."
    first = next((a for a in found if a.age == grace), None)
    if first is None or first.trials < TRUSTED or first.rho >= TELLS:
        return text
    later = next((a.age for a in found if a.age > grace and a.rho >= TELLS), None)
    instead = f"`grace={later}`" if later else "`stop=none`"
    return (
        f"{text} **Trials were stopped from epoch {grace} on, where scores tell little of the last: try "
        f"{instead}.**"
    )
