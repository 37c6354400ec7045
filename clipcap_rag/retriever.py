"""Neighbour captions for image embeddings: over-fetch, exclude, drop duplicate strings, merge several indexes."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path

import numpy as np

from clipcap_rag.artifact import read_json, save_array, write_json
from clipcap_rag.caption_index import CaptionIndex
from clipcap_rag.errors import InputError
from clipcap_rag.features import FeatureSet
from clipcap_rag.progress import bar, say
from clipcap_rag.sources import normalize_caption


@dataclass(frozen=True)
class Neighbor:
    """A retrieved caption: its row, its cosine with the image, and the name of the index it stands in."""

    row: int
    caption: str
    score: float
    index: str


@dataclass(frozen=True)
class Neighbors:
    """Up to K neighbours for each of B images, best first; rows of -1 are absent.

    Attributes:
        rows: [B, K] int64, positions in the index that `sources` names.
        scores: [B, K] float32 cosines.
        sources: [B, K] int64, position in `indexes`.
        embeddings: [B, K, D] float32 unit length, zero where absent.
        captions: per image, the captions of the neighbours that are present.
        indexes: those that were searched.
    """

    rows: np.ndarray
    scores: np.ndarray
    sources: np.ndarray
    embeddings: np.ndarray
    captions: list[list[str]]
    indexes: list[CaptionIndex]

    @property
    def mask(self) -> np.ndarray:
        """[B, K] bool, True where a neighbour is present."""
        return self.rows >= 0

    def part(self, images: slice) -> "Neighbors":
        """The neighbours of some of the images."""
        arrays = (self.rows[images], self.scores[images], self.sources[images], self.embeddings[images])
        return Neighbors(*arrays, self.captions[images], self.indexes)

    def versions(self, kept: np.ndarray) -> "Neighbors":
        """Those of one image in S versions, each with the ones that `kept` [S, K] says."""
        names = [field.name for field in dataclasses.fields(self) if isinstance(getattr(self, field.name), np.ndarray)]
        arrays = {name: np.repeat(getattr(self, name), len(kept), axis=0) for name in names}
        arrays["rows"] = np.where(kept, arrays["rows"], -1)
        captions = [list(compress(self.captions[0], version)) for version in kept]
        return dataclasses.replace(self, **arrays, captions=captions)

    def listed(self) -> list[list[Neighbor]]:
        """The neighbours of each image one by one, best first, for people and for JSON."""
        return [
            [
                Neighbor(int(row), caption, float(score), self.indexes[source].name)
                for row, caption, score, source in zip(rows, captions, scores, sources, strict=False)
            ]
            for rows, captions, scores, sources in zip(self.rows, self.captions, self.scores, self.sources, strict=True)
        ]


@dataclass(frozen=True)
class Exclusion:
    """What an image must not retrieve: rows with its image_id, and captions equal to `texts` once normalised."""

    image_id: str | None
    texts: frozenset[str]

    @classmethod
    def of(cls, image_id: str | None, captions: Sequence[str]) -> "Exclusion":
        return cls(image_id, frozenset(normalize_caption(caption) for caption in captions))


class Retriever:
    """Finds neighbours in one or several indexes; hits are ordered by weight x cosine."""

    def __init__(self, indexes: Sequence[CaptionIndex], weights: Sequence[float] | None = None):
        """Raises InputError if the indexes were built with encoders of different width."""
        if len({index.dim for index in indexes}) > 1:
            widths = ", ".join(f"{index.name} ({index.encoder['clip']}: {index.dim})" for index in indexes)
            raise InputError(f"these indexes were built with different CLIP models: {widths}; build them with one")
        self.indexes, self.weights = list(indexes), list(weights or [1.0] * len(indexes))

    def search(self, queries: np.ndarray, k: int, exclusions: Sequence[Exclusion] | None = None) -> Neighbors:
        """The k best distinct captions for each query.

        Args:
            queries: [B, D] float32 image embeddings of unit length.
            k: neighbours per image; fewer are returned, masked, where the indexes do not hold so many.
            exclusions: per query, what it must not retrieve.
        """
        B, D = queries.shape
        exclusions = exclusions or [Exclusion(None, frozenset())] * B
        hits: list[list[tuple[float, int, int, str]]] = [[] for _ in range(B)]  # cosine, index number, row, caption
        if k > 0:
            for number, index in enumerate(self.indexes):
                for query, found in enumerate(_distinct(index, queries, k, exclusions)):
                    hits[query] += [(score, number, row, caption) for score, row, caption in found]
        merged = [self._merge(found, k) for found in hits]
        rows, sources = np.full((B, k), -1, np.int64), np.zeros((B, k), np.int64)
        scores, embeddings = np.zeros((B, k), np.float32), np.zeros((B, k, D), np.float32)
        for query, found in enumerate(merged):
            for place, (score, number, row, _) in enumerate(found):
                rows[query, place], scores[query, place], sources[query, place] = row, score, number
        for number, index in enumerate(self.indexes):
            here = (rows >= 0) & (sources == number)
            if here.any():
                embeddings[here] = index.embeddings(rows[here])
        captions = [[hit[3] for hit in found] for found in merged]
        return Neighbors(rows, scores, sources, embeddings, captions, self.indexes)

    def _merge(self, hits: list[tuple[float, int, int, str]], k: int) -> list[tuple[float, int, int, str]]:
        best: dict[str, tuple[float, int, int, str]] = {}
        for hit in sorted(hits, key=lambda hit: (-self.weights[hit[1]] * hit[0], hit[1], hit[2])):
            best.setdefault(normalize_caption(hit[3]), hit)
        return list(best.values())[:k]


def _distinct(
    index: CaptionIndex, queries: np.ndarray, k: int, exclusions: Sequence[Exclusion]
) -> list[list[tuple[float, int, str]]]:
    """Per query the k best allowed (cosine, row, caption) with distinct strings, fetching more until there are k."""
    found: list[list[tuple[float, int, str]]] = [[] for _ in queries]
    open_queries, fetch = np.arange(len(queries)), 2 * k + 8
    while len(open_queries):
        fetch = min(fetch, len(index))
        scores, rows = index.search(queries[open_queries], fetch)
        for position, query in enumerate(open_queries):
            present = rows[position] >= 0
            found[query] = _allowed(index, scores[position][present], rows[position][present], exclusions[query], k)
        if fetch == len(index):
            break
        open_queries = np.array([query for query in open_queries if len(found[query]) < k], np.int64)
        fetch *= 4
    return found


def _allowed(
    index: CaptionIndex, scores: np.ndarray, rows: np.ndarray, exclusion: Exclusion, k: int
) -> list[tuple[float, int, str]]:
    kept: dict[str, tuple[float, int, str]] = {}
    captions, image_ids = index.captions(rows), index.image_ids(rows)
    for score, row, caption, image_id in zip(scores, rows, captions, image_ids, strict=True):
        text = normalize_caption(caption)
        own = exclusion.image_id is not None and image_id == exclusion.image_id
        if not own and text not in exclusion.texts and text not in kept:
            kept[text] = (float(score), int(row), caption)
            if len(kept) == k:
                break
    return list(kept.values())


def stored_neighbors(features: FeatureSet, index: CaptionIndex, k: int) -> np.ndarray:
    """Rows [N, k] int64 of each photo's nearest captions, its own excluded; -1 where there are fewer.

    They are computed once and kept beside the features, stamped with the index's revision.
    """
    file = features.path / f"neighbors-{index.name}.npy"
    stamp = file.with_suffix(".json")
    made_from = {"index": str(index.path.resolve()), "revision": index.revision, "rows": len(index), "neighbors": k}
    if stamp.is_file() and file.is_file() and read_json(stamp, "neighbour stamp") == made_from:
        return np.load(file, mmap_mode="r")
    retriever, parts = Retriever([index]), []
    exclusions = [Exclusion.of(*photo) for photo in zip(features.image_ids, features.captions, strict=True)]
    with bar(f"neighbours in {index.name}", total=len(features), unit="photo") as progress:
        for start in range(0, len(features), 256):
            part = slice(start, start + 256)
            parts.append(retriever.search(features.unit_embeddings(part), k, exclusions[part]).rows)
            progress.update(len(parts[-1]))
    rows = np.concatenate(parts)
    try:
        stamp.unlink(missing_ok=True)
        save_array(file, rows)
        write_json(stamp, made_from)
    except OSError as error:
        say(f"neighbours of {features.path} are not kept for the next run ({error.strerror})")
    return rows


def index_choice(argument: str) -> tuple[str, float]:
    """`NAME` or `NAME:WEIGHT` -> name or path, weight; the last colon counts only where a number follows it."""
    name, colon, weight = argument.rpartition(":")
    if colon and not Path(argument).exists():
        try:
            return name, float(weight)
        except ValueError:
            pass
    return argument, 1.0
