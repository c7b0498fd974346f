"""Search for settings of a recipe, in a space.

    python -m tune_spaces SPACE [recipe=RECIPE num_trials=20 path=value ...]
    python -m tune_spaces SPACE             show a space and its published settings
    python -m tune_spaces settings [PATH]   say what the settings of a search mean

SPACE is one of those below, or a Python file of yours that defines SPACE, a dict or a
`raylib.search.space.Space`. Settings are the search's, or else the recipe's, by their paths; where both have
one of a name, `recipe.select=last` is the recipe's.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from raylib.command import command_parser, entry_point, show_settings
from raylib.config import is_setting, load_user_file, lookup, override, setting_paths, suggest
from raylib.errors import UserError
from raylib.help import table, wrap
from raylib.search.config import SearchConfig
from raylib.search.space import Space, describe_knobs
from tune_spaces.spaces import SPACES


@entry_point("the same command goes on")
def main(arguments: Sequence[str]) -> int:
    """Run a command line."""
    if arguments and arguments[0] == "settings":
        return show_settings(arguments[1:], "tune_spaces", SearchConfig)
    spaces = {name: f"{space.summary} (recipe={space.recipe})" for name, space in SPACES.items()}
    parser = command_parser("tune_spaces", __doc__, epilog=f"spaces:\n{table(spaces)}", add_help=False)
    parser.add_argument("space", nargs="?", help="a space's name, or a Python file")
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="name=value",
        help="such as recipe=scenes_xgqa num_trials=30 model=MODEL",
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this, or the space")
    given = parser.parse_intermixed_args(arguments)
    if not given.space:
        parser.print_help()
        return 0 if given.help else 2
    name, space = open_space(given.space)
    if given.help or not given.settings:
        published = [wrap(f"published: {setting}", rest="  ") for setting in space.published]
        print(f"{wrap(f'{name}: {space.summary}')}\n\n{describe_knobs(space.knobs)}\n")
        print("\n".join([*published, wrap(f"grid: {dict(space.grid)}", rest="  ")]))
        return 0
    from raylib.search.search import run_search
    from tune_spaces.jobs import find_job

    search, recipe_settings = parse_settings(given.settings, space.recipe)
    job, base = find_job(search.recipe)
    for setting in recipe_settings:
        # `override` would know the recipe's settings alone, and name none of the search's that may be meant
        path, known = setting.partition("=")[0], [*SearchConfig.model_fields, *setting_paths(type(base))]
        if not is_setting(type(base), path):
            raise UserError(f"unknown setting '{path}'{suggest(path, known)}")
    if not search.name:
        search = override(search, [f"name={name}_{search.recipe}"])
    run_search(search, name, space, job, override(base, recipe_settings))
    return 0


def open_space(name_or_file: str) -> tuple[str, Space]:
    """Return (name, space) of a space by its name, or from a Python file.

    Raises:
        UserError: there is no such space; a file that defines none.
    """
    if not name_or_file.endswith(".py"):
        return name_or_file, lookup(name_or_file, SPACES, "space")
    space = vars(load_user_file(name_or_file)).get("SPACE")
    if isinstance(space, dict):
        space = Space(f"of {name_or_file}", "", space)
    if not isinstance(space, Space):
        raise UserError(f"{name_or_file}: it defines no SPACE, a dict from config path to distribution")
    return Path(name_or_file).stem, space


def parse_settings(settings: list[str], recipe: str) -> tuple[SearchConfig, list[str]]:
    """Return (the search's settings, assignments that are the recipe's); `recipe`: of the trials, if the
    settings name none.

    Raises:
        UserError: not of the form name=value; a search setting of the wrong kind; no recipe.
    """
    for_search = [s for s in settings if s.partition("=")[0] in SearchConfig.model_fields]
    if not recipe and not any(s.startswith("recipe=") for s in for_search):
        raise UserError("recipe= is missing: the recipe that the trials run")
    runs = os.environ.get("POLYGLANCE_RUNS", "runs")  # a job's working directory is a copy that goes away
    for_recipe = [s.removeprefix("recipe.") for s in settings if s not in for_search]
    return override(SearchConfig(recipe=recipe, runs=runs), for_search), for_recipe


if __name__ == "__main__":
    sys.exit(main())
