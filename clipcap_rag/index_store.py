"""The files of a caption index: segments of captions and embeddings, tombstones, photos, the manifest, the lock."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from clipcap_rag.artifact import check_files
from clipcap_rag.errors import InputError
from clipcap_rag.image_table import read_images
from clipcap_rag.index_lock import index_lock
from clipcap_rag.index_manifest import (
    KIND,
    MANIFEST,
    VERSION,
    index_files,
    read_index_manifest,
    segment_files,
    write_index_manifest,
)
from clipcap_rag.index_segment import (
    CAPTIONS,
    EMBEDDINGS,
    SCHEMA,
    SEARCH,
    Segment,
    SegmentWriter,
    caption_batch,
    map_array,
)

__all__ = [
    "CAPTIONS",
    "EMBEDDINGS",
    "KIND",
    "MANIFEST",
    "SCHEMA",
    "SEARCH",
    "VERSION",
    "IndexFiles",
    "Segment",
    "SegmentWriter",
    "caption_batch",
    "index_files",
    "index_lock",
    "open_files",
    "read_index_manifest",
    "segment_files",
    "write_index_manifest",
]


class IndexFiles:
    """The memory-mapped files of an index as they were when it was opened; a row counts through all segments.

    Attributes:
        path: the index directory.
        manifest: what index.json says.
        rows: number of rows N, removed ones included.
        dim: width D of the embeddings.
        live: [N] bool, False for rows that were removed.
        segments: their mapped files.
        starts: [segments + 1] int64, first row of each segment and N.
        images: the photos that captions belong to, where the index holds their embeddings, else None.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], known: Sequence[Segment] = ()):
        self.path, self.manifest = path, manifest
        self.dim: int = manifest["encoder"]["dim"]
        mapped = {segment.entry["name"]: segment for segment in known}
        self.segments = [mapped.get(entry["name"]) or Segment(path, entry, self.dim) for entry in manifest["segments"]]
        self.starts = np.cumsum([0, *(segment.entry["rows"] for segment in self.segments)], dtype=np.int64)
        self.rows = int(self.starts[-1])
        sizes = [size for segment in self.segments for size in segment.batch_sizes]
        self._batch_starts = np.cumsum([0, *sizes], dtype=np.int64)
        self._batches = [(segment, number) for segment in self.segments for number in range(len(segment.batch_sizes))]
        photos = manifest.get("images")
        self.images = read_images(path / photos, self.dim) if photos else None
        self.live = np.ones(self.rows, bool)
        self.live[self._removed()] = False

    def _removed(self) -> np.ndarray:
        """Rows [n] int64 that were removed."""
        if not self.manifest["tombstones"]:
            return np.zeros(0, np.int64)
        file = self.path / self.manifest["tombstones"]
        rows = map_array(file)
        if rows.ndim != 1 or rows.dtype != np.int64 or (len(rows) and not 0 <= rows.min() <= rows.max() < self.rows):
            raise InputError(f"{file} does not hold rows of the index; copy it again or make the index again")
        return np.array(rows)

    def _column(self, name: str, rows: Sequence[int] | np.ndarray) -> list[Any]:
        rows = np.asarray(rows, np.int64).ravel()
        if len(rows) and (rows.min() < 0 or rows.max() >= self.rows):
            raise IndexError(
                f"rows {rows.min()} to {rows.max()} asked of {self.path}, which has rows 0 to {self.rows - 1}"
            )
        batches = np.searchsorted(self._batch_starts, rows, side="right") - 1
        places = rows - self._batch_starts[batches]
        columns = {batch: self._column_of(batch, name) for batch in np.unique(batches).tolist()}
        return [columns[batch][place].as_py() for batch, place in zip(batches.tolist(), places.tolist(), strict=True)]

    def _column_of(self, batch: int, name: str) -> pa.Array:
        segment, number = self._batches[batch]
        return segment.batch(number).column(name)

    def captions(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """The captions of `rows`, flattened, in the order given. Raises IndexError for a row out of range."""
        return self._column("caption", rows)

    def image_ids(self, rows: Sequence[int] | np.ndarray) -> list[str | None]:
        """The image ids of `rows`, None where a caption belongs to no image."""
        return self._column("image_id", rows)

    def caption_ids(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """The ids of the captions of `rows`, which they keep for life."""
        return self._column("caption_id", rows)

    def records(self, rows: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        """All columns of `rows`: caption, caption_id, image_id, source, meta (dict)."""
        columns = {name: self._column(name, rows) for name in SCHEMA.names}
        columns["meta"] = [dict(meta) for meta in columns["meta"]]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def columns(self, name: str) -> Iterator[tuple[int, pa.Array]]:
        """Yields (first row, values) of one column, batch by batch."""
        for batch, start in enumerate(self._batch_starts[:-1].tolist()):
            yield start, self._column_of(batch, name)

    def column_batches(self, name: str) -> Iterator[tuple[int, list[Any]]]:
        """Yields (first row, values as Python objects) of one column, batch by batch."""
        for start, column in self.columns(name):
            yield start, column.to_pylist()

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
        for number, segment in enumerate(self.segments):
            here = segments == number
            if here.any():
                gathered[here] = segment.vectors[rows[here] - self.starts[number]]
        return gathered

    def blocks(self, size: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (first row, float16 view [<= size, D]) over all rows in order; a block stays within a segment."""
        for number in range(len(self.segments)):
            yield from self.segment_blocks(number, size)

    def segment_blocks(self, number: int, size: int) -> Iterator[tuple[int, np.ndarray]]:
        """`blocks` of one segment."""
        vectors = self.segments[number].vectors
        for offset in range(0, len(vectors), size):
            yield int(self.starts[number]) + offset, vectors[offset : offset + size]


def open_files(path: Path, known: IndexFiles | None = None) -> IndexFiles:
    """Checks an index directory against its manifest and maps its files.

    Args:
        known: the files as they were opened before; those that have not changed are taken over unread.

    Raises:
        InputError: the index is missing, unfinished, of another format version, or a file is missing or altered.
    """
    path = Path(path)
    while True:
        manifest = read_index_manifest(path)
        try:
            return _open(path, manifest, known)
        except InputError:
            if read_index_manifest(path) == manifest:  # else a writer was faster, and removed what it replaced
                raise


def _open(path: Path, manifest: dict[str, Any], known: IndexFiles | None) -> IndexFiles:
    old, files = known.manifest["files"] if known else {}, manifest["files"]
    kept = [
        segment
        for segment in (known.segments if known else ())
        if segment.entry in manifest["segments"]
        and all(old[name] == files[name] for name in segment_files(segment.entry))
    ]
    unread = {name for segment in kept for name in segment_files(segment.entry)}
    unread |= {name for name in (manifest.get("images"),) if name in old and old[name] == files[name]}
    check_files(path, {name: record for name, record in files.items() if name not in unread}, KIND)
    return IndexFiles(path, manifest, kept)
