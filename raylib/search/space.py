"""Search spaces: dicts from a dotted config path to a distribution, to a plain value, or from a name to
alternatives.

    {"strategies.prior.alpha": Float(1, 100, log=True),
     "strategies.prior.source": Choice("vectors", "wordnet"),
     "module": OneOf(lora={"strategies.lora.rank": Int(1, 64, log=True)},
                     soft_prompt={"strategies.soft_prompt.tokens": 20})}

The knobs of an alternative are there only in trials that chose it. A *setting* is the choice of a trial, knob
by knob.
"""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from raylib.config import Config, ConfigT, change_settings, require_permission
from raylib.errors import UserError
from raylib.renames import rename_path


class _Range(NamedTuple):
    low: Any
    high: Any
    log: bool = False

    @property
    def ends(self) -> tuple:
        return self.low, self.high


class Float(_Range):
    """Real numbers from `low` to `high`, both included; evenly spread, or so in their logarithm."""

    def suggest(self, trial, name: str) -> float:
        return trial.suggest_float(name, self.low, self.high, log=self.log)

    def contains(self, value: object) -> bool:
        return (
            isinstance(value, int | float) and not isinstance(value, bool) and self.low <= value <= self.high
        )


class Int(_Range):
    """Whole numbers from `low` to `high`, both included."""

    def suggest(self, trial, name: str) -> int:
        return trial.suggest_int(name, self.low, self.high, log=self.log)

    def contains(self, value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and self.low <= value <= self.high


class Choice:
    """One of some values: strings, numbers, truth values, None."""

    def __init__(self, *values: Any):
        self.values = values

    def suggest(self, trial, name: str) -> Any:
        return trial.suggest_categorical(name, self.values)

    def contains(self, value: object) -> bool:
        return any(value == v and type(value) is type(v) for v in self.values)

    @property
    def ends(self) -> tuple:
        return self.values


class Each(NamedTuple):
    """`num` values of one distribution, which a setting calls `path[0]`, `path[1]`, ..."""

    num: int
    of: "Float | Int | Choice"


class OneOf:
    """Alternatives by name, each a dict as the space itself is: with knobs of its own, plain values, or
    nothing."""

    def __init__(self, **branches: dict[str, Any]):
        self.branches = branches

    @property
    def choice(self) -> Choice:
        return Choice(*self.branches)


Distribution = Float | Int | Choice
Knobs = Mapping[str, Any]
Setting = dict[str, Any]


class Space(NamedTuple):
    """`recipe`: that it was written for. `published`: settings of the papers, tried first. `grid`: the
    papers' grid, values of each knob."""

    summary: str
    recipe: str
    knobs: Knobs
    published: tuple[Setting, ...] = ()
    grid: Mapping[str, tuple] = {}

    def grid_settings(self) -> list[Setting]:
        """Return every setting of the grid; knobs that it leaves alone are as first published."""
        if not self.grid:
            return []
        rest = self.published[0] if self.published else {}
        return [
            {**rest, **dict(zip(self.grid, values, strict=True))}
            for values in itertools.product(*self.grid.values())
        ]


def resolve(knobs: Knobs, choose: Callable[[str, Distribution], Any]) -> dict[str, Any]:
    """Return {config path: value}, each value as `choose` chooses it by the knob's name and distribution. A
    knob's name is its path; where several alternatives have one of the same path, `path@alternative`, for
    they may differ in range."""
    # Optuna wants one distribution a name, and the same path may have other ranges in other alternatives.
    counts = Counter(path for path, _, _ in _config_knobs(knobs))

    def walk(part: Knobs, branch: str) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for path, knob in part.items():
            if isinstance(knob, OneOf):
                alternative = choose(path, knob.choice)
                values |= walk(knob.branches[alternative], alternative)
                continue
            name = path if counts[path] == 1 else f"{path}@{branch}"
            if isinstance(knob, Each):
                values[path] = [choose(f"{name}[{i}]", knob.of) for i in range(knob.num)]
            else:
                values[path] = choose(name, knob) if isinstance(knob, Distribution) else knob
        return values

    return walk(knobs, "")


def config_changes(knobs: Knobs, setting: Setting) -> dict[str, Any]:
    """Return {config path: value} of a setting.

    Raises:
        UserError: the setting leaves a knob out, has a value outside of its range, or one of no knob.
    """
    used = set()

    def choose(name: str, knob: Distribution) -> Any:
        if name not in setting:
            raise UserError(f"the setting {setting} has no value for {name}")
        if not knob.contains(setting[name]):
            raise UserError(f"{name}={setting[name]} is not in {_describe(knob)}")
        used.add(name)
        return setting[name]

    changes = resolve(knobs, choose)
    if unused := set(setting) - used:
        raise UserError(
            f"the setting {setting} has {', '.join(sorted(unused))}, which no knob of its alternatives is "
            "called"
        )
    return changes


def apply_changes(base: ConfigT, changes: Mapping[str, Any]) -> ConfigT:
    """Return `base` with the values of a setting, {config path: value}. A path that has been renamed since
    the space was written keeps its old name in the search, whose folder may be as old.

    Raises:
        UserError: an unknown path, a value of the wrong kind, or a shell command that `base` does not allow.
    """
    values = {rename_path(base.stored_as, path): value for path, value in changes.items()}
    require_permission(base, values, "the search space")
    return change_settings(base, values)


class SettingKey:
    """Tells settings that are the same training: `key(setting)` is equal where the configs are that settings
    make of `base`, numbers to six digits. An object, so that a searcher's state can be kept in a file."""

    def __init__(self, knobs: Knobs, base: Config):
        self.knobs, self.base = knobs, base

    def __call__(self, setting: Setting) -> str | None:
        """Return the key; None: the config refuses the setting, as its trial will tell."""
        try:
            config = apply_changes(self.base, config_changes(self.knobs, setting))
        except UserError:
            return None
        return json.dumps(_rounded(config.model_dump(mode="json")), sort_keys=True)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


class DefineByRun:
    """A space as Optuna's define-by-run function; an object, so that a searcher's state can be kept in a
    file."""

    def __init__(self, knobs: Knobs):
        self.knobs = knobs

    def __call__(self, trial) -> None:
        resolve(self.knobs, lambda name, knob: knob.suggest(trial, name))


def alternatives(knobs: Knobs) -> Iterator[dict[str, str]]:
    """Yield every combination of alternatives, {name of a `OneOf`: the alternative that it chooses}."""
    options = [
        [{name: branch, **inner} for branch, part in knob.branches.items() for inner in alternatives(part)]
        for name, knob in knobs.items()
        if isinstance(knob, OneOf)
    ]
    for combination in itertools.product(*options):
        yield {name: branch for part in combination for name, branch in part.items()}


def corners(knobs: Knobs) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (description, {config path: value}) of settings that a space can be judged by: in each
    combination of alternatives, each knob at each of its ends, with all others at their low ones, and all at
    their high ones."""
    for fixed in alternatives(knobs):
        # The product of all ends would be as large as the space. A config's checks look at one setting or at
        # two together, so each knob is moved alone, and all of them once.
        where = ", ".join(f"{name}={branch}" for name, branch in fixed.items())
        yield where, _corner(knobs, fixed, 0)
        yield where, _corner(knobs, fixed, -1)
        for name, knob in _knobs_beside(knobs, fixed).items():
            for end in knob.ends[1:] if name not in fixed else ():
                yield (
                    ", ".join(filter(None, (where, f"{name}={end}"))),
                    _corner(knobs, {**fixed, name: end}, 0),
                )


def _corner(knobs: Knobs, fixed: Setting, end: int) -> dict[str, Any]:
    """Return {config path: value} with every knob that is not `fixed` at its end of this index."""
    return resolve(knobs, lambda name, knob: fixed.get(name, knob.ends[end]))


def _knobs_beside(knobs: Knobs, fixed: Setting) -> dict[str, Distribution]:
    """Return the knobs, by name, of settings with the alternatives `fixed`, these among them."""
    used: dict[str, Distribution] = {}

    def choose(name: str, knob: Distribution) -> Any:
        used[name] = knob
        return fixed.get(name, knob.ends[0])

    resolve(knobs, choose)
    return used


def knobs_by_name(knobs: Knobs) -> dict[str, Distribution]:
    """Return every knob by the name that settings have for it, alternatives among them."""
    return {name: knob for fixed in alternatives(knobs) for name, knob in _knobs_beside(knobs, fixed).items()}


def check_space(name: str, space: Space, base: Config) -> None:
    """Find what would fail in some trial before any starts.

    Raises:
        UserError: no knob; a path that the recipe's config does not have; a value that it refuses; ends the
            wrong way round; a published setting or a grid that is not in the space.
    """
    # Optuna takes an empty range, and one whose logarithm does not exist, for granted until it draws from it.
    ranges = [(path, knob) for path, knob, _ in _config_knobs(space.knobs)]
    if not ranges and not any(isinstance(knob, OneOf) for knob in space.knobs.values()):
        raise UserError(f"space '{name}' has no knob: nothing in it varies")
    for path, knob in ranges:
        if not knob.ends or (not isinstance(knob, Choice) and knob.low > knob.high):
            raise UserError(f"space '{name}': {path}: {_describe(knob)} is empty")
        if not isinstance(knob, Choice) and knob.log and knob.low <= 0:
            raise UserError(f"space '{name}': {path}: {_describe(knob)} needs values above 0 for log=True")
    for description, changes in corners(space.knobs):
        try:
            apply_changes(base, changes)
        except UserError as e:
            raise UserError(f"space '{name}'{f' ({description})' if description else ''}: {e}") from None
    for setting in (*space.published, *space.grid_settings()):
        try:
            config_changes(space.knobs, setting)
        except UserError as e:
            raise UserError(f"space '{name}', its published settings: {e}") from None


def describe_setting(setting: Setting) -> str:
    """Return a setting as short text: "prior.alpha 10, prior.k 5"."""
    numbers = {name: f"{v:.3g}" if isinstance(v, float) else str(v) for name, v in setting.items()}
    return ", ".join(f"{name.removeprefix('strategies.')} {number}" for name, number in numbers.items())


def describe_knobs(knobs: Knobs, indent: str = "") -> str:
    """Return the space as text, a knob a line. A search's folder keeps this text: it must not change."""
    lines = []
    for path, knob in knobs.items():
        if not isinstance(knob, OneOf):
            lines.append(f"{indent}{path}: {_describe(knob)}")
            continue
        lines.append(f"{indent}{path}: one of")
        for branch, inner in knob.branches.items():
            lines.append(f"{indent}  {branch}" + ("" if inner else ": nothing more"))
            if inner:
                lines.append(describe_knobs(inner, indent + "    "))
    return "\n".join(lines)


def _describe(knob: Any) -> str:
    if isinstance(knob, Each):
        return f"{knob.num} of {_describe(knob.of)}"
    if not isinstance(knob, Distribution):
        return f"always {knob}"
    if isinstance(knob, Choice):
        return f"one of {', '.join(map(str, knob.values))}"
    return f"{knob.low} to {knob.high}{', log-uniform' if knob.log else ''}"


def _config_knobs(knobs: Knobs, branch: str = "") -> Iterator[tuple[str, Distribution, str]]:
    """Yield (path, distribution, alternative that it belongs to) of every knob that is a config path."""
    for path, knob in knobs.items():
        if isinstance(knob, OneOf):
            for name, inner in knob.branches.items():
                yield from _config_knobs(inner, name)
        elif isinstance(knob, Distribution | Each):
            yield path, knob.of if isinstance(knob, Each) else knob, branch
