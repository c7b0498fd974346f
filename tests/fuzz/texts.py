"""Damage to texts that keeps their form: other values in JSON, other cells, lines and words."""

import json
import re
from random import Random
from typing import Any

from tests.fuzz import bombs

WORD = re.compile(rb"[^\s,:;\"'\[\]{}()]+")


def is_text(data: bytes) -> bool:
    try:
        return bool(data) and "\0" not in data.decode()
    except UnicodeDecodeError:
        return False


def json_tree(data: bytes, rng: Random) -> bytes | None:
    """Other types and values in the place of one to three, in a file or a line of JSON."""
    lines = data.split(b"\n")
    chosen, whole = rng.randrange(len(lines)), False
    try:
        tree = json.loads(data)
        whole = True
    except (ValueError, RecursionError):
        try:
            tree = json.loads(lines[chosen])
        except (ValueError, RecursionError):
            return None
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        tree = _change_node(tree, rng)
    text = json.dumps(tree, ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")
    if rng.random() < 0.1:  # a key that comes twice: parsers disagree on which counts
        text = re.sub(rb'("[^"\\]+"): ("[^"\\]*"|\d+)', rb"\1: null, \1: \2", text, count=1)
    return text + b"\n" if whole else b"\n".join([*lines[:chosen], text, *lines[chosen + 1 :]])


def _change_node(tree: Any, rng: Random) -> Any:
    """A tree with one of its nodes changed, which is the root at times."""
    if not isinstance(tree, dict | list) or not tree or rng.random() < 0.05:
        return _other_value(tree, rng)
    tree = dict(tree) if isinstance(tree, dict) else list(tree)
    key = rng.choice(list(tree)) if isinstance(tree, dict) else rng.randrange(len(tree))
    act = rng.random()
    if act < 0.1:
        del tree[key]
    elif act < 0.17 and isinstance(tree, dict):
        tree[rng.choice(bombs.strings())] = tree.pop(key) if rng.random() < 0.5 else 0
    elif act < 0.2 and isinstance(tree, list):
        tree += tree[: rng.choice((1, 2, 200))]
    elif (act < 0.5 and isinstance(tree[key], dict | list)) or (
        isinstance(tree[key], dict | list) and rng.random() < 0.8
    ):
        tree[key] = _change_node(tree[key], rng)
    else:
        tree[key] = _other_value(tree[key], rng)
    return tree


def _other_value(value: Any, rng: Random) -> Any:
    near: list[Any] = [[value], {"a": value}, str(value)]
    if isinstance(value, int | float):
        near += [value + 1, -value, float(value), value * 1000]
    if isinstance(value, str):
        near += [list(value), value + "x", value.upper(), value + "\n", "../" + value, repr(value)]
    if isinstance(value, list):
        near += [value[::-1], value[:-1], dict(enumerate(map(str, value)))]
    return rng.choice(near) if rng.random() < 0.4 else rng.choice(bombs.json_values())


def text_words(data: bytes, rng: Random) -> bytes | None:
    """Other words and numbers in a text, table or config."""
    words = list(WORD.finditer(data, 0, 200_000)) if is_text(data) else []
    if not words:
        return None
    word = rng.choice(words)
    new = rng.choice((*bombs.strings(), "0", "-1", "1e400", "nan", "null", "true", "4294967296", "[", "*a"))
    return data[: word.start()] + new.encode(errors="surrogatepass") + data[word.end() :]


def text_lines(data: bytes, rng: Random) -> bytes | None:
    """Lines and cells of a text that are missing, twice there, in other order, longer, or of other width."""
    if not is_text(data) or b"\n" not in data:
        return None
    lines = data.split(b"\n")
    number = rng.randrange(len(lines))
    act, line = rng.randrange(9), lines[number]
    cells = line.split(b"\t")
    if act == 0:
        del lines[number]
    elif act == 1:
        lines.insert(number, line)
    elif act == 2:
        lines.insert(rng.randrange(len(lines)), lines.pop(number))
    elif act == 3:
        lines[number] = line[: rng.randrange(len(line) + 1)]
    elif act == 4:
        lines[number] = line + rng.choice((b"\t", b"\tx", b" ", b",", b"\r", b"\0", line))
    elif act == 5:
        lines[number] = rng.choice(
            (b"", b" ", b"\t", b"\t" * 20, b"#", b"a" * 100_000, b"\xff\xfe", b"{}", b"[]")
        )
    elif act == 6:
        lines[number] = line.replace(b"\t", b" ") if b"\t" in line else line.replace(b" ", b"\t")
    elif act == 7:
        cells[rng.randrange(len(cells))] = rng.choice(bombs.strings()).encode(errors="surrogatepass")
        lines[number] = b"\t".join(cells)
    else:
        rng.shuffle(cells)
        lines[number] = b"\t".join(cells[: rng.randrange(1, len(cells) + 1)])
    return b"\n".join(lines)


def yaml_tags(data: bytes, rng: Random) -> bytes | None:
    """A text with YAML's tags, anchors and aliases in it."""
    if not is_text(data) or b":" not in data:
        return None
    return data.rstrip() + b"\n" + rng.choice(bombs.yaml_texts())
