"""Compare published settings as distributions (`algorithm=priorband`) to TPE that tries them first, to TPE
without them, and to random search: with a good, a weak and a wrong published setting.

    python -m benchmarks.priors [--seeds 10]      minutes: on a surrogate

The surrogate has six numbers and a choice of three. Its score falls with the squared distance from an optimum
that the seed places, by a factor of its own in each knob; its noise is 0.02. A good published setting is a
tenth of the range away in each number, a weak one three tenths, a wrong one in the opposite corner with
another choice. Trials cost the same. Appends to results/priors.jsonl.
"""

import argparse
import warnings
from collections.abc import Sequence

import numpy as np
import optuna

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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=10)
    given = parser.parse_args(arguments)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    done = {(line["prior"], line["algorithm"], line["seed"]) for line in read_jsonl(FILE)}
    for seed in range(given.seeds):
        for prior, name in CONTESTANTS:
            if (prior, name, seed) not in done:
                scores = simulate(prior, name, seed)
                append_jsonl(FILE, {"prior": prior, "algorithm": name, "seed": seed, "scores": scores})
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


def table(lines: Sequence[dict]) -> str:
    """Markdown of the best setting after so many trials: mean and 95 % interval."""
    head = ["surrogate: distance of the score from the best", "published setting", "seeds"]
    rows = [[*head, *(f"after {n} trials" for n in CHECKPOINTS)]]
    lines = newest(list(lines), "prior", "algorithm", "seed")
    for prior, name in CONTESTANTS:
        found = [line["scores"] for line in lines if (line["prior"], line["algorithm"]) == (prior, name)]
        cells = []
        for scores in zip(*found, strict=True):
            mean, half = t_interval([1 - score for score in scores])
            cells.append(f"{mean:.3f}" + (f" ± {half:.3f}" if half is not None else ""))
        rows.append([name, prior or "(not given)", str(len(found)), *cells])
    return markdown_table(rows, words=2)


if __name__ == "__main__":
    main()
