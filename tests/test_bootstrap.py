"""Intervals: they cover what they should, are the same every time, and pair two figures on the same photos."""

import math

import numpy as np
import pytest

from clipcap_rag.bootstrap import Variety, estimates, mean, ratio


def covered(measures, truth):
    """The share of repetitions whose interval holds the true figure."""
    held = []
    for measure in measures:
        low, high = estimates({"figure": measure})["figure"].interval()
        held.append(low <= truth <= high)
    return np.mean(held)


def test_intervals_of_a_mean_cover_it():
    random = np.random.default_rng(1)
    share = covered((mean(random.exponential(2.0, 120)) for _ in range(200)), 2.0)
    assert 0.88 <= share <= 0.99


def test_intervals_of_a_ratio_of_sums_cover_it():
    random = np.random.default_rng(2)

    def drawn():
        below = random.integers(1, 9, 120)
        return ratio(random.binomial(below, 0.3), below)

    assert 0.88 <= covered((drawn() for _ in range(200)), 0.3) <= 0.99


def test_intervals_of_a_number_of_kinds_cover_what_is_expected():
    random = np.random.default_rng(3)
    chances = np.arange(1, 400.0) ** -1
    chances /= chances.sum()
    drawn = [random.choice(len(chances), (60, 8), p=chances) for _ in range(150)]
    truth = np.mean([len(np.unique(things)) for things in drawn])
    share = covered((Variety(things.tolist(), relative=False) for things in drawn), truth)
    assert share >= 0.9


def test_a_mean_has_the_interval_of_the_textbook():
    values = np.random.default_rng(4).normal(5, 3, 2000)
    estimate = estimates({"mean": mean(values)})["mean"]
    low, high = estimate.interval()
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert estimate.value == pytest.approx(values.mean())
    assert (estimate.value - low, high - estimate.value) == pytest.approx((half, half), rel=0.15)


def test_the_same_every_time_and_whatever_stands_beside():
    values = np.random.default_rng(5).random(50)
    alone = estimates({"a": mean(values)})["a"]
    beside = estimates({"b": ratio(values, values + 1), "a": mean(values)})["a"]
    assert np.array_equal(alone.replicates, beside.replicates) and len(alone.replicates) == 1000


def test_a_paired_difference_knows_that_the_photos_are_the_same():
    values = np.random.default_rng(6).normal(0, 5, 300)
    first, second = (estimates({"m": mean(values + shift)})["m"] for shift in (0.1, 0))
    assert (first - second).to_json() == pytest.approx({"value": 0.1, "low": 0.1, "high": 0.1})
    assert first.interval()[1] - first.interval()[0] > 0.5


def test_what_is_not_defined_is_none():
    assert estimates({"m": ratio([0, 0], [0, 0])})["m"].to_json() == {"value": None, "low": None, "high": None}
    assert estimates({"m": mean([math.nan, 2.0, 4.0])})["m"].value == 3.0


def test_variety_counts_kinds():
    things = [["a", "b", "a"], ["b"], [], ["c"]]
    found = estimates({"kinds": Variety(things, relative=False), "share": Variety(things, relative=True)})
    assert (found["kinds"].value, found["share"].value) == (3, 3 / 5)
    assert found["kinds"].replicates.tolist() == [2, 3, 3, 2]  # without each photo
    assert found["share"].replicates.tolist() == pytest.approx([2 / 2, 3 / 4, 3 / 5, 2 / 4])
    assert estimates({"kinds": Variety(things, relative=False).part([1, 2])})["kinds"].value == 1


def test_many_photos_take_seconds_not_minutes():
    random = np.random.default_rng(7)
    found = estimates({f"m{n}": mean(random.random(40_000)) for n in range(8)})
    assert found["m0"].interval()[1] - found["m0"].interval()[0] < 0.01
