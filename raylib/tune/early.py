"""Do early scores tell the last ones? Where they do not, trials that were stopped by them were stopped by chance."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from raylib import markdown
from raylib.tune.told import read_told

FEWEST = 4  # trials, below which a rank correlation says nothing
TELLS = 0.5  # rank correlation from which on an early score is worth stopping by


class Agreement(NamedTuple):
    """After `age` epochs, how the scores of `trials` trials rank as their last ones do: Spearman's rho, from -1 to 1."""

    age: int
    rho: float
    trials: int


def agreements(runs: Path, last: Mapping[str, float], goal: str, reduction: float) -> list[Agreement]:
    """After 1, `reduction`, `reduction` squared, ... epochs: the rungs of ASHA with a grace of one. None where all score alike.

    Args:
        runs: where the trials' folders are, with what they told. last: {trial: score at its end} of those that finished.
    """
    from scipy import stats

    curves = [(_curve(runs / name, goal), score) for name, score in last.items()]
    longest = max((age for curve, _ in curves for age in curve), default=0)
    found, rung = [], 1.0
    while rung <= longest:
        age = int(rung)
        both = [(curve[age], score) for curve, score in curves if age in curve]
        if len(both) >= FEWEST and all(len(set(side)) > 1 for side in zip(*both, strict=True)):
            found.append(Agreement(age, float(stats.spearmanr(*zip(*both, strict=True)).statistic), len(both)))
        rung *= reduction
    return found


def _curve(run: Path, goal: str) -> dict[int, float]:
    """{epoch, without pruning rounds: score} where the trial may be judged."""
    return {int(line["age"]): line[goal] for line in read_told(run) if line.get("judged") and goal in line}


def told(found: Sequence[Agreement], grace: int | None) -> str:
    """`found` as a table, with what to set if trials were judged, from their epoch `grace` on, by scores that tell little;
    `grace`: None where none was stopped. Nothing of nothing."""
    if not found:
        return ""
    lines = [["after epoch", "rank correlation with the last score", "trials"]]
    text = markdown.table([*lines, *([str(a.age), f"{a.rho:.2f}", str(a.trials)] for a in found)], words=0)
    text += "\n\nSpearman's, of trials that finished."
    first = next((a for a in reversed(found) if grace is not None and a.age <= grace), None)
    if first is None or first.rho >= TELLS:
        return text
    later = next((a.age for a in found if a.age > grace and a.rho >= TELLS), None)
    instead = f"`grace={later}`" if later else "`stop=none`"
    return f"{text} **Trials were stopped from epoch {grace} on, where scores tell little of the last: try {instead}.**"
