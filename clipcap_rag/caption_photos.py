"""Captions of an index in place of photos, so that a captioner learns from text alone."""

import numpy as np

from clipcap_rag.caption_index import CaptionIndex
from clipcap_rag.features import FeatureSet

_BLOCK = 65_536  # rows that are moved at a time


def caption_photos(index: CaptionIndex, photos: FeatureSet) -> FeatureSet:
    """Every caption of `index` as a photo of its own whose only caption it is.

    Its embedding stands for that of a photo once it is moved by the gap between the two means and noise is added in
    training: CapDec (Nukrai et al. 2022, arXiv 2211.00575) and the gap of Liang et al. 2022 (arXiv 2203.02053).

    Args:
        photos: those whose mean embedding the captions' is moved to.
    """
    rows = np.flatnonzero(index.files.live)
    gap = photos.unit_embeddings().mean(axis=0) - _mean(index, rows)
    embeddings = np.empty((len(rows), index.dim), np.float16)
    for start in range(0, len(rows), _BLOCK):
        moved = index.embeddings(rows[start : start + _BLOCK]).astype(np.float32) + gap
        embeddings[start : start + _BLOCK] = moved / np.linalg.norm(moved, axis=1, keepdims=True)
    captions = index.captions(rows)
    return FeatureSet(
        path=index.path,
        encoder=index.encoder,
        image_ids=list(index.image_ids(rows)),
        images=[""] * len(rows),
        digests=[b""] * len(rows),
        captions=[[caption] for caption in captions],
        embeddings=embeddings,
    )


def _mean(index: CaptionIndex, rows: np.ndarray) -> np.ndarray:
    parts = [
        index.embeddings(rows[start : start + _BLOCK]).sum(axis=0, dtype=np.float64)
        for start in range(0, len(rows), _BLOCK)
    ]
    return (np.sum(parts, axis=0) / len(rows)).astype(np.float32)
