"""The final evaluation of a run: of its test sets, of `extra_tests`, and once more of its test sets with
shuffled images.

A test item with shuffled images has those of another one: what a model still answers, it reads in the text.
Items about the same images stay together: the groups of images of a set change places, by a permutation that
is drawn once from their names. So it is the same in every language that asks about the same images, and does
not depend on the order of the items. Of a text about two images both come from one other item.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from finetune.build import (
    cache_image_states,
    evaluate_sets,
    extra_tests,
    find_task,
    open_visual_of,
    test_sets,
)
from finetune.config import SHUFFLED_IMAGES, FinetuneConfig
from finetune.formats import Captioned, Example
from finetune.overlap import image_name
from finetune.stores.images import encoded_images
from finetune.tasks.base import Pipeline
from raylib.errors import UserError
from raylib.provenance import provenance
from raylib.randomness import permutation
from raylib.runtime import advise_on_memory, peak_memory

SEED = 0  # of the permutation: the same in all runs, whatever their own
Names = tuple[str, ...]
Figures = dict[str, dict[str, Any]]  # by language, as a task evaluates its set


def cache_test_states(pipeline: Pipeline) -> Pipeline:
    """The pipeline with the states of all images of its test sets, where the image encoder never changes;
    else each evaluation encodes them for itself."""
    items = (item for of_language in test_sets(pipeline.config).values() for item in of_language)
    return cache_image_states(pipeline, items)


def dev_result(config: FinetuneConfig, values: Mapping[str, float], device: torch.device) -> dict[str, Any]:
    """{"dev": {language: score of its dev set}, "interval": {language: its 95 % interval}}, of the scores
    that the evaluated checkpoint was judged by, and what made it (`test_result`)."""
    dev = {name.removeprefix("dev/"): value for name, value in values.items() if name.startswith("dev/")}
    ends = [name.split("/") for name in values if name.startswith("interval/")]
    intervals = {code: [values[f"interval/{code}/{end}"] for end in ("low", "high")] for _, code, _ in ends}
    return {"dev": dev, "interval": intervals, **_runtime_facts(config, device)}


def test_result(pipeline: Pipeline, run: Path) -> dict[str, Any]:
    """Evaluate the model as it is. Returns {"languages": {code: figures}}, with "extra_tests": {name: {code:
    figures}} where there are any, "evaluation_seconds", "evaluated_per_second" (questions or captions),
    "peak_memory_gb", `raylib.provenance`."""
    config, folder = pipeline.config, run / "predictions"
    start = time.perf_counter()
    pipeline = cache_test_states(pipeline)
    device = next(pipeline.model.parameters()).device
    with advise_on_memory("the evaluation", device, lambda: config.less_evaluation_memory):
        figures, extra = evaluate_tests(pipeline, folder)
    seconds = time.perf_counter() - start
    found = (values for each in (figures, *extra.values()) for values in each.values())
    items = sum(values.get("captions", values["n"]) for values in found)
    return {
        "languages": figures,
        **({"extra_tests": extra} if extra else {}),
        "evaluation_seconds": seconds,
        "evaluated_per_second": items / seconds,
        "preprocessing": pipeline.model.backbone.describe_preprocessing() if pipeline.visual else None,
        **_runtime_facts(config, device),
    }


def evaluate_tests(pipeline: Pipeline, folder: Path) -> tuple[Figures, dict[str, Figures]]:
    """({language: figures} of the test sets, {name: the same} of those with shuffled images and of
    `extra_tests`), whose predictions lie in folders of their names below `folder`."""
    config, task = pipeline.config, find_task(pipeline.config)
    extra: dict[str, Figures] = {}

    def evaluate(pipeline: Pipeline, sets: Mapping[str, Iterable[Any]], name: str = "") -> Figures:
        place = folder / name
        figures = evaluate_sets(pipeline, sets, place, f"{name} test".strip())
        return task.test_details(config, figures, place)

    sets = test_sets(config)
    if not config.shuffled_images:
        figures = evaluate(pipeline, sets)
    else:
        # images are encoded once for both
        def names() -> Iterator[str]:
            return (name for items in sets.values() for item in items for name in item.images)

        backbone, states = pipeline.model.backbone, folder / ".all_states"
        with encoded_images(backbone, pipeline.visual, names, states, pipeline.bf16) as visual:
            pipeline = pipeline._replace(visual=visual)
            figures = evaluate(pipeline, sets)
            shuffled = {code: ShuffledImages(items, str(items.path)) for code, items in sets.items()}
            extra[SHUFFLED_IMAGES] = evaluate(pipeline, shuffled, SHUFFLED_IMAGES)
    for name, read_as in extra_tests(config).items():
        visual = open_visual_of(read_as, pipeline.model) if pipeline.visual else None
        other = cache_test_states(pipeline._replace(config=read_as, visual=visual))
        extra[name] = evaluate(other, test_sets(read_as), name)
    return figures, extra


def _runtime_facts(config: FinetuneConfig, device: torch.device) -> dict[str, Any]:
    precision = config.fit.describe_precision(device)
    return {**provenance(device), "evaluation_precision": precision, "peak_memory_gb": peak_memory(device)}


class ShuffledImages:
    """The items of `items`, each with the images of another one; they can be gone through again and again.

    Raises, when they are gone through, UserError: not as many different images as that takes.
    """

    def __init__(self, items: Iterable[Any], where: str):
        self.items, self.where = items, where
        self._donors: dict[Names, Any] = {}

    def __iter__(self) -> Iterator[Any]:
        if not self._donors:
            self._donors = self._find_donors()
        for item in self.items:
            yield item.with_images_of(self._donors[item.images])

    def _find_donors(self) -> dict[Names, Any]:
        """{images of an item: the item whose images it gets}."""
        first: dict[Names, Any] = {}
        for item in self.items:
            first.setdefault(item.images, item)
        groups = derange(list(first), self.where)
        return {names: first[other] for names, other in groups.items()}


def derange(groups: list[Names], where: str) -> dict[Names, Names]:
    """{group of images: another group, which has none of its images if there is such a one}, one to one.

    Raises:
        UserError: there is one group alone.
    """
    if len(groups) < 2:
        raise UserError(
            f"{where}: shuffled_images needs items about two different images at least; raise test_limit=, "
            "or set shuffled_images=false"
        )
    # by their names: files of other languages may have another order, other folders and endings
    by_name = sorted(groups, key=lambda names: (tuple(map(image_name, names)), names))
    order = [by_name[i] for i in permutation(len(groups), SEED, "shuffled images")]
    targets = [*order[1:], order[0]]
    for i, own in enumerate(order):
        if not set(own).isdisjoint(targets[i]):  # two pairs of images may share one
            swaps = (
                j
                for j in range(len(order))
                if set(own).isdisjoint(targets[j]) and set(order[j]).isdisjoint(targets[i])
            )
            if (j := next(swaps, None)) is not None:
                targets[i], targets[j] = targets[j], targets[i]
    return dict(zip(order, targets, strict=True))


def check_shuffled(items: Iterable[Any], where: str) -> None:
    """Raise UserError where items are of no kind whose images could be exchanged, or all about the same."""
    found: dict[Names, None] = {}
    for item in items:
        if not isinstance(item, Example | Captioned) or not item.images:
            raise UserError(f"{where}: its texts are about no images; set shuffled_images=false")
        found[item.images] = None
        if len(found) > 1:
            return
    derange(list(found), where)
