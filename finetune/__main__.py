"""Command line of fine-tuning.

    python -m finetune RECIPE model=EXPORT_OR_FOLDER data=FOLDER [path=value ...] [--print-config]
    python -m finetune --config FILE [path=value ...]
    python -m finetune evaluate RUN
    python -m finetune compare RUN RUN ... [--baseline RUN] [--csv FILE] [--latex FILE]
    python -m finetune analyse RUN [--limit 200] [--images 3] [--layer last] [--words en=dog de=Hund]
                                [--item ID]
    python -m finetune translate TASK MODEL data=FOLDER languages=de,ja [split=train direction=to_en ...]

Papers, in the names of recipes: P0 Nooralahzadeh and Sennrich 2023 (prior, sparse, code-mixing), P1 Reinhardt
et al. 2024 (unfreezing), P2 Li et al. 2023 (pretraining), P3 cViL (distillation), P4 translation-based
alignment, IGLUE Bugliarello et al. 2022.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from raylib.command import RESUME_HINT, check_writable, command_parser, entry_point, run_recipe
from raylib.config import override


@entry_point(RESUME_HINT)
def main(arguments: Sequence[str]) -> int:
    """Run a command line."""
    commands = {"evaluate": _evaluate, "compare": _compare, "analyse": _analyse, "translate": _translate}
    if arguments and arguments[0] in commands:
        return commands[arguments[0]](arguments[1:])
    return _train(arguments)


def _train(arguments: Sequence[str]) -> int:
    from finetune.config import FinetuneConfig
    from finetune.recipes import RECIPES
    from finetune.train import run

    return run_recipe(
        arguments, "finetune", __doc__, RECIPES, FinetuneConfig, run, "model=MODEL data=FOLDER runtime=local"
    )


def _evaluate(arguments: Sequence[str]) -> int:
    from finetune.report import table
    from finetune.train import evaluate_run

    parser = command_parser("finetune evaluate", "Evaluate a run's model again.")
    parser.add_argument("run", type=Path, help="a run that has been trained")
    print(table(evaluate_run(parser.parse_args(arguments).run)))
    return 0


def _compare(arguments: Sequence[str]) -> int:
    from finetune import compare

    parser = command_parser("finetune compare", compare.__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="finished runs")
    parser.add_argument("--baseline", type=Path, metavar="RUN", help="the row to subtract (the first one)")
    parser.add_argument(
        "--csv", type=Path, metavar="FILE", help="also write a line for each row and score, unrounded"
    )
    parser.add_argument("--latex", type=Path, metavar="FILE", help="also write the tables as LaTeX")
    parsed = parser.parse_args(arguments)
    check_writable(parsed.csv)
    check_writable(parsed.latex)
    found, lines = compare.compare_runs(parsed.runs, parsed.baseline)
    print("\n\n".join(filter(None, (compare.to_markdown(found), "\n".join(lines)))))
    if parsed.csv:
        compare.write_csv(found, parsed.csv)
    if parsed.latex:
        compare.write_latex(found, parsed.latex)
    return 0


def _analyse(arguments: Sequence[str]) -> int:
    from finetune.analysis.parallel import parse_words
    from finetune.analysis.run import Options, analyse

    parser = command_parser("finetune analyse", "Every figure of a run, into RUN/analysis.")
    parser.add_argument("run", type=Path, help="a finished run")
    parser.add_argument(
        "--limit", type=_positive, default=200, help="parallel test items that are compared (200)"
    )
    parser.add_argument("--images", type=_positive, default=3, help="images whose attention is drawn (3)")
    parser.add_argument(
        "--layer", default="last", help="unified layer whose attention is drawn: last, mean, or 1, 2, ..."
    )
    parser.add_argument(
        "--words", nargs="+", default=[], metavar="LANGUAGE=WORD", help="what attention is drawn of"
    )
    parser.add_argument(
        "--item", metavar="ID", help="the test item that attention is drawn of (of retrieval: the image)"
    )
    parsed = parser.parse_args(arguments)
    options = Options(parsed.limit, parsed.images, parsed.layer, parse_words(parsed.words), parsed.item)
    print(analyse(parsed.run, options))
    return 0


def _translate(arguments: Sequence[str]) -> int:
    from finetune.build import load_task
    from finetune.strategies.alignment import TranslateConfig, translate

    parser = command_parser("finetune translate", TranslateConfig.__doc__)
    parser.add_argument("task", help="whose captions are translated")
    parser.add_argument("model", type=Path, help="folder of a translation model, as transformers saves it")
    parser.add_argument(
        "settings", nargs="*", metavar="path=value", help="such as data=FOLDER split=shots direction=from_en"
    )
    parsed = parser.parse_args(arguments)
    translate(load_task(parsed.task), parsed.model, override(TranslateConfig(), parsed.settings))
    return 0


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not 1 or more")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
