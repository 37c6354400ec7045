"""Exact search block by block over float16 rows, so that neither memory nor disk holds a second copy of them."""

import re
import warnings
from collections.abc import Iterator

import numpy as np
import torch

BLOCK = 16_384  # rows that are widened to float32 at a time
_SLACK = 16  # candidates beyond k, so that rounding and equal scores rarely need a second look


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
        scores, places = faiss.knn(queries, widened(block), min(k, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
        scores = np.concatenate([best_scores, scores], axis=1)
        candidates = np.concatenate([best_rows, np.where(places >= 0, rows[places], -1)], axis=1)  # NaN is not found
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        best_scores, best_rows = np.take_along_axis(scores, order, 1), np.take_along_axis(candidates, order, 1)
    return best_scores, best_rows


def widened(block: np.ndarray) -> np.ndarray:
    """A float16 block as float32; torch does this much faster than numpy."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # it is only read
        return torch.from_numpy(np.asarray(block)).float().numpy()


def fetch_size(k: int, breadth: int = 1) -> int:
    """How many candidates to take for the best k.

    Args:
        breadth: candidates per result that is wanted; more than 1 where their order is only roughly known.
    """
    return breadth * k + k // 8 + _SLACK


def faiss_reason(error: Exception) -> str:
    """FAISS's own words on one line, without the place in its source."""
    words = re.sub(r"^Error in .*? at .*?:\d+: (Error: '.*?' failed: ?)?", "", str(error).strip(), flags=re.DOTALL)
    return " ".join(words.split()) or type(error).__name__
