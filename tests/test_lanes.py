import itertools
from collections import Counter

import numpy as np
import pytest

from raylib.data.lanes import PERIOD, Lanes, apportion, list_step_draws
from raylib.errors import UserError

SIZES = {"de": [7, 0, 13, 40], "bn": [9], "en": [200, 33]}


def make(sizes=SIZES, seed=1, lanes=3, alpha=0.3, block=8, name="text"):
    return Lanes(sizes, name, seed, lanes, alpha, block)


def test_lanes_partition_every_language():
    lanes = make()
    for language, shards in SIZES.items():
        spans = [lanes.span(lane, language) for lane in range(3)]
        assert [spans[0][0], spans[-1][1]] == [0, sum(shards)]
        assert all(a[1] == b[0] and a[0] < a[1] for a, b in itertools.pairwise(spans))


@pytest.mark.parametrize("lane", range(3))
def test_lanes_draw_every_sample_once_per_epoch(lane):
    lanes = make()
    drawn = {language: [] for language in SIZES}
    for position in range(3 * PERIOD):
        language, number = lanes.draw(lane, position)
        drawn[language].append(number)
    for language, numbers in drawn.items():
        first, last = lanes.span(lane, language)
        epochs = [numbers[i : i + last - first] for i in range(0, len(numbers), last - first)]
        assert len(epochs) > 3
        assert all(sorted(epoch) == list(range(first, last)) for epoch in epochs[:-1])
        assert last - first < 4 or epochs[0] != epochs[1]


def test_lanes_give_languages_their_shares_in_every_period():
    lanes = make()
    totals = np.array([sum(SIZES[language]) for language in sorted(SIZES)])
    shares = totals**0.3 / (totals**0.3).sum()
    orders = []
    for period in range(3):
        drawn = [lanes.draw(0, period * PERIOD + offset)[0] for offset in range(PERIOD)]
        counts = Counter(drawn)
        assert sum(counts.values()) == PERIOD
        for language, share in zip(sorted(SIZES), shares, strict=True):
            assert abs(counts[language] - share * PERIOD) < 1
        orders.append(drawn)
    assert orders[0] != orders[1] != orders[2]


def test_lanes_equal_slow_reference_at_any_position():
    """Any position, asked in any order and of a fresh object, is what plain concatenation of epochs gives."""
    from raylib.randomness import permutation

    def reference(lane, count):
        totals = {language: sum(SIZES[language]) for language in sorted(SIZES)}
        shares = np.array([total**0.3 for total in totals.values()])
        counts = apportion(shares / shares.sum(), PERIOD)
        streams = {}
        for language, total in totals.items():
            first, last = lane * total // 3, (lane + 1) * total // 3
            blocks, start = [], 0
            for size in SIZES[language]:
                for low in range(0, size, 8):
                    block = [start + i for i in range(low, min(low + 8, size)) if first <= start + i < last]
                    if block:
                        blocks.append(block)
                start += size
            stream, epoch = [], 0
            while len(stream) < 2 * PERIOD:
                for b in permutation(len(blocks), 1, "text", "samples", lane, language, epoch):
                    order = permutation(len(blocks[b]), 1, "text", "samples", lane, language, epoch, int(b))
                    stream += [blocks[b][i] for i in order]
                epoch += 1
            streams[language] = iter(stream)
        drawn = []
        for period in range(count // PERIOD):
            languages = [language for language, n in zip(totals, counts, strict=True) for _ in range(n)]
            for i in permutation(PERIOD, 1, "text", "languages", lane, period):
                drawn.append((languages[i], next(streams[languages[i]])))
        return drawn

    expected = reference(2, 2 * PERIOD)
    lanes = make()
    assert [lanes.draw(2, position) for position in range(2 * PERIOD)] == expected
    for position in (1500, 3, 2047, 1024, 1023, 700):
        assert lanes.draw(2, position) == make().draw(2, position) == expected[position]


def test_lanes_read_one_block_at_a_time():
    lanes = make({"en": [100, 60]}, lanes=2, block=16)
    drawn = [lanes.draw(0, position)[1] for position in range(80)]
    blocks = [number // 16 if number < 100 else 100 + (number - 100) // 16 for number in drawn]
    assert len([block for block, _ in itertools.groupby(blocks)]) == len(set(blocks)) == 5
    assert drawn != sorted(drawn)


def test_lanes_order_differs_with_seed_name_and_lane():
    order = [make().draw(0, position) for position in range(50)]
    for other in (make(seed=2), make(name="parallel")):
        assert [other.draw(0, position) for position in range(50)] != order


@pytest.mark.parametrize(
    "shares", [[1.0], [0.5, 0.25, 0.25], [0.9989, 0.0001, 0.001], [1 / 7] * 7, [0.3, 0.7]]
)
def test_apportion_sums_to_total_and_rounds(shares):
    counts = apportion(np.array(shares), 100)
    assert counts.sum() == 100 and counts.min() >= 1
    if min(shares) * 100 >= 1:
        assert (np.abs(counts - np.array(shares) * 100) < 1).all()


def test_apportion_keeps_rare_languages():
    sizes = {f"l{i:03}": [1 + 10 ** (i % 7)] for i in range(300)}
    counts = make(sizes, lanes=1, alpha=1.0).counts
    assert counts.sum() == PERIOD and counts.min() == 1


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5, 7, 12])
def test_lanes_ranks_partition_the_global_batch(world):
    ranks = [list_step_draws(4, 12, rank, world) for rank in range(world)]
    assert {len(rank) for rank in ranks} <= {12 // world, -(-12 // world)}
    assert [draw for rank in ranks for draw in rank] == [(i, i // 3, i % 3) for i in range(12)]
    served = [{draw.lane for draw in rank} for rank in ranks]
    if 4 % world == 0:
        assert sum(map(len, served)) == 4, "no lane is read by two workers where they divide the lanes"


def test_lanes_indivisible_settings_are_errors():
    with pytest.raises(UserError, match="10 lanes but 9 samples of language 'bn'"):
        make(lanes=10)
    with pytest.raises(UserError, match="4 lanes do not divide a batch of 10"):
        list_step_draws(4, 10)
    with pytest.raises(UserError, match="merge some"):
        make({f"l{i}": [5] for i in range(PERIOD + 1)})
    with pytest.raises(UserError, match="no language"):
        make({})
