"""Verdicts on the papers' claims, and the page that tells them, from the records of `benchmarks.claims`."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import claims_search, claims_tasks
from benchmarks.claims_runs import AGAIN, FAILED
from benchmarks.claims_table import EXPERIMENTS, HELD_OUT
from benchmarks.claims_tasks import Group, mean_of_targets, targets_of
from benchmarks.claims_work import FILE, Work, num_seeds
from benchmarks.results import newest
from raylib.display import markdown_table, mean_and_std
from raylib.fileio import read_jsonl
from raylib.metrics import t_interval

CLAIMS_FILE = Path(__file__).with_name("claims.tsv")
DIRECTIONS = {"above": 1, "below": -1, "not below": 0}
MARGIN = 1.0  # points; of "not below"
Record = Mapping[str, Any]


class Claim(NamedTuple):
    """A line of claims.tsv: `metric` summed over `terms`, (sign, experiment), seed by seed, is claimed to be
    above 0 (direction 1), below (-1), or not a point below (0). untestable: why nothing here decides it."""

    paper: str
    text: str
    where: str
    published: str
    metric: str
    direction: int
    terms: tuple[tuple[int, str], ...]
    untestable: str = ""


class Finding(NamedTuple):
    """A claim on our data: the values of each pair, mean and half of the 95 % interval, verdict."""

    values: Sequence[float]
    mean: float | None
    half: float | None
    verdict: str


def read_claims(path: Path = CLAIMS_FILE) -> list[Claim]:
    """Read the claims, in the order in which they are decided."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    claims = []
    for line in lines[1:]:
        paper, text, where, published, metric, direction, last = line.split("\t")
        if direction == "untestable":
            claims.append(Claim(paper, text, where, published, metric, 0, (), last))
            continue
        terms = tuple((1 if term[0] == "+" else -1, term[1:]) for term in last.split())
        claims.append(Claim(paper, text, where, published, metric, DIRECTIONS[direction], terms))
    return claims


# ---- metrics of a run; `group` are all seeds of its experiment


def _spread(run: Record, group: Group) -> float:
    """Mean distance of a run from the median of its experiment's seeds, language by language: what Brown and
    Forsythe compare variances by, so that seeds are pairs."""
    medians = {c: statistics.median(other["scores"][c] for other in group) for c in targets_of(run["scores"])}
    return statistics.fmean(abs(run["scores"][code] - median) for code, median in medians.items())


def _similarities(run: Record) -> dict[str, float]:
    """Return the similarity of each target's CLS states to English ones, after the last epoch."""
    found = {code: values[-1] for code, values in run["epochs"]["similarity"].items()}
    return {code: found[code] for code in targets_of(run["scores"]) if code in found}


def _similarity_r(run: Record, group: Group) -> float:
    found, scores = _similarities(run), run["epochs"]["score"]
    return statistics.correlation(list(found.values()), [scores[code][-1] for code in found])


def _early(run: Record, group: Group) -> float:
    curves = targets_of(run["epochs"]["score"])
    return statistics.fmean(curve[(len(curve) + 1) // 2 - 1] - curve[-1] for curve in curves.values())


METRICS: dict[str, Callable[[Record, Group], float]] = {
    "targets": lambda run, group: mean_of_targets(run["scores"]),
    "english": lambda run, group: run["scores"]["en"],
    "r1": lambda run, group: mean_of_targets(run["r1"]),
    "r1_sw": lambda run, group: run["r1"][HELD_OUT],
    "std": lambda run, group: statistics.stdev(run["r1"].values()),
    "spread": _spread,
    "similarity": lambda run, group: statistics.fmean(_similarities(run).values()),
    "similarity_r": _similarity_r,
    "early": _early,
}
UNITS = {"similarity_r": 1.0}  # elsewhere points of a per cent: 100


# ---- verdicts


def current_runs(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Return {experiment: its runs by seed, the newest of each}, as the experiment is planned now; of the
    model and the scenes that the last record is of."""
    runs: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        name, seed = record["name"], record["seed"]
        if record["kind"] != "run" or name not in EXPERIMENTS or seed >= num_seeds(name):
            continue  # teachers of trials have seeds of their own
        if record["config"] == Work("run", name, seed).key()["config"]:
            runs[name].append(record)
    return {name: newest(list(of_name), "seed") for name, of_name in runs.items()}


def of_last_model(records: Sequence[Record]) -> list[Record]:
    """Return the records of the model and the scenes that the last one is of."""
    keys = ("weights", "scenes")
    return [r for r in records if all(r[key] == records[-1][key] for key in keys)]


def judge(claim: Claim, runs: Mapping[str, Group]) -> Finding:
    """Compare a claim with what the experiments came to: only seeds that all terms have, computed in one
    number format, are pairs."""
    if claim.untestable:
        return Finding((), None, None, f"not testable here: {claim.untestable}")
    values = _by_language(claim, runs) if _is_untrained(claim) else _by_seed(claim, runs)
    if len(values) < 2:
        return Finding(values, None, None, "not run")
    mean, half = t_interval(values)
    assert half is not None
    planned = max(num_seeds(name) for _, name in claim.terms)
    partial = f" ({len(values)} of {planned} seeds)" if len(values) < planned else ""
    return Finding(values, mean, half, _verdict(claim.direction, mean, half) + partial)


def _verdict(direction: int, mean: float, half: float) -> str:
    if direction == 0:
        return "holds" if mean - half > -MARGIN else "reversed" if mean + half < -MARGIN else "not seen"
    mean *= direction
    return "holds" if mean > half else "reversed" if mean < -half else "not seen"


def _is_untrained(claim: Claim) -> bool:
    return all(num_seeds(name) == 1 for _, name in claim.terms)


def _by_seed(claim: Claim, runs: Mapping[str, Group]) -> list[float]:
    groups = [(sign, runs.get(name, ())) for sign, name in claim.terms]
    by_seed = [(sign, group, {(r["seed"], r["precision"]): r for r in group}) for sign, group in groups]
    metric, unit = METRICS[claim.metric], UNITS.get(claim.metric, 100.0)
    seeds = set.intersection(*(set(found) for *_, found in by_seed))
    return [
        unit * sum(sign * metric(found[seed], group) for sign, group, found in by_seed)
        for seed in sorted(seeds)
    ]


def _by_language(claim: Claim, runs: Mapping[str, Group]) -> list[float]:
    """Return differences by language, of what no seed changes."""
    found = [(sign, runs[name][-1][claim.metric]) for sign, name in claim.terms if name in runs]
    if len(found) < len(claim.terms):
        return []
    codes = set.intersection(*(set(scores) for _, scores in found)) - {"en"}
    return [100 * sum(sign * scores[code] for sign, scores in found) for code in sorted(codes)]


# ---- the page


def claims_table(claims: Sequence[Claim], runs: Mapping[str, Group]) -> str:
    """Return a row a claim."""
    rows = [["claim", "paper", "where", "verdict", "published", "here: 95 % interval", "pairs"]]
    for claim in claims:
        found = judge(claim, runs)
        sign = "" if claim.metric in UNITS else "+"
        digits = 2 if claim.metric in UNITS else 1
        ours = "" if found.mean is None else f"{found.mean:{sign}.{digits}f} ± {found.half:.{digits}f}"
        if found.mean is not None and len(claim.terms) == 2 and not _is_untrained(claim):
            ours += f" ({_level(claim, runs, -1)} to {_level(claim, runs, 1)})"
        pairs = str(len(found.values)) if found.values else ""
        rows.append([claim.text, claim.paper, claim.where, found.verdict, _published(claim), ours, pairs])
    return markdown_table(rows, words=4)


def _published(claim: Claim) -> str:
    before, arrow, after = claim.published.partition(" > ")
    return f"{float(after) - float(before):+.2f} ({before} to {after})" if arrow else claim.published


def _level(claim: Claim, runs: Mapping[str, Group], sign: int) -> str:
    """Return the mean of the metric over the seeds of the term with this sign."""
    group = next(runs[name] for each, name in claim.terms if each == sign)
    unit = UNITS.get(claim.metric, 100.0)
    return f"{unit * statistics.fmean(METRICS[claim.metric](run, group) for run in group):.1f}"


def experiments_table(runs: Mapping[str, Group]) -> str:
    """Return a row an experiment: scores on the test sets, on drawings of another style, with other items'
    images."""
    rows = [
        ["experiment: %", "settings, as chosen", "seeds", "English", "targets", HELD_OUT]
        + ["targets, other style", "English, shuffled images", "targets, shuffled images", "CPU-s a run"]
    ]
    for name in (name for name in EXPERIMENTS if name in runs):
        group = runs[name]
        settings = [
            f"`{path.removeprefix('strategies.')}={_number(v)}`" for path, v in _chosen(group).items()
        ]
        columns = [
            [run.get(part, {}).get(code) if code else mean_of_targets(run.get(part, {})) for run in group]
            for part, code in (
                ("scores", "en"),
                ("scores", ""),
                ("scores", HELD_OUT),
                ("test_style", ""),
                ("shuffled_images", "en"),
                ("shuffled_images", ""),
            )
        ]
        cpu = f"{statistics.median(run['cpu_seconds'] for run in group):.0f}"
        rows.append([name, ", ".join(settings), str(len(group)), *map(mean_and_std, columns), cpu])
    return markdown_table(rows, words=2)


def _chosen(group: Group) -> Mapping[str, Any]:
    return group[-1]["chosen"]


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def cost_line(records: Sequence[Record]) -> str:
    """Say what the records are of, and what they cost."""
    if not records:
        return "Nothing has been run yet."
    hours = sum(record["cpu_seconds"] for record in records) / 3600
    counts = Counter(record["kind"] for record in records)
    formats = sorted({record["precision"] for record in records if "precision" in record})
    last = records[-1]
    kinds = {"run": "runs", "choice": "choices of settings", "pretraining": "pretrainings"}
    kinds |= {"search": "searches of all methods", FAILED: "tries that failed", AGAIN: "made again"}
    done = ", ".join(f"{counts[kind]} {words}" for kind, words in kinds.items())
    return (
        f"{done}: {hours:.1f} core-hours. Model {last['weights']}, scenes {last['scenes']}; computed in "
        f"{', '.join(formats) or 'nothing yet'}; last commit {last['commit']}, {last['date']}."
    )


def tables(path: Path = FILE) -> dict[str, str]:
    """Return {"tasks": what the model can do, "claims": with what they cost, "experiments", "worth" of a
    search} of the records in `path`."""
    stored = read_jsonl(path)
    records = of_last_model(stored) if stored else []
    runs = current_runs(records)
    return {
        "tasks": claims_tasks.tables(runs),
        "claims": f"{cost_line(records)}\n\n{claims_table(read_claims(), runs)}",
        "experiments": experiments_table(runs),
        "worth": claims_search.table(records),
    }
