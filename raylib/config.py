"""Configs: frozen pydantic models, changed only by dotted paths.

One mechanism serves the command line (`optim.lr=1e-3`), search spaces and tests. An unknown path or a bad
value is one line that says where and names the near matches.
"""

import difflib
import json
from collections.abc import Mapping, Set
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from raylib.errors import UserError
from raylib.renames import rename_settings


class Config(BaseModel):
    """Base of every config: frozen; an unknown field, and a number that is not finite, is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    stored_as: ClassVar[str] = ""  # the kind in `raylib.renames` by which stored ones are read


C = TypeVar("C", bound=Config)


def override(config: C, assignments: list[str]) -> C:
    """A copy of `config` with each "path=value" applied. Values are JSON (`3`, `true`, `null`, `[0.5, 1]`),
    else text.

    Raises:
        UserError: not of the form path=value, unknown path (names the near matches), or a value of the wrong
            kind.
    """
    values = {}
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(f"'{assignment}' is not of the form path=value, such as optim.lr=1e-3")
        values[path] = _parse(text)
    return change(config, values, "the command line")


def change(config: C, changes: Mapping[str, Any], where: str = "settings") -> C:
    """A copy of `config` with the value of each dotted path in place.

    Raises:
        UserError: as of `override`, told of `where`.
    """
    values, known = config.model_dump(), paths(type(config))
    for path, value in changes.items():
        if path not in known:
            raise UserError(f"unknown setting '{path}'{near(path, known)}")
        *parents, name = path.split(".")
        node = values
        for parent in parents:
            node[parent] = (
                node[parent] if node.get(parent) is not None else {}
            )  # a part that was off is on now
            node = node[parent]
        node[name] = value
    return build(type(config), values, where)


def build(cls: type[C], values: dict[str, Any], where: str) -> C:
    """`cls` from plain values; what pydantic finds wrong becomes one `UserError` line."""
    try:
        return cls.model_validate(values)
    except ValidationError as e:
        first = e.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise UserError(f"{where}: unknown setting '{path}'{near(path, paths(cls))}") from None
        message = first["msg"].removeprefix("Value error, ")
        got = f" (got {first['input']!r})" if path else ""
        raise UserError(f"{where}: {path + ': ' if path else ''}{message}{got}") from None


def load(cls: type[C], path: Path) -> C:
    """A config from the JSON file that `save` wrote, or from a YAML one."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
    kind = "YAML" if path.suffix in (".yaml", ".yml") else "JSON"
    try:
        values = yaml.safe_load(text) if kind == "YAML" else json.loads(text)
    except (ValueError, yaml.YAMLError) as e:
        raise UserError(f"{path}: not a {kind} config file ({' '.join(str(e).split())})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a {kind} config file (it has no settings)")
    return build(cls, rename_settings(cls.stored_as, values), str(path))


def save(config: Config, path: Path) -> None:
    """Write `config` as JSON."""
    Path(path).write_text(dump(config) + "\n", encoding="utf-8")


def dump(config: Config) -> str:
    """`config` as readable JSON, every default resolved."""
    return json.dumps(config.model_dump(mode="json"), indent=2, ensure_ascii=False)


@cache
def paths(cls: type[Config]) -> list[str]:
    """Every dotted path that a config of this class can have, those of parts that may be off too."""
    found = []
    for name, field in cls.model_fields.items():
        found.append(name)
        for part in get_args(field.annotation) or (field.annotation,):
            if isinstance(part, type) and issubclass(part, Config):
                found += [f"{name}.{inner}" for inner in paths(part)]
    return found


def without(values: dict[str, Any], paths: Set[str], prefix: str = "") -> dict[str, Any]:
    """Return a copy of plain settings without the values at dotted `paths`."""
    return {
        name: without(value, paths, f"{prefix}{name}.") if isinstance(value, dict) else value
        for name, value in values.items()
        if prefix + name not in paths
    }


def choose(name: str, choices: dict[str, Any], what: str) -> Any:
    """`choices[name]`, or a `UserError` that lists the near matches, then all of them."""
    if name in choices:
        return choices[name]
    raise UserError(f"unknown {what} '{name}'{near(name, list(choices))}; there are: {', '.join(choices)}")


def near(name: str, known: list[str]) -> str:
    """ "; did you mean ...?" of what is known and like `name`; nothing where nothing is."""
    tail = {k.rsplit(".", 1)[-1]: k for k in known}
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    close += [
        tail[t] for t in difflib.get_close_matches(name.rsplit(".", 1)[-1], list(tail), n=2, cutoff=0.7)
    ]
    close = list(dict.fromkeys(close))
    return f"; did you mean {' or '.join(close[:3])}?" if close else ""


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
