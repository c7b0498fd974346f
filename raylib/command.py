"""Command lines: how a mistake of the user ends, and how a recipe becomes a run."""

import argparse
import functools
import os
import select
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from raylib.config import Config, dump_config, load_config, lookup, override
from raylib.console import spell_commands
from raylib.errors import UserError, disk_full_error
from raylib.help import recipe_list, settings_page, table, wrap

RESUME_HINT = "the same command resumes from the newest checkpoint"
RECIPE_SETTINGS = "Settings with their values here; each path=value changes one:"

Main = Callable[[Sequence[str]], int]


def entry_point(restart_hint: str = "") -> Callable[[Main], Callable[..., int]]:
    """Make `main(arguments)` an entry point: without arguments it takes the process's. A `UserError`, or a
    full disk, is one line on stderr and exit code 2; Ctrl-C is one, with `restart_hint`, and exit code
    130. SIGTERM, by which Slurm, Kubernetes and `ray job stop` end a process, is taken for Ctrl-C."""

    def decorate(main: Main) -> Callable[..., int]:
        @functools.wraps(main)
        def run(arguments: Sequence[str] | None = None) -> int:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
            try:
                code = main(sys.argv[1:] if arguments is None else arguments)
                sys.stdout.flush()
                return code
            except KeyboardInterrupt:
                print("; ".join(filter(None, ("interrupted", restart_hint))), file=sys.stderr)
                return 130
            except BrokenPipeError:
                if _is_read():  # another pipe broke
                    raise
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the exit
                return 141  # as the shell says of SIGPIPE
            except (UserError, OSError) as e:
                # any other error of the system is a bug or a broken machine: it keeps its traceback
                line = f"error: {disk_full_error(e) if isinstance(e, OSError) else e}"
                print(spell_commands(line), file=sys.stderr)
                return 2

        return run

    return decorate


def _is_read() -> bool:
    """Return whether anybody still reads the output: after `| head` nobody does."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return not any(event & select.POLLERR for _, event in poll.poll(0))


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
            for block in textwrap.dedent(text).strip("\n").split("\n\n")
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
    program, description = spell_commands(f"python -m {command}"), spell_commands(doc or "")
    return argparse.ArgumentParser(
        prog=program, description=description, formatter_class=HelpFormatter, **options
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
    config_class: type[Config]
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
        config = load_config(stage.config_class, Path(given.config))
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
    config = override(config, settings)
    if given.help:
        doc = given.config or spell_commands(stage.recipes[given.recipe].__doc__ or "")
        start = f"--config {given.config}" if given.config else given.recipe
        print(f"usage: {parser.prog} {start} [path=value ...]\n\n{wrap(' '.join(doc.split()))}\n")
        print(f"{RECIPE_SETTINGS}\n\n{settings_page(stage.config_class, config=config, intro=False)}")
    elif given.print_config:
        print(dump_config(config))
    else:
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
