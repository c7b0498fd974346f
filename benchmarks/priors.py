"""Published settings as priors (`algorithm=priorband`) beside today's TPE, which tries them first, and random
search; with a good, a weak and a wrong published setting.

    python -m benchmarks.priors [--seeds 10] [--trials 60]         on a surrogate, seconds
    python -m benchmarks.priors --real MODEL DATA [--seeds 3]      searches of a real space (emoji scenes)

The surrogate has a rate (log), a weight (log), a number of layers and a choice; its score falls with the squared
distance from an optimum that the seed places, with interaction and noise of 0.01. A good published setting is a
tenth of the range away from the optimum in each knob, a weak one three tenths, a wrong one in the opposite corner
with the wrong choice. Compute is counted in trials, all of which cost the same. Appends to results/priors.jsonl.
"""

import argparse
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import optuna

from benchmarks.results import RESULTS, newest
from raylib.fileio import append_jsonl, read_jsonl
from raylib.randomness import generator
from raylib.search.config import SearchConfig
from raylib.search.optuna import build_sampler
from raylib.search.space import Choice, DefineByRun, Float, Int, Space
from raylib.tables import markdown_table

FILE = RESULTS / "priors.jsonl"
KNOBS = {
    "rate": Float(1e-5, 1e-2, log=True),
    "weight": Float(0.01, 100, log=True),
    "layers": Int(1, 21),
    "source": Choice("a", "b", "c"),
}
DISTANCES = {"good": 0.1, "weak": 0.3}  # of the published setting from the optimum, in each knob; wrong: a corner
ALGORITHMS = ("priorband", "tpe", "random")
CHECKPOINTS = (5, 10, 20, 40, 60)  # trials after which the best is looked at
NOISE = 0.01


def place(unit: np.ndarray, source: str) -> dict:
    """The setting at a place of the unit cube."""
    unit = unit.clip(0, 1)
    return {
        "rate": float(10 ** (-5 + 3 * unit[0])),
        "weight": float(10 ** (-2 + 4 * unit[1])),
        "layers": round(1 + 20 * unit[2]),
        "source": source,
    }


def unit_of(setting: dict) -> np.ndarray:
    return np.array(
        [
            (np.log10(setting["rate"]) + 5) / 3,
            (np.log10(setting["weight"]) + 2) / 4,
            (setting["layers"] - 1) / 20,
        ]
    )


def score(setting: dict, optimum: np.ndarray) -> float:
    """The score without noise: 1 at the optimum, with the choice "a"."""
    away = unit_of(setting) - optimum
    return float(1 - (away**2).sum() - 0.5 * away[0] * away[1] - 0.1 * (setting["source"] != "a"))


def published_setting(prior: str, optimum: np.ndarray, rng: np.random.Generator) -> dict:
    if prior == "wrong":
        return place((optimum < 0.5).astype(float), "c")
    signs = np.where(optimum > 0.5, -1, 1)  # inwards, so that the distance is kept
    return place(optimum + signs * DISTANCES[prior], "a" if prior == "good" else rng.choice(["a", "b"]))


def simulate(prior: str, algorithm: str, seed: int, trials: int) -> list[float]:
    """The true score of the setting that looks best after each of `CHECKPOINTS` trials."""
    rng = generator(seed, "surrogate")
    optimum = rng.uniform(0.1, 0.9, 3)
    published = published_setting(prior, optimum, rng)
    space = Space("surrogate", "", KNOBS, published=(published,))
    config = SearchConfig(recipe="", algorithm=algorithm, seed=seed)
    study = optuna.create_study(direction="maximize", sampler=build_sampler(config, space, trials))
    if algorithm != "random":
        study.enqueue_trial(published)
    found, best = [], (-np.inf, 0.0)
    for number in range(trials):
        trial = study.ask()
        DefineByRun(KNOBS)(trial)
        true = score(trial.params, optimum)
        measured = true + NOISE * rng.normal()
        study.tell(trial, measured)
        best = max(best, (measured, true))
        if number + 1 in CHECKPOINTS:
            found.append(best[1])
    return found
