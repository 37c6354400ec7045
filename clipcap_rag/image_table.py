"""The photos of an index: one Arrow file of image ids and image embeddings, which captions find by their image_id."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipcap_rag.errors import InputError

_VECTORS, _TRUNK = "embedding", "trunk"


@dataclass(frozen=True)
class IndexPhotos:
    """P photos.

    Attributes:
        ids: their image ids.
        vectors: [P, D] float16 image embeddings of unit length.
        trunk: [P, T] float16 features of the image tower (`image_tower`), None where the index has none.
    """

    ids: pa.StringArray
    vectors: np.ndarray
    trunk: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def places(self, image_ids: pa.Array) -> np.ndarray:
        """Where the photo of each caption [n] stands, int64; -1 where there is none."""
        return pc.fill_null(pc.index_in(image_ids, self.ids), -1).to_numpy(zero_copy_only=False).astype(np.int64)

    def kept(self, mask: np.ndarray) -> "IndexPhotos":
        """Those of a mask [P] bool."""
        trunk = None if self.trunk is None else self.trunk[mask]
        return IndexPhotos(self.ids.filter(pa.array(mask)), self.vectors[mask], trunk)

    def and_more(self, more: "IndexPhotos") -> "IndexPhotos":
        """These and others, of which all or none have features of the trunk."""
        trunk = None if self.trunk is None else np.concatenate([self.trunk, more.trunk])
        return IndexPhotos(pa.concat_arrays([self.ids, more.ids]), np.concatenate([self.vectors, more.vectors]), trunk)


def read_images(file: Path, dim: int) -> IndexPhotos:
    """The photos in a file, memory-mapped.

    Raises:
        InputError: the file is damaged or holds no embeddings of width `dim`.
    """
    try:
        batch = pa.ipc.open_file(pa.memory_map(str(file))).read_all().combine_chunks().to_batches()
        table = batch[0] if batch else pa.RecordBatch.from_pylist([], _schema(dim, None))
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{file} is damaged ({str(error)[:120]}); run index add-images again") from error
    features = _TRUNK in table.schema.names
    width = getattr(table.schema.field(_TRUNK).type, "list_size", None) if features else None
    if table.schema != _schema(dim, width) or any(column.null_count for column in table.columns):
        raise InputError(f"{file} does not hold image embeddings of width {dim}; run index add-images again")
    trunk = _numbers(table, _TRUNK, file) if features else None
    return IndexPhotos(table.column("image_id"), _numbers(table, _VECTORS, file), trunk)


def _numbers(table: pa.RecordBatch, name: str, file: Path) -> np.ndarray:
    numbers = table.column(name).flatten()
    if numbers.null_count:
        raise InputError(f"{file} holds embeddings with gaps; run index add-images again")
    return numbers.to_numpy().reshape(-1, table.schema.field(name).type.list_size)


def write_images(file: Path, photos: IndexPhotos) -> None:
    """Writes photos as a file that is on the disk when this returns."""
    columns = [_lists(part) for part in (photos.vectors, photos.trunk) if part is not None]
    width = None if photos.trunk is None else photos.trunk.shape[1]
    batch = pa.record_batch([photos.ids, *columns], schema=_schema(photos.vectors.shape[1], width))
    with open(file, "wb") as stream:
        with pa.ipc.new_file(stream, batch.schema) as writer:
            writer.write_batch(batch)
        stream.flush()
        os.fsync(stream.fileno())


def _lists(vectors: np.ndarray) -> pa.FixedSizeListArray:
    flat = pa.array(np.ascontiguousarray(vectors, np.float16).ravel(), pa.float16())
    return pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])


def _schema(dim: int, trunk: int | None) -> pa.Schema:
    fields = [pa.field("image_id", pa.string(), nullable=False)]
    for name, width in ((_VECTORS, dim), (_TRUNK, trunk)):
        if width is not None:
            fields.append(pa.field(name, pa.list_(pa.field("item", pa.float16()), width), nullable=False))
    return pa.schema(fields)
