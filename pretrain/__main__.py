"""Command line of pretraining.

python -m pretrain RECIPE [path=value ...] [--print-config]
python -m pretrain --config FILE [path=value ...]
python -m pretrain evaluate MODEL DATA [--json FILE]
python -m pretrain export RUN DIR
python -m pretrain overlap CORPUS DATA [--names FILE ...] [--distance 6] [--json FILE]
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from raylib.command import RESUME_HINT, check_writable, command_parser, entry_point, run_recipe
from raylib.fileio import read_json


@entry_point(RESUME_HINT)
def main(arguments: Sequence[str]) -> int:
    """Run a command line."""
    commands = {"evaluate": _evaluate, "export": _export, "overlap": _overlap}
    if arguments and arguments[0] in commands:
        return commands[arguments[0]](arguments[1:])
    return _train(arguments)


def _train(arguments: Sequence[str]) -> int:
    from pretrain.recipes import RECIPES
    from pretrain.train import PretrainConfig, run

    return run_recipe(
        arguments, "pretrain", __doc__, RECIPES, PretrainConfig, run, "optim.lr=3e-4 runtime=local"
    )


def _evaluate(arguments: Sequence[str]) -> int:
    from pretrain.evaluate import evaluate_folder, recall_table, write_result

    parser = command_parser("pretrain evaluate", "Zero-shot retrieval, per language.")
    parser.add_argument("model", help="an exported model, a run or a checkpoint")
    parser.add_argument("data", help="shards, or a folder with images and captions.json")
    parser.add_argument("--json", type=Path, help="also write the figures into this file")
    args = parser.parse_args(arguments)
    check_writable(args.json)
    result = evaluate_folder(args.model, args.data)
    print(recall_table(result))
    if args.json:
        write_result(args.json, result)
    return 0


def _export(arguments: Sequence[str]) -> int:
    from pretrain.train import export_model

    parser = command_parser("pretrain export", "Write one safetensors model folder.")
    parser.add_argument("run", help="a run or one of its checkpoints")
    parser.add_argument("dir", help="a new folder")
    args = parser.parse_args(arguments)
    to = export_model(args.run, args.dir)
    config = read_json(to / "config.json")
    print(f"{to}: {config['model_type']}, {', '.join(sorted(p.name for p in to.iterdir()))}")
    return 0


def _overlap(arguments: Sequence[str]) -> int:
    from pretrain.image_overlap import main as count

    return count(arguments)


if __name__ == "__main__":
    sys.exit(main())
