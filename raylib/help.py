"""Pages of help: settings with meaning, value, type and range, and lists of recipes, as wide as the terminal.

All that a page says of a setting comes from its field: the meaning from the text below it, the rest from what
validates it.
"""

import json
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, cast, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from raylib.config import Config, setting_paths, suggest
from raylib.errors import UserError

INDENT = "      "
TYPES = {int: "integer", float: "number", str: "text", bool: "true or false"}


class Setting(NamedTuple):
    """A setting of a config class by its dotted path; `value` in a config, or its default."""

    path: str
    field: FieldInfo
    value: Any

    def page(self) -> str:
        """Return path, value and type in a line, and the meaning below."""
        required = self.field.is_required() and self.value is None
        value = "" if required else f" = {format_value(self.value)}"
        head = wrap(f"{self.path}{value}  ({describe_type(self.field)})", "  ", INDENT)
        meaning = " ".join((self.field.description or "").split())
        return f"{head}\n{wrap(meaning, INDENT)}" if meaning else head


def page_width() -> int:
    """Return how many columns a page has: the terminal's, at most 110."""
    return min(shutil.get_terminal_size().columns, 110)


def wrap(text: str, indent: str = "", rest: str | None = None) -> str:
    """Return text in lines of the page's width, after `indent`; those but the first after `rest`."""
    return textwrap.fill(
        text,
        page_width(),
        initial_indent=indent,
        subsequent_indent=indent if rest is None else rest,
        break_on_hyphens=False,
    )


def settings_page(cls: type[Config], path: str = "", config: Config | None = None, intro: bool = True) -> str:
    """Return the settings of a config class at and below a dotted `path` ("" for all), with the values that
    they have in `config`, or their defaults. Of a part that is off, a line; its own page has more. intro:
    begin with what the class is.

    Raises:
        UserError: there is no such path; the near matches are named.
    """
    value: Any = config
    field: FieldInfo | None = None
    known = setting_paths(cls)
    for name in path.split(".") if path else ():
        if name not in cls.model_fields:
            listed = f"; there are: {', '.join(cls.model_fields)}"
            raise UserError(f"unknown setting '{path}'{suggest(path, known) or listed}")
        field = cls.model_fields[name]
        value = vars(value).get(name) if isinstance(value, Config) else _default(field)
        part = config_class(field)
        if part is None:
            return Setting(path, field, value).page()
        cls = part
    prose = [wrap(" ".join(text.split())) for text in (cls.__doc__ or "").split("\n\n")] if intro else []
    settings = [setting.page() for setting in list_settings(cls, value, f"{path}." if path else "")]
    return "\n\n".join((*prose, "\n".join(settings)))


def list_settings(cls: type[Config], config: Config | None, prefix: str = "") -> Iterator[Setting]:
    """Yield the settings of a config class, those of parts that are on among them."""
    plain = [name for name, field in cls.model_fields.items() if config_class(field) is None]
    # a part's own settings come after those that stand beside it
    for name in (*plain, *(name for name in cls.model_fields if name not in plain)):
        field = cls.model_fields[name]
        value = vars(config).get(name) if config is not None else _default(field)
        part = config_class(field)
        if part is None or not part.model_fields or (value is None and not field.is_required()):
            yield Setting(prefix + name, field, value)
        else:
            yield from list_settings(part, value, f"{prefix}{name}.")


def _default(field: FieldInfo) -> Any:
    return None if field.is_required() else field.get_default(call_default_factory=True)


def config_class(field: FieldInfo) -> type[Config] | None:
    """Return the class of a part of a config; None of a plain setting."""
    parts = get_args(field.annotation) or (field.annotation,)
    return next((part for part in parts if isinstance(part, type) and issubclass(part, Config)), None)


def describe_type(field: FieldInfo) -> str:
    """Return which values a field takes, in words: "integer, 1 or more"."""
    if part := config_class(field):
        return "settings of its own, or null: off" if part.model_fields else "settings by names of your own"
    return _describe(field.annotation, field.metadata)


def _describe(annotation: Any, constraints: list[Any]) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _describe(arguments[0], [*arguments[1:], *constraints])
    if origin in (Union, UnionType):
        parts = [_describe(part, constraints) for part in arguments if part is not NoneType]
        return " or ".join(parts) + (", or null" if NoneType in arguments else "")
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin is tuple:
        if Ellipsis in arguments:
            return f"list: {_describe(arguments[0], [])}"
        return f"{len(arguments)} of: {_describe(arguments[0], [])}"
    if origin in (dict, Mapping):
        return "JSON object"
    return ", ".join((TYPES[annotation], *_ranges(constraints, annotation is int)))


def _ranges(constraints: list[Any], whole: bool) -> Iterator[str]:
    for each in constraints:
        match each:
            case annotated_types.Gt(gt=value):
                yield f"{cast(int, value) + 1} or more" if whole else f"above {value:g}"
            case annotated_types.Ge(ge=value):
                yield f"{value if whole else format(value, 'g')} or more"
            case annotated_types.Lt(lt=value):
                yield f"{cast(int, value) - 1} or less" if whole else f"below {value:g}"
            case annotated_types.Le(le=value):
                yield f"{value if whole else format(value, 'g')} or less"
            case FieldInfo():
                yield from _ranges(each.metadata, whole)


def format_value(value: Any) -> str:
    """Return a value as a command line takes it."""
    if isinstance(value, str):
        return value or '""'
    if isinstance(value, tuple):
        return ",".join(map(format_value, value)) or '""'
    if isinstance(value, Config):
        value = value.model_dump(mode="json")
    return json.dumps(value, ensure_ascii=False)


def table(rows: Mapping[str, str]) -> str:
    """Return indented lines "name  summary"."""
    width = max(map(len, rows), default=0)
    return "\n".join(
        wrap(f"{name:{width}}  {' '.join(summary.split())}", "  ", " " * (width + 4))
        for name, summary in rows.items()
    )


def recipe_list(recipes: Mapping[str, Any], families: Mapping[str, str]) -> str:
    """Return a line for each recipe, below the title of its family: the longest of `families`, {beginning of
    names: title}, that its name begins with."""
    groups: dict[str, dict[str, list[str]]] = {family: {} for family in families}
    for name, recipe in recipes.items():
        family = max((f for f in families if name.startswith(f)), key=len)
        groups[family][name] = (recipe.__doc__ or "").partition(" [")[0].split()
    return "\n\n".join(
        f"{wrap(families[family])}\n{table(_without_shared_start(rows))}"
        for family, rows in groups.items()
        if rows
    )


def _without_shared_start(rows: Mapping[str, list[str]]) -> dict[str, str]:
    """Return summaries without the words that all of several begin with: the title says these."""
    shared = 0
    if len(rows) > 1:
        while len({tuple(words[: shared + 1]) for words in rows.values()}) == 1:
            shared += 1
    return {name: " ".join(words[shared:]) for name, words in rows.items()}
