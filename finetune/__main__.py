"""Fine-tune a model on a task by a recipe, one for each row that a paper published. Each path=value changes a
setting of it; model= and data= are yours to give. The run's folder, in runs/, holds its config, checkpoints,
predictions and result."""

import argparse
import sys
from collections.abc import Sequence

from raylib.command import (
    RESUME_HINT,
    Stage,
    check_writable,
    command_parser,
    entry_point,
    local_path,
    module_doc,
    run_stage,
)
from raylib.config import override


@entry_point(RESUME_HINT)
def main(arguments: Sequence[str]) -> int:
    """Run a command line."""
    commands = {"evaluate": _evaluate, "compare": _compare, "analyse": _analyse, "translate": _translate}
    if arguments and arguments[0] in commands:
        return commands[arguments[0]](arguments[1:])
    from finetune.config import FinetuneConfig
    from finetune.recipes import FAMILIES, RECIPES

    def run(config: FinetuneConfig) -> None:
        from finetune.train import run  # PyTorch, which help needs not

        run(config)

    example = "model=MODEL data=FOLDER runtime=local"
    return run_stage(
        arguments, Stage("finetune", __doc__, commands, RECIPES, FAMILIES, FinetuneConfig, run, example)
    )


def _evaluate(arguments: Sequence[str]) -> int:
    """Evaluate a run's model again."""
    parser = command_parser("finetune evaluate", _evaluate.__doc__)
    parser.add_argument("run", type=local_path, help="a run that has been trained")
    parsed = parser.parse_args(arguments)
    from finetune.report import table
    from finetune.train import evaluate_run

    print(table(evaluate_run(parsed.run)))
    return 0


def _compare(arguments: Sequence[str]) -> int:
    """Put runs side by side, in tables with intervals."""
    parser = command_parser("finetune compare", module_doc("finetune.compare"))
    parser.add_argument("runs", type=local_path, nargs="+", help="finished runs")
    parser.add_argument(
        "--baseline", type=local_path, metavar="RUN", help="the row to subtract (the first one)"
    )
    parser.add_argument(
        "--csv", type=local_path, metavar="FILE", help="also write a line for each row and score, unrounded"
    )
    parser.add_argument("--latex", type=local_path, metavar="FILE", help="also write the tables as LaTeX")
    parsed = parser.parse_args(arguments)
    check_writable(parsed.csv)
    check_writable(parsed.latex)
    from finetune import compare

    found, lines = compare.compare_runs(parsed.runs, parsed.baseline)
    print("\n\n".join(filter(None, (compare.to_markdown(found), "\n".join(lines)))))
    if parsed.csv:
        compare.write_csv(found, parsed.csv)
    if parsed.latex:
        compare.write_latex(found, parsed.latex)
    return 0


def _analyse(arguments: Sequence[str]) -> int:
    """Draw every figure of a run, into RUN/analysis."""
    parser = command_parser("finetune analyse", _analyse.__doc__)
    parser.add_argument("run", type=local_path, help="a finished run")
    parser.add_argument(
        "--limit",
        type=_positive,
        metavar="N",
        default=200,
        help="parallel test items that are compared (200)",
    )
    parser.add_argument(
        "--images", type=_positive, metavar="N", default=3, help="images whose attention is drawn (3)"
    )
    parser.add_argument(
        "--layer", default="last", help="unified layer whose attention is drawn: last, mean, or 1, 2, ..."
    )
    parser.add_argument(
        "--words", nargs="+", default=[], metavar="LANGUAGE=WORD", help="words whose attention is drawn"
    )
    parser.add_argument(
        "--item", metavar="ID", help="the test item whose attention is drawn (of retrieval: the image)"
    )
    parsed = parser.parse_args(arguments)
    from finetune.analysis import Options, analyse
    from finetune.analysis.parallel import parse_words

    options = Options(parsed.limit, parsed.images, parsed.layer, parse_words(parsed.words), parsed.item)
    print(analyse(parsed.run, options))
    return 0


def _translate(arguments: Sequence[str]) -> int:
    """Translate a task's texts in advance, by a translation model."""
    from finetune.translation import TranslateConfig, translate

    parser = command_parser("finetune translate", TranslateConfig.__doc__, settings=TranslateConfig)
    parser.add_argument("task", help="whose captions are translated")
    parser.add_argument(
        "model", type=local_path, help="folder of a translation model, as transformers saves it"
    )
    parser.add_argument(
        "settings", nargs="*", metavar="path=value", help="such as data=FOLDER split=shots direction=from_en"
    )
    parsed = parser.parse_args(arguments)
    from finetune.build import load_task

    translate(load_task(parsed.task), parsed.model, override(TranslateConfig(), parsed.settings))
    return 0


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not 1 or more")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
