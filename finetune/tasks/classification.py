"""Tasks whose texts get a class, the best of a list: questions with answers, entailment, statements that are
true or false. `Classification` has a classifier, `Generation` a decoder that generates the class."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.batches import BatchOrder, EpochBatches, ExampleBatches, ExtraInputs
from finetune.formats import Example
from finetune.formats.answers import (
    check_labels,
    merge_answers,
    read_answers,
    read_translations,
    shorten_labels,
)
from finetune.formats.items import select
from finetune.predict import confusions, evaluate, read_predictions
from finetune.strategies.base import AddedTerm, LossTerms, Need, Outputs, term_shares
from finetune.strategies.lexical import WordNet
from finetune.tasks.base import TRAINING_SPLITS, Pipeline, Reading, Score, Task
from raylib.distributed import all_reduce, world_size
from raylib.engine import Objective
from raylib.errors import UserError
from raylib.metrics import disparity
from raylib.models.base import Backbone, FusionBackbone, read_description
from raylib.models.decoder import encode_answers
from raylib.models.finetuned import FinetuneModel, find_evaluated, load_backbone, tokenizer_at
from raylib.packed import upload
from raylib.text import Tokenizer

if TYPE_CHECKING:
    from finetune.config import FinetuneConfig

COUNTS = ("n", "predictions", "unlabelled", "unknown_answers")


@dataclass(frozen=True, kw_only=True, eq=False)
class Classification(Task):
    """A classifier over the grounded text.

    labels: the classes, in the order of IGLUE where it has the task; (): an open set of answers.
    answers: where an open set lies, if it comes as a file (the first that is there is read); else it is the
        answers of the English training file.
    merged_answers: {language: file of the translations of `answers`}: of those with one translation a
        training in this language alone makes one class.
    bleu: also BLEU, for answers that are sentences; "ja" cuts Japanese into words first.
    """

    provides: ClassVar[frozenset[Need]] = frozenset({"labels", "training_texts", "logits", "states"})
    is_generative: ClassVar[bool] = False

    labels: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    merged_answers: Mapping[str, str] = field(default_factory=dict)
    bleu: str | None = None

    @cached_property
    def heads(self) -> Mapping[str, Task]:
        if not self.open_answers:
            return {"classifier": self}
        return {
            "classifier": self,
            "decoder": Generation(**{each.name: getattr(self, each.name) for each in fields(self)}),
        }

    @property
    def open_answers(self) -> bool:
        return not self.labels

    def check(self, config: "FinetuneConfig") -> None:
        if config.loss == "triplet":
            raise UserError("loss=triplet is of pairs of a retrieval; set loss=ce, bce or bce_mean")
        if self._has_wordnet(config):
            WordNet(config.wordnet_folder)

    def files(self, config: "FinetuneConfig") -> list[Path]:
        answers = [file for file in (Path(config.data) / name for name in self.answers) if file.is_file()][:1]
        return answers + ([config.wordnet_folder] if self._has_wordnet(config) else [])

    @cache  # noqa: B019 - tasks live as long as the process
    def label_names(self, config: "FinetuneConfig") -> tuple[str, ...]:
        """The classes: the task's own, its answer file's, or the most frequent answers of the English
        training file.

        Raises:
            UserError: no answer anywhere.
        """
        if self.labels:
            return self.labels
        files = [file for file in (Path(config.data) / name for name in self.answers) if file.is_file()]
        if files and config.answers is None:
            names = read_answers(files[0])
            merged = self.merged_answers.get("".join(config.languages)) if config.trains_apart else None
            if merged is None:
                return names
            return merge_answers(names, read_translations(Path(config.data) / merged, names))
        counts: Counter[str] = Counter()
        reading = self.read_split(config, "train", "en", config.train_limit)
        for example in reading.load():
            counts.update(example.labels)
        if not counts:
            split = self.split("train", "en")
            options = ", ".join(f"{name}={value!r}" for name, value in split.options.items())
            raise UserError(
                f"{reading.path}: no item has an answer, and answers are the classes of {config.task}; check "
                f"the field of the answer: {split.read.__name__} has {options or 'no options'}"
            )
        by_frequency = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        return tuple(answer for answer, _ in by_frequency[: config.answers])

    def training_texts(self, config: "FinetuneConfig") -> tuple[dict[str, Reading], Reading | tuple]:
        split = {"zero_shot": "train", **TRAINING_SPLITS}.get(config.setting)
        if split is None:
            return {}, ()
        languages = ("en",) if config.setting == "zero_shot" else self.languages_of(config)
        limit = config.train_limit if split == "train" else None
        trained = [code for code in languages if config.setting != "few_shot" or code != "en"]
        readings = {code: self.read_split(config, split, code, limit) for code in trained}
        return readings, self.read_split(config, split, "en", limit)

    def build_model(self, config: "FinetuneConfig") -> FinetuneModel:
        labels = self.label_names(config)
        if config.continues:
            model = load_finetuned(config.model, labels, config.backbone)
            if model.is_generative != self.is_generative:
                head = "decoder" if model.is_generative else "classifier"
                raise UserError(f"{config.model}: its head is a {head}; set head={head}")
            return model
        # CLIP and M-CLIP never see a text and its image together
        backbone = load_pretrained(config)
        if not isinstance(backbone, FusionBackbone):
            raise UserError(
                f"task={config.task}: {backbone.kind} reads texts and images apart; it retrieves, "
                "no more (what fuses them derives from FusionBackbone)"
            )
        return self.new_model(config, backbone, labels)

    def new_model(
        self, config: "FinetuneConfig", backbone: FusionBackbone, labels: tuple[str, ...]
    ) -> FinetuneModel:
        """`backbone` with a new head."""
        region_dim, classifier = self.region_dim(config), config.classifier
        return FinetuneModel(
            backbone, labels, self.num_images, config.head_dropout, region_dim, classifier=classifier
        )

    def training_items(
        self, items: Sequence[Example], model: Any
    ) -> tuple[Sequence[Example], Sequence[Example]]:
        """Examples of which an answer is among the classes, and the others.

        Raises:
            UserError: no example of any has one.
        """
        known = frozenset(model.labels)
        groups: tuple[list[int], list[int]] = ([], [])
        for number, example in enumerate(items):
            groups[known.isdisjoint(example.labels)].append(number)
        answerable, unknown = (select(items, numbers) for numbers in groups)
        if unknown and not answerable:
            answers = list(dict.fromkeys(answer for example in items for answer in example.labels))
            if not answers:
                raise UserError(
                    f"none of the {len(items)} training examples has an answer; check the field or column "
                    "that the task's reader takes it from"
                )
            raise UserError(
                f"no answer of the {len(items)} training examples is a class: they have "
                f"[{shorten_labels(answers)}], the classes are [{shorten_labels(model.labels)}]"
            )
        return answerable, unknown

    def batches(
        self, pipeline: Pipeline, items: Sequence[Any], order: BatchOrder, extra: ExtraInputs | None = None
    ) -> EpochBatches:
        config, model, tokenizer, visual = pipeline
        soft = self.is_generative or config.loss.startswith("bce")
        tokenizer = tokenizer.for_training
        return ExampleBatches(items, model.labels, visual, tokenizer, config.length, soft, order, extra)

    def objective(self, config: "FinetuneConfig", model: Any, added: LossTerms) -> Objective:
        return ClassificationObjective(model, config.loss, added)

    def evaluate(
        self, pipeline: Pipeline, sets: Mapping[str, Iterable[Any]], folder: Path
    ) -> dict[str, dict[str, Any]]:
        config, model, tokenizer, visual = pipeline
        seed = config.fit.seed
        return evaluate(model, sets, visual, tokenizer, config.length, folder, self.bleu, pipeline.bf16, seed)

    def dev_score(self, config: "FinetuneConfig", figures: dict[str, Any]) -> Score:
        return Score(figures["accuracy"], figures["interval"])

    def dev_score_name(self, config: "FinetuneConfig") -> str:
        return "accuracy"

    def test_details(
        self, config: "FinetuneConfig", figures: dict[str, dict], folder: Path
    ) -> dict[str, dict]:
        """Of an open set of answers with "synonym_accuracy" and "confusions" of each language (paper 0,
        tables 2 and 3), if there is a WordNet."""
        if not self._has_wordnet(config):
            return figures
        wordnet, detailed = WordNet(config.wordnet_folder), {}
        for code, values in figures.items():
            found = confusions(read_predictions(folder / f"{code}.jsonl"), wordnet)
            synonyms = {"synonym_accuracy": found["accuracy_with_synonyms"], "confusions": found["confused"]}
            detailed[code] = {**values, **synonyms}
        return detailed

    def test_score(self, figures: dict[str, Any]) -> float:
        return figures["accuracy"]

    def summarise(self, figures: dict[str, dict[str, Any]]) -> dict[str, Any]:
        accuracy = {code: values["accuracy"] for code, values in figures.items()}
        counts = {code: {name: values[name] for name in COUNTS} for code, values in figures.items()}
        coverage = {code: 1 - c["unknown_answers"] / c["n"] for code, c in counts.items() if c["n"]}
        result = {
            "accuracy": accuracy,
            "disparity": disparity(accuracy.values()),
            "counts": counts,
            "coverage": coverage,
        }
        for name in ("answers", "synonym_accuracy", "confusions", "bleu"):
            if found := {code: values[name] for code, values in figures.items() if name in values}:
                result[name] = found
        return result

    def _has_wordnet(self, config: "FinetuneConfig") -> bool:
        return self.open_answers and config.wordnet_folder.is_dir()


@dataclass(frozen=True, kw_only=True, eq=False)
class Generation(Classification):
    """Answers of an open set, generated token by token and ranked by their probability (head=decoder)."""

    provides: ClassVar[frozenset[Need]] = frozenset({"labels", "training_texts"})
    is_generative: ClassVar[bool] = True

    @cached_property
    def heads(self) -> Mapping[str, Task]:
        return {"classifier": self, "decoder": self}  # a task that is generated has no other

    def check(self, config: "FinetuneConfig") -> None:
        super().check(config)
        if config.loss != "ce":
            raise UserError(f"head=decoder has a loss of its own, over tokens; leave out loss={config.loss}")

    def new_model(
        self, config: "FinetuneConfig", backbone: FusionBackbone, labels: tuple[str, ...]
    ) -> FinetuneModel:
        answers = encode_answers(labels, Tokenizer.load(tokenizer_at(config.model)))
        region_dim = self.region_dim(config)
        return FinetuneModel(
            backbone, labels, self.num_images, config.head_dropout, region_dim, answers, config.decoder
        )

    def objective(self, config: "FinetuneConfig", model: Any, added: LossTerms) -> Objective:
        return AnswerObjective(model, added.terms)


def task_loss(logits: Tensor, part: dict, loss: str) -> Tensor:
    """Summed over the batch: `loss` as of `ClassificationObjective`."""
    if loss.startswith("bce"):
        total = F.binary_cross_entropy_with_logits(logits, part["scores"], reduction="sum")
        return total / logits.shape[1] if loss == "bce_mean" else total
    return F.cross_entropy(logits, part["answer"], reduction="sum")


class ClassificationObjective(Objective):
    """`forward(batch)` -> (this worker's share of the loss, {"task", and by name the terms of strategies:
    means over the global batch, unweighted}).

        L = sum of weighted terms + task_weight (task + sum of weighted terms that read logits)

    loss: "ce", cross-entropy against the answer with the highest score; "ce_labels", this and the terms that
        read logits, times the number of labels; "bce", binary cross-entropy against
        all scores, summed over the labels (IGLUE's of xGQA, which multiplies the mean by their number);
        "bce_mean", their mean (IGLUE's of XVNLI and NLVR2, which does not).
    added: the terms, which of the model's states they read, and the task's weight.
    """

    # the unified encoder's cross-attention or the image encoder may have no part in a task
    has_unused_parameters = True
    model: FinetuneModel

    def __init__(self, model: FinetuneModel, loss: str, added: LossTerms | None = None):
        super().__init__()
        terms, self.states, self.task_weight = added or LossTerms()
        self.model, self.loss = model, loss
        if loss == "ce_labels":
            self.task_weight *= len(model.labels)
        # what reads no logits comes first: gradients add up in the order in which this is computed
        self.first = {name: term for name, term in terms.items() if "logits" not in term.reads}
        self.second = {name: term for name, term in terms.items() if "logits" in term.reads}

    def forward(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        part = batch["examples"]
        device = next(self.model.parameters()).device
        examples = all_reduce(torch.tensor(float(len(part["text"].lengths)), device=device))
        outputs, last = Outputs(), self.model.num_layers
        if self.states:
            layers = sorted({*self.states.layers, last})
            states, _ = self.model.hidden_states(part, layers, self.states.empty)
            outputs = Outputs(states=dict(zip(layers, states, strict=True)))
        shares = term_shares(self.first, outputs, part, examples)
        names, weights = [*self.first], [term.weight for term in self.first.values()]
        if self.task_weight:
            # one forward pass gives both: the last states are what the head reads
            logits = self.model.answer(outputs.states[last]) if self.states else self.model(part)
            outputs.logits = logits.float()
            outputs.rerun = lambda: Outputs(logits=self.model(part).float())
            task = task_loss(outputs.logits, part, self.loss) / examples
            shares += [task, *term_shares(self.second, outputs, part, examples)]
            names += ["task", *self.second]
            weights += [self.task_weight * w for w in (1.0, *(t.weight for t in self.second.values()))]
        stacked = torch.stack(shares)
        loss = (upload(torch.tensor(weights), device) * stacked).sum()
        return loss * world_size(), dict(zip(names, all_reduce(stacked).unbind(), strict=True))


class AnswerObjective(Objective):
    """The loss of a model whose head generates answers, with the terms of strategies: the mean over questions
    of -log p of their answers, each weighted by its score. Terms see no logits: there are none."""

    has_unused_parameters = True
    model: FinetuneModel

    def __init__(self, model: FinetuneModel, terms: Mapping[str, AddedTerm] | None = None):
        super().__init__()
        self.model, self.terms = model, dict(terms or {})

    def forward(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        part = batch["examples"]
        value = self.model.answer_loss(part)
        examples = all_reduce(torch.tensor(float(len(part["scores"])), device=value.device))
        shares = [value / examples, *term_shares(self.terms, Outputs(), part, examples)]
        stacked = torch.stack(shares)
        weights = torch.tensor([1.0, *(term.weight for term in self.terms.values())], device=value.device)
        loss = (weights * stacked).sum()
        return loss * world_size(), dict(
            zip(("task", *self.terms), all_reduce(stacked).unbind(), strict=True)
        )


def load_pretrained(config: "FinetuneConfig") -> Backbone:
    """The pretrained model that a run starts from, as its settings say."""
    changes = config.backbone_config.changes
    return load_backbone(config.model, config.backbone, config.vision, changes, config.preprocessing)


def load_finetuned(path: Path | str, labels: tuple[str, ...], name: str = "") -> FinetuneModel:
    """The fine-tuned model at `path`, whose classes must be `labels`, in this order; `name` as of
    `stored_backbone`.

    Raises:
        UserError: not fine-tuned; its labels differ (both orders are named).
    """
    folder = find_evaluated(path)
    values = read_description(folder)
    if values.get("model_type") != "polyglance-finetuned":
        raise UserError(f"{path}: no fine-tuned model; give the run of an English fine-tuning")
    model = FinetuneModel.from_pretrained(folder, name)
    check_labels(labels, model.labels, str(folder / "config.json"))
    return model
