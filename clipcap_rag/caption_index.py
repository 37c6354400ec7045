"""`CaptionIndex`: opens an index, searches it exactly or through FAISS, gives captions and embeddings of rows."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from clipcap_rag.errors import InputError
from clipcap_rag.flat_search import BLOCK, fetch_size, flat_search, widened
from clipcap_rag.hub import artifact_name
from clipcap_rag.index_names import resolve_index
from clipcap_rag.index_store import SEARCH, IndexFiles, Segment, open_files
from clipcap_rag.shipped import mending
from clipcap_rag.structure_reader import StructureReader, fits_gpu, gpu_number, gpu_resources

_ROUNDING = 1e-5  # more than float32 sums of unit vectors differ by between kernels
_GPU_LARGEST_K = 2048  # limit of FAISS on a GPU
_QUERIES = 64  # queries whose candidates are gathered at a time


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
        self.__dict__.pop("_flat_on_gpu", None)

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
        self, queries: np.ndarray, k: int, nprobe: int | None = None, ef_search: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k rows of largest inner product with each query.

        Scores are computed from the stored float16 rows whatever finds the candidates. Without a search structure the
        result is exact, equal scores in order of their rows.

        Args:
            queries: [B, D] float32 of unit length.
            k: rows per query, 0 or more.
            nprobe, ef_search: for this search, as for `open`.

        Returns:
            scores [B, k] float32 descending and rows [B, k] int64; -inf and -1 where the index has fewer than k rows.

        Raises:
            InputError: the queries have another width or are not finite, a stored vector is not finite, or the index
                has no use for nprobe or ef_search.
        """
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
        effort = self._effort | self._effort_of(nprobe, ef_search)
        found = min(k, len(self))
        scores, rows = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1, np.int64)
        if found and len(queries):
            scores[:, :found], rows[:, :found] = self._search(queries, found, effort)
        return scores, rows

    def _effort_of(self, nprobe: int | None, ef_search: int | None) -> dict[str, int]:
        """What was given of the two, checked."""
        given = {name: value for name, value in (("nprobe", nprobe), ("ef_search", ef_search)) if value is not None}
        for name, value in given.items():
            if not 1 <= value < 2**31:
                raise InputError(f"{name} is {value}; it must be at least 1")
            if all(structure.effort != name for structure in self._structures.values()):
                raise InputError(f"index {self.name} is not searched with {name}; leave it out")
        return given

    def _search(self, queries: np.ndarray, k: int, effort: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
        """`search` for k that the index can satisfy."""
        if not self._structures:
            return self._search_exactly(queries, k)
        scores, rows = self._rank(queries, self._structured(queries, fetch_size(k), effort), k)
        short = rows[:, -1] < 0  # too few lists were probed, or too many of their rows are removed
        if short.any():
            scores[short], rows[short] = self._search_exactly(queries[short], k)
        return scores, rows

    def _search_exactly(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        fetch = min(fetch_size(k), len(self))
        approximate, candidates = self._flat(queries, fetch)
        scores, rows = self._rank(queries, candidates, k)
        # a row as good as the last one kept may have been left out by rounding or by the order of equal scores
        doubtful = (approximate[:, -1] >= scores[:, -1] - _ROUNDING) & (fetch < len(self))
        if doubtful.any():
            scores[doubtful], rows[doubtful] = self._scan(queries[doubtful], scores[doubtful, -1] - _ROUNDING, k)
        return scores, rows

    def _flat(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        if self._gpu is not None and k <= _GPU_LARGEST_K and self._flat_on_gpu is not None:
            scores, rows = self._flat_on_gpu.search(queries, k)
            return scores, rows if self._live_rows is None else self._live_rows[rows]
        return flat_search(self._live_blocks(), queries, k)

    def _structured(self, queries: np.ndarray, k: int, effort: dict[str, int]) -> np.ndarray:
        """Candidate rows of every segment, from its structure or exactly; -1 for removed rows and for none."""
        parts = []
        for number, segment in enumerate(self.files.segments):
            structure = self._structures.get(segment)
            if structure is None:
                parts.append(flat_search(self._live_blocks([number]), queries, k)[1])
            else:
                rows = structure.search(queries, min(k, len(segment.vectors)), effort)
                parts.append(np.where(rows >= 0, rows + self.files.starts[number], -1))
        rows = np.concatenate(parts, axis=1)
        return np.where((rows >= 0) & self.files.live[rows], rows, -1)

    def _rank(self, queries: np.ndarray, candidates: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best of the candidates [B, F], by their scores in float64 rounded to float32, then by row."""
        scores = np.empty(candidates.shape, np.float32)
        for start in range(0, len(queries), _QUERIES):
            part = slice(start, start + _QUERIES)
            embeddings = self.embeddings(candidates[part]).astype(np.float64)  # [B, F, D]
            scores[part] = np.einsum("bfd,bd->bf", embeddings, queries[part].astype(np.float64))
        scores[candidates < 0] = -np.inf
        faulty = candidates[(candidates >= 0) & ~np.isfinite(scores)]
        if len(faulty):
            raise InputError(f"row {faulty[0]} of {self.path} holds no finite vector; build the index again")
        order = np.lexsort((candidates, -scores))[:, :k]
        scores, rows = np.take_along_axis(scores, order, 1), np.take_along_axis(candidates, order, 1)
        missing = max(0, k - rows.shape[1])
        return (
            np.pad(scores, ((0, 0), (0, missing)), constant_values=-np.inf),
            np.pad(rows, ((0, 0), (0, missing)), constant_values=-1),
        )

    def _scan(self, queries: np.ndarray, bounds: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Exact search that looks at every row of at least a lower bound [B] of the k-th best score."""
        scores = np.full((len(queries), k), -np.inf, np.float32)
        rows = np.full((len(queries), k), -1, np.int64)
        for numbers, block in self._live_blocks():
            close = queries @ widened(block).T >= bounds[:, None]  # [B, n]
            for query in np.flatnonzero(close.any(axis=1)):
                candidates = np.concatenate([rows[query], numbers[close[query]]])[None]
                best = self._rank(queries[query : query + 1], candidates, k)
                scores[query], rows[query] = best[0][0], best[1][0]
                bounds[query] = max(bounds[query], scores[query, -1] - _ROUNDING)
        return scores, rows

    def _live_blocks(self, segments: Iterable[int] | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (rows [n] ascending, embeddings [n, D] float16) of all or some segments, removed rows left out."""
        for number in range(len(self.files.segments)) if segments is None else segments:
            for start, block in self.files.segment_blocks(number, BLOCK):
                live = self.files.live[start : start + len(block)]
                if live.all():
                    yield np.arange(start, start + len(block)), block
                elif live.any():
                    yield start + np.flatnonzero(live), block[live]

    @cached_property
    def _flat_on_gpu(self) -> Any:
        """All live rows on the GPU in float32, or None where they do not fit."""
        import faiss

        if not fits_gpu(f"index {self.name}", 4 * len(self) * self.dim, self._gpu):
            return None
        settings = faiss.GpuIndexFlatConfig()
        settings.device = self._gpu
        flat = faiss.GpuIndexFlatIP(gpu_resources(), self.dim, settings)
        for _, block in self._live_blocks():
            flat.add(widened(block))
        return flat
