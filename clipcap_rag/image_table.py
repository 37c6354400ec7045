"""The photos of an index: one Arrow file of image ids and image embeddings, which captions find by their image_id."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipcap_rag.errors import InputError


class ImageTable:
    """P photos, memory-mapped.

    Attributes:
        ids: their image ids.
        vectors: [P, D] float16 of unit length.
    """

    def __init__(self, file: Path, dim: int):
        """Raises InputError if the file is damaged or holds no embeddings of width `dim`."""
        try:
            batch = pa.ipc.open_file(pa.memory_map(str(file))).read_all().combine_chunks().to_batches()
            table = batch[0] if batch else pa.RecordBatch.from_pylist([], _schema(dim))
            table.validate(full=True)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise InputError(f"{file} is damaged ({str(error)[:120]}); run index add-images again") from error
        if table.schema != _schema(dim) or any(column.null_count for column in table.columns):
            raise InputError(f"{file} does not hold image embeddings of width {dim}; run index add-images again")
        self.ids: pa.StringArray = table.column("image_id")
        numbers = table.column("embedding").flatten()
        if numbers.null_count:
            raise InputError(f"{file} holds embeddings with gaps; run index add-images again")
        self.vectors = numbers.to_numpy().reshape(-1, dim)

    def __len__(self) -> int:
        return len(self.ids)

    def places(self, image_ids: pa.Array) -> np.ndarray:
        """Where the photo of each caption [n] stands, int64; -1 where there is none."""
        return pc.fill_null(pc.index_in(image_ids, self.ids), -1).to_numpy(zero_copy_only=False).astype(np.int64)


def write_images(file: Path, ids: pa.StringArray, vectors: np.ndarray) -> None:
    """Writes image ids [P] and embeddings [P, D] as a file that is on the disk when this returns."""
    dim = vectors.shape[1]
    flat = pa.array(np.ascontiguousarray(vectors, np.float16).ravel(), pa.float16())
    batch = pa.record_batch([ids, pa.FixedSizeListArray.from_arrays(flat, dim)], schema=_schema(dim))
    with open(file, "wb") as stream:
        with pa.ipc.new_file(stream, batch.schema) as writer:
            writer.write_batch(batch)
        stream.flush()
        os.fsync(stream.fileno())


def _schema(dim: int) -> pa.Schema:
    vector = pa.list_(pa.field("item", pa.float16()), dim)
    return pa.schema([pa.field("image_id", pa.string(), nullable=False), pa.field("embedding", vector, nullable=False)])
