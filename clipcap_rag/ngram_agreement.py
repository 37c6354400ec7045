"""How far captions agree in their n-grams, rare ones weighing more: the cosines behind CIDEr."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from clipcap_rag.caption_votes import Votes
from clipcap_rag.vote_sums import VoteSums

_ORDERS = 4
_PIECE = re.compile(r"[^\W_]+(?:[-'’][^\W_]+)*|[^\w\s]")  # a word, or a mark
_END = ""  # stands behind the last word, so that how a caption ends counts too

Gram = tuple[str, ...]
Vector = dict[Gram, float]


class NgramWeights:
    """Weights of n-grams (n = 1 to 4) by the documents that hold them, and captions as vectors of them.

    These are the vectors of CIDEr (Vedantam et al. 2015, arXiv 1411.5726): per order, tf-idf of length 1. Words are
    case folded; punctuation and the end count as words.
    """

    def __init__(self, documents: Iterable[Sequence[str]]):
        """documents: the captions of each; an n-gram counts once in a document."""
        self._frequency: Counter[Gram] = Counter()
        count = 0
        for captions in documents:
            self._frequency.update({gram for caption in captions for gram in grams(caption)})
            count += 1
        self._log_count = math.log(max(2, count))
        self._sums = VoteSums(self.vector)

    def vector(self, caption: str) -> Vector:
        """The tf-idf of a caption's n-grams, of length 1 over all orders; empty for a caption without words."""
        orders: list[Vector] = [{} for _ in range(_ORDERS)]
        for gram, times in Counter(grams(caption)).items():
            rarity = self._log_count - math.log(max(1, self._frequency[gram]))
            orders[len(gram) - 1][gram] = times * rarity
        found: Vector = {}
        for part in orders:
            length = math.sqrt(sum(value * value for value in part.values()) * _ORDERS)
            if length:
                found |= {gram: value / length for gram, value in part.items()}
        return found

    def total(self, votes: Votes) -> np.ndarray:
        """The sum of captions' vectors, each times its weight, to be compared by `agreement`."""
        return self._sums.total(votes)

    def agreement(self, caption: str, total: np.ndarray) -> float:
        """The weighted sum of a caption's agreements with those of `total`."""
        return self._sums.product(caption, total)


def pieces(caption: str) -> list[str]:
    """A caption's words, marks and end, case folded; none for a caption without words."""
    words = _PIECE.findall(caption.casefold())
    return [*words, _END] if words else []


def grams(caption: str) -> list[Gram]:
    """All n-grams of a caption's words and its end, n = 1 to 4; none for a caption without words."""
    words = pieces(caption)
    return [tuple(words[at : at + n]) for n in range(1, _ORDERS + 1) for at in range(len(words) - n + 1)]


def agreement(one: Vector, other: Vector) -> float:
    """The mean over the orders of the cosines of two vectors: 1 for equal captions, 0 without a common n-gram."""
    if len(other) < len(one):
        one, other = other, one
    return sum(value * other[gram] for gram, value in one.items() if gram in other)
