"""Predictions of a classification task and their scores, streamed: memory does not grow with their number.

1. All images are encoded once, by all workers, into a file of states (`raylib.cache`).
2. Examples are read as a stream and cut into batches, of 4,096 of them those about the same image together;
   worker r predicts every world-th batch, so that each batch is the same whatever the number of workers, and
   appends what it predicts to a file of its own.
3. The workers' files become one, in the order of the examples: lines {"id", "prediction", "labels",
   "kind", "images"}, which `score` reads.
"""

import contextlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
import torch.distributed as dist
from torch import Tensor

from finetune.batches import read_usable_inputs
from finetune.formats import Example, get_field, get_optional, parse_number, shorten, stream_jsonl
from finetune.stores.images import PrecomputedFeatures, SharedFeatures, VisualSource, encoded_images
from finetune.strategies.lexical import NONE, SYNONYM, WordNet
from raylib.data.loading import batched, prefetch, to_device
from raylib.display import progress
from raylib.distributed import raise_on_all_workers, world_size
from raylib.errors import UserError, require
from raylib.fileio import atomic_file
from raylib.lock import make_folder
from raylib.metrics import MILLION, ItemClusters
from raylib.models.finetuned import FinetuneModel
from raylib.precision import autocast
from raylib.randomness import Key
from raylib.text import Tokenizer

BATCH = 64  # examples predicted at a time
WINDOW = 64 * BATCH  # examples among which those about the same image come together
NumberedExamples = Sequence[tuple[int, Example]]  # with their places in a window
BLOCK = 64  # batches whose predictions come from the device, and are written, at a time
ORDERS = 4  # n-grams of BLEU
# the answers of what GQA calls verify and logical, in all languages of xGQA
YES_NO = frozenset({"yes", "no"})
CONFUSED_PAIRS = 5  # that paper 0's table 3 names


class PredictedBatch(NamedTuple):
    """A batch of examples; the predicted classes (b,) of those whose images can be read, -1 where scores are
    not finite, None where there are none; {place of another: why}."""

    examples: NumberedExamples
    classes: Tensor | None
    faults: Mapping[int, str]


def predict(
    model: FinetuneModel,
    examples: Iterable[Example],
    visual: VisualSource | None,
    tokenizer: Tokenizer,
    length: int,
    out: Path,
    bf16: bool = False,
    total: int | None = None,
) -> int:
    """Write {"id", "prediction", "labels", "kind", "images"} of every example into `out`, one line each;
    every worker calls it. Where an image cannot be read, the prediction is "", and "error" says why.

    `out` must lie where all workers can write. total: examples, where it is known. Returns how many there
    are.

    Raises:
        NotFinite: scores of an example are not finite; the first of its batch is named.
    """
    rank, world = dist.get_rank() if world_size() > 1 else 0, world_size()
    count, bad = 0, None
    part = out.with_name(f".{out.name}.{rank}")
    model.eval()
    with open(part, "w", encoding="utf-8") as file, torch.inference_mode():
        # every world-th batch, and not every world-th example: batches are the same for any world
        chunks = itertools.islice(_batches(examples), rank, None, world)
        read = (
            (chunk, *read_usable_inputs([e for _, e in chunk], visual, tokenizer, length)) for chunk in chunks
        )
        share = None if total is None else -(-total // world)
        waited = progress(prefetch(read), f"predict {out.stem}", share, "examples", lambda item: len(item[0]))
        pending: list[PredictedBatch] = []
        for chunk, inputs, faults in waited:
            classes = None
            if inputs is not None:
                scores, finite = class_scores(model, inputs, bf16)
                classes = scores.argmax(1).masked_fill(~finite, -1)
            pending.append(PredictedBatch(chunk, classes, faults))
            count += len(chunk)
            if len(pending) == BLOCK:
                bad = _write_predictions(file, pending, model.labels)
                pending = []
            if bad:
                break
        bad = bad or _write_predictions(file, pending, model.labels)
    if bad:
        part.unlink()
    raise_on_all_workers(bad)
    if world > 1:
        counts: list[Any] = [None] * world
        dist.all_gather_object(counts, count)  # waits for all
        count = sum(counts)
    if rank == 0:
        _merge([out.with_name(f".{out.name}.{r}") for r in range(world)], out)
    if world > 1:
        dist.barrier()
    return count


def class_scores(model: FinetuneModel, inputs: dict[str, Any], bf16: bool) -> tuple[Tensor, Tensor]:
    """(scores (b, labels) of the examples that `inputs` are of, as `FinetuneModel.forward` has them; (b,)
    bool: whether those of an example are finite), both on the device."""
    device = next(model.parameters()).device
    with autocast(device, bf16):
        scores = model(to_device(inputs, device))
    # a decoder's score is -inf of what is no candidate; a maximum is NaN where any score is
    checked = scores.amax(1, keepdim=True) if model.is_generative else scores
    return scores, checked.isfinite().all(1)


def not_finite_scores(example: str) -> str:
    """Say whose scores are not finite."""
    return f"scores of example {example}: not finite (NaN or infinite)"


def _write_predictions(file: TextIO, batches: Sequence[PredictedBatch], labels: Sequence[str]) -> str | None:
    """Write a line an example. Returns the line that names the first example whose scores are not finite."""
    classes = [batch.classes for batch in batches if batch.classes is not None]
    # the one place where the host waits for the device
    found = iter(torch.cat(classes).tolist() if classes else [])
    for batch in batches:
        for place, (number, example) in enumerate(batch.examples):
            if (fault := batch.faults.get(place)) is not None:
                answer = {"prediction": "", "error": fault}
            elif (label := next(found)) < 0:
                return not_finite_scores(example.id)
            else:
                answer = {"prediction": labels[label]}
            line = {
                "id": example.id,
                **answer,
                "labels": dict(example.labels),
                "kind": example.kind if isinstance(example.kind, str) else list(example.kind),
                "images": list(example.images),
            }
            file.write(f"{number}\t{json.dumps(line, ensure_ascii=False)}\n")
    return None


def evaluate(
    model: FinetuneModel,
    sets: Mapping[str, Iterable[Example]],
    visual: VisualSource | None,
    tokenizer: Tokenizer,
    length: int,
    folder: Path,
    bleu: str | None = None,
    bf16: bool = False,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """{language: `score` of its examples}; predictions go to `folder`/LANGUAGE.jsonl. All workers
    return the same.

    sets: {language: examples that can be gone through twice, for their images and for their texts}. seed:
        the bootstrap's draws are seeded by it and the language.
    """
    make_folder(folder)
    totals: Counter[str] = Counter()

    def image_names() -> Iterator[str]:
        for language, examples in sets.items():
            for example in examples:
                totals[language] += 1
                yield from example.images

    with encoded_images(model.backbone, visual, image_names, folder / ".states", bf16) as visual:
        if isinstance(visual, PrecomputedFeatures):
            visual = SharedFeatures(visual.states, visual.store)
        results = {}
        for language, examples in sets.items():
            out = folder / f"{language}.jsonl"
            spoken = tokenizer.for_language(language)
            count = predict(model, examples, visual, spoken, length, out, bf16, totals[language] or None)
            found = score(read_predictions(out), frozenset(model.labels), bleu, (seed, language))
            results[language] = {**found, "predictions": count}
    return results


def _batches(examples: Iterable[Example]) -> Iterator[NumberedExamples]:
    """Batches of examples with their places in a window of `WINDOW`: those about the same image together,
    which a model then reads and projects once."""
    for window in batched(examples, WINDOW):
        yield from batched(sorted(enumerate(window), key=lambda numbered: numbered[1].images), BATCH)


def _merge(parts: list[Path], out: Path) -> None:
    """Lines of the workers' files, in the order of the examples and without the number before them."""
    with contextlib.ExitStack() as stack:
        # on the disk before the checkpoint whose evaluation this is: no start writes it again
        temporary = stack.enter_context(atomic_file(out))
        files = [stack.enter_context(open(part, encoding="utf-8")) for part in parts]
        whole = stack.enter_context(open(temporary, "w", encoding="utf-8"))

        def lines() -> Iterator[list[str]]:
            # worker r wrote batches r, r + world, ...: BATCH lines from each in turn are in their order
            for file in itertools.cycle(files):
                batch = list(itertools.islice(file, BATCH))
                yield from (line.split("\t", 1) for line in batch)
                if len(batch) < BATCH:
                    return

        for window in batched(lines(), WINDOW):
            whole.writelines(line for _, line in sorted(window, key=lambda pair: int(pair[0])))
    for part in parts:
        part.unlink()


def read_predictions(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a predictions file, one at a time.

    Raises:
        UserError: a line that is none of a prediction; names it, and the field.
    """
    for where, line in stream_jsonl(path):
        get_field(line, "id", str, where)
        get_field(line, "prediction", str, where)
        for answer in get_field(line, "labels", dict, where).values():
            parse_number(answer, where)
        if any(type(image) is not str for image in get_optional(line, "images", list, where, ())):
            raise UserError(f"{where}: field 'images' is {shorten(line['images'])}; wanted names")
        kinds = get_field(line, "kind", (str, list), where)
        if any(type(kind) is not str for kind in kinds):
            raise UserError(f"{where}: field 'kind' is {shorten(kinds)}; wanted a name, or names")
        get_optional(line, "error", str, where, "")
        yield line


def score(
    predictions: Iterable[dict[str, Any]],
    labels: frozenset[str],
    bleu: str | None = None,
    key: tuple[Key, ...] = (),
) -> dict[str, Any]:
    """Accuracy over the examples that have a label: the mean of what each prediction scores in its labels.

    Returns:
        {"accuracy", "interval": its 95 % bootstrap interval, "n", "by_type": {kind: accuracy}, "n_by_type":
        {kind: examples}, "unlabelled": left out of it, "unknown_answers": none of whose answers are among
        `labels`: these count as wrong, "answers": `AnswerCounts.figures`, "bleu": where asked for; and where
        images could not be read, which counts as wrong, "bad_images": how many items have one, "bad_image":
        what is wrong with the first}.

    The bootstrap, seeded by `key`, draws images with all of their questions, which are not independent (xGQA
    asks 12,578 of 398 images). Items about two images are drawn with those about the same two, items about
    none alone.
    """
    gained: Counter[str] = Counter()  # in millionths: integers add up to the same in any order
    counts: Counter[str] = Counter()
    unlabelled, unknown, clusters = 0, 0, ItemClusters()
    faults: list[str] = []
    corpus = CorpusBleu(bleu) if bleu else None
    counted = AnswerCounts()
    n = whole = 0
    for number, line in enumerate(predictions):
        answers = line["labels"]
        if not answers:
            unlabelled += 1
            continue
        unknown += labels.isdisjoint(answers)
        n += 1
        # a question may be of several kinds
        kinds = [line["kind"]] if isinstance(line["kind"], str) else line["kind"]
        counts.update(kinds)
        if "error" in line:
            faults.append(line["error"])
        else:
            counted.add(answers, line["prediction"])
        worth = 0 if "error" in line else round(MILLION * answers.get(line["prediction"], 0.0))
        whole += worth
        for kind in kinds:
            gained[kind] += worth
        clusters.add(line.get("images") or [f"line {number}"], worth)  # earlier versions wrote no images
        if corpus:
            corpus.add(line["prediction"], list(answers))
    result: dict[str, Any] = {
        "accuracy": whole / MILLION / n if n else 0.0,
        "interval": clusters.interval("bootstrap", *key),
        "n": n,
        "by_type": {kind: gained[kind] / MILLION / counts[kind] for kind in sorted(counts) if kind},
        "n_by_type": {kind: counts[kind] for kind in sorted(counts) if kind},
        "unlabelled": unlabelled,
        "unknown_answers": unknown,
        "answers": counted.figures(),
    }
    if faults:
        result |= {"bad_images": len(faults), "bad_image": faults[0]}
    return {**result, "bleu": corpus.value()} if corpus else result


def confusions(
    predictions: Iterable[dict[str, Any]], wordnet: WordNet, pairs: int = CONFUSED_PAIRS
) -> dict[str, Any]:
    """Count which answers are taken for which (paper 0, section 6), in the predictions of one language.

    Memory grows with the different pairs of labels alone.

    Args:
        predictions: {"id", "prediction", "labels", "kind"} each, as `read_predictions`
            yields them. The true label is the answer with the highest score; an example without answers is
            left out, as in `metrics.score`.
    Returns:
        {"n": examples, "accuracy": as `metrics.score` has it, "accuracy_with_synonyms": a synonym of an
        answer scores as that answer does (table 2), "wrong": {relation: wrong predictions that are this to
        the true label}, "confused": the most frequent pairs of true label and wrong prediction,
        "confused_related": of those with a relation (table 3)}; a pair: {"label", "prediction", "relation":
        "syn", "hyp", "hpo" or "none", "count"}, equal counts by alphabet.
    """
    examples = strict = with_synonyms = 0  # scores in millionths: integers add up to the same in any order
    wrong: Counter[tuple[str, str]] = Counter()
    for line in predictions:
        answers, prediction = line["labels"], line["prediction"]
        if not answers:
            continue
        examples += 1
        if "error" in line:  # no image, and no answer that could be taken for another
            continue
        score = answers.get(prediction, 0.0)
        strict += round(MILLION * score)
        if not score:
            wrong[max(answers, key=answers.get), prediction] += 1
        synonyms = (
            value for answer, value in answers.items() if wordnet.relation(answer, prediction) == SYNONYM
        )
        with_synonyms += round(MILLION * max(score, *synonyms, 0.0))
    by_count = sorted(wrong.items(), key=lambda item: (-item[1], item[0]))
    confused: list[dict[str, Any]] = [
        {
            "label": label,
            "prediction": prediction,
            "relation": wordnet.relation(label, prediction),
            "count": count,
        }
        for (label, prediction), count in by_count
    ]
    relations: Counter[str] = Counter()
    for pair in confused:
        relations[pair["relation"]] += pair["count"]
    return {
        "n": examples,
        "accuracy": strict / MILLION / examples if examples else 0.0,
        "accuracy_with_synonyms": with_synonyms / MILLION / examples if examples else 0.0,
        "wrong": dict(sorted(relations.items())),
        "confused": confused[:pairs],
        "confused_related": [pair for pair in confused if pair["relation"] != NONE][:pairs],
    }


class AnswerCounts:
    """Counts predicted and right answers, of all items and of yes-no questions."""

    def __init__(self) -> None:
        self.predicted: Counter[str] = Counter()
        self.right: Counter[str] = Counter()
        self.yes_no_predicted: Counter[str] = Counter()

    def add(self, labels: Mapping[str, float], prediction: str) -> None:
        """Count an item; of its `labels` the one with the highest score is what is right."""
        right = max(labels, key=labels.__getitem__)
        self.predicted[prediction] += 1
        self.right[right] += 1
        if right in YES_NO:
            self.yes_no_predicted[prediction] += 1

    def figures(self) -> dict[str, Any]:
        """{"n": items, "answer": the most frequent prediction, "share" of the predictions that are it,
        "right_share": of the items for which the most frequent right answer is right; and where there are any
        "yes_no": the same of yes-no questions, with "answered": the share of these that got yes or no}; {}
        of no items."""
        if not self.predicted:
            return {}
        found = _most_frequent(self.predicted, self.right)
        if self.yes_no_predicted:
            right = Counter({answer: self.right[answer] for answer in YES_NO})
            n = self.yes_no_predicted.total()
            answered = sum(self.yes_no_predicted[answer] for answer in YES_NO) / n
            found["yes_no"] = {**_most_frequent(self.yes_no_predicted, right), "answered": answered}
        return found


def _most_frequent(predicted: Counter[str], right: Counter[str]) -> dict[str, Any]:
    n = predicted.total()
    answer = min(predicted, key=lambda each: (-predicted[each], each))  # of equal ones the first by alphabet
    shares = {"share": predicted[answer] / n, "right_share": max(right.values()) / n}
    return {"n": n, "answer": answer, **shares}


class CorpusBleu:
    """BLEU-4 (Papineni et al. 2002) of predictions that come one at a time, counted by sacrebleu, without
    smoothing.

    language: "ja" is cut into words by MeCab (`fugashi`, `unidic-lite`), "zh" into characters, others at
    white space.
    """

    def __init__(self, language: str):
        self.bleu, self.cut = require("sacrebleu", "finetune").BLEU, _cutter(language)
        # the words are cut here; the order that is effective for one sentence keeps sacrebleu from warning
        self.scorer = self.bleu(tokenize="none", effective_order=True)
        self.matches, self.totals = [0] * ORDERS, [0] * ORDERS
        self.length = self.reference_length = 0

    def add(self, prediction: str, references: Sequence[str]) -> None:
        """Count a prediction against what would have been right."""
        words, *right = (" ".join(self.cut(text)) for text in (prediction, *references))
        counts = self.scorer.sentence_score(words, right)
        self.matches = [a + b for a, b in zip(self.matches, counts.counts, strict=True)]
        # a prediction shorter than n words counts as one n-gram without a match, as in NLTK: sacrebleu leaves
        # it out, by which a corpus of answers of two and three words would gain a third
        self.totals = [a + max(1, b) for a, b in zip(self.totals, counts.totals, strict=True)]
        self.length += counts.sys_len
        self.reference_length += counts.ref_len

    def value(self) -> float:
        """BLEU in [0, 1]; 0 if an order has no match at all."""
        if not all(self.matches):
            return 0.0
        lengths = self.length, self.reference_length
        return self.bleu.compute_bleu(self.matches, self.totals, *lengths, smooth_method="none").score / 100


def _cutter(language: str) -> Callable[[str], list[str]]:
    if language == "zh":
        return lambda text: list("".join(text.split()))
    if language != "ja":
        return str.split
    tagger = require("fugashi", "finetune").Tagger()
    return lambda text: [word.surface for word in tagger(text)]
