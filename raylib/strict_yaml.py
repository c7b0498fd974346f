"""YAML of plain values, as configs have it: nothing else is built, and nothing grows beyond its file."""

import math
from typing import Any

import yaml

from raylib.strict_json import DEPTH, DIGITS, check_depth

MAX_BYTES = 1 << 20
MAX_VALUES = 100_000  # after aliases are followed
MAX_NUMBER = 100  # characters of one


class PlainLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which refuses names that a mapping has twice, and numbers as long as a file."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for place, (key, _) in enumerate(node.value):
            if isinstance(key, yaml.ScalarNode) and key.value in names[:place]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} twice in one mapping", key.start_mark
                )
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        # `<<` of what has `<<` itself would have each name as often as there are ways to it
        names = [
            (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key) for key, _ in node.value
        ]
        node.value = list(dict(zip(names, node.value, strict=True)).values())

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """Construct an integer or a float."""
        if len(node.value) > MAX_NUMBER:
            problem = f"a number of {len(node.value):,} characters"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        is_integer = node.tag.endswith(":int")
        return self.construct_yaml_int(node) if is_integer else self.construct_yaml_float(node)


for kind in ("int", "float"):
    PlainLoader.add_constructor(f"tag:yaml.org,2002:{kind}", PlainLoader.construct_number)


def parse_yaml(data: bytes) -> Any:
    """Parse one YAML document in UTF-8 or UTF-16: mappings with names, lists, strings, numbers, booleans,
    null.

    Raises:
        ValueError: it is none, or holds something else (a date, a tag of Python's); a name twice in a
            mapping; aliases that expand to more than `MAX_VALUES` values, or lead in a circle; nested deeper
            than `DEPTH`. The line is named where it is known.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"{len(data):,} bytes, of which {MAX_BYTES:,} may be")
    try:
        value = yaml.load(data, PlainLoader)
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{place}{e.problem or e.context}") from None
    except yaml.reader.ReaderError as e:
        raise ValueError(f"{e.reason} at {e.position:,}") from None
    except RecursionError:
        raise ValueError(f"nested deeper than {DEPTH}") from None
    _count(value, {}, "the file")
    check_depth(value)
    return value


def _count(value: Any, counts: dict[int, int | None], place: str) -> int:
    """Return how many values lie in a value, each alias followed, and check that they are plain; counts: by
    the identity of those that were counted, None of those that are being counted."""
    if isinstance(value, str | int | float | None):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{place} is not finite")
        if isinstance(value, int) and abs(value) >= 10**DIGITS:
            raise ValueError(f"{place} is an integer of more than {DIGITS} digits")
        if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
            raise ValueError(f"half of a surrogate pair in {place}")
        return 1
    if not isinstance(value, dict | list):
        raise ValueError(f"{place} is a {type(value).__name__}; put it in quotes")
    if id(value) in counts:
        if (known := counts[id(value)]) is None:
            raise ValueError(f"an alias of what {place} lies in")
        return known
    counts[id(value)], total = None, 1
    for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(value, dict) and not isinstance(name, str):
            raise ValueError(f"the name {name!r} in {place} is no string; put it in quotes")
        total += _count(inner, counts, f"{name!r}")
    if total > MAX_VALUES:
        raise ValueError(f"its aliases expand to more than {MAX_VALUES:,} values")
    counts[id(value)] = total
    return total
