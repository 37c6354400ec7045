"""Exact search over the stored rows of an index, on the CPU or a GPU; equal scores in order of their rows."""

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import numpy as np

from clipcap_rag.errors import InputError
from clipcap_rag.flat_search import BLOCK, fetch_size, flat_search, widened
from clipcap_rag.index_store import IndexFiles
from clipcap_rag.structure_reader import fits_gpu, gpu_resources

Hits = tuple[np.ndarray, np.ndarray]  # scores [B, k] float32 descending and rows [B, k] int64; -inf and -1 for none

_ROUNDING = 1e-5  # more than float32 sums of unit vectors differ by between kernels
_GPU_LARGEST_K = 2048  # limit of FAISS on a GPU
_QUERIES = 64  # queries whose candidates are gathered at a time


class ExactSearch:
    """The rows of one revision of an index, searched block by block or from a copy on a GPU."""

    def __init__(self, files: IndexFiles, gpu: int | None):
        self._files, self._gpu = files, gpu

    def search(self, queries: np.ndarray, k: int, allowed: np.ndarray) -> Hits:
        """The k of the allowed rows [N] bool, of which there are as many, with the largest cosines."""
        count = int(allowed.sum())
        fetch = min(fetch_size(k), count)
        approximate, candidates = self._nearest(queries, fetch, allowed)
        scores, rows = self.rank(queries, candidates, k)
        # a row as good as the last one kept may have been left out by rounding or by the order of equal scores
        doubtful = (approximate[:, -1] >= scores[:, -1] - _ROUNDING) & (fetch < count)
        if doubtful.any():
            bounds = scores[doubtful, -1] - _ROUNDING
            scores[doubtful], rows[doubtful] = self._scan(queries[doubtful], bounds, k, allowed)
        return scores, rows

    def rank(self, queries: np.ndarray, candidates: np.ndarray, k: int) -> Hits:
        """The k best of the candidates [B, F], by their scores in float64 rounded to float32, then by row.

        Raises:
            InputError: the vector of a candidate is not finite.
        """
        scores = np.empty(candidates.shape, np.float32)
        for start in range(0, len(queries), _QUERIES):
            part = slice(start, start + _QUERIES)
            embeddings = self._files.embeddings(candidates[part]).astype(np.float64)  # [B, F, D]
            scores[part] = np.einsum("bfd,bd->bf", embeddings, queries[part].astype(np.float64))
        scores[candidates < 0] = -np.inf
        faulty = candidates[(candidates >= 0) & ~np.isfinite(scores)]
        if len(faulty):
            raise InputError(f"row {faulty[0]} of {self._files.path} holds no finite vector; build the index again")
        order = np.lexsort((candidates, -scores))[:, :k]
        scores, rows = np.take_along_axis(scores, order, 1), np.take_along_axis(candidates, order, 1)
        missing = max(0, k - rows.shape[1])
        return (
            np.pad(scores, ((0, 0), (0, missing)), constant_values=-np.inf),
            np.pad(rows, ((0, 0), (0, missing)), constant_values=-1),
        )

    def _nearest(self, queries: np.ndarray, k: int, allowed: np.ndarray) -> Hits:
        """`search` but for rounding and for the order of equal scores."""
        everything = allowed is self._files.live  # which alone is kept on a GPU
        if everything and self._gpu is not None and k <= _GPU_LARGEST_K and self._on_gpu is not None:
            scores, places = self._on_gpu.search(queries, k)
            return scores, np.append(np.flatnonzero(allowed), -1)[places]  # -1 stays -1
        return flat_search(allowed_blocks(self._files, allowed), queries, k)

    def _scan(self, queries: np.ndarray, bounds: np.ndarray, k: int, allowed: np.ndarray) -> Hits:
        """`search` that looks at every row of at least a lower bound [B] of the k-th best score."""
        scores = np.full((len(queries), k), -np.inf, np.float32)
        rows = np.full((len(queries), k), -1, np.int64)
        for numbers, block in allowed_blocks(self._files, allowed):
            close = queries @ widened(block).T >= bounds[:, None]  # [B, n]
            for query in np.flatnonzero(close.any(axis=1)):
                candidates = np.concatenate([rows[query], numbers[close[query]]])[None]
                best = self.rank(queries[query : query + 1], candidates, k)
                scores[query], rows[query] = best[0][0], best[1][0]
                bounds[query] = max(bounds[query], scores[query, -1] - _ROUNDING)
        return scores, rows

    @cached_property
    def _on_gpu(self) -> Any:
        """All live rows on the GPU in float32, or None where they do not fit."""
        import faiss

        files = self._files
        if not fits_gpu(f"index {files.path.name}", 4 * int(files.live.sum()) * files.dim, self._gpu):
            return None
        settings = faiss.GpuIndexFlatConfig()
        settings.device = self._gpu
        flat = faiss.GpuIndexFlatIP(gpu_resources(), files.dim, settings)
        for _, block in allowed_blocks(files, files.live):
            flat.add(widened(block))
        return flat


def allowed_blocks(
    files: IndexFiles, allowed: np.ndarray, segments: Iterable[int] | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (rows [n] ascending, embeddings [n, D] float16) of the allowed rows [N] bool of all or some segments."""
    for number in range(len(files.segments)) if segments is None else segments:
        for start, block in files.segment_blocks(number, BLOCK):
            here = allowed[start : start + len(block)]
            if here.all():
                yield np.arange(start, start + len(block)), block
            elif here.any():
                yield start + np.flatnonzero(here), block[here]
