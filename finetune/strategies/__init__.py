"""Fine-tuning strategies by name, and how those of a run act together."""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

from pydantic import BeforeValidator, ConfigDict, Field, ValidationInfo, model_serializer, model_validator
from pydantic_core import PydanticCustomError

from finetune.strategies.alignment import TranslationAlignmentConfig
from finetune.strategies.base import (
    NEEDS,
    AddedTerm,
    Context,
    HiddenStates,
    LossTerms,
    Need,
    Purpose,
    Strategy,
    StrategyConfig,
    Term,
    TrainingProgress,
    TrainingSetup,
)
from finetune.strategies.code_mixing import CodeMixingConfig
from finetune.strategies.distillation import DistillationConfig
from finetune.strategies.prior import LinguisticPriorConfig
from finetune.strategies.pruning import SparseConfig
from finetune.strategies.tuning import (
    AdapterConfig,
    CompacterConfig,
    HardPromptConfig,
    HeadFirstConfig,
    LayerDecayConfig,
    LoraConfig,
    SoftPromptConfig,
    TopLayersConfig,
    UnfreezingConfig,
)
from raylib.config import NO_USER_FILE, Config, UserFile, load_user_class, lookup, validate
from raylib.errors import UserError
from raylib.randomness import Key
from raylib.text import Tokenizer

if TYPE_CHECKING:  # settings of strategies are read without PyTorch (`raylib.settings`)
    from finetune.batches import ExtraInputs
    from raylib.engine import LayerRates


def _load_user_config(name: str, value: Any, run: Path | None) -> Any:
    """The settings of a strategy in a user's own file, from "FILE.py:CLASS" or {"file": that, its settings};
    any other value as it is. run: of stored settings.

    Raises:
        UserError: as of `raylib.config.load_user_class`, or settings that the class has not; a name of ours.
    """
    settings = {"file": value} if isinstance(value, str) else dict(value) if isinstance(value, dict) else {}
    where = settings.pop("file", "")
    path, _, class_name = str(where).partition(":")
    if not path.endswith(".py"):
        return value
    if name in STRATEGIES:
        raise UserError(f"strategies.{name}={where}: this name is taken; give another: strategies.my={where}")
    file = where if isinstance(where, UserFile) else UserFile.named(where, run)
    found = file.require(f"strategies.{name}")
    file.tell()
    user_class = load_user_class(found, StrategyConfig, class_name or None)  # type: ignore[type-abstract]
    config = validate(user_class, settings, where)
    for need in config.required() | config.needs_any:
        lookup(need, NEEDS, f"need in {where}")
    config._user_class = file
    return config


def _require_user_config(value: Any) -> Any:
    if value is None or isinstance(value, StrategyConfig):
        return value
    raise PydanticCustomError(NO_USER_FILE, "no strategy of this name")


class StrategiesConfig(Config):
    """The strategies of a run: `strategies.prior.alpha=4` turns one on, null off. Their order is that in
    which they act. A new one is a line here.

    One in a user's own file is named by it, under any other name: `strategies.my=my_strategy.py`, or
    `my_strategy.py:Class`, and then `strategies.my.weight=0.2`. It acts after the others.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Annotated[StrategyConfig | None, BeforeValidator(_require_user_config)]] = (
        Field(init=False)
    )

    prior: LinguisticPriorConfig | None = None
    """Linguistic prior (paper 0): wrong answers near the right one cost less."""
    sparse: SparseConfig | None = None
    """Sparse fine-tuning by iterative magnitude pruning (paper 0)."""
    alignment: TranslationAlignmentConfig | None = None
    """Translation-based alignment (paper 4)."""
    distillation: DistillationConfig | None = None
    """Distillation from an English teacher (paper 3)."""
    code_mixing: CodeMixingConfig | None = None
    """Code-mixing: words of training texts in other languages (paper 0)."""
    head_first: HeadFirstConfig | None = None
    """The classifier trains alone at first (paper 3)."""
    unfreezing: UnfreezingConfig | None = None
    """Scheduled unfreezing, from the top layers down (paper 1)."""
    layer_decay: LayerDecayConfig | None = None
    """Lower learning rates in lower layers (paper 1)."""
    top_layers: TopLayersConfig | None = None
    """Training of the top layers alone (paper 1)."""
    lora: LoraConfig | None = None
    """LoRA: low-rank changes of attention (paper 4)."""
    adapter: AdapterConfig | None = None
    """Adapters after attention and feed-forward layers (paper 4)."""
    compacter: CompacterConfig | None = None
    """Compacter: adapters of Kronecker products (paper 4)."""
    soft_prompt: SoftPromptConfig | None = None
    """Trainable tokens in front of texts (paper 4)."""
    hard_prompt: HardPromptConfig | None = None
    """Words in front of texts (paper 4)."""

    @model_validator(mode="before")
    @classmethod
    def _load_user_configs(cls, values: Any, info: ValidationInfo) -> Any:
        if not isinstance(values, dict):
            return values
        run = (info.context or {}).get("run")
        return {name: _load_user_config(name, value, run) for name, value in values.items()}

    @model_serializer(mode="wrap")
    def _dump_files(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        values = {name: value for name, value in handler(self).items() if name in STRATEGIES}
        for name, config in (self.model_extra or {}).items():
            if config is not None:
                values[name] = {"file": config._user_class, **config.model_dump()}
        return values

    def __reduce__(self) -> tuple[Any, ...]:
        # a worker loads a user's file itself: its classes have no module that could be imported there
        return StrategiesConfig.model_validate, (self.model_dump(),)

    def active(self) -> dict[str, StrategyConfig]:
        """The strategies that are on, by name, in order."""
        every = {**{name: getattr(self, name) for name in STRATEGIES}, **(self.model_extra or {})}
        return {name: config for name, config in every.items() if config is not None}

    def declared_paths(self, *declarations: str) -> tuple[str, ...]:
        """Return "strategies.NAME.FIELD" of all fields that classes declare in these of `mutable_fields`,
        `run_fields` and `file_fields`: of ours, and of the users' own that are on."""
        classes = STRATEGIES | {name: type(config) for name, config in self.active().items()}
        return tuple(
            f"strategies.{name}.{field}"
            for name, each in classes.items()
            for declaration in declarations
            for field in getattr(each, declaration)
        )

    def files(self, data: Path) -> list[Path]:
        """Return the files that the strategies read, of those in the `data` folder and those that settings
        name."""
        return [file for config in self.active().values() for file in config.files(data)]

    def user_files(self) -> list[UserFile]:
        """The files of users' own that define strategies."""
        return [config._user_class for config in self.active().values() if config._user_class]

    def display_name(self) -> str:
        """Return what a table calls these strategies together; "" for none."""
        return " + ".join(config.display_name(name) for name, config in self.active().items())

    def during(self, purpose: Purpose) -> "StrategiesConfig":
        """The strategies of a training for `purpose`: those that take part, and have what they need."""
        configs = {name: config.during(purpose) for name, config in self.active().items()}
        removed = {need for config in configs.values() if config for need in config.removes()}
        return self.model_copy(
            update={
                name: None if config is None or (config.required() | config.needs_any) & removed else config
                for name, config in configs.items()
            }
        )


STRATEGIES: dict[str, type[StrategyConfig]] = {
    name: get_args(field.annotation)[0] for name, field in StrategiesConfig.model_fields.items()
}


def check_strategies(run: Any, offered: frozenset[Need], trains: bool) -> None:
    """Refuse strategies of `run` (`finetune.config.FinetuneConfig`) that would have no effect: one that is
    asked for is never dropped.

    offered: what the run has by itself. trains: whether it trains anything.
    Raises:
        UserError: something that a strategy needs is not there, or another strategy takes it away; two want
            the same place; a setting of the run does not fit.
    """
    active = run.strategies.active()
    for name, config in active.items():
        if not trains and not config.acts_untrained:
            raise UserError(
                f"strategies.{name} changes training, and setting={run.setting} trains nothing; leave it out"
            )
        config.check_run(run)
    offered = offered.union(*(config.provides() for config in active.values()))
    removed = {need: (name, how) for name, config in active.items() for need, how in config.removes().items()}
    for name, config in active.items():
        any_needs = config.needs_any & offered or config.needs_any
        for need in sorted(config.required() | any_needs):
            if need not in offered:
                either = (
                    " or ".join(NEEDS[each] for each in sorted(any_needs))
                    if need in any_needs
                    else NEEDS[need]
                )
                # a retrieval task has no head to choose
                head = "" if "embeddings" in offered else f", head={run.head}"
                raise UserError(
                    f"strategies.{name} needs {either}; task={run.task}, setting={run.setting}{head} has "
                    "none; leave it out"
                )
            if need in removed:
                other, advice = removed[need]
                raise UserError(
                    f"strategies.{name} needs {NEEDS[need]}, which strategies.{other} takes away; "
                    f"{advice or 'leave one of them out'}"
                )
    # each of these only one strategy can have
    places = [(config.place, name) for name, config in active.items() if config.place]
    places += [
        ("to train before the run itself", name)
        for name, config in active.items()
        if config.stage_epochs and not config.continues_stages
    ]
    for place, name in places:
        if (other := dict(places)[place]) != name:
            raise UserError(
                f"strategies.{name} and strategies.{other} both want {place}; leave one of them out"
            )


class Strategies:
    """The strategies of a training, built, as one: what training and evaluation ask of them.

    notes: lines about what they read.
    """

    def __init__(self, config: StrategiesConfig, context: Context):
        """Raises UserError: what a strategy's `build` finds wrong."""
        self.notes: list[str] = []
        context, self.configs = context._replace(log=self.notes.append), config.active()
        self.built: dict[str, Strategy] = {name: each.build(context) for name, each in self.configs.items()}

    def example(self, example: Any, *key: Key) -> Any:
        """A training example as all strategies show it, one after the other."""
        for strategy in self.built.values():
            example = strategy.example(example, *key)
        return example

    def adapt(self, model: Any) -> None:
        """Every strategy's change of the model, in order."""
        for strategy in self.built.values():
            strategy.adapt(model)

    def wrap_tokenizer(self, tokenizer: Tokenizer, model: Any) -> Tokenizer:
        """The tokenizer with every strategy's prompt; `model` is adapted."""
        for strategy in self.built.values():
            tokenizer = strategy.wrap_tokenizer(tokenizer, model)
        return tokenizer

    def begin(self, setup: TrainingSetup) -> None:
        """Prepare what needs the model itself."""
        for strategy in self.built.values():
            strategy.begin(setup)

    def batch_inputs(self) -> "ExtraInputs | None":
        """Return all that strategies add to a batch, as one function; None where none adds anything."""
        makers = [maker for strategy in self.built.values() if (maker := strategy.batch_inputs())]
        return functools.partial(_all_inputs, makers) if makers else None

    def layer_rates(self, num_layers: int, epoch_steps: int, epochs: int) -> "LayerRates | None":
        """The product of the factors, as a function of depth and step; None where no strategy has any."""
        scaling = [s for s in self.built.values() if type(s).lr_scale is not Strategy.lr_scale]
        if not scaling:
            return None

        def rate(depth: int | None, step: int) -> float:
            progress = TrainingProgress(step, epoch_steps * epochs, step // epoch_steps, epochs)
            return math.prod(strategy.lr_scale(depth, num_layers, progress) for strategy in scaling)

        return rate

    def loss_terms(self, model: Any) -> LossTerms:
        """All terms side by side, all states that they read, and the product of what the task's own loss
        counts.

        Raises:
            UserError: two strategies call their terms the same.
        """
        terms: dict[str, AddedTerm] = {}
        for name, strategy in self.built.items():
            needs = self.configs[name].required() | self.configs[name].needs_any
            if "states" not in needs and (strategy.hidden_states or strategy.task_weight != 1.0):
                # elsewhere nothing would read them: a seam that is not used is an error, never dropped
                raise UserError(f'strategies.{name} sets hidden_states or task_weight: it must need "states"')
            for label, term in strategy.terms(model).items():
                if label in terms:
                    raise UserError(
                        f"strategies.{name}: another strategy has a term '{label}' already; leave one of "
                        "them out"
                    )
                terms[label] = AddedTerm(*term, needs, name)
        states = [s.hidden_states for s in self.built.values() if s.hidden_states]
        layers = tuple(sorted({layer for each in states for layer in each.layers}))
        return LossTerms(
            terms,
            HiddenStates(layers, any(each.empty for each in states)) if states else None,
            math.prod(strategy.task_weight for strategy in self.built.values()),
        )


def _all_inputs(makers: "list[ExtraInputs]", *arguments: Any) -> dict[str, Any]:
    return {name: value for maker in makers for name, value in maker(*arguments).items()}


__all__ = [
    "NEEDS",
    "STRATEGIES",
    "Context",
    "HiddenStates",
    "Need",
    "Strategies",
    "StrategiesConfig",
    "Strategy",
    "StrategyConfig",
    "Term",
    "TrainingProgress",
    "TrainingSetup",
    "check_strategies",
]
