"""Figures over photos with 95 % intervals, and the paired difference of two of them."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES, SEED = 1000, 0
_BLOCK = 2**22  # counts that are in memory at once
_NORMAL = 1.96  # standard errors on either side that hold 95 % of a normal distribution


@dataclass(frozen=True)
class Estimate:
    """A figure, and what it is on other draws of photos.

    Attributes:
        value: on the photos there are; NaN where it is not defined.
        replicates: [R] on R resamples, or with `jackknife` [N], each with one photo left out.
    """

    value: float
    replicates: np.ndarray
    jackknife: bool = False

    def __sub__(self, other: "Estimate") -> "Estimate":
        """The paired difference: both figures on the same draws."""
        return Estimate(self.value - other.value, self.replicates - other.replicates, self.jackknife)

    def interval(self) -> tuple[float, float]:
        """The 95 % interval: percentiles of the bootstrap, or the jackknife's standard error times 1.96."""
        found = self.replicates[np.isfinite(self.replicates)]
        if not len(found) or not math.isfinite(self.value):
            return math.nan, math.nan
        if self.jackknife:
            half = _NORMAL * math.sqrt((len(found) - 1) / len(found) * float(((found - found.mean()) ** 2).sum()))
            return self.value - half, self.value + half
        low, high = np.percentile(found, [2.5, 97.5])
        return float(low), float(high)

    def to_json(self) -> dict[str, float | None]:
        """{"value", "low", "high"}, None for what is not defined."""
        numbers = dict(zip(("value", "low", "high"), (float(self.value), *self.interval()), strict=True))
        return {name: number if math.isfinite(number) else None for name, number in numbers.items()}


@dataclass(frozen=True)
class Measure:
    """A figure that is a function of sums over photos, such as BLEU or any mean.

    Attributes:
        statistics: [N, S] what each photo adds.
        combine: sums [..., S] -> figures [...].
    """

    statistics: np.ndarray
    combine: Callable[[np.ndarray], np.ndarray]

    def part(self, rows: Sequence[int]) -> "Measure":
        return Measure(self.statistics[rows], self.combine)


@dataclass(frozen=True)
class Variety:
    """How many different things photos have, over how many in all; no sum over photos, as one may repeat another's.

    A resample with photos drawn twice always has less variety, so the jackknife gives the interval; its variance errs
    on the wide side (Efron and Stein 1981).

    Attributes:
        things: per photo, what it has, repetitions included.
        relative: divide by how many things there are, as distinct-n does.
    """

    things: Sequence[Sequence[Any]]
    relative: bool

    def part(self, rows: Sequence[int]) -> "Variety":
        return Variety([self.things[row] for row in rows], self.relative)

    def estimate(self) -> Estimate:
        owners: dict[Any, int] = {}  # the only photo that has a thing, or -1
        for photo, things in enumerate(self.things):
            for thing in set(things):
                owners[thing] = -1 if thing in owners else photo
        alone = np.zeros(len(self.things))
        np.add.at(alone, [photo for photo in owners.values() if photo >= 0], 1)
        counts = np.array([len(things) for things in self.things], float)
        kinds, total = len(owners), counts.sum()
        if self.relative:
            return Estimate(float(_ratio(kinds, total)), _ratio(kinds - alone, total - counts), True)
        return Estimate(float(kinds), kinds - alone, True)


def mean(values: Sequence[float]) -> Measure:
    """The mean of one number per photo; photos whose number is NaN do not count."""
    values = np.asarray(values, float)
    known = np.isfinite(values)
    return ratio(np.where(known, values, 0), known)


def ratio(above: Sequence[float], below: Sequence[float]) -> Measure:
    """A sum over photos divided by another, NaN where that is 0."""
    statistics = np.stack([np.asarray(above, float), np.asarray(below, float)], axis=1)
    return Measure(statistics, lambda sums: _ratio(sums[..., 0], sums[..., 1]))


def estimates(measures: Mapping[str, Measure | Variety]) -> dict[str, Estimate]:
    """Each figure with its value on resamples of the photos (Efron 1979), the same resamples for all figures.

    They depend on nothing but the number of photos, so figures of two captioners on the same photos are paired.
    """
    summed = {name: measure for name, measure in measures.items() if isinstance(measure, Measure)}
    found = {name: measure.estimate() for name, measure in measures.items() if isinstance(measure, Variety)}
    if summed:
        widths = np.cumsum([measure.statistics.shape[1] for measure in summed.values()])[:-1]
        stacked = np.concatenate([measure.statistics for measure in summed.values()], axis=1)
        sums = np.concatenate([counts @ stacked for counts in _resamples(len(stacked))])
        for (name, measure), drawn in zip(summed.items(), np.split(sums, widths, axis=1), strict=True):
            value = float(measure.combine(measure.statistics.sum(axis=0)))
            found[name] = Estimate(value, measure.combine(drawn))
    return {name: found[name] for name in measures}


def _resamples(photos: int) -> Iterator[np.ndarray]:
    """How often each photo is drawn in each of `RESAMPLES` draws, in blocks [B, N]."""
    random, done = np.random.default_rng(SEED), 0
    while done < RESAMPLES:
        size = min(RESAMPLES - done, max(1, _BLOCK // photos))
        drawn = random.integers(0, photos, (size, photos)) + photos * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * photos).reshape(size, photos).astype(float)
        done += size


def _ratio(above: Any, below: Any) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.asarray(below) != 0, np.divide(above, below), np.nan)
