"""The comparison of search: float16 rows on disk against FAISS's own flat index over float32 in memory.

The rows are real caption embeddings with a little noise, so that they lie as captions do; isotropic noise
would make every row as far as the next.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from clipcap_rag.bench_protocol import Comparison, Disagreement
from clipcap_rag.bench_subjects import Subjects
from clipcap_rag.caption_index import CaptionIndex
from clipcap_rag.config import IndexConfig
from clipcap_rag.index_store import EMBEDDINGS, SEARCH, SegmentWriter, caption_batch, write_index_manifest
from clipcap_rag.search_structure import build_search_structure

_DIM, _K, _QUERIES, _CHUNK = 512, 8, 64, 50_000
_NOISE = 0.3  # length of the noise that is added to an embedding of length 1


def perturbed(seeds: np.ndarray, count: int, start: int = 0) -> np.ndarray:
    """Unit vectors [count, D] near the rows of `seeds` [n, D], taken in turn from number `start` on."""
    random = np.random.default_rng(start)
    picked = seeds[(start + np.arange(count)) % len(seeds)]
    noise = random.standard_normal(picked.shape, np.float32) * np.float32(_NOISE / np.sqrt(picked.shape[1]))
    moved = picked + noise
    return moved / np.linalg.norm(moved, axis=1, keepdims=True)


def write_index(folder: Path, seeds: np.ndarray, rows: int, encoder: dict[str, Any], key: str = "Flat") -> None:
    """A caption index of perturbed rows that says `encoder` made them; the captions are numbers.

    Args:
        seeds: real embeddings [n, D] of unit length.
        key: how it is searched: Flat or a FAISS factory key.
    """
    segment = folder / "segments" / "000001"
    with SegmentWriter(segment, seeds.shape[1]) as writer:
        for start in range(0, rows, _CHUNK):
            count = min(_CHUNK, rows - start)
            names = [str(number) for number in range(start, start + count)]
            batch = caption_batch(
                {"caption": names, "caption_id": names, "image_id": [None] * count, "source": ["bench"] * count,
                 "meta": [{}] * count}
            )  # fmt: skip
            writer.append(batch, perturbed(seeds, count, start))
    search = build_search_structure(segment / EMBEDDINGS, IndexConfig(index_key=key), segment / SEARCH)
    segments = [{"name": "000001", "rows": rows, "search": search}]
    write_index_manifest(folder, revision=1, encoder=encoder, segments=segments, provenance={}, licence=None)


def comparisons(subjects: Subjects) -> Iterator[Comparison]:
    """One comparison; the index is written first."""
    import faiss

    sizes, folder = subjects.sizes, subjects.folder / "index"
    seeds = widened(subjects.float32.encode_text(subjects.captions(sizes.captions)).vectors, _DIM)
    write_index(folder, seeds, sizes.rows, subjects.float32.record() | {"dim": _DIM})
    began = time.perf_counter()
    index = CaptionIndex.open(folder, "cpu")
    opening = time.perf_counter() - began
    flat = faiss.IndexFlatIP(_DIM)
    for start in range(0, sizes.rows, _CHUNK):
        flat.add(index.embeddings(np.arange(start, min(sizes.rows, start + _CHUNK))))
    queries = perturbed(seeds, _QUERIES, sizes.rows)

    def agree() -> str:
        scores, rows = index.search(queries, _K)
        expected, other = flat.search(queries, _K + 1)
        different = (rows != other[:, :_K]) & (np.abs(scores - expected[:, :_K]) > 1e-5)
        if different.any():
            raise Disagreement(f"{int(different.sum())} of {different.size} rows differ")
        if opening > 1:
            raise Disagreement(f"opening the index took {opening:.1f} s")
        return f"same rows, opened in {1000 * opening:.0f} ms"

    size = f"{sizes.rows:,} x {_DIM}, {_QUERIES} queries, K = {_K}"
    yield Comparison(
        "exact search", size, "float16 on disk, block by block", "faiss IndexFlatIP, float32 in memory", 1 / 1.5,
        lambda: index.search(queries, _K),
        lambda: flat.search(queries, _K),
        agree,
    )  # fmt: skip


def widened(vectors: np.ndarray, dim: int) -> np.ndarray:
    """Vectors of another width turned into `dim` by a random rotation that keeps their angles."""
    if vectors.shape[1] == dim:
        return vectors
    random = np.random.default_rng(0).standard_normal((max(dim, vectors.shape[1]),) * 2)
    rotation = np.linalg.qr(random)[0][: vectors.shape[1], :dim]
    turned = (vectors @ rotation).astype(np.float32)
    return turned / np.linalg.norm(turned, axis=1, keepdims=True)
