"""`CaptionIndex`: opens an index, searches it exactly or through FAISS, gives captions and embeddings of rows."""

import math
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from clipcap_rag.errors import InputError
from clipcap_rag.exact_search import ExactSearch, allowed_blocks
from clipcap_rag.flat_search import fetch_size, flat_search
from clipcap_rag.hub import artifact_name
from clipcap_rag.image_route import ImageRoute
from clipcap_rag.index_names import resolve_index
from clipcap_rag.index_store import SEARCH, IndexFiles, Segment, open_files
from clipcap_rag.shipped import mending
from clipcap_rag.structure_reader import StructureReader, gpu_number

_SMALL_SHARE = 1 / 8  # of the rows; where fewer may be found, looking at each is faster than at what a structure finds


class CaptionIndex:
    """A caption index that is open for reading: a snapshot of one revision, its files memory-mapped.

    Attributes:
        path, name: the directory and its name.
        revision: counts the changes of the index; rows are valid within one revision.
        encoder: the record of the encoder that the index was built with (`clip`, `dim`, `probes`).
        dim: width D of the embeddings.
        files: the stored columns, removed rows included.
    """

    def __init__(
        self, files: IndexFiles, device: str = "auto", nprobe: int | None = None, ef_search: int | None = None
    ):
        self.path, self.name = files.path, artifact_name(files.path)
        self._gpu = gpu_number(device)
        self._structures: dict[Segment, StructureReader] = {}
        self._take(files)
        self._effort = self._effort_of(nprobe, ef_search)

    def _take(self, files: IndexFiles) -> None:
        """Makes `files` what is searched; the structures of segments that it held before stay open."""
        known, self._structures = self._structures, {}
        for segment in files.segments:
            if segment.entry["search"] is not None:
                file = segment.folder / SEARCH
                opened = known.get(segment) or StructureReader(file, len(segment.vectors), files.dim, self._gpu)
                self._structures[segment] = opened
        self.files, self.dim = files, files.dim
        self.revision: int = files.manifest["revision"]
        self.encoder: dict[str, Any] = files.manifest["encoder"]
        self._live_rows = np.flatnonzero(files.live) if not files.live.all() else None
        self._exact = ExactSearch(files, self._gpu)
        self.__dict__.pop("_image_route", None)

    @classmethod
    def open(
        cls,
        name_or_path: str | Path,
        device: str = "auto",
        nprobe: int | None = None,
        ef_search: int | None = None,
    ) -> "CaptionIndex":
        """Opens an index by path or by name.

        Args:
            device: where it is searched: `auto` (a GPU where there is one and its memory suffices), `cpu`, `gpu` or
                `cuda:N`.
            nprobe, ef_search: clusters (IVF) or candidates (HNSW) that a query looks at, instead of the number that was
                tuned when the index was built.

        Raises:
            InputError: there is no such index, a file of it is missing or altered, there is no such GPU, or the index
                has no use for nprobe or ef_search.
        """
        path = resolve_index(name_or_path)
        with mending(path):
            return cls(open_files(path), device, nprobe, ef_search)

    def refresh(self) -> bool:
        """Takes over what was added to the index, or removed from it, since it was opened; says whether it changed.

        Until then an open index stays as it was. Only new files are read. Row numbers may change; do not call it while
        another thread searches.

        Raises:
            InputError: as `open`; the index then stays as it was.
        """
        with mending(self.path):
            files = open_files(self.path, self.files)
        changed = files.manifest != self.files.manifest
        if changed:
            self._take(files)
        return changed

    def __len__(self) -> int:
        """Rows that can be found, removed ones not counted."""
        return int(self.files.live.sum())

    def captions(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """The captions of `rows`, flattened; IndexError for a row out of range."""
        return self.files.captions(rows)

    def image_ids(self, rows: Sequence[int] | np.ndarray) -> list[str | None]:
        """The image ids of `rows`, flattened; None where a caption belongs to no image."""
        return self.files.image_ids(rows)

    def embeddings(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Embeddings [*rows.shape, D] float32 of unit length as stored in float16; zeros for the padding row -1."""
        return self.files.embeddings(rows)

    def random_rows(self, count: int, random: np.random.Generator) -> np.ndarray:
        """Rows [count] int64 drawn evenly from those that can be found."""
        drawn = random.integers(0, len(self), count)
        return drawn if self._live_rows is None else self._live_rows[drawn]

    def rows_of_images(self, image_ids: Collection[str]) -> np.ndarray:
        """Rows [n] int64, ascending, of the captions of some images."""
        rows = [
            start + place
            for start, values in self.files.column_batches("image_id")
            for place, image_id in enumerate(values)
            if image_id in image_ids
        ]
        rows = np.array(rows, np.int64)
        return rows[self.files.live[rows]]

    def search(
        self,
        queries: np.ndarray,
        k: int,
        nprobe: int | None = None,
        ef_search: int | None = None,
        among: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k rows of largest inner product with each query.

        Scores are computed from the stored float16 rows whatever finds the candidates. Without a search structure the
        result is exact, equal scores in order of their rows.

        Args:
            queries: [B, D] float32 of unit length.
            k: rows per query, 0 or more.
            nprobe, ef_search: for this search, as for `open`.
            among: [N] bool, the rows that may be found; None is all. Where these are few, or a search structure finds
                fewer than k of them, they are searched exactly.

        Returns:
            scores [B, k] float32 descending and rows [B, k] int64; -inf and -1 where there are fewer than k rows.

        Raises:
            InputError: the queries have another width or are not finite, a stored vector is not finite, or the index
                has no use for nprobe or ef_search.
        """
        queries = self._checked(queries, k)
        effort = self._effort | self._effort_of(nprobe, ef_search)
        allowed = self._may_be_found(among)
        found = min(k, int(allowed.sum()))
        scores, rows = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1, np.int64)
        if found and len(queries):
            scores[:, :found], rows[:, :found] = self._search(queries, found, effort, allowed)
        return scores, rows

    def search_images(
        self, queries: np.ndarray, k: int, among: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k rows whose photos have the largest cosine with each query, exact; rows without a photo are not found.

        Captions of one photo have its score and are ordered by their own cosine with the query. Arguments and results
        are those of `search`.

        Raises:
            InputError: as `search`, or the index holds no photos.
        """
        return self._image_route.search(self._checked(queries, k), k, self._may_be_found(among))

    def nearest_photos(
        self, queries: np.ndarray, k: int, among: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and places [B, min(k, P)] of the photos whose cosine with each query is largest, exact.

        Places are those in `files.images`. Arguments and errors are those of `search_images`.
        """
        return self._image_route.nearest(self._checked(queries, k), k, self._may_be_found(among))

    def rows_of_photos(self, photos: Sequence[int], among: np.ndarray | None = None) -> list[np.ndarray]:
        """For each photo, by its place, the rows [n] of its captions."""
        allowed = self._may_be_found(among)
        return [self._image_route.rows(photo, allowed) for photo in photos]

    def _may_be_found(self, among: np.ndarray | None) -> np.ndarray:
        return self.files.live if among is None else self.files.live & among

    @cached_property
    def _image_route(self) -> ImageRoute:
        if self.files.images is None:
            raise InputError(
                f"the index {self.path} holds no image embeddings; give it some with index add-images, "
                "or use --route text"
            )
        return ImageRoute(self.files)

    def _checked(self, queries: np.ndarray, k: int) -> np.ndarray:
        queries = np.ascontiguousarray(queries, np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise InputError(
                f"queries of shape {list(queries.shape)} do not fit index {self.name}, built with "
                f"{self.encoder['clip']} of width {self.dim}; encode them with the same CLIP"
            )
        if not np.isfinite(queries).all():
            raise InputError("queries hold infinite or undefined numbers; encode them again, in float32")
        if k < 0:
            raise InputError(f"k is {k}; it must be 0 or more")
        return queries

    def _effort_of(self, nprobe: int | None, ef_search: int | None) -> dict[str, int]:
        """What was given of the two, checked."""
        given = {name: value for name, value in (("nprobe", nprobe), ("ef_search", ef_search)) if value is not None}
        for name, value in given.items():
            if not 1 <= value < 2**31:
                raise InputError(f"{name} is {value}; it must be at least 1")
            if all(structure.effort != name for structure in self._structures.values()):
                raise InputError(f"index {self.name} is not searched with {name}; leave it out")
        return given

    def _search(
        self, queries: np.ndarray, k: int, effort: dict[str, int], allowed: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """`search` for k that the allowed rows [N] bool can satisfy."""
        share = int(allowed.sum()) / len(allowed)
        if not self._structures or share < _SMALL_SHARE:
            return self._exact.search(queries, k, allowed)
        candidates = self._candidates(queries, k, share, effort, allowed)
        scores, rows = self._exact.rank(queries, candidates, k)
        short = rows[:, -1] < 0  # too few lists were probed, or too few of their rows are allowed
        if short.any():
            scores[short], rows[short] = self._exact.search(queries[short], k, allowed)
        return scores, rows

    def _candidates(
        self, queries: np.ndarray, k: int, share: float, effort: dict[str, int], allowed: np.ndarray
    ) -> np.ndarray:
        """Candidate rows of every segment, from its structure or exactly; -1 for rows not allowed and for none.

        Args:
            share: of the rows that are allowed.
        """
        parts = []
        for number, segment in enumerate(self.files.segments):
            structure = self._structures.get(segment)
            if structure is None:
                parts.append(flat_search(allowed_blocks(self.files, allowed, [number]), queries, fetch_size(k))[1])
            else:
                fetch = min(math.ceil(fetch_size(k, structure.breadth) / share), len(segment.vectors))
                rows = structure.search(queries, fetch, effort)
                parts.append(np.where(rows >= 0, rows + self.files.starts[number], -1))
        rows = np.concatenate(parts, axis=1)
        return np.where((rows >= 0) & allowed[rows], rows, -1)
