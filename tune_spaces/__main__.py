"""Command line of searches.

    python -m tune_spaces SPACE recipe=RECIPE [num_trials=20 gpus_per_trial=0.25 dev_sets=english_dev
                                 path=value ...]
    python -m tune_spaces SPACE                what the space holds, and its published settings

SPACE is one of those below, or a Python file of yours that defines SPACE, a dict or a
`raylib.search.space.Space`. Settings are the search's (`raylib/search/config.py`), or else the recipe's, by
their paths; where both have one of a name, `recipe.select=last` is the recipe's.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from raylib.command import entry_point
from raylib.config import is_setting, load_user_file, lookup, override, setting_paths, suggest
from raylib.errors import UserError
from raylib.search.config import SearchConfig
from raylib.search.space import Space, describe_knobs
from tune_spaces.spaces import SPACES


@entry_point("the same command goes on")
def main(arguments: Sequence[str]) -> int:
    """Run a command line."""
    lines = "\n".join(
        f"  {name:14s} {space.summary} (recipe={space.recipe})" for name, space in SPACES.items()
    )
    parser = argparse.ArgumentParser(
        prog="python -m tune_spaces",
        description=f"{__doc__}\nspaces:\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("space", nargs="?", help="a space's name, or a Python file")
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="name=value",
        help="such as recipe=scenes_xgqa num_trials=30 model=MODEL",
    )
    given = parser.parse_args(arguments)
    if not given.space:
        parser.print_help()
        return 2
    name, space = open_space(given.space)
    if not given.settings:
        print(f"{name}: {space.summary}\n\n{describe_knobs(space.knobs)}")
        print(
            "\n".join(
                ["", *(f"published: {setting}" for setting in space.published), f"grid: {dict(space.grid)}"]
            )
        )
        return 0
    from raylib.search.search import run_search
    from tune_spaces.jobs import find_job

    search, rest = parse(given.settings, space.recipe)
    job, base = find_job(search.recipe)
    for setting in rest:
        path, known = setting.partition("=")[0], [*SearchConfig.model_fields, *setting_paths(type(base))]
        if not is_setting(type(base), path):
            raise UserError(f"unknown setting '{path}'{suggest(path, known)}")
    base = override(base, rest)
    if not search.name:
        search = search.model_copy(update={"name": f"{name}_{search.recipe}"})
    run_search(search, name, space, job, base)
    return 0


def open_space(given: str) -> tuple[str, Space]:
    """A space by its name, or from a file.

    Raises:
        UserError: there is no such space; a file that defines none.
    """
    if not given.endswith(".py"):
        return given, lookup(given, SPACES, "space")
    found = vars(load_user_file(given)).get("SPACE")
    if isinstance(found, dict):
        found = Space(f"of {given}", "", found)
    if not isinstance(found, Space):
        raise UserError(f"{given}: it defines no SPACE, a dict from config path to distribution")
    return Path(given).stem, found


def parse(settings: list[str], recipe: str) -> tuple[SearchConfig, list[str]]:
    """(the search's settings, those that are the recipe's), of assignments; `recipe`: what is searched if
    they name none.

    Raises:
        UserError: not of the form name=value; a search setting of the wrong kind; no recipe.
    """
    own = [s for s in settings if s.partition("=")[0] in SearchConfig.model_fields]
    if not recipe and not any(s.startswith("recipe=") for s in own):
        raise UserError("recipe= is missing: say what the trials run")
    runs = os.environ.get("POLYGLANCE_RUNS", "runs")  # a job's working directory is a copy that goes away
    rest = [s.removeprefix("recipe.") for s in settings if s not in own]
    return override(SearchConfig(recipe=recipe, runs=runs), own), rest


if __name__ == "__main__":
    sys.exit(main())
