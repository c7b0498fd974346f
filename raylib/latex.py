"""Tables for papers."""

from collections.abc import Sequence

SPECIAL = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "\n": " ",
}


def escape(text: str) -> str:
    """`text` as LaTeX prints it; a negative number with a minus, not a hyphen."""
    sign, rest = ("$-$", text[1:]) if text[:1] == "-" and text[1:2].isdigit() else ("", text)
    return sign + "".join(SPECIAL.get(character, character) for character in rest)


def table(rows: Sequence[Sequence[str]], caption: str, words: int = 1) -> str:
    """`rows`, the first of which is the head, as a table environment that needs no package; after the first
    `words` columns all are figures, and aligned to the right."""
    head, *rest = (" & ".join(map(escape, row)) + r" \\" for row in rows)
    columns = "l" * words + "r" * (len(rows[0]) - words)
    begin = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape(caption)}}}",
        rf"\begin{{tabular}}{{{columns}}}",
    ]
    rule, end = r"\hline", [r"\end{tabular}", r"\end{table}"]
    return "\n".join([*begin, rule, head, rule, *rest, rule, *end])
