"""Losses of held-out samples in pretraining, term by term, and whether the model grounds its words in images.

The samples lie in a folder of the same layout as the corpus (`data.dev`): image_text, parallel, text, or some
of them. They are read as training reads its own, in global batches of the same size that are a pure function
of (seed, number), so that the figures are the same on any number of workers and comparable with the
training's; images whole, not augmented. Nothing is dropped out, nothing gets a gradient.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.batches import DataConfig, StepBatches
from raylib.data.loading import to_device
from raylib.distributed import all_reduce
from raylib.errors import UserError
from raylib.objectives import PretrainingTerm
from raylib.objectives.pretraining import UnifiedObjective
from raylib.precision import autocast
from raylib.settings import SQUEEZED, PreprocessConfig

NUM_BATCHES = 4


def dev_batches(
    data: DataConfig,
    image_size: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
    preprocess: PreprocessConfig = SQUEEZED,
) -> StepBatches | None:
    """Open the held-out samples of the streams that train, in batches as large; None: none are wanted.

    Raises:
        UserError: no stream has any; as of `StepBatches`, such as fewer samples of a language than lanes.
    """
    if not data.dev:
        return None
    streams = {}
    for name, stream in data.streams.items():
        folder = Path(data.dev).absolute() / name
        batch = stream.batch if folder.is_dir() else 0
        streams[name] = stream.model_copy(update={"folder": str(folder), "batch": batch})
    if not any(stream.batch for stream in streams.values()):
        trained = ", ".join(name for name, stream in data.streams.items() if stream.batch)
        raise UserError(f"data.dev={data.dev}: no folder {trained} in it; data.dev=false leaves it out")
    held_out = data.model_copy(update={**streams, "augment": None})
    try:
        return StepBatches(held_out, image_size, seed, rank, world, preprocess)
    except UserError as error:
        raise UserError(f"data.dev={data.dev}: {error}") from error


class DevLosses:
    """`losses()` -> {"dev_loss/NAME": of each term; "dev_loss/vlm_wrong_image": of masked words of captions
    beside another image; "itm_accuracy"}.

    batches: the held-out ones, of which the first `NUM_BATCHES` are used.
    """

    def __init__(self, objective: UnifiedObjective, batches: StepBatches, bf16: bool):
        self.batches, self.bf16, self.model = batches, bf16, objective.model
        terms = {k: entry for k, entry in objective.terms.items() if entry.stream in batches.streams}
        # VLM's losses are of all captions, which costs little without the other terms
        vlm = {name: terms.pop(name) for name in ("vlm",) if name in terms}
        self.vlm, self.others = _with_terms(objective, vlm, fuse_every=1), _with_terms(objective, terms)

    def __call__(self) -> dict[str, float]:
        """The means over the batches. All workers take part, and all return the same."""
        device, values = self.model.temperature.device, []
        self.num_bad = 0
        with torch.no_grad(), autocast(device, self.bf16):
            batch = self._read(0, device)
            for number in range(NUM_BATCHES):
                following = self._read(number + 1, device)
                values.append(self._losses(batch, following))
                batch = following
        count = all_reduce(torch.tensor(self.num_bad, device=device))
        self.batches.check_replaced(int(count), NUM_BATCHES + 1)
        # the device works through all batches before the host asks for a number
        names, rows = list(values[0]), torch.stack([torch.stack(list(row.values())) for row in values])
        means = [sum(column) / NUM_BATCHES for column in zip(*rows.tolist(), strict=True)]
        return {
            name if name == "itm_accuracy" else f"dev_loss/{name}": mean
            for name, mean in zip(names, means, strict=True)
        }

    def _losses(self, batch: dict[str, Any], following: dict[str, Any]) -> dict[str, Tensor]:
        values = self.others(batch)[1] if self.others.terms else {}
        if self.vlm.terms:
            pairs = batch["image_text"]
            # the image at the same place of the next batch: on any number of workers it is the same one
            other = {name: following["image_text"][name] for name in ("states", "image_id")}
            wrong = self.vlm({"image_text": pairs | other})[1]
            values |= self.vlm({"image_text": pairs})[1] | {"vlm_wrong_image": wrong["vlm"]}
        return values

    def _read(self, number: int, device: torch.device) -> dict[str, Any]:
        """A batch with its images encoded: once, though up to three losses read them."""
        batch = to_device(self.batches[number], device)
        self.num_bad += batch["bad"]
        if any(entry.stream == "image_text" for entry in (self.others.terms | self.vlm.terms).values()):
            pairs = batch["image_text"]
            batch["image_text"] = {**pairs, "states": self.model.encode_images(pairs["images"])}
        return batch


def _with_terms(
    objective: UnifiedObjective, terms: Mapping[str, PretrainingTerm], **config: Any
) -> UnifiedObjective:
    """Return the objective of the same model that computes these terms alone, with other settings."""
    other = copy.copy(objective)
    other.terms, other.weights = dict(terms), dict.fromkeys(terms, 1.0)
    other.config = objective.config.model_copy(update=config)
    # states that it keeps would be of another batch than the one in which training first meets them
    other.frozen_texts = None
    return other
