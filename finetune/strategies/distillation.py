"""Distillation across languages (cViL, paper 3): the states of a student that reads another language are
drawn to those of a teacher that reads the English question about the same picture. `finetune.distillation`
does the work."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, PrivateAttr, model_validator
from torch import nn

from finetune.distillation.alignments import Alignments, read_alignments
from finetune.distillation.mixing import mix
from finetune.distillation.teacher import load_teacher
from finetune.examples import Example
from finetune.model import tokenizer_at, weights_of
from finetune.strategies.base import Context, Strategy
from raylib.errors import UserError
from raylib.randomness import Key
from raylib.text import Tokenizer

WHERE = "strategies.distillation"


class Distillation(Strategy):
    """Defaults are the paper's.

    teacher: the run of an English fine-tuning, or weights that `backbone` can start from.
    tokens: whose states are compared; "mixed": of English words that take the place of `share` of the words,
    by the word
        `alignments`, a folder of LANGUAGE.text and LANGUAGE.align (default: `alignments` in the data folder).
    layers: of the student, default 3, 6, 9 and the last; teacher_layers: which of the teacher's each is
        compared with, default the same; weights: lambda_m, default 1; one alone is every layer's.
    normalise: as equations 2 to 6, or as the public code, one mean over everything. slots: pictures are
        padded to so many regions, and the empty ones are averaged in (the public code: 50); 0: they are
        masked.
    task: what the answers count beside it. classifier: the student's is new, or starts as the teacher's.
    states: the teacher runs beside the student, or its states are stored before.
    epochs: distil for so many epochs in a training of its own, RUN/distilled, which the run's goes on from,
    on answers alone
        (the paper's two steps in one run); None: the run itself distils.
    """

    shown = ("tokens",)
    hidden = ("teacher", "backbone", "alignments", "states")

    teacher: str
    backbone: str = "unified"
    tokens: tuple[Literal["cls", "image", "tags", "mixed"], ...] = Field(
        ("cls", "image", "tags", "mixed"), min_length=1
    )
    layers: tuple[PositiveInt, ...] | None = None
    teacher_layers: tuple[PositiveInt, ...] | None = None
    weights: tuple[NonNegativeFloat, ...] | None = None
    normalise: Literal["paper", "public"] = "paper"
    slots: NonNegativeInt = 0
    task: NonNegativeFloat = 0.0
    classifier: Literal["new", "teacher"] = "new"
    states: Literal["live", "stored"] = "live"
    epochs: PositiveInt | None = None
    alignments: str | None = None
    share: float = Field(0.15, gt=0, le=1)
    _pivots: dict[str, str] = PrivateAttr(default_factory=dict)
    _aligned: Alignments | None = PrivateAttr(None)
    _labels: tuple[str, ...] = PrivateAttr(())

    @model_validator(mode="after")
    def _fits(self) -> "Distillation":
        if len(set(self.tokens)) < len(self.tokens):
            raise ValueError(f"tokens {list(self.tokens)}: name each once")
        return self

    def files(self, data: Path) -> tuple[Path, ...]:
        weights = (
            [weights_of(self.teacher)] if Path(self.teacher).exists() else []
        )  # `load_teacher` says that it is missing
        return (*([self._alignments_in(data)] if "mixed" in self.tokens else []), *weights)

    def _alignments_in(self, data: Path) -> Path:
        return Path(self.alignments or data / "alignments")

    def prepare(self, context: Context) -> "Distillation":
        """Read the English text of every training example, and the word alignments.

        Raises:
            UserError: no classification; examples without English; alignments that do not fit the examples.
        """
        if not context.labels:
            raise UserError(f"{WHERE} wants questions with answers; this task has none; leave it out")
        ready = self.model_copy()
        ready._labels = context.labels
        ready._pivots = {e.id: e.texts[-1] for e in context.english}
        for language, examples in context.training.items():
            missing = [e.id for e in examples if e.id not in ready._pivots]
            if missing:
                raise UserError(
                    f"{WHERE}: {len(missing)} training examples in '{language}' have no English one, such as "
                    f"{missing[0]}"
                )
        if "mixed" in self.tokens:
            ready._aligned = self._read_alignments(context, ready._pivots)
        return ready

    def _read_alignments(self, context: Context, pivots: dict[str, str]) -> Alignments:
        if set(context.training) <= {"en"}:
            raise UserError(
                f"{WHERE}.tokens: 'mixed' puts English words into texts of another language, and training "
                "reads English alone; leave it out, or set setting=single_language"
            )
        folder = self._alignments_in(context.data)
        both = [Tokenizer.load(path) for path in (context.tokenizer, tokenizer_at(self.teacher))]
        found: Alignments = {}
        for language, examples in context.training.items():
            if language != "en":
                found |= read_alignments(folder, language, _with_english(examples, pivots), both)
        return found

    def pivot(self, example: Example) -> str:
        """The English text that the teacher reads."""
        return self._pivots[example.id]

    def example(self, example: Example, *key: Key) -> Example:
        """The example with its English text; English words take the place of some of its own, anew each
        epoch."""
        example = example._replace(pivot=self.pivot(example))
        links = (self._aligned or {}).get((example.id, example.texts[-1]))
        if not links or not key:
            return example
        text, aligned = mix(example.texts[-1], example.pivot, links, self.share, *key, "mixed")
        return example._replace(texts=(*example.texts[:-1], text), aligned=aligned)

    def adapt(self, model: nn.Module) -> None:
        """Give the student the teacher's head; without a task, take the head out of training: it would decay
        under ZeRO.

        Raises:
            UserError: the teacher's answers are others.
        """
        pooler = getattr(model.backbone, "pooler", None)
        if self.classifier == "teacher":
            teacher = load_teacher(self.teacher, self.backbone, ("?",), model.description["regions"])
            if teacher.labels != model.labels or teacher.backbone.width != model.backbone.width:
                raise UserError(
                    f"{WHERE}.classifier=teacher: the teacher's answers ({len(teacher.labels)}) are not this "
                    f"task's ({len(model.labels)}), or its width is another; set classifier=new"
                )
            model.head.load_state_dict(teacher.head.state_dict())
            if pooler is not None:
                pooler.load_state_dict(teacher.backbone.pooler.state_dict())
        if not self.task:
            for part in filter(None, (model.head, pooler)):
                part.requires_grad_(False)


def _with_english(examples: Iterable[Example], pivots: dict[str, str]) -> Iterable[tuple[str, str, str]]:
    """(id, text, English text) of each."""
    return ((e.id, e.texts[-1], pivots[e.id]) for e in examples)


def chosen_layers(
    method: Distillation, student: int, teacher: int
) -> tuple[dict[int, float], tuple[int, ...]]:
    """({layer of the student: lambda}, the teacher's layers that they are compared with), of models with so
    many layers.

    Raises:
        UserError: models of different depth and no map; layers that are not there or not rising; lists of
            different length.
    """
    if student != teacher and not (method.layers and method.teacher_layers):
        raise UserError(
            f"{WHERE}: the student has {student} layers, the teacher {teacher}; say which go together with "
            f"{WHERE}.layers= and {WHERE}.teacher_layers="
        )
    mine = method.layers or tuple(sorted({layer for layer in (3, 6, 9, student) if layer <= student}))
    theirs, weights = method.teacher_layers or mine, method.weights or (1.0,)
    weights = weights * len(mine) if len(weights) == 1 else weights
    for name, values in (("teacher_layers", theirs), ("weights", weights)):
        if len(values) != len(mine):
            raise UserError(
                f"{WHERE}.{name}: {len(values)} values for {len(mine)} layers, {list(mine)}; give one for "
                "each"
            )
    for name, values, depth in (("layers", mine, student), ("teacher_layers", theirs, teacher)):
        if list(values) != sorted(set(values)) or values[-1] > depth:
            raise UserError(
                f"{WHERE}.{name}={list(values)}: the model has layers 1 to {depth}; name some, each once, "
                "rising"
            )
    return dict(zip(mine, weights, strict=True)), theirs
