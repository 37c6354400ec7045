"""What an index knows of the photos that a captioner is judged on: their ids, their captions, their doubles."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clipcap_rag.caption_index import CaptionIndex
from clipcap_rag.evaluated import Photos
from clipcap_rag.features import FeatureSet
from clipcap_rag.flat_search import BLOCK
from clipcap_rag.sources import normalize_caption

_LISTED = 100  # doubles that are named


@dataclass(frozen=True)
class Leak:
    """One way in which an index knows evaluated photos: these, positions in their feature set, by these of its rows."""

    photos: set[int] = field(default_factory=set)
    rows: set[int] = field(default_factory=set)

    def to_json(self) -> dict[str, int]:
        return {"photos": len(self.photos), "captions": len(self.rows)}


@dataclass(frozen=True)
class Double:
    """An evaluated photo and another one that its embedding nearly equals."""

    photo: int
    other: str
    cosine: float


@dataclass(frozen=True)
class LeakAudit:
    """What was found in one index.

    Attributes:
        ids: captions with the image_id of an evaluated photo.
        strings: captions that equal a reference, once normalised.
        doubles: photos that nearly equal an evaluated one, most similar first; None where there were none to compare.
        copies: the captions of these photos.
        compared: how many photos were compared with the evaluated ones.
    """

    ids: Leak
    strings: Leak
    doubles: list[Double] | None
    copies: Leak
    compared: int

    @property
    def photos(self) -> set[int]:
        """All photos that leak."""
        return self.ids.photos | self.strings.photos | self.copies.photos | {one.photo for one in self.doubles or []}

    def texts(self, index: CaptionIndex) -> frozenset[str]:
        """The leaking captions, normalised."""
        rows = sorted(self.ids.rows | self.strings.rows | self.copies.rows)
        return frozenset(normalize_caption(caption) for caption in index.captions(rows))

    def to_json(self, photos: Photos) -> dict[str, Any]:
        """The counts, and by name the photos that leak and up to a hundred doubles."""
        doubles = None
        if self.doubles is not None:
            pairs = [
                {"image": photos.images[one.photo], "other": one.other, "cosine": one.cosine} for one in self.doubles
            ]
            counts = {"photos": len({one.photo for one in self.doubles}), "captions": len(self.copies.rows)}
            doubles = counts | {"compared": self.compared, "pairs": pairs[:_LISTED]}
        return {
            "ids": self.ids.to_json(),
            "strings": self.strings.to_json(),
            "doubles": doubles,
            "leaking": [photos.images[row] for row in sorted(self.photos)],
        }


def audit(index: CaptionIndex, photos: Photos, others: FeatureSet | None, cosine: float) -> LeakAudit:
    """Compares an index with evaluated photos.

    Args:
        others: photos whose captions the index may hold, found there by their image_id; None takes the photos that
            the index holds itself, if any.
        cosine: image embeddings above this count as the same photo.
    """
    ids = _matches(index, "image_id", {image_id: {row} for row, image_id in enumerate(photos.image_ids)})
    texts: dict[str, set[int]] = {}
    for row, captions in enumerate(photos.references):
        for caption in captions:
            texts.setdefault(normalize_caption(caption), set()).add(row)
    strings = _matches(index, "caption", texts)
    stored = index.files.images
    if others is None and stored is None:
        return LeakAudit(ids, strings, None, Leak(), 0)
    known = (others.image_ids, others.embeddings) if others is not None else (stored.ids.to_pylist(), stored.vectors)
    doubles = near_duplicates(photos, *known, cosine)
    owners: dict[str, set[int]] = {}
    for one in doubles:
        owners.setdefault(one.other, set()).add(one.photo)
    return LeakAudit(ids, strings, doubles, _matches(index, "image_id", owners), len(known[0]))


def near_duplicates(photos: Photos, image_ids: list[str], vectors: np.ndarray, cosine: float) -> list[Double]:
    """The pairs of evaluated photos and others [M, D], of other ids, with a cosine above `cosine`, best first."""
    found = []
    for start in range(0, len(vectors), BLOCK):
        block = np.asarray(vectors[start : start + BLOCK], np.float32)
        block /= np.linalg.norm(block, axis=1, keepdims=True)
        cosines = photos.embeddings.vectors @ block.T
        for row, place in np.argwhere(cosines > cosine).tolist():
            if image_ids[start + place] != photos.image_ids[row]:
                found.append(Double(row, image_ids[start + place], float(cosines[row, place])))
    return sorted(found, key=lambda one: (-one.cosine, one.photo))


def _matches(index: CaptionIndex, column: str, wanted: dict[str, set[int]]) -> Leak:
    """The live rows whose value is wanted, and the photos that want it."""
    leak = Leak()
    for start, values in index.files.column_batches(column):
        for row, value in enumerate(_comparable(column, values), start):
            if value in wanted and index.files.live[row]:
                leak.rows.add(row)
                leak.photos.update(wanted[value])
    return leak


def _comparable(column: str, values: list[Any]) -> Iterable[Any]:
    return map(normalize_caption, values) if column == "caption" else values
