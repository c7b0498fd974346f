"""What a fine-tuning method is: a frozen config with functions for the seams of training."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from finetune.examples import Captioned, Example
from raylib.config import Config
from raylib.distributed import total, world_size
from raylib.packed import Ragged
from raylib.randomness import Key
from raylib.text import Tokenizer


class Progress(NamedTuple):
    """How far training is: `step` of `steps`, in `epoch` of `epochs` (all from 0)."""

    step: int
    steps: int
    epoch: int
    epochs: int


class Context(NamedTuple):
    """The run that a strategy takes part in: the `data` folder, the `wordnet` one, the task's `languages`,
    the answers (`labels`), the model's `tokenizer` file, a folder to `cache` in, `log`, which prints,
    and `captions(made, language)`, {picture: its training captions}: made "", the captions themselves,
    "_to_en" or "_from_en", translations of them. None: none are trained on but English ones. `training`: the
    examples that are trained on, by language, and `english`, the same in English; of tasks that have
    answers."""

    data: Path
    wordnet: Path
    languages: tuple[str, ...]
    labels: tuple[str, ...]
    tokenizer: Path
    cache: Path
    log: Callable[[str], None]
    captions: Callable[[str, str], dict[str, tuple[str, ...]]] | None = None
    training: Mapping[str, Iterable[Example]] = {}
    english: Iterable[Example] = ()


class HiddenStates(NamedTuple):
    """States of the model that terms read (`Outputs.states`): after these `layers`, rising; `empty`: rows
    have a slot without a region."""

    layers: tuple[int, ...]
    empty: bool = False


class Outputs(NamedTuple):
    """Named results of the task's forward pass, which terms read; None where the task computes no such thing.

    logits: (b, C) of a classifier. states: {layer: all tokens} of `HiddenStates`, of a classification.
    image_embeddings, text_embeddings, pivot_embeddings: (b, e) of a retrieval, of any length.
    contrast: `contrast(queries (b, e), keys (b, e))`, InfoNCE of cosines summed over the rows, with the keys
        of all workers.
    """

    logits: Tensor | None = None
    states: Mapping[int, Ragged] = {}
    image_embeddings: Tensor | None = None
    text_embeddings: Tensor | None = None
    pivot_embeddings: Tensor | None = None
    contrast: Callable[[Tensor, Tensor], Tensor] | None = None


class Term(NamedTuple):
    """A term of the loss: `weight` times the mean of its values over the global batch.

    values: `values(outputs, batch)` of one worker's part of the batch: (b,), one an example; or, of a
        term that looks at the model alone, a scalar, the same on every worker.
    count: what the sum of the values is divided by, over all workers, if not by the number of examples.
    reads_logits: it is about the answers: computed after them, and scaled by the weight of the task's own
    loss.
    """

    weight: float
    values: Callable[[Outputs, dict], Tensor]
    count: Callable[[dict], Tensor] | None = None
    reads_logits: bool = False


def term_shares(terms: Iterable[Term], outputs: Outputs, part: dict, examples: Tensor) -> list[Tensor]:
    """This worker's share of each term's mean over the global batch of so many `examples`, unweighted."""
    shares = []
    for term in terms:
        values = term.values(outputs, part)
        if term.count:
            shares.append(values.sum() / total(term.count(part)))
        else:
            # a scalar is of the model alone, the same on every worker: the workers' shares add up to it
            shares.append(values / world_size() if values.ndim == 0 else values.sum() / examples)
    return shares


class Strategy(Config):
    """A method that changes nothing: each of these does where a method overrides it. They compose without
    knowing of each other: examples and tokenizers one after the other, `adapt` in order, rates by product,
    terms side by side."""

    shown: ClassVar[tuple[str, ...]] = ()  # settings that tables always tell
    hidden: ClassVar[tuple[str, ...]] = ()  # those that they never tell: files

    def called(self, name: str) -> str:
        """What tables call the method, which is `name` in the registry, with the settings that are not the
        usual ones."""
        told = [
            field
            for field, info in type(self).model_fields.items()
            if field not in self.hidden and (field in self.shown or getattr(self, field) != info.default)
        ]
        values = [f"{field} {_worded(getattr(self, field))}".replace("source ", "") for field in told]
        return name.replace("_", " ") + (f" ({', '.join(values)})" if values else "")

    def files(self, data: Path) -> tuple[Path, ...]:
        """Return the files that the method reads, of those in the `data` folder and those that its settings
        name."""
        return ()

    def prepare(self, context: Context) -> "Strategy":
        """Read what the method needs, before anything starts. Returns the method, ready.

        Raises:
            UserError: a file is missing or wrong, a setting does not fit.
        """
        return self

    def example(self, example: Example | Captioned, *key: Key) -> Example | Captioned:
        """A training example as this method shows it; whatever is drawn is drawn from `key` (seed, epoch, its
        id)."""
        return example

    def reads(self, tokenizer: Tokenizer, model: nn.Module) -> Tokenizer:
        """How the model, adapted, reads its texts, in training and evaluation: the tokenizer, with a prompt
        perhaps."""
        return tokenizer

    def adapt(self, model: nn.Module) -> None:
        """Change the model before training: masks, permanent freezes."""

    def lr_scale(self, depth: int | None, depths: int, progress: Progress) -> float:
        """Factor of the learning rate of the parameters at `depth` (`raylib.models`) of `depths`; 0
        freezes them."""
        return 1.0

    def terms(self, model: nn.Module) -> dict[str, Term]:
        """What is added to the loss, by name."""
        return {}


def _worded(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
