"""Compare published settings as distributions (`algorithm=priorband`) to TPE that tries them first, to TPE
without them, and to random search: with a good, a weak and a wrong published setting.

    python -m benchmarks.priors [--seeds 10]                       on a surrogate: minutes
    python -m benchmarks.priors --real MODEL DATA [--seeds 3]      searches of paper 4's space on emoji scenes

The surrogate has six numbers and a choice of three. Its score falls with the squared distance from an optimum
that the seed places, by a factor of its own in each knob; its noise is 0.02. A good published setting is a
tenth of the range away in each number, a weak one three tenths, a wrong one in the opposite corner with
another choice. The real space is that of `benchmarks.search`; there, the paper's own setting is the weak one,
and the best and the worst of the grid, by its record, are the others. Trials cost the same. Appends to
results/priors.jsonl.
"""

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import optuna

from benchmarks import search
from benchmarks.results import RESULTS, newest
from raylib.display import markdown_table
from raylib.fileio import append_jsonl, read_jsonl
from raylib.metrics import t_interval
from raylib.randomness import generator
from raylib.search.config import SearchConfig
from raylib.search.samplers import build_sampler
from raylib.search.space import Choice, DefineByRun, Float, Space

FILE = RESULTS / "priors.jsonl"
DIMENSIONS = 6
KNOBS = {f"x{i}": Float(0.0, 1.0) for i in range(DIMENSIONS)} | {"source": Choice("a", "b", "c")}
PRIORS = ("good", "weak", "wrong")
ALGORITHMS = {  # name: (algorithm, whether it is given the published setting)
    "priorband": ("priorband", True),
    "TPE, published first": ("tpe", True),
    "TPE": ("tpe", False),
    "random": ("random", False),
}
CONTESTANTS = [  # (prior, name); what is not given the published setting does not depend on it
    *((prior, name) for prior in PRIORS for name, (_, informed) in ALGORITHMS.items() if informed),
    *(("", name) for name, (_, informed) in ALGORITHMS.items() if not informed),
]
TRIALS = 40
CHECKPOINTS = (5, 10, 20, 40)  # trials after which the best is looked at
NOISE = 0.02
REAL_PUBLISHED = {  # of `benchmarks.search`'s space; its recorded grid has 9.5, 8.2 and 6.8 % there
    "good": {"strategies.alignment.weight": 1.0, "optim.lr": 3e-3},
    "weak": {"strategies.alignment.weight": 10.0, "optim.lr": 1e-3},
    "wrong": {"strategies.alignment.weight": 100.0, "optim.lr": 3e-4},
}
REAL_TRIALS = 10


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--real", nargs=2, type=Path, metavar=("MODEL", "DATA"))
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--folder", type=Path, default=Path("runs/priors_benchmark"))
    given = parser.parse_args(arguments)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    done = {(line["space"], line["prior"], line["algorithm"], line["seed"]) for line in read_jsonl(FILE)}
    space = "paper 4" if given.real else "surrogate"
    for seed in range(given.seeds or (3 if given.real else 10)):
        for prior, name in CONTESTANTS:
            if (space, prior, name, seed) in done:
                continue
            scores = search_real(given, prior, name, seed) if given.real else simulate(prior, name, seed)
            line = {"space": space, "prior": prior, "algorithm": name, "seed": seed, "scores": scores}
            append_jsonl(FILE, line)
    print(table(read_jsonl(FILE)))


def published_setting(prior: str, optimum: np.ndarray) -> dict:
    """The published setting of the surrogate: good, weak or wrong."""
    inwards = np.where(optimum > 0.5, -1, 1)
    values, source = {
        "good": (optimum + 0.1 * inwards, "a"),
        "weak": (optimum + 0.3 * inwards, "b"),
        "wrong": ((optimum < 0.5).astype(float), "c"),
    }[prior]
    return {**{f"x{i}": float(value) for i, value in enumerate(values)}, "source": source}


def simulate(prior: str, name: str, seed: int) -> list[float]:
    """Return the true score of the setting that looks best after each of `CHECKPOINTS` trials."""
    algorithm, _ = ALGORITHMS[name]
    rng = generator(seed, "surrogate")
    optimum, slopes = rng.uniform(0.1, 0.9, DIMENSIONS), rng.uniform(0.2, 1.5, DIMENSIONS)
    published = (published_setting(prior, optimum),) if prior else ()
    space = Space("surrogate", "", KNOBS, published=published)
    config = SearchConfig(recipe="", algorithm=algorithm, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = build_sampler(config, space, TRIALS)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for setting in published:
        study.enqueue_trial(setting)
    found, best = [], (-np.inf, 0.0)
    for number in range(1, TRIALS + 1):
        trial = study.ask()
        DefineByRun(KNOBS)(trial)
        away = np.array([trial.params[f"x{i}"] for i in range(DIMENSIONS)]) - optimum
        true = float(1 - (slopes * away**2).sum() - 0.1 * (trial.params["source"] != "a"))
        measured = true + NOISE * rng.normal()
        study.tell(trial, measured)
        best = max(best, (measured, true))
        if number in CHECKPOINTS:
            found.append(best[1])
    return found


def search_real(given: argparse.Namespace, prior: str, name: str, seed: int) -> list[float]:
    """Search paper 4's space; return the best German score after 5 and after all trials."""
    algorithm, _ = ALGORITHMS[name]
    space = search.SPACE._replace(published=(REAL_PUBLISHED[prior],) if prior else (), grid={})
    settings = (f"algorithm={algorithm}", "early_stopping=none", f"num_trials={REAL_TRIALS}")
    model, data = given.real
    rows = search.search(model, data, given.folder / prior, seed, name, settings, space)["rows"]
    scores = [row["score"] for row in rows if row["state"] == "finished"]
    return [max(scores[:5]), max(scores)]


def table(lines: Sequence[dict]) -> str:
    """Markdown tables, one a space, of the best setting after so many trials: mean and 95 % interval."""
    return "\n\n".join(_table(space, lines) for space in dict.fromkeys(line["space"] for line in lines))


def _table(space: str, lines: Sequence[dict]) -> str:
    marks = CHECKPOINTS if space == "surrogate" else (5, REAL_TRIALS)
    what = "distance of the score from the best" if space == "surrogate" else "German mean recall, %"
    rows = [[f"{space}: {what}", "published setting", "seeds", *(f"after {n} trials" for n in marks)]]
    lines = [
        line for line in newest(list(lines), "space", "prior", "algorithm", "seed") if line["space"] == space
    ]
    for prior, name in CONTESTANTS:
        found = [line["scores"] for line in lines if (line["prior"], line["algorithm"]) == (prior, name)]
        cells = []
        for scores in zip(*found, strict=True):
            values = [1 - s for s in scores] if space == "surrogate" else [100 * s for s in scores]
            mean, half = t_interval(values)
            cells.append(f"{mean:.3f}" + (f" ± {half:.3f}" if half is not None else ""))
        rows.append([name, prior or "(not given)", str(len(found)), *cells])
    return markdown_table(rows, words=2)


if __name__ == "__main__":
    main()
