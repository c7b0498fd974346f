"""Go on with a search, perhaps with more of it; begin one with what another has found."""

from pathlib import Path
from typing import Any, NamedTuple

from optuna.trial import FrozenTrial

from raylib.config import differing_paths, read_stored_settings, validate
from raylib.errors import UserError
from raylib.fileio import read_json
from raylib.launch import MUTABLE_SETTINGS, VERIFY_SETTINGS, LaunchConfig
from raylib.search.config import SearchConfig
from raylib.search.optuna import load_evidence
from raylib.search.space import Space

# settings of a search that may grow when it goes on, and those that may be anything: no past trial depends on
# either
GROWING_SETTINGS = ("num_trials", "num_finalists", "final_seeds")
FREE_SETTINGS = (
    "max_hours",
    "max_concurrent",
    "max_failures",
    "repeats",
    "warm_start",
    "gpus_per_trial",
    "cpus_per_trial",
)
POPULATION_FIXED = ("num_trials", "max_concurrent")  # members of a population begin together


def check_fingerprint(folder: Path, fingerprint: dict[str, Any], recipe: type[LaunchConfig]) -> list[str]:
    """Refuse to go on with another search than the one whose folder this is. Settings that are newer than the
    folder have their defaults there. Returns in words what there is more of.

    Raises:
        UserError: it has other settings, which are named.
    """
    stored = read_search(folder, recipe)
    if stored is None:
        return []
    before, now = stored["search"], fingerprint["search"]
    may_change = {*GROWING_SETTINGS, *FREE_SETTINGS}
    if now["algorithm"] == "pbt":
        may_change -= set(POPULATION_FIXED)
    changed = [
        name
        for name in differing_paths(stored, fingerprint)
        if name.partition(".")[2] not in {*may_change, *VERIFY_SETTINGS}
    ]
    if changed:
        raise UserError(
            f"{folder} holds a search with other settings ({', '.join(changed)}); give this one another name="
        )
    for name in GROWING_SETTINGS:
        if now[name] < before.get(name, now[name]):
            raise UserError(
                f"{folder} holds a search with {name}={before[name]}, which can only grow: "
                f"{name}={now[name]} would leave out what was run; give this one another name="
            )
    grown = [name for name in GROWING_SETTINGS if now[name] > before.get(name, now[name])]
    hours, hours_before = now["max_hours"], before.get("max_hours")
    if hours_before is not None and (hours is None or hours > hours_before):
        grown.append("max_hours")
    return [f"{name}={now[name]} ({before[name]} before)" for name in grown]


def read_search(folder: Path, recipe: type[LaunchConfig]) -> dict[str, Any] | None:
    """Return {"space", "search", "recipe"} of the search in `folder`, by the names of today; None: there is
    none."""
    if not (folder / "search.json").is_file():
        return None
    stored = read_json(folder / "search.json")
    for part, kind in (("search", SearchConfig), ("recipe", recipe)):
        stored[part] = read_stored_settings(kind, stored[part]).values
    return stored


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
        stored = read_search(folder, recipe)
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
    settings = f"other settings there: {', '.join(differing)}" if differing else "the same settings there"
    return WarmStart(
        trials, f"warm start from {len(trials)} finished trials of {folder}{outside}; {settings}"
    )
