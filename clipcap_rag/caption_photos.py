"""Captions of an index in place of photos, so that a captioner learns from text alone."""

import numpy as np

from clipcap_rag.caption_index import CaptionIndex
from clipcap_rag.features import FeatureSet

_BLOCK = 65_536  # rows that are moved at a time


def caption_photos(index: CaptionIndex, photos: FeatureSet) -> FeatureSet:
    """The captions of each photo of `index` as a photo, and every caption of no photo as one of its own.

    Its embedding is the mean of its captions', moved by the gap between captions and photos; with the noise that
    training adds it stands for a photo's: CapDec (Nukrai et al. 2022, arXiv 2211.00575) and the gap of Liang et al.
    2022 (arXiv 2203.02053).

    Args:
        photos: those whose mean embedding the captions' is moved to.
    """
    rows = np.flatnonzero(index.files.live)
    image_ids = index.image_ids(rows)
    places: dict[str, int] = {}
    owners = np.array(
        [
            places.setdefault(f"row {row}" if image_id is None else f"id {image_id}", len(places))
            for row, image_id in zip(rows.tolist(), image_ids, strict=True)
        ]
    )
    captions: list[list[str]] = [[] for _ in places]
    names: list[str | None] = [None] * len(places)
    for owner, image_id, caption in zip(owners.tolist(), image_ids, index.captions(rows), strict=True):
        captions[owner].append(caption)
        names[owner] = image_id
    embeddings = np.zeros((len(places), index.dim), np.float32)
    for start in range(0, len(rows), _BLOCK):
        part = slice(start, start + _BLOCK)
        np.add.at(embeddings, owners[part], index.embeddings(rows[part]))
    embeddings = _unit(embeddings)
    return FeatureSet(
        path=index.path,
        encoder=index.encoder,
        image_ids=names,
        images=[""] * len(places),
        digests=[b""] * len(places),
        captions=captions,
        embeddings=_unit(embeddings + photos.unit_embeddings().mean(axis=0) - embeddings.mean(axis=0)),
    )


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
