"""Configs: frozen pydantic models, changed only by dotted paths.

One mechanism serves the command line (`optim.lr=1e-3`), search spaces and tests. An unknown path or a bad
value is one line that says where and names the near matches.
"""

import copy
import difflib
import hashlib
import importlib.util
import inspect
import json
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from functools import cache
from pathlib import Path
from types import ModuleType, UnionType
from typing import Annotated, Any, ClassVar, NamedTuple, TypeVar, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    WrapValidator,
    field_validator,
    model_validator,
)

from raylib.errors import UserError, printable, reading, shorten_text
from raylib.file_kinds import recognize
from raylib.fileio import is_unicode, read_bytes
from raylib.renames import MODULES, rename_path, rename_settings
from raylib.strict_json import parse_json
from raylib.strict_yaml import parse_yaml


class UserSource(NamedTuple):
    """A Python file of the user's: its name, and its content when it was loaded."""

    name: str
    content: bytes


class UserFile(str):
    """A setting that names a Python file of the user's, FILE.py or FILE.py:NAME. `run`: of settings that were
    stored, the folder, which has a copy: so it is found from anywhere, and as it was."""

    run: Path | None = None

    @classmethod
    def named(cls, name: str, run: Path | None) -> "UserFile":
        """The file `name` in the settings of `run`, or of the command."""
        file = cls(name)
        file.run = run
        return file

    @property
    def path(self) -> Path:
        """Return where it lies, or should lie."""
        (path,) = user_files(self)
        copy = self.run / path.name if self.run else path
        return copy if copy.is_file() else path

    def require(self, setting: str) -> Path:
        """Return where it lies.

        Raises:
            UserError: nowhere; the setting, and the run that has it, are named.
        """
        if self.path.is_file():
            return self.path
        where = f"{self.run}/config.json: " if self.run else ""
        raise UserError(f"{where}{setting}={self}: no such file")

    def tell(self) -> None:
        """Tell on stderr, before it runs, of code that stored settings name: they may be another's."""
        if self.run and (self.run, self.path) not in _told_of:
            _told_of.add((self.run, self.path))
            line = f"note: the settings in {self.run} name code, which runs now: {self.path}"
            print(printable(line), file=sys.stderr, flush=True)


def _mark_user_file(value: Any, handler: Callable[[Any], str], info: ValidationInfo) -> str:
    if isinstance(value, UserFile):
        return value
    name = handler(value)
    return UserFile.named(name, (info.context or {}).get("run")) if user_files(name) else name


NameOrFile = Annotated[str, WrapValidator(_mark_user_file)]  # of ours by its name, or in a file of the user's


class Config(BaseModel):
    """Base of every config: frozen; an unknown field, and a number that is not finite, is an error."""

    # the text below a field is what help says of the setting (`raylib.help`)
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
    stored_as: ClassVar[str] = ""  # the kind in `raylib.renames` by which stored ones are read
    takes_urls: ClassVar[tuple[str, ...]] = ()  # settings that may be a URL; a path may not

    def __hash__(self) -> int:
        # pydantic's own takes no dict among the settings (deviations, prompts by language)
        return hash(self.model_dump_json())

    @classmethod
    def derived_defaults(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the defaults of settings that follow from others, such as `follow`; of the same settings,
        whatever these are. A dict stands for settings of a part. values: those given, unchecked."""
        return {}

    @model_validator(mode="before")
    @classmethod
    def _fill_derived(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or not (derived := cls.derived_defaults(values)):
            return values
        filled = dict(values)
        for name, default in derived.items():
            given = filled.get(name, {} if isinstance(default, dict) else default)
            if isinstance(given, Config):
                given = given.model_dump(exclude_unset=True)
            # a part that is off, or is no part, stays what it is
            filled[name] = (
                {**default, **given} if isinstance(default, dict) and isinstance(given, dict) else given
            )
        return filled

    @field_validator("*", mode="after")
    @classmethod
    def _is_no_url(cls, value: Any, info: ValidationInfo) -> Any:
        if info.field_name not in cls.takes_urls and cls.__module__ not in _user_sources:
            for text in value if isinstance(value, tuple) else (value,):
                if isinstance(text, str) and (problem := path_problem(text)):
                    raise ValueError(problem)
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _split_list(cls, value: Any, info: ValidationInfo) -> Any:
        """Take a list as a shell passes it, "de,ja" or "0.9,0.98"; a text with commas stays one where the
        setting may be a text."""
        if not _is_list(cls.model_fields[str(info.field_name)].annotation):
            return value
        if isinstance(value, str):
            return [part.strip() for part in value.split(",")] if value.strip() else []
        # "layers=3" has been read as a number
        return [value] if isinstance(value, int | float) and not isinstance(value, bool) else value


def _is_list(annotation: Any) -> bool:
    """Return whether a setting of this type is a list, or None."""
    parts = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    return any(get_origin(part) is tuple for part in parts) and all(
        get_origin(part) is tuple or part is type(None) for part in parts
    )


# of 255: a file has more before and behind its name while it is written
LONGEST_NAME = 200
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # `Path` makes s3:/ of s3://


def path_problem(text: str) -> str:
    """Say what keeps a text from being a path of this machine: it is a URL, has a NUL, or is no UTF-8, in
    which paths are stored; "": nothing."""
    if URL.match(text):
        return (
            "a path of this machine, no URL: copy it here, or mount it; URLs are taken by "
            "data.image_text.folder, data.parallel.folder and data.text.folder of pretraining, and by "
            "--images of predict, and its --out with --ray"
        )
    if not is_unicode(text):
        return "its name is not in UTF-8; rename it"
    return "no path has a NUL character" if "\0" in text else ""


def _check_folder_name(name: str) -> str:
    if not re.fullmatch(r"[\w.-]+", name) or name in (".", "..") or len(name.encode()) > LONGEST_NAME:
        raise ValueError(
            f"give the name of one folder: letters, digits, '_', '-' and '.', at most {LONGEST_NAME} bytes"
        )
    return name


# of a model: no dimension is larger, nor two of them too large for PyTorch to count their product
Size = Annotated[int, Field(gt=0, le=1 << 24)]
SizeOrZero = Annotated[int, Field(ge=0, le=1 << 24)]


def _check_given(path: str) -> str:
    if not path.strip():
        raise ValueError("give a folder; . is the one that you are in")
    return path


Folder = Annotated[str, AfterValidator(_check_given)]
FolderName = Annotated[str, AfterValidator(_check_folder_name)]  # of a run, in `runs`
FolderNameOrNone = Annotated[str, AfterValidator(lambda name: name and _check_folder_name(name))]  # "": none
ConfigT = TypeVar("ConfigT", bound=Config)
T = TypeVar("T")
_user_sources: dict[str, "UserSource"] = {}  # by module
PIPE = "pipe:"  # begins a shell command that takes the place of a folder (`raylib.data.fetch`)
PERMISSION = "allow_pipe"  # the setting by which such commands of files run
CODE_PERMISSION = "allow_code"  # and by which code runs that a config file names
_told_of: set[tuple[Path, Path]] = set()  # runs and their code (`UserFile.tell`)
MANY = 20  # names that are too many for an error line
# the type of a pydantic error: a name that no setting has, where a user's file may take any
NO_USER_FILE = "no_user_file"


def override(config: ConfigT, assignments: list[str]) -> ConfigT:
    """Return a copy of `config` with each "path=value" applied. Values are JSON (`3`, `true`, `null`, `[0.5,
    1]`), else text; lists may be written `de,ja` too.

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
    return change_settings(config, values, "the command line")


def change_settings(config: ConfigT, changes: Mapping[str, Any], where: str = "settings") -> ConfigT:
    """Return a copy of `config` with the value of each dotted path in place.

    Raises:
        UserError: as of `override`, told of `where`.
    """
    values, known = config.model_dump(), setting_paths(type(config))
    for path, value in changes.items():
        if not is_setting(type(config), path):
            # an old name is best answered by its new one, which may not be like it at all
            new = rename_path(config.stored_as, path)
            advice = suggest(path, known) if new == path else f"; it is {new} now"
            raise UserError(f"unknown setting '{path}'{advice}")
        *parents, name = path.split(".")
        node = values
        for parent in parents:
            if isinstance(node.get(parent), str):  # a user's class by its file, which gets settings now
                node[parent] = {"file": node[parent]}
            # a part that was off is on now
            node[parent] = node[parent] if node.get(parent) is not None else {}
            node = node[parent]
        node[name] = value
    _release_derived(config, values, set(changes))
    return validate(type(config), values, where)


def _release_derived(config: Config, values: dict[str, Any], changes: Set[str], prefix: str = "") -> None:
    """Take out of `values` what is still as it was derived from other settings of `config`, and is not among
    the `changes`: it follows when these change."""
    for name, default in type(config).derived_defaults(config.model_dump()).items():
        is_part = isinstance(default, dict)
        node = values.get(name) if is_part else values
        defaults, path = (default, f"{prefix}{name}.") if is_part else ({name: default}, prefix)
        if isinstance(node, dict) and path[:-1] not in changes:
            for key, derived in defaults.items():
                if key in node and node[key] == derived and path + key not in changes:
                    del node[key]
    for name, part in [*config, *(config.model_extra or {}).items()]:
        if isinstance(part, Config) and isinstance(values.get(name), dict):
            _release_derived(part, values[name], changes, f"{prefix}{name}.")


def validate(cls: type[ConfigT], values: dict[str, Any], where: str, run: Path | None = None) -> ConfigT:
    """Make a `cls` of plain values, stored ones of the folder `run` (`UserFile`); what pydantic finds wrong
    becomes one `UserError` line."""
    try:
        return cls.model_validate(values, context={"run": run})
    except ValidationError as e:
        first = e.errors()[0]
        path = shorten_text(".".join(str(part) for part in first["loc"]), 100)
        if first["type"] in ("extra_forbidden", NO_USER_FILE):
            advice = f"; or name your file: {path}=FILE.py" if first["type"] == NO_USER_FILE else ""
            similar = suggest(path, setting_paths(cls))
            raise UserError(f"{where}: unknown setting '{path}'{similar}{advice}") from None
        if first["type"] == "missing" and isinstance(first["loc"][-1], int):  # of a list of fixed length
            listed, given = path.rpartition(".")[0], json.dumps(first["input"], default=str)
            raise UserError(f"{where}: {listed}: a list of too few values: {given}; give one more") from None
        if first["type"] == "missing":
            raise UserError(
                f"{where}: no setting '{path}'; give one, or a run or file of this command's"
            ) from None
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] in ("model_type", "model_attributes_type"):
            message = f"it has settings of its own; give these, as {path}.NAME=..., or {{}} for its defaults"
        given = repr(first["input"])
        got = f" (got {given if len(given) <= LONGEST_NAME else given[:50] + '...'})" if path else ""
        raise UserError(f"{where}: {path + ': ' if path else ''}{message}{got}") from None


def load_config(cls: type[ConfigT], path: Path, assignments: Sequence[str] | None = None) -> ConfigT:
    """Read a config from a JSON file, such as `dump_config` makes, or from a YAML one.

    assignments: "path=value" of the command line that names the file, whose code runs only if they name it
    too, or allow it; None: it is the config of a run that a command reads, whose code is told of.
    """
    path = Path(path)
    kind = "YAML" if path.suffix in (".yaml", ".yml") else "JSON"
    if not path.exists():
        raise UserError(f"{path}: no such config file")
    with reading(path, f"a {kind} config file", "mend it, or give another"):
        values = (parse_yaml if kind == "YAML" else parse_json)(read_bytes(path))
        if not isinstance(values, dict):
            raise ValueError("it has no settings")
    values = rename_settings(cls.stored_as, values)
    if assignments is not None:
        _require_code_permission(values, path, assignments)
    config = validate(cls, values, str(path), path.parent)
    # a permission is not the file's to give
    given = {PERMISSION, CODE_PERMISSION} & cls.model_fields.keys()
    return config.model_copy(update=dict.fromkeys(given, False))


def _require_code_permission(values: dict[str, Any], where: Path, assignments: Sequence[str]) -> None:
    """Put what the command line gives in the place of code that plain settings name: to make a config of
    them runs it.

    Raises:
        UserError: they name code that the command line neither gives nor allows.
    """
    given = {path: _parse(text) for path, _, text in (each.partition("=") for each in assignments)}
    if given.get(CODE_PERMISSION) is True:
        return
    for path, value in given.items():
        *parents, name = path.split(".")
        node = values
        for parent in parents:
            node = node[parent] if isinstance(node.get(parent), dict) else {}
        if isinstance(node.get(name), str | dict):
            # where the user says, not beside the config file
            node[name] = UserFile(value) if isinstance(value, str) else value
    for path, code in find_code(values):
        if not isinstance(code, UserFile):
            raise UserError(
                f"{where}: {path} names code, {shorten_text(code, 100)!r}, which would run on this machine: "
                f"read it, and add {CODE_PERMISSION}=true to the command line, or give {path}=... there"
            )


def find_commands(values: Any) -> Iterator[tuple[str, str]]:
    """Yield (dotted path, text) of each shell command, `pipe:...`, in plain settings."""
    return (found for found in _find_texts(values) if found[1].startswith(PIPE))


def find_code(values: Any) -> Iterator[tuple[str, str]]:
    """Yield (dotted path, text) of each Python file that plain settings name."""
    return (found for found in _find_texts(values) if user_files(found[1]))


def _find_texts(values: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(values, dict):
        for name, value in values.items():
            yield from _find_texts(value, f"{path}.{name}" if path else str(name))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _find_texts(value, path)
    elif isinstance(values, str):
        yield path, values


def require_permission(
    config: Config, values: Mapping[str, Any], where: Path | str, assignments: Sequence[str] = ()
) -> None:
    """Raise UserError where `values`, settings of the file `where`, have a shell command that `config` does
    not allow.

    assignments: the command line's own "path=value", whose commands need no permission.
    """
    given = tuple(assignment.partition("=")[0] + "." for assignment in assignments)
    for path, command in find_commands(values):
        if f"{path}.".startswith(given) or config.model_dump().get(PERMISSION):
            continue
        shown = command if len(command) <= LONGEST_NAME else f"{command[:50]}..."
        raise UserError(
            f"{where}: {path} is a shell command, {shown!r}, which would run on this machine: read it, and "
            f"add {PERMISSION}=true to the command line, or give {path}=... there"
        )


def dump_config(config: Config) -> str:
    """Return `config` as readable JSON, every default resolved."""
    return json.dumps(config.model_dump(mode="json"), indent=2, ensure_ascii=False)


@cache
def setting_paths(cls: type[Config]) -> list[str]:
    """List every dotted path that a config of this class can have, those of parts that may be off too."""
    found = []
    for name, field in cls.model_fields.items():
        found.append(name)
        for part in get_args(field.annotation) or (field.annotation,):
            if isinstance(part, type) and issubclass(part, Config):
                found += [f"{name}.{inner}" for inner in setting_paths(part)]
    return found


def is_setting(cls: type[Config], path: str) -> bool:
    """Return whether a config of this class can have the setting at a dotted path: one of `setting_paths`, or
    of a class in a user's own file, in a part that takes these (`extra="allow"`)."""
    if path in setting_paths(cls):
        return True
    name, _, rest = path.partition(".")
    field = cls.model_fields.get(name)
    if field is None:
        return cls.model_config.get("extra") == "allow"
    parts = get_args(field.annotation) or (field.annotation,)
    return any(
        isinstance(part, type) and issubclass(part, Config) and is_setting(part, rest) for part in parts
    )


class StoredSettings(NamedTuple):
    """values: by the names of today, with defaults for what was not stored. config: the same as an object;
    None if they are no config of this version for the reason in `problem`: the values are as stored then.
    unknown: paths of stored settings that this version lacks; they stay among the values."""

    values: dict[str, Any]
    config: Any
    unknown: tuple[str, ...] = ()
    problem: str = ""


def read_stored_settings(
    cls: type[Config], stored: dict[str, Any], run: Path | None = None
) -> StoredSettings:
    """Read plain settings that an earlier version may have stored, in the folder `run`."""
    renamed = rename_settings(cls.stored_as, stored)
    values, unknown = copy.deepcopy(renamed), []
    while True:
        try:
            config = cls.model_validate(values, context={"run": run})
            break
        except ValidationError as e:
            cut = [found for error in e.errors() if (found := _cut(values, error["loc"]))]
            if not cut:
                return StoredSettings(renamed, None, (), e.errors()[0]["msg"])
            unknown += cut
        except UserError as e:  # the file of a class of the user's own is gone
            return StoredSettings(renamed, None, (), str(e))
    filled = config.model_dump(mode="json")
    for path, value in unknown:
        node = filled
        for parent in path[:-1]:
            node[parent] = node[parent] if isinstance(node.get(parent), dict) else {}
            node = node[parent]
        node[path[-1]] = value
    return StoredSettings(filled, config, tuple(".".join(path) for path, _ in unknown))


def _cut(values: dict[str, Any], loc: tuple[str | int, ...]) -> tuple[tuple[str, ...], Any] | None:
    """Take the value at `loc`, as pydantic names it, out of `values`. Returns (its path, the value); None if
    there is none, or none any more."""
    node, path = values, []
    for i, name in enumerate(loc):
        if name not in node:
            return None
        path.append(str(name))
        # what follows a value names an alternative of its type, or a place in a list
        if i == len(loc) - 1 or not isinstance(node[name], dict):
            return tuple(path), node.pop(name)
        node = node[name]
    return None


def differing_paths(a: Any, b: Any, prefix: str = "") -> list[str]:
    """Return the dotted paths at which two plain configs differ."""
    if not isinstance(a, dict) or not isinstance(b, dict):
        return [] if a == b else [prefix.rstrip(".")]
    return [
        path
        for name in sorted({*a, *b})
        for path in differing_paths(a.get(name), b.get(name), f"{prefix}{name}.")
    ]


def without_settings(values: dict[str, Any], paths: Set[str], prefix: str = "") -> dict[str, Any]:
    """Return a copy of plain settings without the values at dotted `paths`."""
    return {
        name: without_settings(value, paths, f"{prefix}{name}.") if isinstance(value, dict) else value
        for name, value in values.items()
        if prefix + name not in paths
    }


def lookup(name: str, choices: Mapping[Any, T], what: str, hint: str = "") -> T:
    """Return `choices[name]`.

    Raises:
        UserError: there is none; names all, or the five nearest of many and with `hint` how to list all.
    """
    if name in choices:
        return choices[name]
    known = list(choices)
    if len(known) <= MANY:
        raise UserError(f"unknown {what} '{name}'{suggest(name, known)}; there are: {', '.join(known)}")
    nearest = difflib.get_close_matches(name, known, n=5, cutoff=0.0)
    raise UserError(
        f"unknown {what} '{name}'; the nearest: {', '.join(nearest)}{f'; {hint}' if hint else ''}"
    )


def suggest(name: str, known: list[str]) -> str:
    """Return "; did you mean ...?" with the known names that are like `name`; "" if none is."""
    # "lr" for "optim.lr": people know the last part of a path, and forget where it belongs
    tail = {k.rsplit(".", 1)[-1]: k for k in known}
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    close += [
        tail[t] for t in difflib.get_close_matches(name.rsplit(".", 1)[-1], list(tail), n=2, cutoff=0.7)
    ]
    close = list(dict.fromkeys(close))
    return f"; did you mean {' or '.join(close[:3])}?" if close else ""


def user_files(name: str) -> list[Path]:
    """The user's file that a name "FILE.py" or "FILE.py:ENTRY" means; none of any other name."""
    file, _, entry = name.partition(".py:")
    return [Path(f"{file}.py" if entry else name)] if entry or name.endswith(".py") else []


def load_user_file(path: Path | str) -> ModuleType:
    """The module that a Python file of the user's makes. Files of equal content are one module, wherever they
    lie, so that a class and its copy beside a stored model are the same class.

    Raises:
        UserError: there is no such file, or it fails when it runs; the line that failed is named.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file")
    with reading(path, "a Python file", "give another"):
        source = read_bytes(path)
    name = f"polyglance_user_{path.stem}_{hashlib.sha256(source).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path}: no Python file; its name must end with .py")
    # dataclasses and pydantic look the module of a class up while the file still runs
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    _user_sources[name] = UserSource(path.name, source)
    # the copy in a stored run names modules as they were called then
    for old, new in MODULES.items():
        if old.encode() in source:
            sys.modules[old] = importlib.import_module(new)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as e:
        del sys.modules[name]
        raise user_file_error(e, path) from e
    return module


def user_file_error(error: BaseException, path: Path, where: str = "") -> UserError:
    """Return the line for an `error` that a Python file of the user's raised: its place in the file, and
    `where` it was at work."""
    line = error.lineno if isinstance(error, SyntaxError) else _line_in(error, path)
    if not line or isinstance(error, SyntaxError):  # it did not begin to run
        kind, advice = recognize(path, "a Python file")
        if kind:
            return UserError(f"{path}: not to be read as a Python file ({kind}); {advice}")
    message = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
    place = f"{path}:{line}" if line else f"{path}"
    return UserError(f"{place}: {type(error).__name__}{message and ': '}{message}{where}")


def user_source(item: Callable) -> UserSource | None:
    """The user's file that defines a class or function; None: ours does."""
    return _user_sources.get(item.__module__)


def load_user_class(path: Path | str, base: type[T], name: str | None = None) -> type[T]:
    """The one class derived from `base` that a Python file of the user's defines, or the one called `name`.

    Raises:
        UserError: as of `load_user_file`; it defines no such class, or several and `name` does not say which.
    """
    module = load_user_file(path)
    classes = {
        key: value
        for key, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, base) and value.__module__ == module.__name__
    }
    if name is not None:
        if name not in classes:
            known = f"; it has: {', '.join(classes)}" if classes else ""
            raise UserError(f"{path}: no class {name} derived from {base.__name__}{known}")
        found = classes[name]
    else:
        # a class that another one of the file builds on is not meant
        last = {k: v for k, v in classes.items() if not any(v in c.__mro__[1:] for c in classes.values())}
        if len(last) != 1:
            what = f"several classes ({', '.join(last)})" if last else "no class"
            hint = f"; say which: {path}:{next(iter(last))}" if last else ""
            raise UserError(f"{path}: {what} derived from {base.__name__}{hint}")
        found = next(iter(last.values()))
    if inspect.isabstract(found):
        missing = ", ".join(sorted(found.__abstractmethods__))  # type: ignore[attr-defined]
        raise UserError(f"{path}: {found.__name__} has no {missing}")
    return found


def _line_in(error: BaseException, path: Path) -> int | None:
    """The last line of `path` that ran before `error`."""
    frames = reversed(traceback.extract_tb(error.__traceback__))
    return next((f.lineno for f in frames if Path(f.filename).resolve() == path.resolve()), None)


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
