"""Regular expressions of strangers: those in a tokenizer.json, by which its texts are cut.

Oniguruma, which the `tokenizers` library matches them with, goes back and tries again; it gives up after ten
million tries at one place of a text, a tenth of a second. A pattern made for it takes as long at every
character. Published ones (CLIP's, GPT-2's to GPT-4o's, Llama's, Qwen's, BLOOM's) repeat single characters,
at most two kinds in a row, so that a text of n characters takes at most n^3 tries, in fact about n.
"""

import re
from typing import Any, NamedTuple

MAX_REPEATS = 2  # in a row, without an end or with more than one time
MAX_LENGTH, MAX_PATTERNS = 1 << 14, 100  # characters of one; in a file
TOKEN = re.compile(
    r"\\[pP]\{[^}]*\}|\\x\{[^}]*\}|\\.|\(\?[ims-]*[:)]|\(\?(?:[=!>]|<[=!]|<\w+>)|[*+?]|\{\d*,?\d*\}|.",
    re.DOTALL,
)
REFERENCE = re.compile(r"\\[gk1-9]")  # to a group, which may call itself


class _Group(NamedTuple):
    """A part in brackets. is_open: something in it repeats, or it has alternatives; repeats: in a row, of the
    alternative that is read; most: of any."""

    is_open: bool = False
    repeats: int = 0
    most: int = 0

    def add(self, repeats: int, is_open: bool) -> "_Group":
        total = self.repeats + repeats
        return _Group(self.is_open or is_open, total, max(self.most, total))


def check_patterns(value: Any) -> None:
    """Check every `{"Regex": PATTERN}` in the values of a tokenizer.json.

    Raises:
        ValueError: a pattern that may take very long, or that is not known not to.
    """
    found, todo = [], [value]
    while todo:
        each = todo.pop()
        if isinstance(each, dict):
            found += [each["Regex"]] if isinstance(each.get("Regex"), str) else []
            todo += each.values()
        elif isinstance(each, list):
            todo += each
    if len(found) > MAX_PATTERNS:
        raise ValueError(f"{len(found):,} regular expressions, of which {MAX_PATTERNS} may be")
    for pattern in dict.fromkeys(found):
        if problem := describe_problem(pattern):
            raise ValueError(f"its regular expression {pattern[:60]!r} {problem}")


def describe_problem(pattern: str) -> str:
    """Say why matching may take very long; "": it does not."""
    if len(pattern) > MAX_LENGTH:
        return f"has more than {MAX_LENGTH:,} characters"
    stack = [_Group()]
    last: _Group | None = None  # what a sign of repetition would repeat; None: nothing, or such a sign
    place = 0
    while place < len(pattern):
        token = TOKEN.match(pattern, place)
        assert token is not None  # the last alternative takes any character
        word, place = token[0], token.end()
        if word == "[":
            place, last = _end_of_class(pattern, place), _Group()
        elif word == "(" or (word.startswith("(?") and word[-1] != ")"):
            if pattern.startswith("?", place) and word == "(":
                return "has a kind of brackets that is not known here"
            stack.append(_Group())
            last = None
        elif word == ")":
            if len(stack) == 1:
                return "has brackets that do not match"
            last = stack.pop()
            stack[-1] = stack[-1].add(last.most, last.is_open)
        elif word == "|":
            stack[-1], last = stack[-1]._replace(is_open=True, repeats=0), None
        elif word in ("*", "+", "?") or re.fullmatch(r"\{\d*,?\d+\}|\{\d+,\}", word):
            if last is None:
                if word not in ("?", "+"):  # these make a repetition lazy, or possessive
                    return "repeats what repeats"
            elif word in ("?", "{0,1}", "{1}", "{,1}"):
                stack[-1] = stack[-1].add(0, True)
            elif last.is_open:
                return "repeats what repeats, or has alternatives"
            else:
                stack[-1] = stack[-1].add(1, True)
            last = None
        elif REFERENCE.match(word):
            return "refers to its own parts"
        else:
            last = _Group()
    if len(stack) > 1:
        return "has brackets that do not match"
    return f"repeats {stack[0].most} parts in a row" if stack[0].most > MAX_REPEATS else ""


def _end_of_class(pattern: str, place: int) -> int:
    """Return where the set of characters ends whose bracket stands before `place`; sets may lie in it."""
    depth, is_first = 1, True
    while place < len(pattern) and depth:
        character = pattern[place]
        place += 2 if character == "\\" else 1
        if character == "^" and is_first:
            continue
        if character == "[":
            depth += 1
        elif character == "]" and not is_first:
            depth -= 1
        is_first = character == "["
    return place
