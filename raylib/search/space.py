"""Search spaces: dicts from a dotted config path to a distribution, to a plain value, or from a name to
alternatives.

    {"strategies.prior.alpha": Float(1, 100, log=True),
     "strategies.prior.source": Choice("vectors", "wordnet"),
     "module": OneOf(lora={"strategies.lora.rank": Int(1, 64, log=True)},
     soft_prompt={"strategies.soft_prompt.tokens": 20})}

The knobs of an alternative are there only in trials that chose it. A *setting* is what a trial chose, knob by
knob.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from raylib.config import Config, change_settings
from raylib.errors import UserError


class Float(NamedTuple):
    """Real numbers from `low` to `high`, both included; evenly spread, or so in their logarithm."""

    low: float
    high: float
    log: bool = False

    def suggest(self, trial, name: str) -> float:
        return trial.suggest_float(name, self.low, self.high, log=self.log)

    def holds(self, value: object) -> bool:
        return (
            isinstance(value, int | float) and not isinstance(value, bool) and self.low <= value <= self.high
        )

    @property
    def ends(self) -> tuple:
        return self.low, self.high


class Int(NamedTuple):
    """Whole numbers from `low` to `high`, both included."""

    low: int
    high: int
    log: bool = False

    def suggest(self, trial, name: str) -> int:
        return trial.suggest_int(name, self.low, self.high, log=self.log)

    def holds(self, value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and self.low <= value <= self.high

    @property
    def ends(self) -> tuple:
        return self.low, self.high


class Choice:
    """One of some values: strings, numbers, truth values, None."""

    def __init__(self, *values: Any):
        self.values = values

    def suggest(self, trial, name: str) -> Any:
        return trial.suggest_categorical(name, self.values)

    def holds(self, value: object) -> bool:
        return any(value == v and type(value) is type(v) for v in self.values)

    @property
    def ends(self) -> tuple:
        return self.values


class Each(NamedTuple):
    """`count` values of one distribution, which a setting calls `path[0]`, `path[1]`, ..."""

    count: int
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
# choose(knob's name, its distribution) -> value
Chooser = Callable[[str, Distribution], Any]


class Space(NamedTuple):
    """`recipe`: that it was written for. `published`: settings of the papers, tried first. `grid`: the
    papers' grid, values of each knob."""

    summary: str
    recipe: str
    knobs: Knobs
    published: tuple[Setting, ...] = ()
    grid: Mapping[str, tuple] = {}

    def points(self) -> list[Setting]:
        """Every setting of the grid; knobs that it leaves alone are as first published."""
        rest = self.published[0] if self.published else {}
        return [
            {**rest, **dict(zip(self.grid, values, strict=True))}
            for values in itertools.product(*self.grid.values())
        ]


def settle(knobs: Knobs, choose: Chooser) -> dict[str, Any]:
    """{config path: value} of what `choose` chooses. A knob is called by its path; where several alternatives
    have one of the same path, by `path@alternative`, for they may differ in range."""
    counts = Counter(path for path, _, _ in _leaves(knobs))

    def walk(part: Knobs, branch: str) -> dict[str, Any]:
        settled: dict[str, Any] = {}
        for path, knob in part.items():
            if isinstance(knob, OneOf):
                chosen = choose(path, knob.choice)
                settled |= walk(knob.branches[chosen], chosen)
            elif isinstance(knob, Distribution | Each):
                name = path if counts[path] == 1 else f"{path}@{branch}"
                settled[path] = (
                    [choose(f"{name}[{i}]", knob.of) for i in range(knob.count)]
                    if isinstance(knob, Each)
                    else choose(name, knob)
                )
            else:
                settled[path] = knob
        return settled

    return walk(knobs, "")


def read(knobs: Knobs, setting: Setting) -> dict[str, Any]:
    """{config path: value} of a setting.

    Raises:
        UserError: a knob that the setting leaves out, has outside of its range, or that is none.
    """
    used = set()

    def choose(name: str, knob: Distribution) -> Any:
        if name not in setting:
            raise UserError(f"the setting {setting} says nothing of {name}")
        if not knob.holds(setting[name]):
            raise UserError(f"{name}={setting[name]} is not in {_told(knob)}")
        used.add(name)
        return setting[name]

    settled = settle(knobs, choose)
    if left := set(setting) - used:
        raise UserError(
            f"the setting {setting} has {', '.join(sorted(left))}, which is no knob beside its others"
        )
    return settled


class Suggest:
    """A space as Optuna's define-by-run function; an object, so that a searcher's state can be kept in a
    file."""

    def __init__(self, knobs: Knobs):
        self.knobs = knobs

    def __call__(self, trial) -> None:
        settle(self.knobs, lambda name, knob: knob.suggest(trial, name))


def alternatives(knobs: Knobs) -> Iterator[dict[str, str]]:
    """Every combination of alternatives, {name of a `OneOf`: what it chooses}."""
    options = [
        [{name: branch, **inner} for branch, part in knob.branches.items() for inner in alternatives(part)]
        for name, knob in knobs.items()
        if isinstance(knob, OneOf)
    ]
    for combination in itertools.product(*options):
        yield {name: branch for part in combination for name, branch in part.items()}


def corners(knobs: Knobs) -> Iterator[tuple[str, dict[str, Any]]]:
    """(which, {config path: value}) of the settings that a space can be judged by: in each combination of
    alternatives, each knob at each of its ends, with all others at their low ones, and all at their high
    ones."""
    for fixed in alternatives(knobs):
        names: dict[str, Distribution] = {}

        def low(name: str, knob: Distribution, fixed=fixed, names=names) -> Any:
            names[name] = knob
            return fixed.get(name, knob.ends[0])

        where = ", ".join(f"{name}={branch}" for name, branch in fixed.items())
        yield where, settle(knobs, low)
        yield where, settle(knobs, lambda name, knob, fixed=fixed: fixed.get(name, knob.ends[-1]))
        for one in (name for name in names if name not in fixed):
            for end in names[one].ends[1:]:
                told = ", ".join(filter(None, (where, f"{one}={end}")))
                yield (
                    told,
                    settle(
                        knobs,
                        lambda name, knob, one=one, end=end, fixed=fixed: (
                            end if name == one else fixed.get(name, knob.ends[0])
                        ),
                    ),
                )


def check(name: str, space: Space, base: Config) -> None:
    """Find what would fail in some trial before any starts.

    Raises:
        UserError: no knob; a path that the recipe's config does not have; a value that it refuses; ends the
            wrong way round; a published setting or a grid that is not in the space.
    """
    leaves = list(_leaves(space.knobs))
    if not leaves and not any(isinstance(knob, OneOf) for knob in space.knobs.values()):
        raise UserError(f"space '{name}' has no knob to turn")
    for path, knob, _ in leaves:
        if not knob.ends or (not isinstance(knob, Choice) and knob.low > knob.high):
            raise UserError(f"space '{name}': {path}: {_told(knob)} is empty")
        if not isinstance(knob, Choice) and knob.log and knob.low <= 0:
            raise UserError(f"space '{name}': {path}: {_told(knob)} has no logarithm everywhere")
    for told, values in corners(space.knobs):
        try:
            change_settings(base, values)
        except UserError as e:
            raise UserError(f"space '{name}'{f' ({told})' if told else ''}: {e}") from None
    for setting in (*space.published, *(space.points() if space.grid else ())):
        try:
            read(space.knobs, setting)
        except UserError as e:
            raise UserError(f"space '{name}', its published settings: {e}") from None


def by_name(knobs: Knobs) -> dict[str, Distribution]:
    """Every knob by the name that settings have for it, alternatives among them."""
    found: dict[str, Distribution] = {}
    for fixed in alternatives(knobs):

        def choose(name: str, knob: Distribution, fixed=fixed) -> Any:
            found.setdefault(name, knob)
            return fixed.get(name, knob.ends[0])

        settle(knobs, choose)
    return found


def described(knobs: Knobs, indent: str = "") -> str:
    """The space as text, a knob a line."""
    lines = []
    for path, knob in knobs.items():
        if isinstance(knob, OneOf):
            lines.append(f"{indent}{path}: one of")
            for branch, inner in knob.branches.items():
                lines.append(f"{indent}  {branch}" + ("" if inner else ": nothing more"))
                if inner:
                    lines.append(described(inner, indent + "    "))
        else:
            lines.append(f"{indent}{path}: {_told(knob)}")
    return "\n".join(lines)


def _told(knob: Any) -> str:
    if isinstance(knob, Each):
        return f"{knob.count} of {_told(knob.of)}"
    if not isinstance(knob, Distribution):
        return f"always {knob}"
    if isinstance(knob, Choice):
        return f"one of {', '.join(map(str, knob.values))}"
    return f"{knob.low} to {knob.high}{', log-uniform' if knob.log else ''}"


def _leaves(knobs: Knobs, branch: str = "") -> Iterator[tuple[str, Distribution, str]]:
    """(path, distribution, alternative that it belongs to) of every knob that is a config path."""
    for path, knob in knobs.items():
        if isinstance(knob, OneOf):
            for name, inner in knob.branches.items():
                yield from _leaves(inner, name)
        elif isinstance(knob, Distribution | Each):
            yield path, knob.of if isinstance(knob, Each) else knob, branch
