"""JSON as its standard has it: whatever is no JSON, or what no two readers need read alike, is a `ValueError`
in words."""

import json
import math
import re
from typing import Any

DEPTH = 100  # of lists and objects in one another
DIGITS = 40  # of an integer: 128 bits, as states of random generators have
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(data: bytes | str, finite: bool = True) -> Any:
    """Parse JSON in UTF-8, or UTF-16 or UTF-32, with or without a byte order mark.

    finite: NaN and Infinity are refused; else read as Python writes them.
    Raises:
        ValueError: it is none; nested deeper than `DEPTH`; an integer of more than `DIGITS` digits; a name
            that an object has twice with different values; half of a surrogate pair, which no file can hold.
    """
    text = data if isinstance(data, str) else data.decode(json.detect_encoding(data))
    hooks: dict[str, Any] = {"parse_constant": _refuse, "parse_float": _finite_float} if finite else {}
    try:
        value = json.loads(
            text.removeprefix("\ufeff"), parse_int=_integer, object_pairs_hook=_object, **hooks
        )
    except RecursionError:
        raise ValueError(f"nested deeper than {DEPTH}") from None
    if text.count("[") + text.count("{") > DEPTH:
        _check_depth(value)
    if SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as e:
            raise ValueError(f"half of a surrogate pair, {e.object[e.start : e.end]!a}") from None
    return value


def _check_depth(value: Any) -> None:
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
