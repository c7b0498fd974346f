"""Pretrain a model by a recipe. Each path=value changes a setting of it; the run's folder, in runs/, holds
its config, checkpoints, curves and result."""

import sys
from collections.abc import Sequence
from pathlib import Path

from raylib.command import RESUME_HINT, Stage, check_writable, command_parser, entry_point, run_stage


@entry_point(RESUME_HINT)
def main(arguments: Sequence[str]) -> int:
    """Run a command line."""
    commands = {"evaluate": _evaluate, "export": _export, "overlap": _overlap}
    if arguments and arguments[0] in commands:
        return commands[arguments[0]](arguments[1:])
    from pretrain.recipes import FAMILIES, RECIPES
    from pretrain.train import PretrainConfig, run

    example = "optim.lr=3e-4 runtime=local"
    return run_stage(
        arguments, Stage("pretrain", __doc__, commands, RECIPES, FAMILIES, PretrainConfig, run, example)
    )


def _evaluate(arguments: Sequence[str]) -> int:
    """Evaluate a model zero-shot: retrieval of images and captions, per language."""
    parser = command_parser("pretrain evaluate", _evaluate.__doc__)
    parser.add_argument("model", help="an exported model, a run or a checkpoint")
    parser.add_argument("data", help="shards, or a folder with images and captions.json")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures into this file")
    args = parser.parse_args(arguments)
    check_writable(args.json)
    from pretrain.evaluate import evaluate_folder, recall_table, write_result

    result = evaluate_folder(args.model, args.data)
    print(recall_table(result))
    if args.json:
        write_result(args.json, result)
    return 0


def _export(arguments: Sequence[str]) -> int:
    """Write a run's model as a folder that Hugging Face reads."""
    from raylib.api.export import main as export

    return export(arguments)


def _overlap(arguments: Sequence[str]) -> int:
    """Find test images that are in a pretraining corpus."""
    from pretrain.image_overlap import main as count

    return count(arguments)


if __name__ == "__main__":
    sys.exit(main())
