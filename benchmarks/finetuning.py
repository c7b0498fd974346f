"""The README's tables of fine-tuning, from results/finetune.jsonl: one a task, a row a method, seeds together."""

import statistics
from collections import defaultdict

from finetune.report import scores_of
from raylib import markdown
from raylib.markdown import percent, spread

SETTINGS = {"zero_shot": "", "few_shot": "few-shot", "translate_test": "translate-test"}


BLIND = {"majority": "(the most frequent answer)", "text": "(logistic regression over the text alone)"}


def tables(records: list[dict], blind: dict[str, dict[str, float]]) -> str:
    """Markdown. A run that was recorded twice counts once, as recorded last. `blind`: what `finetune.scenes.balance` measured
    on the same data, in English."""
    newest = {record["run"]: record for record in records}
    tasks: dict[str, list[dict]] = defaultdict(list)
    for record in newest.values():
        tasks[record["task"]].append(record)
    made = [_table(task, rows, blind.get(task, {})) for task, rows in tasks.items()]
    return "\n\n".join(made) or "No fine-tuning run has been recorded yet."


def _table(task: str, records: list[dict], blind: dict[str, float]) -> str:
    groups: dict[str, list[dict]] = defaultdict(list)
    for record in records:
        setting = SETTINGS.get(record["setting"], record["setting"])
        groups[", ".join(filter(None, (setting, record["method"])))].append(record)
    what = "mean recall" if "retrieval" in records[0] else "accuracy"
    head = [f"{task}: {what}, %", "seeds", "English", "mean of the targets", "gap"]
    synonyms, pruned = any("synonym_accuracy" in r for r in records), any(r["sparsity"] for r in records)
    head += ["targets, synonyms right"] if synonyms else []
    head += ["weights at zero, %"] if pruned else []
    head += ["training, s"]
    lines = [head]
    for key, name in BLIND.items():
        if key in blind:
            lines.append([name, "", percent(blind[key]), *[""] * (len(head) - 3)])
    for name, group in groups.items():
        row = [name, str(len({r["seed"] for r in group})), spread(scores_of(r).get("en") for r in group),
               spread(r["mean_targets"] for r in group), spread(r["gap"] for r in group)]  # fmt: skip
        if synonyms:
            row.append(spread(_mean_of_targets(r.get("synonym_accuracy")) for r in group))
        if pruned:
            row.append(percent(group[0]["sparsity"]) if group[0]["sparsity"] else "")
        seconds = statistics.median(r["seconds"] for r in group)  # of wall time: some runs waited for others
        lines.append([*row, f"{seconds:.0f}" if seconds else ""])
    return markdown.table(lines)


def _mean_of_targets(scores: dict[str, float] | None) -> float | None:
    others = [score for code, score in (scores or {}).items() if code != "en"]
    return statistics.fmean(others) if others else None
