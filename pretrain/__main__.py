"""Command line of pretraining.

    python -m pretrain RECIPE [path=value ...] [--print-config]
    python -m pretrain --config FILE [path=value ...]
    python -m pretrain evaluate MODEL DATA [--json FILE]
    python -m pretrain export RUN DIR
"""

import argparse
import json
import os
import sys
from pathlib import Path

from raylib.config import choose, dump, load, override
from raylib.errors import UserError, disk_is_full


def main(arguments: list[str] | None = None) -> int:
    """Run a command line; a `UserError` is one line on stderr and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = {"evaluate": _evaluate, "export": _export}
    try:
        if arguments and arguments[0] in commands:
            return commands[arguments[0]](arguments[1:])
        return _train(arguments)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except OSError as e:
        print(f"error: {disk_is_full(e)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command resumes from the newest checkpoint", file=sys.stderr)
        return 130


def _train(arguments: list[str]) -> int:
    from pretrain.recipes import RECIPES
    from pretrain.train import PretrainConfig, run

    lines = "\n".join(f"  {name:20s} {recipe.__doc__}" for name, recipe in RECIPES.items())
    parser = argparse.ArgumentParser(
        prog="python -m pretrain",
        description=f"{__doc__}\nrecipes:\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", nargs="?", help="a recipe's name")
    parser.add_argument("settings", nargs="*", metavar="path=value", help="such as optim.lr=3e-4 runtime=local")
    parser.add_argument("--config", help="start from a stored config.json instead of a recipe")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and stop")
    given = parser.parse_intermixed_args(arguments)
    if given.config:
        settings = [given.recipe, *given.settings] if given.recipe else given.settings
        config = load(PretrainConfig, Path(given.config))
    elif given.recipe:
        settings, config = given.settings, choose(given.recipe, RECIPES, "recipe")()
    else:
        parser.print_help()
        return 2
    if "POLYGLANCE_RUNS" in os.environ:  # a job's working directory is a copy that goes away
        config = override(config, [f"runs={os.environ['POLYGLANCE_RUNS']}"])
    config = override(config, settings)
    if given.print_config:
        print(dump(config))
        return 0
    run(config)
    return 0


def _evaluate(arguments: list[str]) -> int:
    from pretrain.evaluate import evaluate_folder
    from pretrain.report import table, write_result

    parser = argparse.ArgumentParser(prog="python -m pretrain evaluate", description="Zero-shot retrieval, per language.")
    parser.add_argument("model", help="an exported model, a run or a checkpoint")
    parser.add_argument("data", help="shards, or a folder with pictures and captions.json")
    parser.add_argument("--json", type=Path, help="also write the figures into this file")
    given = parser.parse_args(arguments)
    result = evaluate_folder(given.model, given.data)
    print(table(result))
    if given.json:
        write_result(given.json, result)
    return 0


def _export(arguments: list[str]) -> int:
    from pretrain.export import export

    parser = argparse.ArgumentParser(prog="python -m pretrain export", description="Write one safetensors model folder.")
    parser.add_argument("run", help="a run or one of its checkpoints")
    parser.add_argument("dir", help="a new folder")
    given = parser.parse_args(arguments)
    to = export(given.run, given.dir)
    config = json.loads((to / "config.json").read_text(encoding="utf-8"))
    print(f"{to}: {config['model_type']}, {', '.join(sorted(p.name for p in to.iterdir()))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
