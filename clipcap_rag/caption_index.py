"""`CaptionIndex`: opens an index, searches it exactly or through FAISS, gives captions and embeddings of rows."""

from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipcap_rag.errors import InputError
from clipcap_rag.flat_search import BLOCK, faiss_reason, fetch_size, flat_search, widened
from clipcap_rag.hardware import pick_device
from clipcap_rag.hub import artifact_name
from clipcap_rag.index_names import resolve_index
from clipcap_rag.index_store import SEARCH, IndexFiles, open_files
from clipcap_rag.progress import say
from clipcap_rag.shipped import mending

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

    def __init__(self, files: IndexFiles, device: str = "auto"):
        self.files = files
        self.path, self.name = files.path, artifact_name(files.path)
        self.revision: int = files.manifest["revision"]
        self.encoder: dict[str, Any] = files.manifest["encoder"]
        self.dim = files.dim
        self._gpu = _gpu_number(device)
        self._structures = [self._open_structure(number, device) for number in range(len(files.manifest["segments"]))]
        self._live_rows = np.flatnonzero(files.live) if not files.live.all() else None

    @classmethod
    def open(cls, name_or_path: str | Path, device: str = "auto") -> "CaptionIndex":
        """Opens an index by path or by name.

        Args:
            device: where it is searched: `auto` (a GPU where there is one), `cpu`, `gpu` or `cuda:N`.

        Raises:
            InputError: there is no such index, a file of it is missing or altered, or there is no such GPU.
        """
        path = resolve_index(name_or_path)
        with mending(path):
            return cls(open_files(path), device)

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

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k rows of largest inner product with each query.

        Scores are computed from the stored float16 rows whatever finds the candidates. Without a search structure the
        result is exact, equal scores in order of their rows.

        Args:
            queries: [B, D] float32 of unit length.
            k: rows per query, 0 or more.

        Returns:
            scores [B, k] float32 descending and rows [B, k] int64; -inf and -1 where the index has fewer than k rows.

        Raises:
            InputError: the queries have another width or are not finite.
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
        found = min(k, len(self))
        scores, rows = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1, np.int64)
        if found and len(queries):
            scores[:, :found], rows[:, :found] = self._search(queries, found)
        return scores, rows

    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """`search` for k that the index can satisfy."""
        if all(structure is None for structure in self._structures):
            return self._search_exactly(queries, k)
        scores, rows = self._rank(queries, self._structured(queries, fetch_size(k)), k)
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

    def _structured(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Candidate rows of every segment, from its structure or exactly; -1 for removed rows and for none."""
        parts = []
        for number, structure in enumerate(self._structures):
            start, stop = self.files.starts[number : number + 2]
            if structure is None:
                blocks = (block for block in self._live_blocks() if start <= block[0][0] < stop)
                parts.append(flat_search(blocks, queries, k)[1])
            else:
                rows = structure.search(queries, int(min(k, stop - start)))[1]
                parts.append(np.where(rows >= 0, rows + start, -1))
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

    def _live_blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (rows [n] ascending, their embeddings [n, D] float16), without removed rows."""
        for start, block in self.files.blocks(BLOCK):
            live = self.files.live[start : start + len(block)]
            if live.all():
                yield np.arange(start, start + len(block)), block
            elif live.any():
                yield start + np.flatnonzero(live), block[live]

    def _open_structure(self, number: int, device: str) -> Any:
        """The FAISS index of a segment, memory-mapped or on the GPU; None where the segment is searched exactly."""
        if self.files.manifest["segments"][number]["search"] is None:
            return None
        import faiss

        file = self.files.segment_folder(number) / SEARCH
        try:
            if self._gpu is not None:  # what is memory-mapped cannot be copied to a GPU
                moved = faiss.index_cpu_to_gpu(self._gpu_resources, self._gpu, faiss.read_index(str(file)))
                if isinstance(faiss.downcast_index(moved), faiss.GpuIndex):
                    return moved
                if device != "auto":
                    raise InputError(f"FAISS cannot search {file} on a GPU; use --index-device cpu")
            structure = faiss.read_index(str(file), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
        except RuntimeError as error:
            raise InputError(f"FAISS cannot open {file} ({faiss_reason(error)}); make the index again") from error
        rows = self.files.manifest["segments"][number]["rows"]
        if structure.d != self.dim or structure.ntotal != rows:
            raise InputError(
                f"{file} holds {structure.ntotal} vectors of width {structure.d} where index.json says {rows} of width "
                f"{self.dim}; make the index again"
            )
        return structure

    @cached_property
    def _gpu_resources(self) -> Any:
        import faiss

        return faiss.StandardGpuResources()

    @cached_property
    def _flat_on_gpu(self) -> Any:
        """All live rows on the GPU in float32, or None where they do not fit."""
        import faiss

        needed, free = 4 * len(self) * self.dim, torch.cuda.mem_get_info(self._gpu)[0]
        if needed > 0.8 * free:
            say(f"index {self.name} needs {needed / 2**30:.1f} GB of GPU, {free / 2**30:.1f} are free: using the CPU")
            return None
        settings = faiss.GpuIndexFlatConfig()
        settings.device = self._gpu
        flat = faiss.GpuIndexFlatIP(self._gpu_resources, self.dim, settings)
        for _, block in self._live_blocks():
            flat.add(widened(block))
        return flat


def _gpu_number(device: str) -> int | None:
    """The GPU that FAISS may use for `auto`, `cpu`, `gpu`, `cuda` or `cuda:N`; None is the CPU."""
    picked = pick_device("cuda" if device == "gpu" else device)
    if picked.type == "cpu":
        return None
    import faiss

    number = picked.index or 0
    if number < getattr(faiss, "get_num_gpus", int)():
        return number
    if device == "auto":
        return None
    raise InputError("the installed FAISS has no GPU support; install faiss-gpu, or use --index-device cpu")
