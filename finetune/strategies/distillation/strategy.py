"""Distillation across languages (cViL, paper 3): what its settings build for a training."""

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from finetune.batches import encode_inputs, find_faults, load_visual
from finetune.formats import Example
from finetune.stores.images import PrecomputedFeatures
from finetune.strategies.base import (
    HiddenStates,
    Outputs,
    Strategy,
    Term,
    TrainingSetup,
)
from finetune.strategies.distillation import WHERE, DistillationConfig
from finetune.strategies.distillation.pairs import RowTokenizer, TeacherInputs, pair_distance, pair_weight
from finetune.strategies.distillation.teacher import StoredStates, Teacher, load_teacher, store_states
from finetune.strategies.distillation.word_alignments import Alignments, mix_aligned
from raylib.cache import fingerprint_module
from raylib.data.images import BadImage
from raylib.data.loading import to_device
from raylib.errors import UserError
from raylib.models.finetuned import FinetuneModel, tokenizer_at
from raylib.precision import autocast
from raylib.randomness import Key
from raylib.text import Tokenizer

BATCH = 64  # examples whose states a teacher makes at a time, beforehand


class Distillation(Strategy):
    """The student's states beside the teacher's.

        L = sum_m lambda_m (cls + image + tags + mixed) (paper 3, equation 6) + task (the task's loss)

    pivots: {id: the English text that the teacher reads}. alignments: words that may be mixed. num_words:
        {(id, text): words of a text without spaces}.
    """

    def __init__(
        self,
        config: DistillationConfig,
        pivots: Mapping[str, str],
        alignments: Alignments,
        num_words: Mapping[tuple[str, str], int] | None = None,
    ):
        self.config, self.pivots, self.alignments = config, pivots, alignments
        self.num_words = num_words or {}
        self.task_weight = config.task
        self.inputs: TeacherInputs | None = None
        self.weights: tuple[float, ...] = ()  # lambda of each compared layer
        self._model: FinetuneModel | None = None
        self._teacher: Teacher | None = None
        self._states: tuple[dict, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Loader processes change examples, and need no teacher."""
        return {**self.__dict__, "_model": None, "_teacher": None, "_states": None}

    def example(self, example: Example, *key: Key) -> Example:
        """The example with its English text; English words take the place of some of its own, anew each
        epoch."""
        example = example._replace(pivot=self.pivots[example.id])
        links = self.alignments.get((example.id, example.texts[-1]))
        if not links:
            return example
        share, num_words = self.config.share, self.num_words.get((example.id, example.texts[-1]), 0)
        text, aligned = mix_aligned(
            example.texts[-1], example.pivot, links, share, *key, "mixed", num_words=num_words
        )
        return example._replace(texts=(*example.texts[:-1], text), aligned=aligned)

    def adapt(self, model: Any) -> None:
        """Give the student the teacher's head; without a task, take the head out of training: it would decay
        under ZeRO.

        Raises:
            UserError: the teacher's answers are others.
        """
        poolers = model.backbone.poolers()
        if self.config.classifier == "teacher":
            teacher = self._load(model)
            if teacher.labels != model.labels or teacher.backbone.width != model.backbone.width:
                raise UserError(
                    f"{WHERE}.classifier=teacher: the teacher's answers ({len(teacher.labels)}) are not this "
                    f"task's ({len(model.labels)}), or its width is another; set classifier=new"
                )
            heads = teacher.head.state_dict(), model.head.state_dict()
            shapes = [{name: weight.shape for name, weight in head.items()} for head in heads]
            if shapes[0] != shapes[1]:
                raise UserError(
                    f"{WHERE}.classifier=teacher: the teacher's classifier has other layers; give this run "
                    "the teacher's classifier.* settings, or set classifier=new"
                )
            model.head.load_state_dict(heads[0])
            for student_pooler, teacher_pooler in zip(poolers, teacher.backbone.poolers(), strict=True):
                student_pooler.load_state_dict(teacher_pooler.state_dict())
        if not self.config.task:
            for part in (model.head, *poolers):
                part.requires_grad_(False)

    def _load(self, model: Any) -> FinetuneModel:
        """The teacher's model, read once, for a student `model`."""
        if self._model is None:
            config = self.config
            self._model = load_teacher(config.teacher, config.backbone, model.description["regions"])
        return self._model

    def begin(self, setup: TrainingSetup) -> None:
        """Set the teacher beside the student, or compute its states.

        Raises:
            UserError: teacher, student, task and settings do not go together.
        """
        config, pipeline = self.config, setup.pipeline
        model = pipeline.model
        teacher = self._load(model).to(next(model.parameters()).device)
        check_models(config, model, teacher)
        _check_images(config, model, teacher, pipeline.visual, setup.examples)
        layers, compared = compared_layers(config, model.num_layers, teacher.num_layers)
        beside = Teacher(teacher, compared, config.slots > 0)
        self.compare(layers, beside)
        reads = RowTokenizer(Tokenizer.load(tokenizer_at(config.teacher)), teacher.backbone.row_parts)
        stored = None
        if config.states == "stored" or (config.states == "auto" and self._fits_store(beside, reads, setup)):
            stored, self._teacher = self._store(beside, reads, setup), None
        self.inputs = TeacherInputs(
            RowTokenizer(pipeline.tokenizer, model.backbone.row_parts),
            reads,
            pipeline.config.length,
            config.tokens,
            config.slots,
            config.normalise == "public",
            stored,
        )

    def compare(self, layers: Mapping[int, float], teacher: Teacher) -> None:
        """Compare states after `layers` of the student, {layer: lambda}, with those of `teacher`."""
        self.hidden_states = HiddenStates(tuple(layers), self.config.slots > 0)
        self.weights, self._teacher = tuple(layers.values()), teacher

    def batch_inputs(self) -> TeacherInputs | None:
        return self.inputs

    def terms(self, model: Any) -> dict[str, Term]:
        """One term for each of `tokens`, of all compared layers."""
        assert self.hidden_states is not None
        layers = self.hidden_states.layers
        # the public code takes one mean over the pairs of all terms; the paper one over examples
        divisor = _pairs if self.config.normalise == "public" else _examples

        def distance(tokens: str) -> Term:
            def values(outputs: Outputs, part: dict) -> Tensor:
                taught, pairs = self._teacher_states(part), part["pairs"][tokens]
                distances = [
                    weight * pair_distance(outputs.states[layer].values, taught[m], pairs)
                    for m, (layer, weight) in enumerate(zip(layers, self.weights, strict=True))
                ]
                return functools.reduce(operator.add, distances)

            return Term(1.0, values, divisor)

        return {tokens: distance(tokens) for tokens in self.config.tokens}

    def _teacher_states(self, part: dict) -> Tensor:
        """The teacher's states (L, T', d) of the same images, computed once a batch for all terms."""
        teacher = part["teacher"]
        if "stored" in teacher:
            return teacher["stored"]
        if self._states is None or self._states[0] is not part:
            assert self._teacher is not None
            self._states = part, self._teacher.states({**part, **teacher})
        return self._states[1]

    def _fits_store(self, teacher: Teacher, reads: RowTokenizer, setup: TrainingSetup) -> bool:
        """Return whether `states=auto` stores states: they are the same in every epoch, there are several,
        and they have room, by the lengths of the first examples."""
        pipeline, unique = setup.pipeline, {e.id: e for e in setup.examples}
        if pipeline.visual.num_draws or pipeline.config.epochs == 1:
            return False
        lengths = self._read_inputs(list(unique.values())[:BATCH], teacher, reads, setup)[1]
        token_bytes = len(teacher.layers) * teacher.model.backbone.width * (2 if pipeline.bf16 else 4)
        return sum(lengths) / len(lengths) * len(unique) * token_bytes <= self.config.store_gb * 1e9

    def _read_inputs(
        self, chunk: Sequence[Example], teacher: Teacher, reads: RowTokenizer, setup: TrainingSetup
    ) -> tuple[dict[str, Any], list[int]]:
        """(what the teacher reads of some examples, the tokens of each of its rows)."""
        pipeline = setup.pipeline
        pivots = [e._replace(texts=(self.pivots[e.id],)) for e in chunk]
        try:
            visual = load_visual(pivots, pipeline.visual)
        except BadImage:
            # examples without a usable image are not trained on: whatever is stored of them is not read
            faults = find_faults(pivots, pipeline.visual)
            usable = next((e.images for place, e in enumerate(pivots) if place not in faults), None)
            if usable is None:
                raise
            pivots = [e._replace(images=usable) if i in faults else e for i, e in enumerate(pivots)]
            visual = load_visual(pivots, pipeline.visual)
        inputs = encode_inputs(pivots, visual, reads.tokenizer, pipeline.config.length)
        segments = reads.segments(inputs, teacher.empty)
        lengths = segments.text.lengths + segments.tags.lengths + segments.regions.lengths
        return inputs, (lengths + int(teacher.empty)).tolist()

    def _store(self, teacher: Teacher, reads: RowTokenizer, setup: TrainingSetup) -> StoredStates:
        """The teacher's states of all examples, made beforehand."""
        pipeline = setup.pipeline
        length, visual, bf16 = pipeline.config.length, pipeline.visual, pipeline.bf16
        if visual.num_draws:
            raise UserError(
                f"{WHERE}.states=stored: augmented images differ each time; set augment=null, or states=auto"
            )
        device = next(teacher.model.parameters()).device

        def states(chunk: Sequence[Example]) -> tuple[Tensor, list[int]]:
            inputs, lengths = self._read_inputs(chunk, teacher, reads, setup)
            with autocast(device, bf16):
                return teacher.states(to_device(inputs, device)), lengths

        # the folder is named by all that the states depend on: other parts, runs and trials read it too
        facts = (
            teacher.layers,
            teacher.empty,
            length,
            reads.tokenizer.sha256,
            bf16,
            [(e.id, self.pivots[e.id], e.images, e.tags) for e in setup.examples],
            pipeline.config.regions,
            pipeline.config.images,
        )
        folder = setup.folder / "teacher" / fingerprint_module(teacher.model, *facts)
        dtype = torch.float16 if bf16 else torch.float32
        return store_states(folder, setup.examples, states, BATCH, dtype)


def _pairs(part: dict) -> Tensor:
    return pair_weight(part["pairs"])


def _examples(part: dict) -> Tensor:
    weights = next(iter(part["pairs"].values())).weights
    return weights.new_tensor(float(len(part["text"].lengths)))


def compared_layers(
    config: DistillationConfig, student: int, teacher: int
) -> tuple[dict[int, float], tuple[int, ...]]:
    """({layer of the student: lambda}, the teacher's layers that they are compared with), of models with so
    many layers.

    Raises:
        UserError: models of different depth and no map; layers that are not there or not rising; lists of
            different length.
    """
    if student != teacher and not (config.layers and config.teacher_layers):
        raise UserError(
            f"{WHERE}: the student has {student} layers, the teacher {teacher}; say which go together with "
            f"{WHERE}.layers= and {WHERE}.teacher_layers="
        )
    usual = tuple(sorted({layer for layer in (3, 6, 9, student) if layer <= student}))
    layers, weights = config.layers or usual, config.weights or (1.0,)
    compared = config.teacher_layers or layers
    weights = weights * len(layers) if len(weights) == 1 else weights
    for name, count in (("teacher_layers", len(compared)), ("weights", len(weights))):
        if count != len(layers):
            raise UserError(
                f"{WHERE}.{name}: {count} values for {len(layers)} layers, {list(layers)}; give one for each"
            )
    for name, numbers, depth in (("layers", layers, student), ("teacher_layers", compared, teacher)):
        if list(numbers) != sorted(set(numbers)) or numbers[-1] > depth:
            raise UserError(
                f"{WHERE}.{name}={list(numbers)}: the model has layers 1 to {depth}; name some, each once, "
                "rising"
            )
    return dict(zip(layers, weights, strict=True)), compared


def check_models(config: DistillationConfig, student: FinetuneModel, teacher: FinetuneModel) -> None:
    """Raises UserError: states of the two cannot be compared."""
    backbone, other = student.backbone, teacher.backbone
    for each in (backbone, other):
        if not each.row_parts:
            raise UserError(
                f"{WHERE}: the backbone {each.kind} has no hidden states to compare; unified, cclm and oscar "
                "have"
            )
    if backbone.row_parts != other.row_parts:
        raise UserError(
            f"{WHERE}: {backbone.kind}'s rows are of {', '.join(backbone.row_parts)}, the teacher's, "
            f"{other.kind}'s, of {', '.join(other.row_parts)}; take a teacher of the same kind"
        )
    if backbone.width != other.width:
        raise UserError(
            f"{WHERE}: the teacher's states are {other.width} wide, the student's {backbone.width}; they "
            "must be equal"
        )
    for name, part, what in (("image", "regions", "tokens of images"), ("tags", "tags", "object tags")):
        if name in config.tokens and part not in backbone.row_parts:
            raise UserError(
                f"{WHERE}.tokens: {backbone.kind} has no {what} in its rows, which '{name}' compares; leave "
                f"'{name}' out"
            )
    if config.slots and "regions" not in backbone.row_parts:
        raise UserError(f"{WHERE}.slots={config.slots}: {backbone.kind} has no slots of regions; set it to 0")


def _check_images(
    config: DistillationConfig,
    student: FinetuneModel,
    teacher: FinetuneModel,
    images: Any,
    examples: Sequence[Example],
) -> None:
    """Raises UserError: the two would not read the same image."""
    if student.num_images != 1 or not examples[0].images:
        raise UserError(f"{WHERE}: teacher and student must be about one image; this task's texts are not")
    if "soft_prompt" in teacher.backbone.tuning:
        raise UserError(
            f"{WHERE}.teacher={config.teacher}: it was trained with a soft prompt, which texts would lack"
        )
    if student.backbone.preprocess != teacher.backbone.preprocess and student.backbone.image_size:
        raise UserError(
            f"{WHERE}: teacher and student prepare images differently "
            f"({teacher.backbone.preprocess} and {student.backbone.preprocess}); set preprocessing=opencv"
        )
    size, teacher_size = student.backbone.image_size, teacher.backbone.image_size
    if size != teacher_size:
        raise UserError(
            f"{WHERE}: the teacher sees images of {teacher_size} pixels, the student of {size}; set "
            f"image_size={teacher_size}"
        )
    if isinstance(images, PrecomputedFeatures):
        encoders = [m.backbone.image_encoder for m in (student, teacher)]
        prints = [encoder and fingerprint_module(encoder) for encoder in encoders]
        if prints[0] != prints[1]:
            raise UserError(
                f"{WHERE}: the frozen image encoder is not the teacher's, so images cannot be encoded once "
                "for both; set cache_image_states=false"
            )
