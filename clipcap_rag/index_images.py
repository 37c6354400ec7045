"""Gives an index the embeddings of the photos that its captions describe, so that it can be searched by photo."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipcap_rag.encoder import check_same_encoder
from clipcap_rag.errors import InputError
from clipcap_rag.features import FeatureSet
from clipcap_rag.image_table import IndexPhotos
from clipcap_rag.index_commit import index_change
from clipcap_rag.index_editor import editable_path
from clipcap_rag.index_store import read_index_manifest


@dataclass(frozen=True)
class ImageEdit:
    """A change that is on the disk: the index, its new revision, its photos, and its captions that belong to one."""

    path: Path
    revision: int
    photos: int
    captions: int


def add_images(index: str | Path, features: str | Path, *, wait: float = math.inf) -> ImageEdit:
    """Stores the embeddings of those photos of a feature set that captions of an index belong to by their image_id.

    Features of the trunk, where the feature set has them, are stored as well. Photos that the index has from before
    stay, unless the feature set has them, too.

    Args:
        index: name or path.
        features: a feature set made by the CLIP model of the index.
        wait: seconds to wait for another process that writes the index.

    Raises:
        InputError: no caption belongs to any of the photos, another CLIP model made them, only they or only those that
            stay have features of the trunk, or the index is damaged, came with the package or is held by another
            process. The index is then as it was.
    """
    path, photos = editable_path(index), FeatureSet.open(features)
    record = read_index_manifest(path)["encoder"]
    check_same_encoder(photos.encoder, f"the feature set {photos.path}", record, f"the index {path}")
    ids = pa.array(photos.image_ids, pa.string())
    with index_change(path, wait) as change:
        told, before = change.image_ids(), change.files.images
        named = told.unique()
        new = _among(ids, named)
        if not new.any():
            raise InputError(
                f"no caption of the index {path} has the image_id of a photo of {photos.path} "
                f"(the first is {photos.image_ids[0]!r}); give the features of its own photos"
            )
        rows = np.flatnonzero(new)
        trunk = None if photos.trunk is None else np.asarray(photos.trunk[rows])
        found = IndexPhotos(ids.filter(pa.array(new)), photos.unit_embeddings(rows).astype(np.float16), trunk)
        if before is not None:
            stays = before.kept(_among(before.ids, named) & ~_among(before.ids, found.ids))
            if len(stays):
                _check_alike(path, stays, photos.path, found)
                found = stays.and_more(found)
        change.set_images(found)
        ids = found.ids
        captions = int(_among(told, ids).sum())
        revision = change.commit()
    return ImageEdit(path, revision, len(ids), captions)


def _check_alike(index: Path, stays: IndexPhotos, features: Path, new: IndexPhotos) -> None:
    """Raises InputError where only the photos of one side have features of the trunk of the same width."""
    widths = [None if photos.trunk is None else photos.trunk.shape[1] for photos in (stays, new)]
    if widths[0] != widths[1]:
        having, lacking = (index, features) if widths[0] else (features, index)
        raise InputError(
            f"{having} has features of the trunk for its photos and {lacking} has not, or others; extract the photos "
            "of both with --trunk, or of none"
        )


def _among(ids: pa.Array | pa.ChunkedArray, chosen: pa.Array) -> np.ndarray:
    """Whether each id [n] bool is one of those chosen."""
    return np.asarray(pc.is_in(ids, value_set=chosen))
