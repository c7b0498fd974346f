"""`python -m finetune.strategies.distillation ENCODER DATA --languages ru de`: word alignments of training
texts with English ones."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from raylib.command import command_parser, entry_point, local_path
from raylib.config import lookup
from raylib.display import progress
from raylib.errors import UserError
from raylib.fileio import write_atomically

if TYPE_CHECKING:  # PyTorch, which help needs not
    from finetune.strategies.distillation.word_alignments import WordAligner

BATCH = 64


def write_alignments(aligner: "WordAligner", task: str, data: Path, language: str, out: Path) -> int:
    """Write `out`/LANGUAGE.text and .align of a task's training examples. Returns how many links there are.

    Raises:
        UserError: no such files; an example without English.
    """
    from finetune.strategies.distillation.word_alignments import SEPARATOR
    from finetune.tasks.datasets import TASKS
    from raylib.words import split_words

    record = lookup(task, TASKS, "task")
    read = {
        code: list(record.read(record.path(data, "train", code), "train", code)) for code in ("en", language)
    }
    english = {e.id: e.texts[-1] for e in read["en"]}
    missing = [e.id for e in read[language] if e.id not in english]
    if missing:
        raise UserError(
            f"{task}: {len(missing)} training examples in '{language}' have no English one, such as "
            f"{missing[0]}"
        )
    pairs = [(split_words(e.texts[-1], language), split_words(english[e.id])) for e in read[language]]
    batches = [pairs[start : start + BATCH] for start in range(0, len(pairs), BATCH)]
    waited = progress(batches, f"align {language}", len(pairs), "questions", len)
    links = [row for batch in waited for row in aligner.align(batch)]
    out.mkdir(parents=True, exist_ok=True)
    # alignments of an earlier start must not be found beside the texts of this one, should it die in between
    (out / f"{language}.align").unlink(missing_ok=True)
    write_atomically(
        out / f"{language}.text", "".join(f"{' '.join(a)}{SEPARATOR}{' '.join(b)}\n" for a, b in pairs)
    )
    write_atomically(
        out / f"{language}.align", "".join(" ".join(f"{i}-{j}" for i, j in row) + "\n" for row in links)
    )
    return sum(map(len, links))


@entry_point()
def main(arguments: Sequence[str]) -> int:
    """Run a command line."""
    parser = command_parser("finetune.strategies.distillation", __doc__)
    parser.add_argument(
        "encoder", type=local_path, help="folder of a multilingual encoder of transformers, such as mBERT"
    )
    parser.add_argument("data", type=local_path, help="the data folder of fine-tuning")
    parser.add_argument("--task", default="cvil_vqa")
    parser.add_argument("--languages", nargs="+", required=True)
    parser.add_argument("--out", type=local_path, help="default: DATA/alignments")
    parser.add_argument(
        "--layer", type=int, default=8, help="whose states are compared (default: 8, of mBERT's 12)"
    )
    parser.add_argument("--threshold", type=float, default=1e-3)
    a = parser.parse_args(arguments)
    from finetune.strategies.distillation.word_alignments import WordAligner

    aligner = WordAligner(a.encoder, a.layer, a.threshold)
    for language in a.languages:
        num_links = write_alignments(aligner, a.task, a.data, language, a.out or a.data / "alignments")
        print(f"{language}: {num_links} links")
    return 0


if __name__ == "__main__":
    sys.exit(main())
