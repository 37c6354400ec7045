"""Neighbour captions for image embeddings: over-fetch, exclude, drop duplicate strings, merge several indexes."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice, zip_longest
from typing import NamedTuple

import numpy as np

from clipcap_rag.caption_index import CaptionIndex
from clipcap_rag.caption_votes import PHOTOS_PER_NEIGHBOR, Votes, photo_weights
from clipcap_rag.config import RetrievalConfig
from clipcap_rag.deny_list import DenyList
from clipcap_rag.errors import InputError
from clipcap_rag.index_filter import matching, parse_where
from clipcap_rag.neighbors import Neighbors
from clipcap_rag.sources import normalize_caption

_PER_PHOTO = 6  # captions that are looked up for each photo that is to vote
_normalized = lru_cache(maxsize=50_000)(normalize_caption)  # photo after photo the same captions are found


@dataclass(frozen=True)
class Exclusion:
    """What an image must not retrieve: rows with its image_id, and captions equal to `texts` once normalised."""

    image_id: str | None
    texts: frozenset[str]

    @classmethod
    def of(cls, image_id: str | None, captions: Sequence[str]) -> "Exclusion":
        return cls(image_id, frozenset(normalize_caption(caption) for caption in captions))


class _Hit(NamedTuple):
    """A caption that one route found in one index; `text` is the caption as strings are compared."""

    score: float
    number: int
    row: int
    caption: str
    text: str
    route: str


class Retriever:
    """Finds neighbours in one or several indexes; hits are ordered by weight x cosine, two routes take turns."""

    def __init__(
        self,
        indexes: Sequence[CaptionIndex],
        weights: Sequence[float] | None = None,
        most: Sequence[int | None] | None = None,
        config: RetrievalConfig | None = None,
        photos_vote: bool = False,
    ):
        """Prepares the search.

        Args:
            weights: of each index.
            most: of each index, how many neighbours of an image may come from it; None is no limit.
            config: which captions may be found, and by which route.
            photos_vote: whether photos that indexes hold say in `Neighbors.photo_votes` what their captions say; they
                do not for route text.

        Raises:
            InputError: the indexes were built with encoders of different width, none holds photos for the route, no
                caption meets the conditions, or the deny file cannot be used.
        """
        if len({index.dim for index in indexes}) > 1:
            widths = ", ".join(f"{index.name} ({index.encoder['clip']}: {index.dim})" for index in indexes)
            raise InputError(f"these indexes were built with different CLIP models: {widths}; build them with one")
        config = config or RetrievalConfig()
        self.indexes, self.weights = list(indexes), list(weights or [1.0] * len(indexes))
        self._most = [math.inf if limit is None else limit for limit in most or [None] * len(indexes)]
        self._routes = {"both": ("text", "image"), "auto": ("text",)}.get(config.route, (config.route,))
        self._photos_vote = photos_vote and config.route != "text"
        self._denied = DenyList.read(config.deny) if config.deny else DenyList()
        self._where, self._masks = parse_where(config.where), {}
        if self._where and indexes and not any(map(self._count, range(len(indexes)))):
            names = " and ".join(index.name for index in indexes)
            raise InputError(f"no caption of {names} meets {', '.join(config.where)}; give other conditions")
        lacking = [index for index in indexes if index.files.images is None] if "image" in self._routes else []
        if lacking and (config.route == "image" or len(lacking) == len(indexes)):
            raise InputError(
                f"the index {lacking[0].path} holds no image embeddings for route {config.route}; give it some with "
                "index add-images, or take --route text"
            )

    @property
    def available(self) -> int:
        """Captions that the conditions and the limits of the indexes leave for one image."""
        return sum(min(most, self._count(number)) for number, most in enumerate(self._most))

    def search(self, queries: np.ndarray, k: int, exclusions: Sequence[Exclusion] | None = None) -> Neighbors:
        """The k best distinct captions for each query.

        Args:
            queries: [B, D] float32 image embeddings of unit length.
            k: neighbours per image; fewer are returned, masked, where the indexes do not hold so many.
            exclusions: per query, what it must not retrieve.
        """
        B, D = queries.shape
        exclusions = exclusions or [Exclusion(None, frozenset())] * B
        hits: list[list[list[_Hit]]] = [[[] for _ in self._routes] for _ in range(B)]
        for place, route in enumerate(self._routes if k > 0 else ()):
            for number in range(len(self.indexes)):
                for query, found in enumerate(self._distinct(number, route, queries, k, exclusions)):
                    hits[query][place] += found
        merged = [self._merge(routes, k) for routes in hits]
        rows, sources = np.full((B, k), -1, np.int64), np.zeros((B, k), np.int64)
        scores, image_scores = np.zeros((B, k), np.float32), np.full((B, k), np.nan, np.float32)
        embeddings = np.zeros((B, k, D), np.float32)
        for query, found in enumerate(merged):
            for place, hit in enumerate(found):
                rows[query, place], sources[query, place] = hit.row, hit.number
                (scores if hit.route == "text" else image_scores)[query, place] = hit.score
        for number, index in enumerate(self.indexes):
            here = (rows >= 0) & (sources == number)
            if here.any():
                embeddings[here] = index.embeddings(rows[here])
        by_image = ~np.isnan(image_scores)
        scores[by_image] = np.einsum("bkd,bd->bk", embeddings, queries)[by_image]
        captions = [[hit.caption for hit in found] for found in merged]
        votes = self.photo_votes(queries, k, exclusions)
        return Neighbors(rows, scores, sources, embeddings, captions, self.indexes, image_scores, votes)

    def photo_votes(self, queries: np.ndarray, k: int, exclusions: Sequence[Exclusion]) -> list[Votes] | None:
        """What the captions of the 2 k nearest photos of the indexes say; None where no photos are asked.

        Args:
            queries: [B, D] float32 image embeddings of unit length.
            exclusions: per query, what has no vote.
        """
        if not (k and self._photos_vote):
            return None
        asked = [
            number
            for number, index in enumerate(self.indexes)
            if index.files.images is not None and self.weights[number] > 0
        ]
        if not asked:
            return None
        count = PHOTOS_PER_NEIGHBOR * k
        found: list[dict[tuple[int, int], list[_Hit]]] = [{} for _ in queries]
        for number in asked:
            index = self.indexes[number]
            all_scores, all_rows = index.search_images(queries, _PER_PHOTO * count, among=self._among(number))
            photos = index.photos(all_rows)
            for query, (scores, rows, own) in enumerate(zip(all_scores, all_rows, photos, strict=True)):
                present = rows >= 0
                place = dict(zip(rows.tolist(), own.tolist(), strict=True))
                hits = self._allowed(number, "image", scores[present], rows[present], exclusions[query])
                for hit in islice(hits, min(self._most[number], len(rows))):
                    found[query].setdefault((number, place[hit.row]), []).append(hit)
        return [self._votes(query, own, count) for query, own in zip(queries, found, strict=True)]

    def _votes(self, query: np.ndarray, found: dict[tuple[int, int], list[_Hit]], count: int) -> Votes:
        """What the captions of the nearest `count` of the photos that were found say, by index and place there."""
        nearest = sorted(found, key=lambda photo: -self.weights[photo[0]] * found[photo][0].score)[:count]
        if not nearest:
            return Votes()
        vectors = np.concatenate([self.indexes[number].photo_embeddings(np.array([at])) for number, at in nearest])
        weights = photo_weights(query, vectors, np.array([self.weights[number] for number, _ in nearest]))
        said = [
            (hit.caption, weight / len(found[photo]))
            for photo, weight in zip(nearest, weights.tolist(), strict=True)
            for hit in found[photo]
        ]
        return Votes([caption for caption, _ in said], np.array([weight for _, weight in said]))

    def _merge(self, routes: Sequence[list[_Hit]], k: int) -> list[_Hit]:
        """The first k distinct captions of routes that take turns, no index giving more than it may."""
        ordered = [sorted(hits, key=lambda hit: -self.weights[hit.number] * hit.score) for hits in routes]
        kept: dict[str, _Hit] = {}
        given: Counter[int] = Counter()
        for hit in chain.from_iterable(zip_longest(*ordered)):
            if len(kept) == k:
                break
            if hit is not None and hit.text not in kept and given[hit.number] < self._most[hit.number]:
                kept[hit.text] = hit
                given[hit.number] += 1
        return list(kept.values())

    def _count(self, number: int) -> int:
        """Captions of an index that meet the conditions."""
        among = self._among(number)
        return len(self.indexes[number]) if among is None else int(among.sum())

    def _among(self, number: int) -> np.ndarray | None:
        """Which rows [N] bool meet the conditions, worked out once for each state of an index; None where all do."""
        if not self._where:
            return None
        files = self.indexes[number].files
        seen, mask = self._masks.get(number, (None, None))
        if seen is not files:
            mask = matching(files, self._where)
            self._masks[number] = files, mask
        return mask

    def _distinct(
        self, number: int, route: str, queries: np.ndarray, k: int, exclusions: Sequence[Exclusion]
    ) -> list[list[_Hit]]:
        """Per query the k best allowed hits with distinct strings, fetching more until there are k."""
        index, among = self.indexes[number], self._among(number)
        found: list[list[_Hit]] = [[] for _ in queries]
        if route == "image" and index.files.images is None:
            return found
        look = index.search if route == "text" else index.search_images
        open_queries, fetch = np.arange(len(queries)), 2 * k + 8
        while len(open_queries):
            fetch = min(fetch, len(index))
            all_scores, all_rows = look(queries[open_queries], fetch, among=among)
            for query, scores, rows in zip(open_queries, all_scores, all_rows, strict=True):
                present = rows >= 0
                hits = self._allowed(number, route, scores[present], rows[present], exclusions[query])
                found[query] = list(islice(hits, k))
            if fetch == len(index):
                break
            lacking = np.array([len(found[query]) < k for query in open_queries])
            open_queries = open_queries[lacking & (all_rows[:, -1] >= 0)]
            fetch *= 4
        return found

    def _allowed(
        self, number: int, route: str, scores: np.ndarray, rows: np.ndarray, exclusion: Exclusion
    ) -> Iterator[_Hit]:
        """What may be retrieved of some rows, each string once."""
        index, seen = self.indexes[number], set()
        captions, image_ids = index.captions(rows), index.image_ids(rows)
        for score, row, caption, image_id in zip(scores, rows, captions, image_ids, strict=True):
            text = _normalized(caption)
            own = exclusion.image_id is not None and image_id == exclusion.image_id
            if not own and text not in exclusion.texts and text not in seen and not self._denied.refuses(text):
                seen.add(text)
                yield _Hit(float(score), number, int(row), caption, text, route)
