"""Results of a run for people: `result.json`, a Markdown table, a figure."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from finetune.build import find_task, reported_split
from finetune.config import SHUFFLED_IMAGES, FinetuneConfig
from finetune.lineage import described, method_of
from finetune.one_answer import Answers, footnotes, marks_of
from raylib.display import markdown_table, open_pyplot, percent, save_figure
from raylib.errors import UserError, reading
from raylib.fileio import read_json, read_json_object, write_atomically, write_json
from raylib.finite import require_finite_values
from raylib.metrics import RANKS, mean_or_zero
from raylib.monitoring import list_losses, read_metrics
from raylib.strict_json import Count, check_shape

MOST_FREQUENT = "most frequent answer"
BASELINES = {"text": "text alone", "image": "image alone", "chance": "chance"}  # of a data set -> of tables
RECALLS = tuple(f"{way}_r{k}" for way in ("i2t", "t2i") for k in RANKS)


def summarise(config: FinetuneConfig, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """`result.json`: what the parts of a run came to. `accuracy` (or the recalls under `retrieval`) by
    language, their mean over the targets, the gap from English to it, and accuracy by question type;
    `disparity` over languages of accuracy, or of `recall_at_1`, the mean of both ways (paper 4); `interval`,
    [low, high] of each language's score by a bootstrap over images (`raylib.metrics`): what other test
    images would change, and not other seeds. Languages that were held out of pretraining count neither in
    the mean of the targets nor in the gap and the disparity."""
    figures = {code: dict(values) for part in parts for code, values in part["languages"].items()}
    intervals = {code: values.pop("interval", None) for code, values in figures.items()}
    task = find_task(config)
    scores = {code: task.test_score(values) for code, values in figures.items()}
    held_out = [code for code in config.held_out_languages if code in scores]
    targets = [score for code, score in scores.items() if code not in ("en", *held_out)]
    summary = task.summarise(figures)
    if trained := {code: values for code, values in figures.items() if code not in held_out}:
        summary["disparity"] = task.summarise(trained).get("disparity", {})
    first = parts[0]
    sparsity = first.get("sparsity") or {}
    steps = sum(part.get("steps", 0) for part in parts)
    skipped = sum(part.get("skipped_steps", 0) for part in parts)
    unknown = sum(part.get("unknown_training_answers", 0) for part in parts)
    finished = all(part.get("finished", True) for part in parts)
    return {
        "run": config.name,
        "task": config.task,
        "setting": config.setting,
        "split": reported_split(config),
        "method": described(config, steps, finished, skipped=skipped),
        "finished": finished,
        "seed": config.fit.seed,
        "model": config.model,
        "params": first.get("params"),
        "trainable": first.get("trainable"),
        "sparsity": sparsity.get("whole", 0.0),
        "sparsity_prunable": sparsity.get("prunable", 0.0),
        **{name: first[name] for name in ("share", "share_with_heads") if name in first},
        "steps": steps,
        "skipped_steps": skipped,
        "seconds": sum(part.get("seconds", 0.0) for part in parts),
        **summary,
        "interval": intervals,
        "mean_targets": mean_or_zero(targets) if targets else None,
        "gap": scores["en"] - mean_or_zero(targets) if targets and "en" in scores else None,
        "by_type": {code: values["by_type"] for code, values in figures.items() if values.get("by_type")},
        "unknown_training_answers": unknown,
        "unknown_training_answer": next(
            filter(None, (p.get("unknown_training_answer") for p in parts)), None
        ),
        "items_skipped": {
            **_items_skipped(parts),
            **{c: v.get("unlabelled", 0) + v.get("bad_images", 0) for c, v in figures.items()},
        },
        "bad_images": {
            code: values["bad_images"] for code, values in figures.items() if "bad_images" in values
        },
        **({"held_out_languages": held_out} if held_out else {}),
        **_extra_tests(parts),
        **read_baselines(config),
        **_runtime_facts(parts),
    }


def _extra_tests(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """{"extra_tests": {name: {language: its figures, as the task evaluates a test set}}} of all parts; {}
    where none was asked for."""
    found: dict[str, dict[str, Any]] = {}
    for part in parts:
        for name, figures in part.get("extra_tests", {}).items():
            found.setdefault(name, {}).update(figures)
    return {"extra_tests": found} if found else {}


def read_baselines(config: FinetuneConfig) -> dict[str, Any]:
    """{"baselines": {language, or "targets" for their mean: {name: score}}} of what baselines.json of the
    data folder, {task: this}, tells of the whole test set; {} where it tells nothing of it.

    Raises:
        UserError: it is damaged.
    """
    path = Path(config.data, "baselines.json")
    if config.split != "test" or config.test_limit or config.setting == "translate_test":
        return {}
    if not os.path.lexists(path):
        return {}
    what, shape = "what the data can be answered by", dict[str, dict[str, dict[str, float]]]
    found = read_json(path, what, "remove it, or make the data anew", shape=shape).get(config.task)
    return {"baselines": found} if found else {}


def baselines_of(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """{what answers without understanding: {language, or "targets" for their mean: its score}}: the most
    frequent right answer of the test set, and what the data tell (`read_baselines`)."""
    frequent = {
        code: of["right_share"] for code, of in result.get("answers", {}).items() if "right_share" in of
    }
    if (mean := mean_of_targets(result, frequent)) is not None:
        frequent["targets"] = mean
    told = {
        shown: {
            group: scores[name] for group, scores in result.get("baselines", {}).items() if name in scores
        }
        for name, shown in BASELINES.items()
    }
    return {name: scores for name, scores in {MOST_FREQUENT: frequent, **told}.items() if scores}


def extra_scores(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """{name of an extra test: {language: the one figure, as of `scores_of`}}."""
    key = "mean_recall" if "retrieval" in result else "accuracy"
    return {
        name: {code: values[key] for code, values in figures.items() if values.get(key) is not None}
        for name, figures in result.get("extra_tests", {}).items()
    }


def extra_mean(result: dict[str, Any], name: str) -> float | None:
    """The mean over the targets of an extra test; None where it lacks one of them."""
    return mean_of_targets(result, extra_scores(result).get(name, {}))


def mean_of_targets(result: dict[str, Any], scores: Mapping[str, float]) -> float | None:
    """The mean of `scores` over the targets of a run; None where they lack one."""
    targets = targets_of(result)
    return mean_or_zero(scores[code] for code in targets) if targets and scores.keys() >= {*targets} else None


def of_dev_sets(config: FinetuneConfig, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """`result.json` of a run that leaves the test sets alone: "dev", the score of each language's dev set, of
    all parts that looked at it the mean; "interval" of those that one part alone looked at (`summarise`)."""
    languages = {code for part in parts for code in part["dev"]}
    first = parts[0]
    intervals = {
        code: [part.get("interval", {}).get(code) for part in parts if code in part["dev"]]
        for code in sorted(languages)
    }
    return {
        "run": config.name,
        "task": config.task,
        "setting": config.setting,
        "method": method_of(config),
        "seed": config.fit.seed,
        "params": first.get("params"),
        "trainable": first.get("trainable"),
        "steps": sum(part.get("steps", 0) for part in parts),
        "seconds": sum(part.get("seconds", 0.0) for part in parts),
        "skipped_steps": sum(part.get("skipped_steps", 0) for part in parts),
        "dev": {
            code: mean_or_zero([part["dev"][code] for part in parts if code in part["dev"]])
            for code in sorted(languages)
        },
        "interval": {code: found[0] for code, found in intervals.items() if len(found) == 1},
        "items_skipped": _items_skipped(parts),
        **_runtime_facts(parts),
    }


def _items_skipped(parts: list[dict[str, Any]]) -> dict[str, int]:
    """{"train": examples without a usable answer or image; where there are any, "dev/LANGUAGE": items whose
    image could not be read, in the last evaluation}."""
    counts = Counter(train=sum(part.get("unknown_training_answers", 0) for part in parts))
    for part in parts:
        counts["train"] += part.get("samples_replaced", 0)
        for name, count in part.get("evaluation", {}).items():
            if name.startswith("bad_images/"):
                counts[name.removeprefix("bad_images/")] += int(count)
    return dict(counts)


def _runtime_facts(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return {"code", "libraries", "device", "time", "training_precision", "evaluation_precision",
    "preprocessing" of images, "peak_memory_gb", "samples_per_second" of training, "evaluated_per_second"} of
    all parts, as far as they tell: those of earlier versions do not."""
    environment = ("code", "libraries", "device", "time")
    names = (*environment, "training_precision", "evaluation_precision", "preprocessing")
    facts = {name: parts[-1][name] for name in names if name in parts[-1]}
    if memory := [part["peak_memory_gb"] for part in parts if "peak_memory_gb" in part]:
        facts["peak_memory_gb"] = max(memory)
    # a rate of several parts is weighed by the seconds that each took
    for rate, seconds_of in (
        ("samples_per_second", lambda part: sum(part["times"].get(name, 0.0) for name in ("step", "data"))),
        ("evaluated_per_second", lambda part: part["evaluation_seconds"]),
    ):
        rates = [(part[rate], seconds_of(part)) for part in parts if rate in part]
        if whole := sum(seconds for _, seconds in rates):
            facts[rate] = sum(value * seconds for value, seconds in rates) / whole
    return facts


# beginnings of names in metrics.jsonl, as `finetune.worker.Validation` records them
EPOCH_RECORDS = {"test": "score", "similarity": "similarity"}


def read_epochs(folders: Iterable[Path]) -> dict[str, dict[str, list[float]]]:
    """{"score": {language: of its test set after each evaluation}, "similarity": {"mean", "unpaired" and
    languages: cosines}}, of what the metrics.jsonl of these folders record; {} where that is nothing."""
    found: dict[str, dict[str, list[float]]] = {}
    for folder in folders:
        for record in read_metrics(folder):
            for key, value in record.items():
                kind, _, name = key.removeprefix("eval/").partition("/")
                if key.startswith("eval/") and kind in EPOCH_RECORDS and "/" not in name:
                    found.setdefault(EPOCH_RECORDS[kind], {}).setdefault(name, []).append(value)
    return found


def epochs_table(epochs: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Markdown: a line an evaluation, its scores and the similarity of parallel items, in %."""
    scores, similarity = epochs["score"], epochs.get("similarity", {})
    shown = {name: similarity[name] for name in ("mean", "unpaired") if name in similarity}
    rows = [["epoch", *scores, *(f"{'CLS similarity' if n == 'mean' else n}" for n in shown)]]
    columns = [*scores.values(), *shown.values()]
    rows += [[str(i), *(percent(column[i - 1]) for column in columns)] for i in range(1, len(columns[0]) + 1)]
    return markdown_table(rows)


def scores_of(result: dict[str, Any]) -> dict[str, float]:
    """The one figure of each language: accuracy, or mean recall."""
    if "accuracy" in result:
        return result["accuracy"]
    return {code: figures["mean_recall"] for code, figures in result["retrieval"].items()}


def trained_languages(result: dict[str, Any]) -> frozenset[str]:
    """The languages of a result but for those that were held out of pretraining: of these are its means."""
    return frozenset(scores_of(result)).difference(result.get("held_out_languages", ()))


def targets_of(result: dict[str, Any]) -> list[str]:
    """The languages of whose scores the mean of the targets is."""
    trained = trained_languages(result)
    return [code for code in scores_of(result) if code in trained and code != "en"]


def figures_of(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """{language: {"score", the recalls, or the accuracy of each question type}}."""
    details = result.get("retrieval") or result["by_type"]
    return {code: {"score": score, **details.get(code, {})} for code, score in scores_of(result).items()}


def table(result: dict[str, Any]) -> str:
    """Markdown: a line a language, in %; the mean of the targets, the gap to English, and what was
    counted."""
    kinds = sorted({kind for by in result["by_type"].values() for kind in by})
    columns = list(RECALLS) if "retrieval" in result else kinds
    intervals = result.get("interval", {})
    extra, answers, baselines = extra_scores(result), answers_of(result), baselines_of(result)
    head = [
        "language",
        "mean recall" if "retrieval" in result else "accuracy",
        "95 % interval",
        *(name.replace("_", " ") for name in extra),
        *baselines,
        *(["BLEU"] if (bleu := result.get("bleu")) else []),
        *(c.replace("_r", " R@") for c in columns),
    ]
    details = result.get("retrieval") or result["by_type"]
    rows = [head]
    for code, score in scores_of(result).items():
        ends = ", ".join(percent(end) for end in intervals.get(code) or ())
        more = [percent(details.get(code, {}).get(c)) for c in columns]
        of_words = [percent(bleu.get(code))] if bleu else []
        others = [marked(scores.get(code), answers.get(f"{code}, {name}")) for name, scores in extra.items()]
        others += [percent(scores.get(code)) for scores in baselines.values()]
        rows.append([code, marked(score, answers.get(code)), ends and f"[{ends}]", *others, *of_words, *more])
    if result["mean_targets"] is not None:
        targets = targets_of(result)
        others = [percent(extra_mean(result, name)) for name in extra]
        others += [percent(scores.get("targets")) for scores in baselines.values()]
        means = [
            mean_or_zero(details[code][c] for code in targets if c in details.get(code, {})) for c in columns
        ]
        of_words = [percent(mean_or_zero(bleu[code] for code in targets if code in bleu))] if bleu else []
        means_row = [percent(result["mean_targets"]), "", *others, *of_words, *map(percent, means)]
        rows.append(["mean of the targets", *means_row])
    epochs = ["", epochs_table(result["epochs"])] if result.get("epochs") else []
    marks = [line for note in footnotes(answers) for line in ("", note)]
    return "\n".join([markdown_table(rows), "", _notes(result), *marks, *epochs])


def marked(score: float | None, answers: Answers | None) -> str:
    """A score in %, with the marks of `finetune.one_answer`."""
    return " ".join(filter(None, (percent(score), marks_of(answers or {}))))


def answers_of(result: dict[str, Any]) -> dict[str, Answers]:
    """{language: its `AnswerCounts.figures`, and "LANGUAGE, NAME" of the extra tests}. Those of shuffled
    images tell nothing: who sees no image that fits may well say no to everything."""
    return {
        **result.get("answers", {}),
        **{
            f"{code}, {name}": values["answers"]
            for name, figures in result.get("extra_tests", {}).items()
            for code, values in figures.items()
            if name != SHUFFLED_IMAGES and "answers" in values
        },
    }


def _notes(result: dict[str, Any]) -> str:
    notes = [
        f"{result['task']} ({result['split']} split), {result['setting']}, {result['method']}, seed "
        f"{result['seed']}"
    ]
    if held_out := result.get("held_out_languages"):
        notes.append(f"held out of pretraining, and of the mean of the targets: {', '.join(held_out)}")
    if result["gap"] is not None:
        notes.append(f"gap to English {percent(result['gap'])}")
    for name, what in (("unlabelled", "without a label"), ("unknown_answers", "whose answers are no class")):
        counted = {code: c[name] for code, c in result.get("counts", {}).items() if c[name]}
        if counted:
            notes.append(f"examples {what}: " + ", ".join(f"{code} {n}" for code, n in counted.items()))
    if bad := result.get("bad_images"):
        items = ", ".join(f"{code} {n}" for code, n in bad.items())
        notes.append(f"items that count as wrong because their image cannot be read: {items}")
    if skipped := result.get("skipped_steps"):
        notes.append(f"{skipped} of {result['steps']} steps skipped, whose loss or gradient was not finite")
    if result.get("unknown_training_answers"):
        example = result.get("unknown_training_answer")  # older results have none
        notes.append(
            f"training examples left out, whose answers are no class: {result['unknown_training_answers']}"
            + (f", such as {example!r}" if example else "")
        )
    return "; ".join(notes)


def write(run: Path, result: dict[str, Any]) -> None:
    """`result.json`, `result.md` and `result.png` into the run's folder.

    Raises:
        NotFinite: a number in `result` is not finite; nothing is written.
    """
    require_finite_values(f"{run}/result.json", result)
    draw(result, run / "result.png")
    write_atomically(run / "result.md", table(result) + "\n")
    write_json(run / "result.json", result)


def draw(result: dict[str, Any], path: Path) -> None:
    """A bar a language, English set apart, and a line at the mean of the targets."""
    scores = scores_of(result)
    figure, axes = open_pyplot().subplots(figsize=(1.5 + 0.6 * len(scores), 3.6), layout="constrained")
    axes.bar(
        list(scores),
        [100 * s for s in scores.values()],
        color=["tab:orange" if c == "en" else "tab:blue" for c in scores],
    )
    if result["mean_targets"] is not None:
        axes.axhline(
            100 * result["mean_targets"],
            color="black",
            linewidth=1,
            linestyle="--",
            label="mean of the targets",
        )
        axes.legend(fontsize=8)
    what = "mean recall" if "retrieval" in result else "accuracy"
    axes.set(ylabel=f"{what}, %", ylim=(0, 100), title=f"{result['task']}: {result['method']}")
    save_figure(figure, path)


def draw_curve(run: Path) -> None:
    """`curve.png`: each loss, and the score on held-out English that chooses the checkpoint, over the steps
    of `run`."""
    records = read_metrics(run)
    figure, (left, right) = open_pyplot().subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    losses = list_losses(records)
    epochs = {key: None for record in records for key in record if key.startswith("eval/test/")}
    curves = [key for key in epochs if key.count("/") == 2] + ["eval/similarity/mean"]
    right_keys = [(right, key, 100) for key in ("eval/score", *curves)]
    for axes, key, scale in [*((left, loss, 1) for loss in losses), *right_keys]:
        points = [(r["step"], scale * r[key]) for r in records if key in r]
        if points:
            axes.plot(*zip(*points, strict=True), marker=".", linewidth=1, label=key.partition("/")[2])
    if len(losses) > 1:
        left.legend(fontsize=8)
    left.set(xlabel="step", ylabel="loss", title="terms, means over the global batch", ylim=(0, None))
    if curves[1:]:
        right.legend(fontsize=6)
    what = "development set; test sets and CLS similarity" if curves[1:] else "development set"
    right.set(xlabel="step", ylabel="score, %", title=what, ylim=(0, None))
    save_figure(figure, run / "curve.png")


class StoredYesNo(BaseModel):
    """`AnswerCounts.figures` of yes-no questions."""

    n: Count
    answer: str
    share: float
    right_share: float
    answered: float


class StoredAnswers(BaseModel):
    """`AnswerCounts.figures`."""

    n: Count
    answer: str
    share: float
    right_share: float
    yes_no: StoredYesNo | None = None


class NoAnswers(BaseModel, extra="forbid"):
    """Those of a set without a right answer."""


class StoredFigures(BaseModel, extra="allow"):
    """Figures of a language, as far as others go by them."""

    accuracy: float | None = None
    mean_recall: float | None = None
    answers: StoredAnswers | NoAnswers = NoAnswers()


class StoredResult(BaseModel, extra="allow"):
    """`result.json` of fine-tuning, as far as others go by it."""

    task: str
    method: str
    steps: Count
    skipped_steps: Count = 0
    setting: str = ""
    split: str = ""
    code: str = ""
    finished: bool = True
    params: Count | None = None
    trainable: Count | None = None
    share: float | None = None
    accuracy: dict[str, float] | None = None
    retrieval: dict[str, dict[str, float | list[float] | None]] | None = None
    by_type: dict[str, dict[str, float]] = {}
    interval: dict[str, list[float] | None] = {}
    mean_targets: float | None
    gap: float | None
    counts: dict[str, dict[str, float]] = {}
    answers: dict[str, StoredAnswers | NoAnswers] = {}
    held_out_languages: list[str] = []
    baselines: dict[str, dict[str, float]] = {}
    bad_images: dict[str, Count] = {}
    disparity: dict[str, float] = {}
    extra_tests: dict[str, dict[str, StoredFigures]] = {}
    epochs: dict[str, dict[str, list[float]]] = {}


class StoredPart(BaseModel, extra="allow"):
    """`part.json`: the result of one training, as far as a run's goes by it."""

    finished: bool = True
    steps: Count = 0
    skipped_steps: Count = 0
    samples_replaced: Count = 0
    unknown_training_answers: Count = 0
    seconds: float = 0.0
    times: dict[str, float] = {}
    evaluation: dict[str, float] = {}
    dev: dict[str, float] = {}
    interval: dict[str, list[float] | None] = {}
    languages: dict[str, dict[str, Any]] = {}
    extra_tests: dict[str, dict[str, dict[str, Any]]] = {}
    sparsity: dict[str, float] | None = None
    peak_memory_gb: float = 0.0
    samples_per_second: float = 0.0
    evaluated_per_second: float = 0.0
    evaluation_seconds: float = 0.0


def read_part(path: Path) -> dict[str, Any]:
    """Read a `part.json`, where there is one already.

    Raises:
        UserError: it is damaged.
    """
    what, advice = "the result of a training", "restore it, or remove it: the same command makes it anew"
    return read_json_object(path, (), what, advice, finite=False, shape=StoredPart)


def read_result(run: Path) -> dict[str, Any]:
    """The result of a finished run.

    Raises:
        UserError: not a finished run of fine-tuning, or a number in it is not finite.
    """
    path = run / "result.json"
    if not path.exists():
        raise UserError(f"{path}: no such file; give finished runs")
    what, advice = "the result of a run", "give finished runs"
    result = read_json_object(path, (), what, advice, finite=False)
    if "dev" in result:
        raise UserError(f"{run}: a trial of a search, which was never tested; run the search's best.yaml")
    require_finite_values(f"{run}/result.json", result)
    # pretraining's has none of them but steps
    if not ({"task", "method", "steps"} <= result.keys() and {"accuracy", "retrieval"} & result.keys()):
        raise UserError(f"{run}/result.json: no result of fine-tuning; give runs of python -m finetune")
    with reading(path, what, advice):
        check_shape(result, StoredResult)
    return result
