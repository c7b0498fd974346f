"""A fine-tuning strategy: `StrategyConfig`, its frozen settings, and `Strategy`, what these build for one
training.

The settings say what a strategy needs and what it does to a run as a whole; the built strategy holds tables
and tensors and acts at the seams of training, each of which composes without knowing of the others:

| seam | composes by |
| --- | --- |
| `example` | one after the other, in the registry's order |
| `adapt` | one after the other |
| `wrap_tokenizer` | one after the other |
| `lr_scale` | product |
| `batch_inputs` | all of them, by name |
| `terms` | side by side; a name twice is an error |
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from pydantic import PrivateAttr

from finetune.formats import Example
from raylib.config import Config, UserFile
from raylib.errors import UserError
from raylib.randomness import Key
from raylib.settings import OptimConfig
from raylib.text import Tokenizer

if TYPE_CHECKING:  # settings of strategies are read without PyTorch (`raylib.settings`)
    from torch import Tensor

    from finetune.batches import ExtraInputs
    from raylib.packed import Ragged

# What a strategy may need of a run, as error lines name it: `check_strategies` is the one place that asks.
Need = Literal[
    "labels",
    "training_texts",
    "captions",
    "logits",
    "states",
    "embeddings",
    "one_image",
    "english_texts",
    "dense_weights",
    "pruning_rounds",
]
NEEDS: dict[Need, str] = {
    "labels": "a task with answers or labels",
    "training_texts": "labelled training texts",
    "logits": "a classifier's logits that are trained",
    "states": "the hidden states of a classifier (head=classifier)",
    "embeddings": "the embeddings of a retrieval task",
    "one_image": "texts about one image each",
    "captions": "a retrieval task and captions of other languages (setting=few_shot, single_language or "
    "all_language)",
    "english_texts": "English training texts",
    "dense_weights": "all weights of the model in training",
    "pruning_rounds": "rounds that look for a pruning mask",
}
# What a training is for: finding a mask, drawing states to a teacher's, a classifier on frozen layers, or the
# run itself.
Purpose = Literal["pruning", "states", "head", "run"]
# captions(translation, language) -> {image: its training captions}; translation: "" for the captions
# themselves, "_to_en" or "_from_en"
Captions = Callable[[str, str], dict[str, tuple[str, ...]]]


class TrainingProgress(NamedTuple):
    """The progress of training: `step` of `steps`, in `epoch` of `epochs` (all from 0)."""

    step: int
    steps: int
    epoch: int
    epochs: int


class Context(NamedTuple):
    """The run that a strategy is built for.

    data, wordnet: folders. languages: of the task. labels: its answers, () of retrieval. tokenizer: the
        model's file. cache: a folder for what is named by content. log: tells people.
    captions: `captions(way, language)` -> {image: its training captions}; way "", the captions themselves,
        "_to_en" or "_from_en", translations of them. None: only English ones are trained on.
    training, english: of tasks with answers, what is trained on by language, and the same in English.
    """

    data: Path
    wordnet: Path
    languages: tuple[str, ...]
    labels: tuple[str, ...]
    tokenizer: Path
    cache: Path
    log: Callable[[str], None] = print
    captions: Captions | None = None
    training: Mapping[str, Iterable[Example]] = {}
    english: Iterable[Example] = ()


class TrainingSetup(NamedTuple):
    """A training that is about to begin: its `pipeline` (`finetune.tasks.base.Pipeline`, with the adapted
    model) and training `examples`; a `folder` for what is computed beforehand."""

    pipeline: Any
    examples: Sequence[Any]
    folder: Path


class HiddenStates(NamedTuple):
    """States of the model that terms read (`Outputs.states`): after these `layers`, rising; `empty`: rows
    have a slot without a region."""

    layers: tuple[int, ...]
    empty: bool = False


# the need that asks for each of `Outputs`
OUTPUT_NEEDS: dict[str, Need] = {
    "logits": "logits",
    "states": "states",
    "image_embeddings": "embeddings",
    "text_embeddings": "embeddings",
    "pivot_embeddings": "embeddings",
    "scores": "embeddings",
    "contrast": "embeddings",
}


class Outputs:
    """Named results of the task's forward pass, of which a term sees what its strategy needs: `"logits" in
    outputs` says whether the task computes it.

    logits: (b, C) of a classifier. states: {layer: all tokens} of `HiddenStates`, of a classification.
    image_embeddings, text_embeddings, pivot_embeddings: (b, e) of a retrieval, of any length; a batch without
        pivots has None.
    scores: `scores(queries (b, e), keys (b, e))`, cosines over the temperature with the keys of all workers,
        (b, B). contrast: of the same arguments, InfoNCE of these, summed over the rows, or over those of a
        third one, (b,) bool; equal images and texts are no negatives.
    rerun: `rerun()`, the `Outputs` of another forward pass over this batch, with gradient and dropout of its
        own; of a strategy that needs logits or embeddings.
    """

    logits: "Tensor"
    states: "Mapping[int, Ragged]"
    image_embeddings: "Tensor"
    text_embeddings: "Tensor"
    pivot_embeddings: Any
    scores: "Callable[[Tensor, Tensor], Tensor]"
    contrast: "Callable[..., Tensor]"
    rerun: Callable[[], "Outputs"]

    def __init__(self, reader: str = "a term", **computed: Any):
        self._reader = reader
        self.__dict__.update(computed)

    def __contains__(self, name: str) -> bool:
        return name in self.__dict__

    def __getattr__(self, name: str) -> Any:
        # only what was not computed comes here
        if name == "rerun":
            raise UserError(f"{self._reader} reads outputs.rerun, which goes with logits or embeddings alone")
        if name not in OUTPUT_NEEDS:
            raise AttributeError(f"outputs has no {name}; it has {', '.join(OUTPUT_NEEDS)}, rerun")
        raise UserError(
            f"{self._reader} reads outputs.{name}, which its strategy does not ask for or the task has not; "
            f'ask by needs = frozenset({{"{OUTPUT_NEEDS[name]}"}}) on the StrategyConfig class'
        )

    def read_by(self, reader: str, needs: frozenset[Need]) -> "Outputs":
        """The results that a term whose strategy has these `needs` sees."""
        visible = {k: v for k, v in vars(self).items() if OUTPUT_NEEDS.get(k) in needs}
        if visible and "rerun" in self:
            visible["rerun"] = lambda: self.rerun().read_by(reader, needs)
        return Outputs(reader, **visible)


class Term(NamedTuple):
    """A term of the loss: `weight` times the mean of its values over the global batch.

    values: `values(outputs, batch)` of one worker's part of the batch: (b,), one an example; or, of a
        term that looks at the model alone, a scalar, the same on every worker.
    divisor: `divisor(batch)`, what the sum of the values is divided by, over all workers, if not by the
        number of examples; the values may have any shape then.
    """

    weight: float
    values: "Callable[[Outputs, dict], Tensor]"
    divisor: "Callable[[dict], Tensor] | None" = None


class AddedTerm(NamedTuple):
    """A `Term` in a loss: which strategy it is of, and what that needs. A term that reads logits is computed
    after them, and scaled by the task's own weight."""

    weight: float
    values: "Callable[[Outputs, dict], Tensor]"
    divisor: "Callable[[dict], Tensor] | None" = None
    reads: frozenset[Need] = frozenset()
    strategy: str = ""


class LossTerms(NamedTuple):
    """All that strategies add to a loss: `terms` by name, the states that these read, and what the task's own
    loss counts beside them (0: its head has no part in training)."""

    terms: Mapping[str, AddedTerm] = {}
    hidden_states: HiddenStates | None = None
    task_weight: float = 1.0


def term_shares(
    terms: Mapping[str, AddedTerm], outputs: Outputs, part: dict, examples: "Tensor"
) -> "list[Tensor]":
    """This worker's share of each term's mean over the global batch of so many `examples`, unweighted.

    Raises:
        UserError: a term reads what its strategy does not need; its values are neither (b,) nor a scalar.
    """
    from raylib.distributed import all_reduce, world_size

    shares, num_rows = [], len(part["text"].lengths)
    for name, term in terms.items():
        reader = f"strategies.{term.strategy}: term '{name}'"
        values = term.values(outputs.read_by(reader, term.reads), part)
        if term.divisor:
            shares.append(values.sum() / all_reduce(term.divisor(part)))
        elif values.shape not in ((), (num_rows,)):
            raise UserError(
                f"{reader} has values of shape {tuple(values.shape)}; return one for each of the worker's "
                f"{num_rows} examples, ({num_rows},), or a scalar of the model alone"
            )
        else:
            # a scalar is of the model alone, the same on every worker: the workers' shares add up to it
            shares.append(values / world_size() if values.ndim == 0 else values.sum() / examples)
    return shares


class Strategy:
    """A strategy that changes nothing: each of these does where a strategy overrides it."""

    # what the objective computes for the terms, and what the task's own loss counts beside them
    hidden_states: HiddenStates | None = None
    task_weight: float = 1.0

    def __init_subclass__(cls):
        if {"needs", "needs_any"} & vars(cls).keys():
            raise TypeError(f"needs belongs to the StrategyConfig class that builds {cls.__name__}")

    def example(self, example: Any, *key: Key) -> Any:
        """Return a training example (`Example` or `Captioned`) as this strategy shows it; whatever is drawn
        is drawn from `key` (seed, epoch, its id)."""
        return example

    def adapt(self, model: Any) -> None:
        """Change the model before training: masks, new modules, permanent freezes."""

    def wrap_tokenizer(self, tokenizer: Tokenizer, model: Any) -> Tokenizer:
        """Return the tokenizer by which the adapted model reads, in training and evaluation: with a prompt
        perhaps."""
        return tokenizer

    def begin(self, setup: TrainingSetup) -> None:
        """Prepare what needs the model itself, in every training process: a teacher, its states."""

    def batch_inputs(self) -> "ExtraInputs | None":
        """Return `inputs(examples, visual inputs, batch)` -> what else a batch of examples holds, by name;
        it is sent to loader processes."""
        return None

    def lr_scale(self, depth: int | None, depths: int, progress: TrainingProgress) -> float:
        """Return the factor of the learning rate of the parameters at `depth` (`raylib.models`) of `depths`;
        0 freezes them."""
        return 1.0

    def terms(self, model: Any) -> dict[str, Term]:
        """Return what is added to the loss, by name; called after `begin`."""
        return {}


class Stage(NamedTuple):
    """A training that comes before the run's own, in RUN/`name`.

    epochs: it stops after so many. start: the checkpoint whose weights it starts from, if not the model's.
    run_settings: of the run, in this training. strategy_settings: of the strategy, in this training; not
        stored with it, for they name files of the run, which may move.
    selects: it leaves the checkpoint that the run's `select` chooses on the dev set, else its last one.
    """

    name: str
    purpose: Purpose
    epochs: int
    start: Path | None = None
    run_settings: Mapping[str, Any] = {}
    strategy_settings: Mapping[str, Any] = {}
    selects: bool = False


class StageOutcome(NamedTuple):
    """All that the stages leave to the run's own training: settings of the strategy in it, the checkpoint
    that it starts from, and what its result tells of them."""

    strategy_settings: Mapping[str, Any] = {}
    start: Path | None = None
    figures: Mapping[str, Any] = {}


class StageRun(NamedTuple):
    """The run whose stages a strategy makes. `train(stage)` trains one, unless that is done already, and
    returns the checkpoint that it left.

    optim: the run's optimizer. start: the checkpoint that the stages of strategies before have left.
    """

    folder: Path
    is_main_process: bool
    build_model: Callable[[], Any]
    train: Callable[[Stage], Path]
    optim: OptimConfig
    start: Path | None = None


class StrategyConfig(Config):
    """Settings of a strategy. What a class declares about itself is here, so that no other code asks for a
    strategy by its name."""

    # of a class in a user's own file, where that is: FILE.py or FILE.py:CLASS
    _user_class: UserFile | None = PrivateAttr(None)

    needs: ClassVar[frozenset[Need]] = frozenset()
    needs_any: ClassVar[frozenset[Need]] = frozenset()  # those of them that the task has, at least one
    place: ClassVar[str] = ""  # what of the model only one strategy can take
    acts_untrained: ClassVar[bool] = False  # also where a setting trains nothing: a prompt
    changes_texts: ClassVar[bool] = False  # `wrap_tokenizer`: wherever the model is used later
    display_fields: ClassVar[tuple[str, ...]] = ()  # settings that tables always show
    hidden_fields: ClassVar[tuple[str, ...]] = ()  # those that they never show, beside paths
    mutable_fields: ClassVar[tuple[str, ...]] = ()  # a search may change them within a trial
    run_fields: ClassVar[tuple[str, ...]] = ()  # paths that may lead into other runs
    file_fields: ClassVar[tuple[str, ...]] = ()  # other paths
    continues_stages: ClassVar[bool] = False  # its stages begin where those of other strategies end
    translations: ClassVar[
        tuple[str, ...]
    ] = ()  # "_to_en", "_from_en": of the training captions, read as files

    @abstractmethod
    def build(self, context: Context) -> Strategy:
        """Read what the strategy needs, once, before anything starts.

        Raises:
            UserError: a file is missing or wrong, a setting does not fit.
        """

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        for name in ("needs", "needs_any"):
            if not isinstance(needs := vars(cls).get(name, frozenset()), Set):
                example = ", ".join(f'"{need}"' for need in ((needs,) if isinstance(needs, str) else needs))
                raise TypeError(f"{name} is a set of names: {name} = frozenset({{{example}}})")

    def required(self) -> frozenset[Need]:
        """Return the needs of these settings: `needs`, and more of some settings."""
        return self.needs

    def provides(self) -> frozenset[Need]:
        """Return what others find in a run through this strategy."""
        return frozenset()

    def removes(self) -> Mapping[Need, str]:
        """Return what others do not find in a run any more, each with advice, or ""."""
        return {}

    def check_run(self, run: Any) -> None:
        """Raises UserError: settings of the run (`finetune.config.FinetuneConfig`) that do not fit these."""

    @property
    def tests_translations(self) -> bool:
        """Return whether the run is tested on translations into English."""
        return False

    def files(self, data: Path) -> tuple[Path, ...]:
        """Return the files that are read, of those in the `data` folder and those that settings name."""
        return ()

    def display_name(self, name: str) -> str:
        """Return what tables call the strategy, which is `name` in the registry, with the settings that are
        not the usual ones."""
        hidden = {*self.hidden_fields, *self.run_fields, *self.file_fields}
        usual = self.derived_defaults(self.model_dump())
        fields = [
            field
            for field, info in type(self).model_fields.items()
            if field not in hidden
            and (field in self.display_fields or getattr(self, field) != usual.get(field, info.default))
        ]
        values = [
            f"{field} {_display_value(getattr(self, field))}".replace("source ", "") for field in fields
        ]
        return name.replace("_", " ") + (f" ({', '.join(values)})" if values else "")

    def during(self, purpose: Purpose) -> "StrategyConfig | None":
        """Return the settings in a training for `purpose`; None: it takes no part."""
        return self

    def stages_before(self, run: StageRun) -> StageOutcome:
        """Make what trainings before the run's own leave to it. A run that goes on passes here again, and
        stages that are done are not trained again: so they must be the same each time."""
        return StageOutcome()

    @property
    def stage_epochs(self) -> int:
        """Epochs of all `stages_before`."""
        return 0

    def warmup_epochs(self, depths: int) -> int:
        """Return after how many epochs of the run's own training a score says something: all that is to be
        trained has been, of a model with so many layers."""
        return 1


def _display_value(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
