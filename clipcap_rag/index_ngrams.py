"""How rare n-grams are in the captions of indexes."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from clipcap_rag.caption_index import CaptionIndex
from clipcap_rag.ngram_agreement import NgramWeights

_COUNTED = 5_000  # captions of the indexes whose n-grams are counted; 1,000 ranked as well


def ngram_weights(indexes: Sequence[CaptionIndex]) -> NgramWeights:
    """How rare n-grams are in captions drawn from indexes as they are now."""
    return _counted_weights(tuple(indexes), tuple(index.revision for index in indexes))


@lru_cache(maxsize=8)
def _counted_weights(indexes: tuple[CaptionIndex, ...], revisions: tuple[int, ...]) -> NgramWeights:
    random = np.random.default_rng(0)
    rows = [index.random_rows(_COUNTED // len(indexes), random) for index in indexes]
    return NgramWeights([caption] for index, own in zip(indexes, rows, strict=True) for caption in index.captions(own))
