"""FAISS search structures for indexes too large for exact search: which one, its building, its tuning for recall."""

import contextlib
import io
import logging
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from clipcap_rag.config import IndexConfig
from clipcap_rag.errors import InputError
from clipcap_rag.flat_search import BLOCK, faiss_reason, fetch_size, flat_search, widened
from clipcap_rag.hardware import free_memory
from clipcap_rag.index_store import EMBEDDINGS
from clipcap_rag.progress import say
from clipcap_rag.structure_reader import breadth_of

EXACT_LIMIT = 1_000_000  # rows up to which `auto` searches exactly
_TUNED_WITH = 500  # queries
_RECALL = 0.95  # recall@10 that nprobe or efSearch is raised for


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
            f"index_key {key!r} does not suit vectors of width {dim} ({faiss_reason(error)}); "
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


def build_search_structure(
    embeddings: Path, config: IndexConfig, out: Path, queries: np.ndarray | None = None
) -> dict[str, Any] | None:
    """Builds search.faiss over an embeddings.npy [N, D] where the number of rows or `config` asks for one.

    nprobe or efSearch is doubled until recall@10 against exact search reaches 0.95. autofaiss builds the keys it
    knows, `faiss.index_factory` the others.

    Args:
        embeddings: the .npy file.
        config: key, memory and latency.
        out: the file to write.
        queries: [Q, D] image embeddings of unit length to measure recall with; left out, noise is added to captions.

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
        kind, queries = ("text", _noisy(vectors)) if queries is None else ("images", _sample(queries))
        report = {"key": key, "queries": kind, **_tune(structure, vectors, queries)}
    except RuntimeError as error:
        raise InputError(f"FAISS could not build {key} ({faiss_reason(error)}); use another --index-key") from error
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
    for start in range(0, len(vectors), BLOCK):
        structure.add(widened(vectors[start : start + BLOCK]))
    return structure


def _sample(vectors: np.ndarray) -> np.ndarray:
    """At most 500 rows, drawn without replacement, in float32."""
    rows = np.random.default_rng(1).choice(len(vectors), min(len(vectors), _TUNED_WITH), replace=False)
    return vectors[np.sort(rows)].astype(np.float32)


def _noisy(vectors: np.ndarray) -> np.ndarray:
    """Stored captions moved away: an image lies further from its captions than they from each other."""
    queries = _sample(vectors)
    queries += np.random.default_rng(2).standard_normal(queries.shape, np.float32) / vectors.shape[1] ** 0.5
    return queries / np.linalg.norm(queries, axis=1, keepdims=True)


def _tune(structure: Any, vectors: np.ndarray, queries: np.ndarray) -> dict[str, Any]:
    """Doubles nprobe or efSearch until recall@10 is reached; says parameters, recall and milliseconds a query."""
    import faiss

    blocks = (
        (np.arange(start, min(start + BLOCK, len(vectors))), vectors[start : start + BLOCK])
        for start in range(0, len(vectors), BLOCK)
    )
    count = min(10, len(vectors))
    fetched = min(fetch_size(count, breadth_of(structure)), len(vectors))
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
        found = structure.search(queries, fetched)[1]
        recall = float(np.mean([len(np.intersect1d(*pair)) / count for pair in zip(truth, found, strict=True)]))
        if recall >= _RECALL:
            break
    start = time.perf_counter()
    for query in queries[:50]:
        structure.search(query[None], fetched)
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
