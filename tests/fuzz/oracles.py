"""Readings that several records share, by other means than the product's."""

import json
from pathlib import Path
from typing import Any


def load_json(data: Path | bytes) -> Any:
    """JSON in UTF-8, -16 or -32, as the standard library reads it; a key twice in an object with
    different values, and a number that is not finite, are refused, as the product refuses them."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        assert all(repr(found[key]) == repr(value) for key, value in pairs), "a key twice"
        return found

    def number(text: str) -> float:
        value = float(text)
        assert abs(value) < float("inf"), f"{text} is not finite"
        return value

    raw = data if isinstance(data, bytes) else data.read_bytes()
    return json.loads(raw, object_pairs_hook=once, parse_float=number, parse_constant=number)


def load_jsonl(data: Path | bytes) -> list[Any]:
    """The value of every line of JSON that is not empty; UTF-8, also with its mark before the first."""
    raw = data if isinstance(data, bytes) else data.read_bytes()
    return [load_json(line) for line in raw.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
