"""Settings of a run and of the runs that it goes on from, without those that change no number; its method."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from finetune.config import FinetuneConfig
from finetune.strategies import StrategiesConfig
from raylib import checkpoint
from raylib.config import change_settings, load_config, read_stored_settings, without_settings
from raylib.errors import UserError
from raylib.fileio import read_json
from raylib.launch import MUTABLE_SETTINGS
from raylib.provenance import started_in
from raylib.renames import rename_settings

# names of a run, what is only looked at, and the seed, which is kept apart
NO_SETTING = frozenset(
    {
        *("name", "method", "eval_each_epoch", "similarity_items", "run_test", "fit.seed", *MUTABLE_SETTINGS),
        *("extra_tests", "shuffled_images"),
    }
)
PATHS = ("model", "vision", "data", "images", "regions", "wordnet")  # settings that are paths
UNTRAINED = "as it is"
ABSENT = object()  # no such setting in a run: of a part that is off, or a model that is no run


class RunSettings(dict):
    """Settings of a run that another one goes on from, and the `path` by which that one names it."""

    path: str = ""


class Lineage(NamedTuple):
    """settings: nested, with this version's defaults for what was not stored. In place of a path into another
        run stand the settings of that run.
    seeds: of the run, then of those runs. A run that trains nothing has none of its own.
    config: None of pretraining, and of settings that are no config of this version.
    unknown: a line for each stored setting that this version has not; it stays among the settings.
    """

    settings: dict[str, Any]
    seeds: tuple[int, ...]
    config: FinetuneConfig | None
    unknown: tuple[str, ...]


def read_lineage(run: Path) -> Lineage:
    """Read the lineage of a run from its config.json, and those of the runs that it names.

    Raises:
        UserError: `run` has no config.json of a run.
    """
    values = _read(run)
    if values is None:
        raise UserError(f"{run}/config.json: no settings of a run; give the folders of finished runs")
    return _lineage(run, values, ())


def load_run_config(run: Path) -> FinetuneConfig:
    """Load the config of a finished or stopped run, whose paths are found from anywhere: beside it, or from
    the folder in which it was started."""
    config = load_config(FinetuneConfig, run / "config.json")
    values = config.model_dump()
    named = {
        path: _nested(values, path.split("."))
        for path in (*PATHS, *config.strategies.declared_paths("run_fields", "file_fields"))
    }
    found = {path: str(_locate(value, run, config.runs)) for path, value in named.items() if value}
    return change_settings(config, {**found, "runs": str(run.absolute().parent)})


def _run_paths(config: FinetuneConfig | None) -> tuple[str, ...]:
    """Settings that may lead into other runs."""
    strategies = config.strategies if config else StrategiesConfig()
    return ("model", "init.model", *strategies.declared_paths("run_fields"))


def runs_behind(config: FinetuneConfig) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(folder, stored settings) of every run that `config` goes on from or is taught or pruned by, of those
    before it, and so on; each once."""
    waiting: list[tuple[Path | None, dict[str, Any], FinetuneConfig | None]] = [
        (None, config.model_dump(mode="json"), config)
    ]
    visited = set()
    for folder, values, parsed in waiting:  # grows while it is gone through
        for path in _run_paths(parsed):
            value = _nested(values, path.split("."))
            if not value or not isinstance(value, str):  # of pretraining, `model` are sizes
                continue
            source = _run_at(_locate(value, folder, values.get("runs")))
            if source and source[0] not in visited:
                visited.add(source[0])
                waiting.append((*source, _fill(*source)[0]))
                yield source


def varying_paths(settings: Sequence[dict[str, Any]], prefix: str = "") -> list[str]:
    """Dotted paths at which some of these nested settings differ. A part that some have and others have not
    is one path, unless those that have it differ within: then the paths within tell it."""
    found: list[str] = []
    for name in dict.fromkeys(name for values in settings for name in values):
        values = [part.get(name, ABSENT) for part in settings]
        parts = [value for value in values if isinstance(value, dict)]
        others = [value for value in values if not isinstance(value, dict)]
        within = varying_paths(parts, f"{prefix}{name}.") if len(parts) > 1 else []
        if within and all(value is None or value is ABSENT for value in others):
            found += within
        elif any(value != values[0] for value in values):
            found += [prefix + name, *within]
    return found


def _nested(values: Any, path: list[str]) -> Any:
    """The value at a path of keys; None if there is none."""
    for key in path:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def described(
    config: FinetuneConfig, steps: int, finished: bool, run: Path | None = None, skipped: int = 0
) -> str:
    """Name the method of a run with a result, and how far its training got: without a step that was not
    skipped, it got nowhere."""
    if config.trains and steps <= skipped:
        return f"{UNTRAINED} ({f'all {steps} steps skipped' if skipped else 'no step recorded'})"
    return method_of(config, run) + ("" if finished else f" (stopped at step {steps})")


def method_of(config: FinetuneConfig, run: Path | None = None) -> str:
    """Name the method of a run, whose folder is `run`, for tables. Where nothing is trained, the method is
    that of the run which the model comes from, and "as it is" if it comes from none."""
    if config.method or config.trains:
        return config.display_name
    source = _run_at(_locate(config.model, run, config.runs))
    source_config = source and _fill(*source)[0]
    if not source or not source_config:
        return config.display_name
    method = method_of(source_config, source[0])
    if config.setting == "translate_test":
        return config.display_name.replace(UNTRAINED, method, 1)
    return config.display_name if method == UNTRAINED else f"{config.display_name}, after {method}"


def _lineage(run: Path, stored: dict[str, Any], above: tuple[Path, ...]) -> Lineage:
    config, values, unknown = _fill(run, stored)
    seed = values["fit"].get("seed")
    seeds: tuple[int, ...] = (seed,) if seed is not None and (config is None or config.trains) else ()
    settings, visited = without_settings(values, NO_SETTING), (*above, run.resolve())
    for path in _run_paths(config):
        *parents, name = path.split(".")
        node = _nested(settings, parents)
        if not isinstance(node, dict) or not node.get(name) or not isinstance(node[name], str):
            continue
        location = _locate(node[name], run, stored.get("runs"))
        source = _run_at(location)
        if source is None or source[0] in visited:
            node[name] = str(location)
            continue
        source_run = _lineage(*source, visited)
        # a file, or one of several checkpoints, within the run
        inside = {"path": str(location.relative_to(source[0]))} if location != source[0] else {}
        other = RunSettings(source_run.settings | inside)
        other.path, node[name] = node[name], other
        seeds, unknown = seeds + source_run.seeds, unknown + source_run.unknown
    return Lineage(settings, seeds, config, unknown)


def _read(folder: Path) -> dict[str, Any] | None:
    """The settings in a folder's config.json; None if it is no run's."""
    try:
        values = read_json(folder / "config.json")
    except (OSError, UserError):
        return None
    if not isinstance(values, dict) or not isinstance(values.get("fit"), dict):
        return None
    return rename_settings("finetune" if "task" in values else "pretrain", values)


def _locate(path: str, run: Path | None, runs: str | None) -> Path:
    """Find a `path` that is a setting of `run`: first beside the run, if that is where it was, for runs may
    have moved; then from where the run was started, and from here. As it stands if there is nothing."""
    candidates = [started_in(run) / path if run else Path(path), Path(path)]
    if run and runs and Path(path).is_relative_to(runs):
        candidates.insert(0, run.resolve().parent / Path(path).relative_to(runs))
    return next((location.resolve() for location in candidates if _is_there(location)), Path(path))


def _is_there(location: Path) -> bool:
    """Return whether there is such a file or folder, or it is RUN/best of a run that has one."""
    return os.path.exists(location) or (
        location.name == "best" and checkpoint.find_best(location.parent) is not None
    )


def _run_at(location: Path) -> tuple[Path, dict[str, Any]] | None:
    """(folder, stored settings) of the run that `location` is, or lies in; None if there is none."""
    folders = (location, *location.parents) if _is_there(location) else ()
    return next(((folder, values) for folder in folders if (values := _read(folder))), None)


def _fill(run: Path, stored: dict[str, Any]) -> tuple[FinetuneConfig | None, dict[str, Any], tuple[str, ...]]:
    """(config, settings, unknown) of a `Lineage`, from what the config.json of `run` holds."""
    if "task" not in stored:  # pretraining, whose defaults are not known here
        return None, stored, ()
    settings = read_stored_settings(FinetuneConfig, stored, run)
    lines = [
        f"{run}: setting {path} is none of this version; it is compared as it was stored"
        for path in settings.unknown
    ]
    if settings.config is None:
        lines = [f"{run}: {settings.problem}; its settings are compared as they were stored"]
    return settings.config, settings.values, tuple(lines)
