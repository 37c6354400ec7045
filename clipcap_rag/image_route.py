"""Search by photo: the captions of those photos of an index that look most like the one asked for."""

import numpy as np

from clipcap_rag.exact_search import Hits
from clipcap_rag.flat_search import BLOCK, flat_search
from clipcap_rag.index_store import IndexFiles


class ImageRoute:
    """The photos of an index and the captions of each; exact, and a photo is compared once for all its captions."""

    def __init__(self, files: IndexFiles):
        self._files, self._vectors = files, files.images.vectors
        ids = [files.images.places(column) for _, column in files.columns("image_id")]
        self._photos = np.concatenate([np.zeros(0, np.int64), *ids])  # [N] photo of each row, -1 for none
        self._order = np.argsort(self._photos, kind="stable")
        self._starts = np.searchsorted(self._photos, np.arange(len(self._vectors) + 1), sorter=self._order)

    def nearest(self, queries: np.ndarray, k: int, among: np.ndarray) -> Hits:
        """Cosines and places [B, min(k, P)] of the photos with the largest cosine with each query.

        Args:
            queries: [B, D] float32 of unit length.
            among: [N] bool, the rows that may be found; a photo without any of them is not.
        """
        seen = np.zeros(len(self._vectors) + 1, bool)  # the last place takes the -1 of no photo
        seen[self._photos[among]] = True
        photos = np.flatnonzero(seen[:-1])
        blocks = (photos[start : start + BLOCK] for start in range(0, len(photos), BLOCK))
        return flat_search(((part, self._vectors[part]) for part in blocks), queries, min(k, len(photos)))

    def rows(self, photo: int, among: np.ndarray) -> np.ndarray:
        """The rows [n] of a photo's captions."""
        own = self._order[self._starts[photo] : self._starts[photo + 1]]
        return own[among[own]]

    def search(self, queries: np.ndarray, k: int, among: np.ndarray) -> Hits:
        """The k rows whose photo has the largest cosine with each query, as `CaptionIndex.search` returns them.

        Captions of one photo are ordered by their own cosine with the query, then by row. Arguments are those of
        `nearest`.
        """
        cosines, nearest = self.nearest(queries, k, among)
        scores, rows = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1, np.int64)
        for query, found in enumerate(nearest):
            best = self._captions(queries[query], cosines[query][found >= 0], found[found >= 0], k, among)
            scores[query, : len(best[0])], rows[query, : len(best[1])] = best
        return scores, rows

    def _captions(self, query: np.ndarray, cosines: np.ndarray, photos: np.ndarray, k: int, among: np.ndarray) -> Hits:
        """The first k captions of some photos, these in order."""
        parts, wanted = [], k
        for photo in photos:
            if wanted <= 0:
                break
            parts.append(self.rows(photo, among))
            wanted -= len(parts[-1])
        rows = np.concatenate([np.zeros(0, np.int64), *parts])
        scores = np.repeat(cosines[: len(parts)], [len(part) for part in parts])
        order = np.lexsort((rows, -(self._files.embeddings(rows) @ query), -scores))[:k]
        return scores[order], rows[order]
