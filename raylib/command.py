"""Command lines: how a mistake of the user ends, and how a recipe becomes a run."""

import argparse
import functools
import os
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from raylib.config import ConfigT, dump_config, load_config, lookup, override
from raylib.console import spell_commands
from raylib.errors import UserError, disk_full_error

RESUME_HINT = "the same command resumes from the newest checkpoint"

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
                return main(sys.argv[1:] if arguments is None else arguments)
            except KeyboardInterrupt:
                print("; ".join(filter(None, ("interrupted", restart_hint))), file=sys.stderr)
                return 130
            except (UserError, OSError) as e:
                # any other error of the system is a bug or a broken machine: it keeps its traceback
                line = f"error: {disk_full_error(e) if isinstance(e, OSError) else e}"
                print(spell_commands(line), file=sys.stderr)
                return 2

        return run

    return decorate


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


def command_parser(command: str, doc: str | None) -> argparse.ArgumentParser:
    """Return the parser of `python -m COMMAND`, which its help calls as the user did; `doc`: its help begins
    with this."""
    program, description = spell_commands(f"python -m {command}"), spell_commands(doc or "")
    return argparse.ArgumentParser(prog=program, description=description, formatter_class=HelpFormatter)


def run_recipe(
    arguments: Sequence[str],
    package: str,
    doc: str,
    recipes: Mapping[str, Callable[[], ConfigT]],
    kind: type[ConfigT],
    run: Callable[[ConfigT], Any],
    example: str,
) -> int:
    """`python -m PACKAGE RECIPE [path=value ...]`, or `--config FILE`: run the config that they make. `doc`:
    of its --help; `example`: of settings."""
    lines = "\n".join(f"  {name:20s} {recipe.__doc__}" for name, recipe in recipes.items())
    parser = command_parser(package, f"{doc}\nrecipes:\n{lines}")
    parser.add_argument("recipe", nargs="?", help="a recipe's name")
    parser.add_argument("settings", nargs="*", metavar="path=value", help=f"such as {example}")
    parser.add_argument(
        "--config", help="start from a stored config.json, or a YAML file, instead of a recipe"
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and stop")
    given = parser.parse_intermixed_args(arguments)
    if given.config:
        settings = [given.recipe, *given.settings] if given.recipe else given.settings
        config = load_config(kind, Path(given.config))
    elif given.recipe:
        settings = given.settings
        config = lookup(given.recipe, recipes, "recipe")().model_copy(update={"recipe": given.recipe})
    else:
        parser.print_help()
        return 2
    if "POLYGLANCE_RUNS" in os.environ:  # a job's working directory is a copy that goes away
        config = override(config, [f"runs={os.environ['POLYGLANCE_RUNS']}"])
    config = override(config, settings)
    if given.print_config:
        print(dump_config(config))
    else:
        run(config)
    return 0
