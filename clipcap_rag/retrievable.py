"""What of several indexes may be retrieved for an image: conditions, limits, denied captions, and its own captions."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from clipcap_rag.caption_index import CaptionIndex
from clipcap_rag.config import RetrievalConfig
from clipcap_rag.deny_list import DenyList
from clipcap_rag.errors import InputError
from clipcap_rag.index_filter import matching, parse_where
from clipcap_rag.sources import normalize_caption

_normalized = lru_cache(maxsize=50_000)(normalize_caption)  # photo after photo the same captions are found


@dataclass(frozen=True)
class Exclusion:
    """What an image must not retrieve: rows with its image_id, and captions equal to `texts` once normalised."""

    image_id: str | None
    texts: frozenset[str]

    @classmethod
    def of(cls, image_id: str | None, captions: Sequence[str]) -> "Exclusion":
        return cls(image_id, frozenset(normalize_caption(caption) for caption in captions))


class Hit(NamedTuple):
    """A caption that one route found in one index; `text` is the caption as strings are compared."""

    score: float
    number: int
    row: int
    caption: str
    text: str
    route: str


class Retrievable:
    """Several indexes and which of their captions may be retrieved.

    Attributes:
        indexes: those that are searched.
        weights: of each.
        most: of each, how many neighbours of an image may come from it.
    """

    def __init__(
        self,
        indexes: Sequence[CaptionIndex],
        weights: Sequence[float] | None,
        most: Sequence[int | None] | None,
        config: RetrievalConfig,
    ):
        """Arguments and errors are those of `Retriever`."""
        self.indexes, self.weights = list(indexes), list(weights or [1.0] * len(indexes))
        self.most = [math.inf if limit is None else limit for limit in most or [None] * len(indexes)]
        self._denied = DenyList.read(config.deny) if config.deny else DenyList()
        self._where, self._masks = parse_where(config.where), {}
        if self._where and indexes and not any(map(self._count, range(len(indexes)))):
            names = " and ".join(index.name for index in indexes)
            raise InputError(f"no caption of {names} meets {', '.join(config.where)}; give other conditions")

    @property
    def available(self) -> int:
        """Captions that the conditions and the limits of the indexes leave for one image."""
        return sum(min(most, self._count(number)) for number, most in enumerate(self.most))

    def _count(self, number: int) -> int:
        """Captions of an index that meet the conditions."""
        among = self.among(number)
        return len(self.indexes[number]) if among is None else int(among.sum())

    def among(self, number: int) -> np.ndarray | None:
        """Which rows [N] bool meet the conditions, worked out once for each state of an index; None where all do."""
        if not self._where:
            return None
        files = self.indexes[number].files
        seen, mask = self._masks.get(number, (None, None))
        if seen is not files:
            mask = matching(files, self._where)
            self._masks[number] = files, mask
        return mask

    def hits(
        self, number: int, route: str, scores: np.ndarray, rows: np.ndarray, exclusion: Exclusion
    ) -> Iterator[Hit]:
        """What may be retrieved of some rows, each string once."""
        index, seen = self.indexes[number], set()
        captions, image_ids = index.captions(rows), index.image_ids(rows)
        for score, row, caption, image_id in zip(scores, rows, captions, image_ids, strict=True):
            text = _normalized(caption)
            own = exclusion.image_id is not None and image_id == exclusion.image_id
            if not own and text not in exclusion.texts and text not in seen and not self._denied.refuses(text):
                seen.add(text)
                yield Hit(float(score), number, int(row), caption, text, route)
