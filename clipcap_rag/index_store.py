"""The files of a caption index: segments of captions and embeddings, tombstones, the manifest, the lock."""

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa

from clipcap_rag.artifact import read_manifest, write_manifest
from clipcap_rag.errors import InputError

KIND, VERSION, MANIFEST = "caption index", 1, "index.json"
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


def write_index_manifest(
    folder: Path,
    *,
    revision: int,
    encoder: dict[str, Any],
    segments: Sequence[dict[str, Any]],
    tombstones: str | None = None,
    provenance: dict[str, Any],
    licence: str | None,
) -> None:
    """Writes index.json, which makes the files of `folder` an index.

    Args:
        segments: per segment `name`, `rows` and `search` (what built search.faiss, or None for exact search).
        tombstones: name of a .npy file in `folder` with the rows that were removed, int64 ascending.
        encoder: the record of the encoder with `clip`, `dim` and `probes`.
        provenance: what the index was made from.
        licence: the terms of the captions, where they are known.
    """
    fields = {
        "revision": revision,
        "metric": "inner product of unit vectors (cosine)",
        "rows": sum(segment["rows"] for segment in segments),
        "segments": list(segments),
        "tombstones": tombstones,
        "licence": licence,
        "provenance": provenance,
        "encoder": encoder,
    }
    write_manifest(folder, MANIFEST, KIND, VERSION, fields)


class IndexFiles:
    """The memory-mapped files of an index as they were when it was opened; a row counts through all segments.

    Attributes:
        path: the index directory.
        manifest: what index.json says.
        rows: number of rows N, removed ones included.
        dim: width D of the embeddings.
        live: [N] bool, False for rows that were removed.
        starts: [segments + 1] int64, first row of each segment and N.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self.path, self.manifest = path, manifest
        self.dim: int = manifest["encoder"]["dim"]
        segments = manifest["segments"]
        self.starts = np.cumsum([0, *(segment["rows"] for segment in segments)], dtype=np.int64)
        self.rows = int(self.starts[-1])
        self._vectors = [self._map_vectors(segment) for segment in segments]
        batches = [batch for segment in segments for batch in self._map_captions(segment)]
        self._batch_starts = np.cumsum([0, *(len(batch) for batch in batches)], dtype=np.int64)
        self._columns = {name: [batch.column(name) for batch in batches] for name in SCHEMA.names}
        self.live = np.ones(self.rows, bool)
        if manifest["tombstones"]:
            self.live[np.load(path / manifest["tombstones"], allow_pickle=False)] = False

    def segment_folder(self, number: int) -> Path:
        return self.path / "segments" / self.manifest["segments"][number]["name"]

    def _map_vectors(self, segment: dict[str, Any]) -> np.ndarray:
        file = self.path / "segments" / segment["name"] / EMBEDDINGS
        vectors = np.load(file, mmap_mode="r", allow_pickle=False)
        if vectors.shape != (segment["rows"], self.dim) or vectors.dtype != np.float16:
            raise InputError(
                f"{file} holds {vectors.dtype} {list(vectors.shape)} where index.json says float16 "
                f"{[segment['rows'], self.dim]}; make the index again"
            )
        return vectors

    def _map_captions(self, segment: dict[str, Any]) -> list[pa.RecordBatch]:
        file = self.path / "segments" / segment["name"] / CAPTIONS
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(file)))
            batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        except pa.ArrowInvalid as error:
            raise InputError(f"{file} is not an Arrow file ({error}); make the index again") from error
        if reader.schema != SCHEMA or sum(map(len, batches)) != segment["rows"]:
            raise InputError(f"{file} does not hold the {segment['rows']} captions of index.json; make the index again")
        return batches

    def _column(self, name: str, rows: Sequence[int] | np.ndarray) -> list[Any]:
        rows = np.asarray(rows, np.int64).ravel()
        if len(rows) and (rows.min() < 0 or rows.max() >= self.rows):
            raise IndexError(
                f"rows {rows.min()} to {rows.max()} asked of {self.path}, which has rows 0 to {self.rows - 1}"
            )
        batches = np.searchsorted(self._batch_starts, rows, side="right") - 1
        places = rows - self._batch_starts[batches]
        columns = self._columns[name]
        return [columns[batch][place].as_py() for batch, place in zip(batches.tolist(), places.tolist(), strict=True)]

    def captions(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """The captions of `rows`, flattened, in the order given. Raises IndexError for a row out of range."""
        return self._column("caption", rows)

    def image_ids(self, rows: Sequence[int] | np.ndarray) -> list[str | None]:
        """The image ids of `rows`, None where a caption belongs to no image."""
        return self._column("image_id", rows)

    def records(self, rows: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        """All columns of `rows`: caption, caption_id, image_id, source, meta (dict)."""
        columns = {name: self._column(name, rows) for name in SCHEMA.names}
        columns["meta"] = [dict(meta) for meta in columns["meta"]]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def column_batches(self, name: str) -> Iterator[tuple[int, list[Any]]]:
        """Yields (first row, values) of one column, batch by batch."""
        for start, column in zip(self._batch_starts, self._columns[name], strict=False):
            yield int(start), column.to_pylist()

    def embeddings(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Embeddings [*rows.shape, D] float32; zeros for the padding row -1.

        Raises:
            IndexError: a row is below -1 or beyond the index.
        """
        rows = np.asarray(rows, np.int64)
        if rows.size and (rows.min() < -1 or rows.max() >= self.rows):
            raise IndexError(
                f"rows {rows.min()} to {rows.max()} asked of {self.path}, which has rows 0 to {self.rows - 1}"
            )
        gathered = np.zeros((*rows.shape, self.dim), np.float32)
        segments = np.searchsorted(self.starts, rows, side="right") - 1  # -1 for padding
        for number, vectors in enumerate(self._vectors):
            here = segments == number
            if here.any():
                gathered[here] = vectors[rows[here] - self.starts[number]]
        return gathered

    def blocks(self, size: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (first row, float16 view [<= size, D]) over all rows in order; a block stays within a segment."""
        for start, vectors in zip(self.starts, self._vectors, strict=False):
            for offset in range(0, len(vectors), size):
                yield int(start) + offset, vectors[offset : offset + size]


def open_files(path: Path) -> IndexFiles:
    """Checks an index directory against its manifest and maps its files.

    Raises:
        InputError: the index is missing, unfinished, of another format version, or a file is missing or altered.
    """
    path = Path(path)
    manifest = read_manifest(path, MANIFEST, KIND, VERSION)
    fields = ("revision", "rows", "segments", "tombstones", "provenance", "encoder", "licence", "files")
    missing = [field for field in fields if field not in manifest]
    if missing:
        raise InputError(f"{path / MANIFEST} lacks {', '.join(missing)}; copy the index again or make it again")
    needed = [
        f"segments/{segment['name']}/{file}" for segment in manifest["segments"] for file in (CAPTIONS, EMBEDDINGS)
    ]
    needed += [f"segments/{segment['name']}/{SEARCH}" for segment in manifest["segments"] if segment["search"]]
    needed += [manifest["tombstones"]] if manifest["tombstones"] else []
    unrecorded = [file for file in needed if file not in manifest["files"]]
    if unrecorded:
        raise InputError(
            f"{path / MANIFEST} has no record of {', '.join(unrecorded)}; copy the index again or make it again"
        )
    return IndexFiles(path, manifest)


@contextmanager
def index_lock(out: Path) -> Iterator[None]:
    """Keeps two commands from writing the index `out` at the same time; the system frees it when a process dies.

    Raises:
        InputError: another process holds it.
    """
    file = out.with_name(f".{out.name}.lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_nlink == 0:  # its holder removed it between our open and our lock
                raise BlockingIOError
        except OSError as error:
            raise InputError(f"another command is writing {out}; wait until it ends or choose another --out") from error
        try:
            yield
        finally:
            file.unlink(missing_ok=True)
    finally:
        os.close(descriptor)
