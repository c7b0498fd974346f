"""Distillation across languages (cViL, paper 3): a teacher reads English, a student another language, about
the same image.

    1. `strategy` gives each training example its English text, and mixes English words into its own
       (`word_alignments`; `python -m finetune.strategies.distillation` finds them).
    2. `pairs` says, batch by batch, what the teacher reads and which tokens of student and teacher are to
       come together.
    3. `teacher` runs beside the student, or what it made before is read back.
    4. `strategy` draws the student's states to the teacher's, as terms of the loss.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from finetune.strategies.base import Context, Need, Purpose, Stage, StageOutcome, StageRun, StrategyConfig
from raylib.errors import UserError
from raylib.text import Tokenizer

if TYPE_CHECKING:  # settings of strategies are read without PyTorch (`raylib.settings`)
    from finetune.strategies.distillation.strategy import Distillation
    from finetune.strategies.distillation.word_alignments import Alignments

WHERE = "strategies.distillation"


class DistillationConfig(StrategyConfig):
    """Distillation of an English teacher's hidden states (paper 3, cViL). Defaults are the paper's."""

    needs = frozenset({"labels", "one_image", "states", "training_texts"})
    display_fields = ("tokens",)
    hidden_fields = ("backbone", "states", "store_gb")
    run_fields = ("teacher",)
    file_fields = ("alignments",)

    teacher: str
    """Run of an English fine-tuning, or weights that `backbone` can start from."""
    backbone: str = "unified"
    """Architecture of a teacher that is not ours."""
    tokens: tuple[Literal["cls", "image", "tags", "mixed"], ...] = Field(
        ("cls", "image", "tags", "mixed"), min_length=1
    )
    """Tokens whose states are compared; mixed: English words that take the place of `share` of the words."""
    layers: tuple[PositiveInt, ...] | None = None
    """Layers of the student that are compared; null: 3, 6, 9 and the last."""
    teacher_layers: tuple[PositiveInt, ...] | None = None
    """Layers of the teacher, one for each of these; null: the same."""
    weights: tuple[NonNegativeFloat, ...] | None = None
    """Weight of each layer (lambda_m); one alone is every layer's; null: 1."""
    follow: Literal["paper", "code"] = "paper"
    """Defaults of `normalise` and `slots` as the paper has them, or its public code."""
    normalise: Literal["paper", "public"] = "paper"
    """Means as equations 2 to 6 have them, or as the public code: one over all pairs of tokens, of which it
    has more, the SEP after the question and every word that both texts have."""
    slots: NonNegativeInt = 0
    """Regions that images are padded to, the empty ones averaged in (the public code, and so with
    normalise=public: 50); 0: they are masked."""
    task: NonNegativeFloat = 0.0
    """Weight of the answers' loss beside distillation."""
    classifier: Literal["new", "teacher"] = "new"
    """The student's classifier is new, or starts as the teacher's."""
    states: Literal["auto", "live", "stored"] = "auto"
    """The teacher runs beside the student in every step (live), or its states are made once, before, and
    stored; auto: stored where images are not augmented, there is more than one epoch, and they take no more
    than `store_gb`."""
    store_gb: NonNegativeFloat = 2.0
    """Space on disk, in GB, that states=auto may take for the teacher's states."""
    epochs: PositiveInt | None = None
    """Distil for so many epochs in a training of its own, RUN/distilled, which the run's goes on from on
    answers alone (the paper's two steps in one run); null: the run itself distils."""
    lr: PositiveFloat | None = None
    """Learning rate of that training of its own; null: the run's."""
    alignments: str | None = None
    """Folder of word alignments, LANGUAGE.text and LANGUAGE.align; null: `alignments` in the data folder."""
    share: float = Field(0.15, gt=0, le=1)
    """Share of a text's words that English ones replace, for tokens=mixed."""
    words: Literal["segmented", "spaces"] = "segmented"
    """Words that `share` is of: where a language writes no spaces, those of a segmenter; spaces: always what
    stands between these, of which a Japanese sentence is one."""

    @classmethod
    def derived_defaults(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        means = values.get("normalise", "public" if values.get("follow") == "code" else "paper")
        return {"normalise": means, "slots": 50 if means == "public" else 0}

    @model_validator(mode="after")
    def _fits(self) -> "DistillationConfig":
        if len(set(self.tokens)) < len(self.tokens):
            raise ValueError(f"tokens {list(self.tokens)}: name each once")
        if self.lr and not self.epochs:
            raise ValueError("lr is of a training of its own; set epochs, or optim.lr in its place")
        return self

    def removes(self) -> Mapping[Need, str]:
        return {} if self.task or self.epochs else {"logits": f"set {WHERE}.task=1"}

    def check_run(self, run: Any) -> None:
        if "logits" in self.removes() and self.classifier == "new" and run.select == "best":
            raise UserError(
                f"{WHERE}.task=0 trains no head that could choose the best checkpoint; set select=last, or "
                f"{WHERE}.classifier=teacher"
            )

    def files(self, data: Path) -> tuple[Path, ...]:
        from raylib.models.finetuned import weights_of

        # a teacher that is missing is an error of `load_teacher`
        weights = [weights_of(self.teacher)] if Path(self.teacher).exists() else []
        return (*([self._alignments_in(data)] if "mixed" in self.tokens else []), *weights)

    def _alignments_in(self, data: Path) -> Path:
        return Path(self.alignments or data / "alignments")

    def during(self, purpose: Purpose) -> "DistillationConfig | None":
        """With `epochs` it is a training of its own, and no part of the run's."""
        if purpose == "states":
            return self.model_copy(update={"epochs": None})
        return None if self.epochs else self

    @property
    def stage_epochs(self) -> int:
        return self.epochs or 0

    def stages_before(self, run: StageRun) -> StageOutcome:
        """The student is distilled first; the run goes on from it, on answers alone."""
        if not self.epochs:
            return StageOutcome()
        optim = run.optim.model_copy(update={"lr": self.lr or run.optim.lr})
        settings = {"epochs": self.epochs, "select": "last", "optim": optim}
        stage = Stage("distilled", "states", self.epochs, run_settings=settings)
        return StageOutcome(start=run.train(stage))

    def build(self, context: Context) -> "Distillation":
        """Read the English text of every training example, and the word alignments.

        Raises:
            UserError: examples without English; alignments that do not fit the examples.
        """
        from finetune.strategies.distillation.strategy import Distillation

        pivots = {e.id: e.texts[-1] for e in context.english}
        for language, examples in context.training.items():
            missing = [e.id for e in examples if e.id not in pivots]
            if missing:
                raise UserError(
                    f"{WHERE}: {len(missing)} training examples in '{language}' have no English one, such as "
                    f"{missing[0]}"
                )
        alignments = self._read_alignments(context, pivots) if "mixed" in self.tokens else {}
        return Distillation(self, pivots, alignments, self._count_words(context) if alignments else {})

    def _count_words(self, context: Context) -> dict[tuple[str, str], int]:
        """{(id, text): words} of texts in languages that write no spaces."""
        from raylib.words import count_words, has_segmenter

        languages = [code for code in context.training if self.words == "segmented" and has_segmenter(code)]
        texts = ((code, e.id, e.texts[-1]) for code in languages for e in context.training[code])
        return {(key, text): count_words(text, code) for code, key, text in texts}

    def _read_alignments(self, context: Context, pivots: Mapping[str, str]) -> "Alignments":
        from finetune.strategies.distillation.word_alignments import read_alignments
        from raylib.models.finetuned import tokenizer_at

        if set(context.training) <= {"en"}:
            raise UserError(
                f"{WHERE}.tokens: 'mixed' puts English words into texts of another language, and training "
                "reads English alone; leave it out, or set setting=single_language"
            )
        folder = self._alignments_in(context.data)
        both = Tokenizer.load(context.tokenizer), Tokenizer.load(tokenizer_at(self.teacher))
        alignments: Alignments = {}
        for language, examples in context.training.items():
            if language != "en":
                texts = ((e.id, e.texts[-1], pivots[e.id]) for e in examples)
                alignments |= read_alignments(folder, language, texts, both)
        return alignments
