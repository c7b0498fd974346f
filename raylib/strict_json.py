"""JSON as its standard has it: whatever is no JSON, or what no two readers need read alike, is a `ValueError`
in words; and the shapes and names that values read from files must have."""

import json
import math
import re
from functools import cache
from pathlib import PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

DEPTH = 100  # of lists and objects in one another
DIGITS = 40  # of an integer: 128 bits, as states of random generators have
CONTROLS = re.compile(r"[\0-\x1f\x7f]")
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(data: bytes | str, finite: bool = True) -> Any:
    """Parse JSON in UTF-8, or UTF-16 or UTF-32, with or without a byte order mark.

    finite: NaN and Infinity are refused; else read as Python writes them.
    Raises:
        ValueError: it is none; nested deeper than `DEPTH`; an integer of more than `DIGITS` digits; a name
            that an object has twice with different values; half of a surrogate pair, which no file can hold.
    """
    text = data.removeprefix("\ufeff") if isinstance(data, str) else data.decode(json.detect_encoding(data))
    hooks: dict[str, Any] = {"parse_constant": _refuse, "parse_float": _finite_float} if finite else {}
    try:
        value = json.loads(text, parse_int=_integer, object_pairs_hook=_object, **hooks)
    except RecursionError:
        raise ValueError(f"nested deeper than {DEPTH}") from None
    if text.count("[") + text.count("{") > DEPTH:
        check_depth(value)
    if SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as e:
            raise ValueError(f"half of a surrogate pair, {e.object[e.start : e.end]!a}") from None
    return value


def check_depth(value: Any) -> None:
    """Check that lists and dicts are not nested too deeply.

    Raises:
        ValueError: they are.
    """
    level, depth = [value], 0
    while level := [v for v in level if isinstance(v, dict | list)]:
        if (depth := depth + 1) > DEPTH:
            raise ValueError(f"nested deeper than {DEPTH}")
        level = [inner for v in level for inner in (v.values() if isinstance(v, dict) else v)]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        for name, value in pairs:
            if repr(found[name]) != repr(value):
                raise ValueError(f"{name!r} twice in one object, with different values")
    return found


def _integer(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"an integer of {len(digits):,} digits")
    return int(digits)


def _finite_float(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        raise ValueError(f"{digits[:DIGITS]} is too large a number")
    return number


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


def check_shape(values: Any, shape: Any) -> None:
    """Check that plain values have the types that `shape` says.

    Raises:
        ValueError: one has not; names the first, by its place.
    """
    try:
        _adapter(shape).validate_python(values, strict=True)
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        given = "" if first["type"] in ("missing", "value_error") else f", not {repr(first['input'])[:50]}"
        problem = first["msg"].removeprefix("Value error, ").replace("Input should", "should")
        raise ValueError(f"{place or 'it'}: {problem[0].lower()}{problem[1:]}{given}") from None


@cache
def _adapter(shape: Any) -> TypeAdapter:
    return TypeAdapter(shape)


def check_member(name: object) -> str:
    """Return a name that a file has for something beside or below it.

    Raises:
        ValueError: it is none, or leads out of the folder.
    """
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    if not isinstance(name, str) or not parts or parts[0] == "/" or ".." in parts or CONTROLS.search(name):
        raise ValueError(f"{name!r:.100} is no name of a file in its folder")
    return name


def _check_plain(name: str) -> str:
    if "/" in check_member(name):
        raise ValueError(f"{name!r:.100} is no name without folders")
    return name


# Types for shapes
MemberName = Annotated[str, AfterValidator(check_member)]
PlainName = Annotated[str, AfterValidator(_check_plain)]
Count = Annotated[int, Field(ge=0, lt=1 << 53)]
