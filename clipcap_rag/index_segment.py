"""One segment of a caption index: its captions and embeddings, as they are written and as they are mapped."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa

from clipcap_rag.errors import InputError

CAPTIONS, EMBEDDINGS, SEARCH = "captions.arrow", "embeddings.npy", "search.faiss"
SCHEMA = pa.schema(
    [
        pa.field("caption", pa.string(), nullable=False),
        pa.field("caption_id", pa.string(), nullable=False),
        pa.field("image_id", pa.string()),
        pa.field("source", pa.string()),
        pa.field("meta", pa.map_(pa.string(), pa.string()), nullable=False),
    ]
)


class SegmentWriter:
    """Writes one segment batch by batch: captions.arrow (Arrow IPC file) and embeddings.npy ([rows, D] float16).

    Use it as a context manager; the files are whole when the block has ended without an error. Equal batches give
    equal bytes.
    """

    def __init__(self, folder: Path, dim: int):
        self.folder, self.dim, self.rows = folder, dim, 0

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._arrow_file = open(self.folder / CAPTIONS, "wb")  # noqa: SIM115 (closed in __exit__)
        self._vector_file = open(self.folder / EMBEDDINGS, "wb")  # noqa: SIM115 (closed in __exit__)
        self._arrow = pa.ipc.new_file(self._arrow_file, SCHEMA)
        self._write_header()
        return self

    def append(self, captions: pa.RecordBatch, embeddings: np.ndarray) -> None:
        """Adds a batch of SCHEMA and its embeddings [len(captions), D]."""
        if embeddings.shape != (len(captions), self.dim):
            raise ValueError(f"embeddings have shape {embeddings.shape}, expected {(len(captions), self.dim)}")
        self._arrow.write_batch(captions)
        self._vector_file.write(np.ascontiguousarray(embeddings, np.float16).tobytes())
        self.rows += len(captions)

    def __exit__(self, kind: type | None, *rest: Any) -> None:
        try:
            if kind is None:
                self._arrow.close()
                self._vector_file.seek(0)
                self._write_header()
                for file in (self._arrow_file, self._vector_file):
                    file.flush()
                    os.fsync(file.fileno())
        finally:
            self._arrow_file.close()
            self._vector_file.close()

    def _write_header(self) -> None:
        # numpy pads the header so that it keeps its length while the number of rows grows
        header = {"descr": "<f2", "fortran_order": False, "shape": (self.rows, self.dim)}
        np.lib.format.write_array_header_1_0(self._vector_file, header)


def caption_batch(columns: dict[str, Sequence[Any]]) -> pa.RecordBatch:
    """A record batch of SCHEMA from columns of equal length; `meta` holds dicts of strings."""
    arrays = {**columns, "meta": [list(meta.items()) for meta in columns["meta"]]}
    return pa.record_batch([pa.array(arrays[field.name], field.type) for field in SCHEMA], schema=SCHEMA)


class Segment:
    """One segment, memory-mapped.

    Attributes:
        entry: what index.json says of it: `name`, `rows`, `search`.
        vectors: [rows, D] float16.
    """

    def __init__(self, path: Path, entry: dict[str, Any], dim: int):
        self.entry, self.folder = entry, path / "segments" / entry["name"]
        self.vectors = self._map_vectors(dim)
        self._batches = self._map_captions()
        self.batch_sizes = [len(batch) for batch in self._batches]
        self._sound = [False] * len(self._batches)

    def batch(self, number: int) -> pa.RecordBatch:
        """A batch of captions, looked through when it is first used: broken offsets would crash the process."""
        if not self._sound[number]:
            try:
                self._batches[number].validate(full=True)
            except pa.ArrowException as error:
                raise InputError(f"{self.folder / CAPTIONS} is damaged ({error}); make the index again") from error
            self._sound[number] = True
        return self._batches[number]

    def _map_vectors(self, dim: int) -> np.ndarray:
        file = self.folder / EMBEDDINGS
        vectors = map_array(file)
        if vectors.shape != (self.entry["rows"], dim) or vectors.dtype != np.float16:
            raise InputError(
                f"{file} holds {vectors.dtype} {list(vectors.shape)} where index.json says float16 "
                f"{[self.entry['rows'], dim]}; make the index again"
            )
        return vectors

    def _map_captions(self) -> list[pa.RecordBatch]:
        file = self.folder / CAPTIONS
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(file)))
            batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        except (pa.ArrowException, OSError, ValueError) as error:
            raise InputError(
                f"{file} is not an Arrow file ({_first_line(error)}); copy it again or make the index again"
            ) from error
        if reader.schema != SCHEMA or sum(map(len, batches)) != self.entry["rows"]:
            raise InputError(
                f"{file} does not hold the {self.entry['rows']} captions of index.json; make the index again"
            )
        return batches


def map_array(file: Path) -> np.ndarray:
    """A .npy file, memory-mapped; InputError where there is none or something else is in it."""
    try:
        return np.lib.format.open_memmap(file, mode="r")
    except Exception as error:  # numpy reads the header as Python, and so fails in all the ways that Python may
        raise InputError(
            f"{file} is not an array ({_first_line(error)}); copy it again or make the index again"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]
