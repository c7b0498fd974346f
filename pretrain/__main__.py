"""Pretrain a model by a recipe. Each path=value changes a setting of it; the run's folder, in runs/, holds
its config, checkpoints, curves and result."""

import sys
from collections.abc import Sequence

from raylib.command import (
    RESUME_HINT,
    Stage,
    add_max_pixels,
    check_writable,
    command_parser,
    entry_point,
    local_path,
    module_doc,
    run_stage,
)
from raylib.errors import UserError


@entry_point(RESUME_HINT)
def main(arguments: Sequence[str]) -> int:
    """Run a command line."""
    commands = {"evaluate": _evaluate, "export": _export, "overlap": _overlap, "convert": _convert}
    if arguments and arguments[0] in commands:
        return commands[arguments[0]](arguments[1:])
    from pretrain.config import PretrainConfig
    from pretrain.recipes import FAMILIES, RECIPES

    def run(config: PretrainConfig) -> None:
        from pretrain.train import run  # PyTorch, which help needs not

        run(config)

    example = "optim.lr=3e-4 runtime=local"
    return run_stage(
        arguments, Stage("pretrain", __doc__, commands, RECIPES, FAMILIES, PretrainConfig, run, example)
    )


def _evaluate(arguments: Sequence[str]) -> int:
    """Evaluate a model zero-shot: retrieval of images and captions, per language."""
    parser = command_parser("pretrain evaluate", _evaluate.__doc__)
    parser.add_argument("model", type=local_path, help="an exported model, a run or a checkpoint")
    parser.add_argument("data", type=local_path, help="shards, or a folder with images and captions.json")
    parser.add_argument(
        "--json", type=local_path, metavar="FILE", help="also write the figures into this file"
    )
    add_max_pixels(parser)
    args = parser.parse_args(arguments)
    check_writable(args.json)
    from pretrain.evaluate import evaluate_folder, recall_table, write_result

    result = evaluate_folder(args.model, args.data, args.max_pixels)
    print(recall_table(result))
    if args.json:
        write_result(args.json, result)
    return 0


def _export(arguments: Sequence[str]) -> int:
    """Write a run's model as a folder that Hugging Face reads."""
    parser = command_parser("pretrain export", module_doc("raylib.api.export"))
    parser.add_argument("run", type=local_path, help="a run or one of its checkpoints")
    parser.add_argument("dir", type=local_path, help="a new folder")
    parser.add_argument("--language", help="of a run that trained a model for each language, which one")
    parser.add_argument("--license", help="of the weights, for the model card, such as apache-2.0")
    parser.add_argument("--float16", action="store_true", help="weights in half of the bytes")
    args = parser.parse_args(arguments)
    from raylib.api.export import export_model

    gap = export_model(args.run, args.dir, args.language, args.license, args.float16)
    readers = f"polyglance.load alone: {gap}" if gap else "polyglance.load and transformers"
    print(f"{args.dir}: {', '.join(sorted(p.name for p in args.dir.iterdir()))}; read by {readers}")
    return 0


def _convert(arguments: Sequence[str]) -> int:
    """Write the optimizer states of an earlier version anew, so that its run can be trained on."""
    parser = command_parser("pretrain convert", module_doc("raylib.convert"))
    parser.add_argument("run", type=local_path, help="a run of your own, of pretraining or fine-tuning")
    run = parser.parse_args(arguments).run
    from raylib.convert import convert_run

    print(f"{run}: reading pickles, which only runs of your own should be asked for", flush=True)
    count = convert_run(run)
    print(f"{run}: {count} checkpoints converted; the command of the run goes on from its newest one")
    return 0


def _overlap(arguments: Sequence[str]) -> int:
    """Find test images that are in a pretraining corpus."""
    parser = command_parser("pretrain overlap", module_doc("pretrain.image_overlap"))
    parser.add_argument(
        "corpus", type=local_path, help="image-text shards, or a corpus with a folder image_text"
    )
    parser.add_argument(
        "data", type=local_path, help="a folder or a tar of test images, a retrieval set, or shards"
    )
    parser.add_argument(
        "--names", type=local_path, nargs="+", default=[], help="annotation files: only images that they name"
    )
    parser.add_argument("--distance", type=int, default=6, help="bits of 64 that may differ (default 6)")
    parser.add_argument("--json", type=local_path, help="write all figures, and each pair, into this file")
    add_max_pixels(parser)
    args = parser.parse_args(arguments)
    if not 0 <= args.distance <= 32:
        raise UserError(f"--distance {args.distance}: give a number from 0 to 32")
    check_writable(args.json)
    from pretrain.image_overlap import report_overlap

    report_overlap(args.corpus, args.data, args.names, args.distance, args.json, args.max_pixels)
    return 0


if __name__ == "__main__":
    sys.exit(main())
