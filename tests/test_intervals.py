"""Confidence intervals against slow references, and how often they hold what they should."""

import itertools
import random
import statistics

import numpy as np
import pytest

from raylib.metrics import MILLION, ItemClusters, bootstrap_interval, recall_interval, t_interval

T_975 = {
    1: 12.7062,
    2: 4.3027,
    3: 3.1824,
    4: 2.7764,
    9: 2.2622,
    29: 2.0452,
}  # a printed table, by degrees of freedom


@pytest.mark.parametrize("freedom", T_975)
def test_seed_interval_reproduces_a_printed_table(freedom):
    values = [0.1 * (i % 5) + 0.03 * i for i in range(freedom + 1)]
    mean, half = t_interval(values)
    assert mean == pytest.approx(statistics.fmean(values))
    assert half == pytest.approx(T_975[freedom] * statistics.stdev(values) / len(values) ** 0.5, rel=1e-4)


def test_seed_interval_of_one_seed_is_none():
    assert t_interval([0.3]) == (0.3, None)


def slow_bootstrap(clusters: list[list[tuple[int, int]]], resamples: int) -> list[float]:
    """Clusters of (gained, items) for each part; drawn one by one."""
    draw, scores = random.Random(0), []
    for _ in range(resamples):
        drawn = [draw.choice(clusters) for _ in clusters]
        parts = [sum(c[p][0] for c in drawn) / sum(c[p][1] for c in drawn) for p in range(len(clusters[0]))]
        scores.append(sum(parts) / len(parts))
    scores.sort()
    return [scores[round(share * (resamples - 1))] for share in (0.025, 0.975)]


def test_bootstrap_equals_slow_loop():
    draw = random.Random(1)
    clusters = []
    for _ in range(70):
        items = draw.randint(1, 6)
        clusters.append([(draw.randint(0, 1), 1), (draw.randint(0, items), items)])
    gained, counts = (np.array([[part[i] for part in cluster] for cluster in clusters]) for i in (0, 1))
    found = bootstrap_interval(MILLION * gained, counts, "test")
    assert found == pytest.approx(slow_bootstrap(clusters, 6000), abs=0.012)  # 8 points wide
    order = np.random.default_rng(0).permutation(70)
    assert (
        bootstrap_interval(MILLION * gained[order], counts[order], "test") == found
    )  # whatever the order, and so the workers
    assert bootstrap_interval(MILLION * gained, counts, "other") != found


def test_bootstrap_of_three_clusters_equals_all_their_samples():
    gained, counts = np.array([[0], [1], [3]]), np.array([[2], [2], [4]])
    every = [
        sum(int(gained[i, 0]) for i in drawn) / sum(int(counts[i, 0]) for i in drawn)
        for drawn in itertools.product(range(3), repeat=3)
    ]
    expected = np.quantile(every, (0.025, 0.975), method="inverted_cdf")
    assert bootstrap_interval(MILLION * gained, counts, 0) == pytest.approx(expected)


def test_bootstrap_without_spread_or_of_one_cluster():
    right, one = np.full((50, 1), MILLION), np.ones((50, 1), np.int64)
    assert bootstrap_interval(right, one, 0) == [1.0, 1.0]
    assert bootstrap_interval(right[:1], one[:1], 0) is None
    assert (
        bootstrap_interval(np.vstack([right[:1], 0 * right]), np.vstack([one[:1], 0 * one]), 0) is None
    )  # clusters without items


def simulated(draw: np.random.Generator) -> list[tuple[str, int]]:
    """(image, right or wrong) of 50 images with 1 to 15 questions, that are answered alike: half of them, in
    the mean."""
    out = []
    for image in range(50):
        chance = draw.beta(1, 1)
        out += [(str(image), int(draw.random() < chance)) for _ in range(draw.integers(1, 16))]
    return out


def test_bootstrap_intervals_have_nominal_coverage():
    """Over images in 95 of 100 simulated tests; over questions, as if they were independent, far more
    seldom."""
    draw, held = np.random.default_rng(3), {"images": 0, "questions": 0}
    for trial in range(300):
        items = simulated(draw)
        for kind in held:
            clusters = ItemClusters()
            for number, (image, right) in enumerate(items):
                clusters.add([image if kind == "images" else str(number)], MILLION * right)
            low, high = clusters.interval(trial)
            held[kind] += low <= 0.5 <= high
    assert 0.91 < held["images"] / 300 < 0.98 and held["questions"] / 300 < 0.85


def test_bootstrap_recall_intervals_have_nominal_coverage():
    draw, held = np.random.default_rng(4), 0
    for trial in range(300):
        chance = draw.beta(2, 2, 80)  # of an image, both ways
        owner = np.repeat(np.arange(80), draw.integers(1, 6, 80))
        i2t, t2i = draw.random(80) < chance, draw.random(len(owner)) < chance[owner]
        low, high = recall_interval(i2t.astype(float), t2i.astype(float), owner, trial)
        held += low <= 0.5 <= high
    assert 0.91 < held / 300 < 0.98


def test_bootstrap_colliding_hash_buckets_keep_interval_width(monkeypatch):
    monkeypatch.setattr(ItemClusters, "BUCKETS", 2048)  # 400 images: 70 of them share one
    draw, many, alone = np.random.default_rng(5), ItemClusters(), []
    for image in range(400):
        right = int(draw.integers(0, 2))
        many.add([f"image{image}"], MILLION * right)
        alone.append(right)
    exact = bootstrap_interval(MILLION * np.array(alone)[:, None], np.ones((400, 1), np.int64), 0)
    found = many.interval(0)
    assert np.diff(found) == pytest.approx(np.diff(exact), rel=0.15) and found == pytest.approx(
        exact, abs=0.02
    )


def test_bootstrap_of_all_distinct_outcomes_works_in_pieces():
    """Ten thousand images, none like another: the table of resamples is cut into pieces."""
    draw = np.random.default_rng(6)
    gained = draw.integers(0, MILLION, (10_000, 1))
    low, high = bootstrap_interval(gained, np.ones_like(gained), 0)
    half = 1.96 * gained.std() / MILLION / 100
    assert (low, high) == pytest.approx(
        (gained.mean() / MILLION - half, gained.mean() / MILLION + half), abs=0.0006
    )
