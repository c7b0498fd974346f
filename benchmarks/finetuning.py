"""The README's tables of fine-tuning, from results/finetune.jsonl: one a task, a row a method, seeds
together."""

import statistics
from collections import defaultdict

from finetune.report import scores_of
from raylib import markdown
from raylib.markdown import percent, spread

SETTINGS = {"zero_shot": "", "few_shot": "few-shot", "translate_test": "translate-test", "untrained": ""}
# GQA's types of questions, by what their answers are
KINDS = {("verify", "logical"): "yes or no", ("choose", "compare", "query"): "things"}
TRANSFER = "transfer_"  # what runs of papers 3 and 4 are called by
BLIND = {"majority": "(the most frequent answer)", "text": "(logistic regression over the text alone)"}


def tables(records: list[dict], blind: dict[str, dict[str, float]]) -> str:
    """Markdown. A run that was recorded twice counts once, as recorded last. `blind`: what
    `benchmarks.balance` measured on the same data, in English."""
    newest = {record["run"]: record for record in records if not record["run"].startswith(TRANSFER)}
    tasks: dict[str, list[dict]] = defaultdict(list)
    for record in newest.values():
        tasks[record["task"]].append(record)
    made = [_table(task, rows, blind.get(task, {})) for task, rows in tasks.items()]
    return "\n\n".join(made) or "No fine-tuning run has been recorded yet."


def transfer(records: list[dict]) -> str:
    """Markdown of papers 3 and 4's runs: retrieval by method, with how far languages are apart; then
    distillation."""
    newest = {record["run"]: record for record in records if record["run"].startswith(TRANSFER)}
    retrieval = [r for r in newest.values() if "retrieval" in r]
    rows = [
        [
            "retrieval: %",
            "seeds",
            "mean recall",
            "R@1",
            "std of languages",
            "range",
            "weights trained",
            "training, s",
        ]
    ]
    for name, group in _by_method(retrieval).items():
        firsts = [statistics.fmean(v for code, v in r["recall_at_1"].items() if code != "en") for r in group]
        rows.append(
            [
                name,
                str(len(group)),
                spread(r["mean_targets"] for r in group),
                spread(firsts),
                spread(r["disparity"]["std"] for r in group),
                spread(r["disparity"]["range"] for r in group),
                f"{100 * group[0]['trainable'] / group[0]['params']:.2f}" if group[0]["seconds"] else "",
                f"{statistics.median(r['seconds'] for r in group):.0f}" if group[0]["seconds"] else "",
            ]
        )
    taught = [r for r in newest.values() if r["task"] == "xgqa_translated"]
    codes = sorted({code for r in taught for code in r["accuracy"]})
    more = [["questions: accuracy, %", "seeds", *codes, "mean", "training, s"]]
    for name, group in _by_method(taught).items():
        seconds = f"{statistics.median(r['seconds'] for r in group):.0f}"
        more.append(
            [
                name,
                str(len(group)),
                *(spread(r["accuracy"].get(code) for r in group) for code in codes),
                spread(r["mean_targets"] for r in group),
                seconds,
            ]
        )
    made = [markdown.table(part) for part in (rows, more) if len(part) > 1]
    return "\n\n".join(made) or "Not measured yet."


def _by_method(records: list[dict]) -> dict[str, list[dict]]:
    groups: dict[str, list[dict]] = defaultdict(list)
    for record in records:
        setting = {"untrained": "as it is", "translate_test": "as it is, on translations"}.get(
            record["setting"]
        )
        groups[setting or record["method"]].append(record)
    return groups


def _table(task: str, records: list[dict], blind: dict[str, float]) -> str:
    groups: dict[str, list[dict]] = defaultdict(list)
    for record in records:
        setting = SETTINGS.get(record["setting"], record["setting"])
        groups[", ".join(filter(None, (setting, record["method"])))].append(record)
    what = "mean recall" if "retrieval" in records[0] else "accuracy"
    head = [f"{task}: {what}, %", "seeds", "English", "mean of the targets", "gap"]
    kinds = [
        group
        for group in KINDS
        if any(set(group) & set(by) for r in records for by in r.get("by_type", {}).values())
    ]
    head += [f"targets, {KINDS[group]}" for group in kinds]
    told = [
        (percent(_mean_of_targets(r.get("synonym_accuracy"))), percent(r["mean_targets"])) for r in records
    ]
    synonyms = any(kind and kind != strict for kind, strict in told)
    pruned = any(r["sparsity"] for r in records)
    head += ["targets, synonyms right"] if synonyms else []
    head += ["weights at zero, %"] if pruned else []
    head += ["training, s"]
    lines = [head]
    for key, name in BLIND.items():
        if key in blind:
            lines.append([name, "", percent(blind[key]), *[""] * (len(head) - 3)])
    for name, group in groups.items():
        row = [
            name,
            str(len({r["seed"] for r in group})),
            spread(scores_of(r).get("en") for r in group),
            spread(r["mean_targets"] for r in group),
            spread(r["gap"] for r in group),
        ]
        row += [spread(_mean_of_kinds(r, group_of) for r in group) for group_of in kinds]
        if synonyms:
            row.append(spread(_mean_of_targets(r.get("synonym_accuracy")) for r in group))
        if pruned:
            row.append(percent(group[0]["sparsity"]) if group[0]["sparsity"] else "")
        seconds = statistics.median(r["seconds"] for r in group)  # of wall time: some runs waited for others
        lines.append([*row, f"{seconds:.0f}" if seconds else ""])
    return markdown.table(lines)


def _mean_of_kinds(record: dict, kinds: tuple[str, ...]) -> float | None:
    """Mean over the targets, and over these types of questions."""
    values = [
        by[kind] for code, by in record["by_type"].items() if code != "en" for kind in kinds if kind in by
    ]
    return statistics.fmean(values) if values else None


def _mean_of_targets(scores: dict[str, float] | None) -> float | None:
    others = [score for code, score in (scores or {}).items() if code != "en"]
    return statistics.fmean(others) if others else None
