"""What votes say of terms: words, runs of tokens or n-grams, each caption read once while it is remembered."""

from collections.abc import Callable, Hashable, Mapping
from functools import lru_cache

import numpy as np

from clipcap_rag.caption_votes import Votes

_REMEMBERED = 50_000  # captions; those of an index vote again and again
_MOST = 500_000  # terms that have a number; with more, all is forgotten


class VoteSums:
    """Sums of what captions have of terms, over votes.

    Attributes:
        terms: by number, in the order in which they came up.
    """

    def __init__(self, terms_of: Callable[[str], Mapping[Hashable, float]]):
        """terms_of: what a caption has of each of its terms."""
        self.terms: list[Hashable] = []
        self._numbers: dict[Hashable, int] = {}
        self._terms_of = terms_of
        self._parts = lru_cache(maxsize=_REMEMBERED)(self._read)

    def total(self, votes: Votes) -> np.ndarray:
        """[T] float64, for each of the `terms` so far the sum over the votes of weight times what the caption has."""
        if len(self.terms) > _MOST:
            self.terms.clear()
            self._numbers.clear()
            self._parts.cache_clear()
        parts = [self._parts(caption) for caption in votes.captions]
        numbers = np.concatenate([np.zeros(0, np.int32), *(own for own, _ in parts)])
        has = np.concatenate([np.zeros(0), *(values for _, values in parts)])
        weights = np.repeat(votes.weights, [len(own) for own, _ in parts])
        return np.bincount(numbers, weights * has, minlength=len(self.terms))

    def product(self, caption: str, total: np.ndarray) -> float:
        """The sum over a caption's terms of what it has times their `total`; terms new since then have none."""
        numbers, values = self._parts(caption)
        known = numbers < len(total)
        return float(values[known] @ total[numbers[known]])

    def _read(self, caption: str) -> tuple[np.ndarray, np.ndarray]:
        found = self._terms_of(caption)
        for term in found:
            if term not in self._numbers:
                self._numbers[term] = len(self.terms)
                self.terms.append(term)
        return np.array([self._numbers[term] for term in found], np.int32), np.array([*found.values()], np.float64)
