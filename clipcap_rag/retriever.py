"""Neighbour captions for image embeddings: over-fetch, exclude, drop duplicate strings, merge several indexes."""

from collections import Counter
from collections.abc import Sequence
from itertools import chain, islice, zip_longest

import numpy as np

from clipcap_rag.caption_index import CaptionIndex
from clipcap_rag.config import RetrievalConfig
from clipcap_rag.errors import InputError
from clipcap_rag.neighbors import Neighbors
from clipcap_rag.photo_votes import PhotoVotes
from clipcap_rag.progress import say
from clipcap_rag.retrievable import Exclusion, Hit, Retrievable


class Retriever:
    """Finds neighbours in one or several indexes.

    They are ordered by weight x cosine, and two routes take turns. By route auto, where photos vote, 8 captions of
    theirs come first, or half of all, that agree most with all their votes.
    """

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
        self.allowed = Retrievable(indexes, weights, most, config)
        self.indexes, self._weights, self._most = self.allowed.indexes, self.allowed.weights, self.allowed.most
        self._routes = {"both": ("text", "image"), "auto": ("text",)}.get(config.route, (config.route,))
        self._trunk_missed = False
        self._photos_lead = config.route == "auto"
        self._photos = PhotoVotes(self.allowed) if photos_vote and config.route != "text" else None
        lacking = [index for index in indexes if index.files.images is None] if "image" in self._routes else []
        if lacking and (config.route == "image" or len(lacking) == len(indexes)):
            raise InputError(
                f"the index {lacking[0].path} holds no image embeddings for route {config.route}; give it some with "
                "index add-images, or take --route text"
            )

    @property
    def wants_trunk(self) -> bool:
        """Whether `search` has a use for features of the image tower's trunk."""
        return self._photos is not None and self._photos.trunk_dim is not None

    def search(
        self,
        queries: np.ndarray,
        k: int,
        exclusions: Sequence[Exclusion] | None = None,
        trunk: np.ndarray | None = None,
    ) -> Neighbors:
        """The k best distinct captions for each query.

        Args:
            queries: [B, D] float32 image embeddings of unit length.
            k: neighbours per image; fewer are returned, masked, where the indexes do not hold so many.
            exclusions: per query, what it must not retrieve.
            trunk: [B, T] features of the image tower's trunk, by which photos that look alike are told apart.

        Raises:
            InputError: the photos of the indexes have features of another width, or as `CaptionIndex.search`.
        """
        B, D = queries.shape
        exclusions = exclusions or [Exclusion(None, frozenset())] * B
        hits: list[list[list[Hit]]] = [[[] for _ in self._routes] for _ in range(B)]
        for place, route in enumerate(self._routes if k > 0 else ()):
            for number in range(len(self.indexes)):
                for query, found in enumerate(self._distinct(number, route, queries, k, exclusions)):
                    hits[query][place] += found
        told = None
        if k and self._photos:
            told = self._photos.votes(queries, k, exclusions, self._comparable(trunk))
        leading = [said.best[: k // 2] for said in told] if told and self._photos_lead else [[]] * B
        merged = [self._merge(first, routes, k) for first, routes in zip(leading, hits, strict=True)]
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
        votes = told and [said.votes for said in told]
        return Neighbors(rows, scores, sources, embeddings, captions, self.indexes, image_scores, votes)

    def _comparable(self, trunk: np.ndarray | None) -> np.ndarray | None:
        """The features of images that photos of the indexes have as well; says, once, what is missed without them."""
        width = self._photos.trunk_dim
        if trunk is not None and width not in (None, trunk.shape[1]):
            raise InputError(
                f"these images have {trunk.shape[1]} trunk features and the photos of the index {width}; extract both "
                "with one CLIP model"
            )
        if trunk is None and width is not None and not self._trunk_missed:
            self._trunk_missed = True
            say(
                "these embeddings come without the trunk features by which the index compares photos; embeddings are "
                "compared instead (give photos, or features of extract --trunk)"
            )
        return trunk if width is not None else None

    def _merge(self, first: list[Hit], routes: Sequence[list[Hit]], k: int) -> list[Hit]:
        """The first k distinct captions: some that lead, then routes that take turns, no index giving too many."""
        ordered = [sorted(hits, key=lambda hit: -self._weights[hit.number] * hit.score) for hits in routes]
        kept: dict[str, Hit] = {}
        given: Counter[int] = Counter()
        for hit in chain(first, chain.from_iterable(zip_longest(*ordered))):
            if len(kept) == k:
                break
            if hit is not None and hit.text not in kept and given[hit.number] < self._most[hit.number]:
                kept[hit.text] = hit
                given[hit.number] += 1
        return list(kept.values())

    def _distinct(
        self, number: int, route: str, queries: np.ndarray, k: int, exclusions: Sequence[Exclusion]
    ) -> list[list[Hit]]:
        """Per query the k best allowed hits with distinct strings, fetching more until there are k."""
        index, among = self.indexes[number], self.allowed.among(number)
        found: list[list[Hit]] = [[] for _ in queries]
        if route == "image" and index.files.images is None:
            return found
        look = index.search if route == "text" else index.search_images
        open_queries, fetch = np.arange(len(queries)), 2 * k + 8
        while len(open_queries):
            fetch = min(fetch, len(index))
            all_scores, all_rows = look(queries[open_queries], fetch, among=among)
            for query, scores, rows in zip(open_queries, all_scores, all_rows, strict=True):
                present = rows >= 0
                hits = self.allowed.hits(number, route, scores[present], rows[present], exclusions[query])
                found[query] = list(islice(hits, k))
            if fetch == len(index):
                break
            lacking = np.array([len(found[query]) < k for query in open_queries])
            open_queries = open_queries[lacking & (all_rows[:, -1] >= 0)]
            fetch *= 4
        return found
