"""A run's distillation, put together from its settings, its student and its teacher."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from finetune import pictures as seen_as
from finetune.batches import encode_inputs, load_visual
from finetune.config import FinetuneConfig
from finetune.distillation.inputs import Inputs, Side
from finetune.distillation.objective import DistillationObjective
from finetune.distillation.stored import Stored, write_stored
from finetune.distillation.teacher import Teacher, load_teacher
from finetune.examples import Example
from finetune.model import FinetuneModel, tokenizer_at
from finetune.strategies import Term
from finetune.strategies.distillation import Distillation, chosen_layers
from raylib.data.states import fingerprint
from raylib.device import to_device
from raylib.errors import UserError
from raylib.text import Tokenizer

BATCH = 64  # examples whose states a teacher makes at a time, beforehand
WHERE = "strategies.distillation"


def distil(
    config: FinetuneConfig,
    method: Distillation,
    model: FinetuneModel,
    tokenizer: Tokenizer,
    pictures: seen_as.VisualSource,
    examples: Sequence[Example],
    terms: dict[str, Term],
    home: Path,
) -> tuple[Inputs, DistillationObjective]:
    """What batches hold besides, and the objective.

    home: where states that are made beforehand are kept, for all parts of a run.
    Raises:
        UserError: teacher, student, task and settings do not go together.
    """
    device = next(model.parameters()).device
    teacher = load_teacher(method.teacher, method.backbone, model.labels, model.description["regions"]).to(
        device
    )
    check_models(method, model, teacher)
    _check_pictures(method, model, teacher, pictures, examples)
    if terms and not method.task:
        raise UserError(
            f"{WHERE}.task=0: {', '.join(terms)} is of the classifier, which learns nothing; set "
            f"{WHERE}.task=1"
        )
    layers, taught = chosen_layers(method, model.num_layers, teacher.num_layers)
    beside = Teacher(teacher, taught, method.slots > 0)
    sides = (
        Side(tokenizer, model.backbone.row_parts),
        Side(Tokenizer.load(tokenizer_at(method.teacher)), teacher.backbone.row_parts),
    )
    public = method.normalise == "public"
    stored = None
    if method.states == "stored":
        stored, beside = _store(config, method, beside, sides[1], pictures, examples, home), None
    inputs = Inputs(*sides, config.length, method.tokens, method.slots, public, stored)
    objective = DistillationObjective(
        model, beside, layers, config.loss, method.task, terms, public, method.slots > 0
    )
    return inputs, objective


def check_models(method: Distillation, student: FinetuneModel, teacher: FinetuneModel) -> None:
    """Raises UserError: states of the two cannot be compared."""
    for model in (student, teacher):
        if not hasattr(model.backbone, "hidden_states"):
            raise UserError(
                f"{WHERE}: the backbone {model.backbone.kind} does not tell its states; unified, cclm and "
                "oscar do"
            )
    mine, theirs = student.backbone, teacher.backbone
    if mine.row_parts != theirs.row_parts:
        raise UserError(
            f"{WHERE}: {mine.kind}'s rows are of {', '.join(mine.row_parts)}, the teacher's, "
            f"{theirs.kind}'s, of {', '.join(theirs.row_parts)}; take a teacher of the same kind"
        )
    if mine.width != theirs.width:
        raise UserError(
            f"{WHERE}: the teacher's states are {theirs.width} wide, the student's {mine.width}; they must "
            "be equal"
        )
    for name, part, what in (("image", "regions", "tokens of pictures"), ("tags", "tags", "object tags")):
        if name in method.tokens and part not in mine.row_parts:
            raise UserError(
                f"{WHERE}.tokens: {mine.kind} has no {what} in its rows, which '{name}' compares; leave "
                f"'{name}' out"
            )
    if method.slots and "regions" not in mine.row_parts:
        raise UserError(f"{WHERE}.slots={method.slots}: {mine.kind} has no slots of regions; leave it out")


def _check_pictures(
    method, model: FinetuneModel, teacher: FinetuneModel, pictures, examples: Sequence[Example]
) -> None:
    if model.num_images != 1 or not examples[0].images:
        raise UserError(f"{WHERE}: teacher and student must be about one picture; this task's texts are not")
    if "soft_prompt" in getattr(teacher.backbone, "tuning", {}):
        raise UserError(
            f"{WHERE}.teacher={method.teacher}: it was trained with a soft prompt, which texts would lack"
        )
    sizes = [getattr(m.backbone.config, "image_size", None) for m in (model, teacher)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{WHERE}: the teacher sees pictures of {sizes[1]} pixels, the student of {sizes[0]}; set "
            f"image_size={sizes[1]}"
        )
    if isinstance(pictures, seen_as.PrecomputedFeatures):
        made = [fingerprint(m.backbone.vision) for m in (model, teacher)]
        if made[0] != made[1]:
            raise UserError(
                f"{WHERE}: the frozen image encoder is not the teacher's, so pictures cannot be encoded once "
                "for both; set cache_image_states=false"
            )


def _store(
    config: FinetuneConfig,
    method: Distillation,
    teacher: Teacher,
    side: Side,
    pictures: seen_as.VisualSource,
    examples: Sequence[Example],
    home: Path,
) -> Stored:
    """The teacher's states of all examples, made beforehand."""
    if pictures.num_draws:
        raise UserError(
            f"{WHERE}.states=stored: augmented pictures differ each time; set augment=null, or states=live"
        )
    device = next(teacher.model.parameters()).device
    bf16 = config.fit.uses_bf16(device)

    def states(chunk: Sequence[Example]) -> tuple[Tensor, list[int]]:
        pivots = [e._replace(texts=(method.pivot(e),)) for e in chunk]
        inputs = encode_inputs(pivots, load_visual(pivots, pictures), side.tokenizer, config.length)
        places = side.places(inputs, teacher.empty)
        lengths = places.text.lengths + places.tags.lengths + places.regions.lengths + int(teacher.empty)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return teacher.states(to_device(inputs, device)), lengths.tolist()

    texts = [(e.id, method.pivot(e), e.images, e.tags) for e in examples]
    facts = (
        teacher.layers,
        teacher.empty,
        config.length,
        side.tokenizer.sha256,
        bf16,
        texts,
        config.regions,
        config.images,
    )
    folder = home / "teacher" / fingerprint(teacher.model, *facts)
    return write_stored(folder, examples, states, BATCH, torch.float16 if bf16 else torch.float32)
