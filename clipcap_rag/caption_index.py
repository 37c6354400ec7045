"""`CaptionIndex`: opens an index, searches it exactly or through FAISS, gives captions and embeddings of rows."""

import contextlib
import io
import logging
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipcap_rag.config import IndexConfig
from clipcap_rag.errors import InputError
from clipcap_rag.hardware import free_memory, pick_device
from clipcap_rag.index_store import EMBEDDINGS, SEARCH, IndexFiles, open_files, resolve_index
from clipcap_rag.progress import say
from clipcap_rag.sources import normalize_caption

EXACT_LIMIT = 1_000_000  # rows up to which `auto` searches exactly
_RECALL = 0.95  # recall@10 that nprobe or efSearch is raised for
_BLOCK = 8192  # rows that are widened to float32 at a time: few enough to stay in the cache of the processor
_SLACK = 16  # candidates beyond k, so that rounding and equal scores rarely need a second look
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
        self.path, self.name = files.path, files.path.resolve().name
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
        return cls(open_files(resolve_index(name_or_path)), device)

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

    def rows_of_image(self, image_id: str) -> np.ndarray:
        """Rows [n] int64, ascending, of the captions of one image."""
        return self._rows_equal(self._image_hashes, image_id, self.image_ids)

    def rows_of_text(self, normalized: str) -> np.ndarray:
        """Rows [n] int64, ascending, whose caption becomes `normalized` by `sources.normalize_caption`."""
        return self._rows_equal(
            self._text_hashes, normalized, lambda rows: [normalize_caption(text) for text in self.captions(rows)]
        )

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
        scores, rows = self._rank(queries, self._structured(queries, _fetch(k)), k)
        short = rows[:, -1] < 0  # too few lists were probed, or too many of their rows are removed
        if short.any():
            scores[short], rows[short] = self._search_exactly(queries[short], k)
        return scores, rows

    def _search_exactly(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        fetch = min(_fetch(k), len(self))
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
            close = queries @ _widened(block).T >= bounds[:, None]  # [B, n]
            for query in np.flatnonzero(close.any(axis=1)):
                candidates = np.concatenate([rows[query], numbers[close[query]]])[None]
                best = self._rank(queries[query : query + 1], candidates, k)
                scores[query], rows[query] = best[0][0], best[1][0]
                bounds[query] = max(bounds[query], scores[query, -1] - _ROUNDING)
        return scores, rows

    def _live_blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (rows [n] ascending, their embeddings [n, D] float16), without removed rows."""
        for start, block in self.files.blocks(_BLOCK):
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
            raise InputError(f"FAISS cannot open {file} ({_reason(error)}); make the index again") from error
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
            flat.add(_widened(block))
        return flat

    @cached_property
    def _image_hashes(self) -> tuple[np.ndarray, np.ndarray]:
        return self._hashes("image_id", lambda image_id: image_id)

    @cached_property
    def _text_hashes(self) -> tuple[np.ndarray, np.ndarray]:
        return self._hashes("caption", normalize_caption)

    def _hashes(self, column: str, key: Callable[[Any], Any]) -> tuple[np.ndarray, np.ndarray]:
        """Sorted hashes of a column and their rows: 16 bytes a row where a dict of strings takes ten times that."""
        hashes = np.empty(self.files.rows, np.int64)
        for start, values in self.files.column_batches(column):
            hashes[start : start + len(values)] = [hash(key(value)) for value in values]
        rows = np.flatnonzero(self.files.live)
        order = np.argsort(hashes[rows], kind="stable")
        return hashes[rows][order], rows[order]

    def _rows_equal(
        self, table: tuple[np.ndarray, np.ndarray], key: str, keys_of: Callable[[np.ndarray], list[Any]]
    ) -> np.ndarray:
        hashes, rows = table
        first, last = np.searchsorted(hashes, hash(key), "left"), np.searchsorted(hashes, hash(key), "right")
        found = rows[first:last]
        return found[np.array([value == key for value in keys_of(found)], bool)]


def flat_search(
    blocks: Iterator[tuple[np.ndarray, np.ndarray]], queries: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Best k of all blocks (rows [n], embeddings [n, D] float16) by inner product, block by block.

    Returns:
        scores [B, k] float32 descending and rows [B, k] int64; -inf and -1 where there are fewer rows.
    """
    import faiss

    best_scores = np.full((len(queries), k), -np.inf, np.float32)
    best_rows = np.full((len(queries), k), -1, np.int64)
    for rows, block in blocks:
        scores, places = faiss.knn(queries, _widened(block), min(k, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
        scores = np.concatenate([best_scores, scores], axis=1)
        candidates = np.concatenate([best_rows, rows[places]], axis=1)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        best_scores, best_rows = np.take_along_axis(scores, order, 1), np.take_along_axis(candidates, order, 1)
    return best_scores, best_rows


def _widened(block: np.ndarray) -> np.ndarray:
    """A float16 block as float32; torch does this nine times as fast as numpy."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # it is only read
        return torch.from_numpy(np.asarray(block)).float().numpy()


def _fetch(k: int) -> int:
    return k + k // 8 + _SLACK


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


def plan_search(config: IndexConfig, rows: int, dim: int) -> str | None:
    """The FAISS factory key that an index of `rows` x `dim` is searched with, or None for exact search.

    Raises:
        InputError: FAISS does not know the key, it asks for more clusters than rows, or for more memory than allowed.
    """
    key = config.index_key
    if key == "auto":
        key = "Flat" if rows <= EXACT_LIMIT else f"IVF{round(4 * rows**0.5)},Flat"
    if key == "Flat":
        return None
    import faiss

    try:
        empty = faiss.index_factory(dim, key, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise InputError(
            f"index_key {key!r} does not suit vectors of width {dim} ({_reason(error)}); "
            "use auto, Flat, or a FAISS factory key such as IVF4096,Flat or HNSW32"
        ) from error
    inverted = faiss.try_extract_index_ivf(empty)
    if inverted and not 1 <= inverted.nlist <= rows:
        raise InputError(f"index_key {key} asks for {inverted.nlist} clusters of {rows} captions; use fewer, or auto")
    budget = _memory_budget(config)
    training = min(rows, 256 * inverted.nlist) * dim * 4 if inverted else 0
    needed = max(training, rows * (_bytes_per_row(empty, key) + 8))
    if needed > budget:
        raise InputError(
            f"index_key {key} needs about {needed / 2**30:.2g} GB to build and {budget / 2**30:.2g} GB may be used; "
            "raise --index-memory, or use --index-key Flat or IVF4096,SQfp16"
        )
    return key


def build_search_structure(embeddings: Path, config: IndexConfig, out: Path) -> dict[str, Any] | None:
    """Builds search.faiss over an embeddings.npy [N, D] where the number of rows or `config` asks for one.

    nprobe or efSearch is doubled until recall@10 against exact search reaches 0.95. autofaiss builds the keys it
    knows, `faiss.index_factory` the others.

    Args:
        embeddings: the .npy file.
        config: key, memory and latency.
        out: the file to write.

    Returns:
        What index.json says: key, parameters, recall_at_10, queries (the kind it was measured with), latency_ms.
        None where search is exact and nothing was written.

    Raises:
        InputError: as `plan_search`.
    """
    vectors = np.load(embeddings, mmap_mode="r", allow_pickle=False)
    key = plan_search(config, *vectors.shape)
    if key is None:
        return None
    import faiss

    say(f"building {key} over {len(vectors)} captions")
    try:
        structure = _with_autofaiss(embeddings, key, config)
        if structure is None:
            structure = _with_factory(vectors, key)
        report = {"key": key, "queries": "text", **_tune(structure, vectors)}
    except RuntimeError as error:
        raise InputError(f"FAISS could not build {key} ({_reason(error)}); use another --index-key") from error
    if report["recall_at_10"] < _RECALL:
        say(f"{key} finds {report['recall_at_10']:.0%} of the ten nearest captions; --index-key Flat finds all")
    if report["latency_ms"] > config.index_latency:
        say(f"a query of {key} takes {report['latency_ms']:.1f} ms, more than --index-latency {config.index_latency:g}")
    with open(out, "wb") as file:
        faiss.write_index(structure, faiss.PyCallbackIOWriter(file.write))
    return report


def _with_autofaiss(embeddings: Path, key: str, config: IndexConfig) -> Any:
    """The index that autofaiss builds for `key`, or None for a key it cannot build."""
    if not re.fullmatch(r"HNSW\d+|IVF\d+,Flat", key):  # autofaiss 2.18 calls OPQ in a way that current FAISS refuses
        return None
    import autofaiss
    import faiss

    budget, parameter = _memory_budget(config), "efSearch=64" if key.startswith("HNSW") else "nprobe=1"
    root = logging.getLogger()
    before, threads = (root.level, list(root.handlers)), faiss.omp_get_max_threads()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        (Path(folder) / EMBEDDINGS).symlink_to(embeddings.absolute())  # it reads whole folders
        try:
            index, _ = autofaiss.build_index(
                folder,
                save_on_disk=False,
                index_key=key,
                index_param=parameter,  # its own search for one is replaced by _tune
                max_index_query_time_ms=config.index_latency,
                max_index_memory_usage=f"{int(0.85 * budget)}B",
                current_memory_available=f"{int(budget)}B",
                metric_type="ip",
                nb_cores=threads,
                verbose=logging.CRITICAL,
            )
        finally:
            root.level, root.handlers[:] = before
    return index


def _with_factory(vectors: np.ndarray, key: str) -> Any:
    import faiss

    structure = faiss.index_factory(vectors.shape[1], key, faiss.METRIC_INNER_PRODUCT)
    inverted = faiss.try_extract_index_ivf(structure)
    sample = min(len(vectors), max(65_536, 256 * inverted.nlist if inverted else 0))
    rows = np.sort(np.random.default_rng(0).choice(len(vectors), sample, replace=False))
    structure.train(vectors[rows].astype(np.float32))
    for start in range(0, len(vectors), _BLOCK):
        structure.add(_widened(vectors[start : start + _BLOCK]))
    return structure


def _tune(structure: Any, vectors: np.ndarray) -> dict[str, Any]:
    """Doubles nprobe or efSearch until recall@10 is reached; says parameters, recall and milliseconds a query."""
    import faiss

    generator = np.random.default_rng(1)
    rows = np.sort(generator.choice(len(vectors), min(len(vectors), 500), replace=False))
    queries = vectors[rows].astype(np.float32)
    # an image lies further from its captions than they from each other, and nprobe has to suffice for that
    queries += generator.standard_normal(queries.shape, np.float32) / vectors.shape[1] ** 0.5
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    blocks = (
        (np.arange(start, min(start + _BLOCK, len(vectors))), vectors[start : start + _BLOCK])
        for start in range(0, len(vectors), _BLOCK)
    )
    count = min(10, len(vectors))
    truth = flat_search(blocks, queries, count)[1]
    inverted = faiss.try_extract_index_ivf(structure)
    if inverted:
        name, values = "nprobe", _doubling(1, inverted.nlist)
    elif isinstance(faiss.downcast_index(structure), faiss.IndexHNSW):
        name, values = "efSearch", _doubling(32, max(32, min(len(vectors), 8192)))
    else:
        name, values = "", [0]
    for value in values:
        if name:
            faiss.ParameterSpace().set_index_parameter(structure, name, value)
        found = structure.search(queries, min(_fetch(count), len(vectors)))[1]
        recall = float(np.mean([len(np.intersect1d(*pair)) / count for pair in zip(truth, found, strict=True)]))
        if recall >= _RECALL:
            break
    start = time.perf_counter()
    for query in queries[:50]:
        structure.search(query[None], _fetch(10))
    latency = (time.perf_counter() - start) / min(50, len(queries)) * 1000
    return {
        "parameters": {name: value} if name else {},
        "recall_at_10": round(recall, 4),
        "latency_ms": round(latency, 3),
    }


def _doubling(first: int, last: int) -> list[int]:
    return [*(value for value in (first << power for power in range(40)) if value < last), last]


def _memory_budget(config: IndexConfig) -> float:
    return config.index_memory * 2**30 or 0.6 * free_memory()


def _bytes_per_row(empty: Any, key: str) -> int:
    links = re.match(r"HNSW(\d+)", key)
    try:
        code = empty.sa_code_size()
    except RuntimeError:
        code = 4 * empty.d
    return code + (8 * int(links[1]) if links else 0)


def _reason(error: RuntimeError) -> str:
    """FAISS's own words without the place in its source."""
    return re.sub(
        r"^Error in .*? at .*?:\d+: (Error: '.*?' failed: ?)?", "", str(error).strip(), flags=re.DOTALL
    ).strip()
