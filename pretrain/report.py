"""What a run leaves for people: the table, the learning curve, `result.json`."""

from pathlib import Path
from typing import Any

from pretrain.evaluate import r1
from raylib.fileio import write_json
from raylib.finite import require_finite_values
from raylib.metrics import mean_or_zero
from raylib.tables import markdown_table, open_pyplot, save_figure
from raylib.track import read_metrics

COLUMNS = ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10")


def table(scores: dict[str, Any]) -> str:
    """Markdown: recall in % by language, both ways; means, held-out concepts, chance."""
    languages = scores["retrieval"]
    head = [
        "language",
        "R@1",
        "x chance",
        *(c.replace("_r", " R@") for c in COLUMNS),
        "pictures",
        "chance R@1",
    ]
    rows = [head, *(_row(language, [languages[language]]) for language in _english_first(languages))]
    others = [figures for language, figures in languages.items() if language != "en"]
    if len(others) > 1:
        rows.append(_row(f"mean of the other {len(others)}" if "en" in languages else "mean", others))
    held = scores["heldout"]
    if "en" in held:
        rows.append(_row("held-out concepts, en", [held["en"]]))
    if held_others := [figures for language, figures in held.items() if language != "en"]:
        rows.append(_row("held-out concepts, others", held_others))
    return markdown_table(rows)


def _row(name: str, figures: list[dict[str, float]]) -> list[str]:
    both, chance = mean_or_zero(r1(f) for f in figures), mean_or_zero(f["chance_r1"] for f in figures)
    values = [f"{100 * mean_or_zero(f[c] for f in figures):.1f}" for c in COLUMNS]
    asked = f"{mean_or_zero(f['n'] for f in figures):.0f}"
    return [name, f"{100 * both:.1f}", f"{both / chance:.0f}", *values, asked, f"{100 * chance:.2f}"]


def _english_first(languages: dict) -> list[str]:
    return sorted(languages, key=lambda language: (language != "en", language))


def spent(result: dict[str, Any]) -> str:
    """One line: where the time went, and the peak memory of worker 0."""
    times, whole = result["times"], sum(result["times"].values())
    parts = [f"{name} {seconds:.1f} s ({100 * seconds / whole:.1f} %)" for name, seconds in times.items()]
    return f"{whole:.0f} s: {', '.join(parts)}; peak memory {result['peak_memory_gb']:.2f} GB a worker"


def draw_curve(run: Path) -> Path:
    """`curve.png`: losses, and R@1 with chance, over the steps."""
    records = read_metrics(run)
    figure, (left, right) = open_pyplot().subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name in sorted({k for r in records for k in r if k.startswith("loss/")} - {"loss/grad_norm"}):
        points = [(r["step"], r[name]) for r in records if name in r]
        left.plot(*zip(*points, strict=True), label=name.removeprefix("loss/"), linewidth=1)
    left.set(xlabel="step", ylabel="loss", title="terms, means over the global batch")
    left.legend(fontsize=8)
    labels = {
        "eval/en_r1": "English",
        "eval/others_r1": "mean of the others",
        "eval/heldout_r1": "held-out concepts, all languages",
    }
    for name, label in labels.items():
        points = [(r["step"], 100 * r[name]) for r in records if name in r]
        if points:
            right.plot(*zip(*points, strict=True), label=label, marker=".")
    if right.lines:
        right.legend(fontsize=8)
    right.set(
        xlabel="step", ylabel="R@1, %", title="zero-shot retrieval, mean of both directions", ylim=(0, None)
    )
    save_figure(figure, run / "curve.png")
    return run / "curve.png"


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a result as JSON, whole or not at all.

    Raises:
        NotFinite: a number in it is not finite.
    """
    require_finite_values(str(path), result)
    write_json(path, result)
