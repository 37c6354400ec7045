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

    Photos that the index has from before stay, unless the feature set has them, too.

    Args:
        index: name or path.
        features: a feature set made by the CLIP model of the index.
        wait: seconds to wait for another process that writes the index.

    Raises:
        InputError: no caption belongs to any of the photos, another CLIP model made them, or the index is damaged, came
            with the package or is held by another process. The index is then as it was.
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
        ids, vectors = ids.filter(pa.array(new)), photos.unit_embeddings(np.flatnonzero(new)).astype(np.float16)
        if before is not None:
            stays = _among(before.ids, named) & ~_among(before.ids, ids)
            ids = pa.concat_arrays([before.ids.filter(pa.array(stays)), ids])
            vectors = np.concatenate([before.vectors[stays], vectors])
        change.set_images(ids, vectors)
        captions = int(_among(told, ids).sum())
        revision = change.commit()
    return ImageEdit(path, revision, len(ids), captions)


def _among(ids: pa.Array | pa.ChunkedArray, chosen: pa.Array) -> np.ndarray:
    """Whether each id [n] bool is one of those chosen."""
    return np.asarray(pc.is_in(ids, value_set=chosen))
